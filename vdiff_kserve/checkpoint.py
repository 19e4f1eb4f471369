"""Where the served checkpoint is: a folder, the hub, a training run's, or inside the package."""

from __future__ import annotations

import os
from pathlib import Path

from vdiff_kserve import hub
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.models import CheckpointError

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_AUXILIARY = "apd"
"""Folder of the auxiliary model inside the embedded one; they share a tokenizer."""
READ_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".jinja", ".model"})
CONVERTED = "converted"
"""Folder inside the cache folder."""


def find_checkpoint(config: ServerConfig) -> Path:
    """The folder of the checkpoint; one on the hub is downloaded, a training run's is converted.

    Raises:
        CheckpointError: it cannot be had.
    """
    if config.checkpoint_dir is not None:
        check_readable(config.checkpoint_dir)
        return config.checkpoint_dir
    if config.hub_id is not None:
        return hub.download(config.hub_id, config.revision, tokenizer_code=config.trust_remote_code)
    return EMBEDDED if config.dcp_path is None else _converted(config)


def check_readable(folder: Path) -> None:
    """Refuse a folder of which this user may not read every file that a server reads: volumes that
    another user filled are often so.

    Raises:
        CheckpointError: naming the file and the user.
    """
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in READ_SUFFIXES and path.is_file():
                path.open("rb").close()
    except OSError as error:
        groups = ", ".join(map(str, sorted({os.getegid(), *os.getgroups()})))
        raise CheckpointError(
            f"{error.filename or folder} cannot be read by user {os.geteuid()} of group {groups}: "
            f"{error.strerror}"
        ) from error


def _converted(config: ServerConfig) -> Path:
    """The converted DCP directory, from the cache folder when an earlier start left it there."""
    from vdiff_kserve.convert import Conversion, convert  # seconds, for torch's part of it

    assert config.dcp_path is not None
    assert config.base_model is not None
    source = Path(config.dcp_path)
    conversion = Conversion(source, config.base_model, config.revision)
    name = f"{source.resolve().name}-{conversion.fingerprint[:16]}"
    output = Path(config.cache_dir).expanduser() / CONVERTED / name
    try:
        convert(conversion, output)
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be converted into --cache_dir {config.cache_dir}: {error}"
        ) from error
    return output


def auxiliary_checkpoint(config: ServerConfig, folder: Path) -> Path | None:
    """The folder of APD's auxiliary model: the one that is named, or the embedded model's own.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not config.enable_apd:
        return None
    if config.apd_model is not None:
        check_readable(Path(config.apd_model))
        return Path(config.apd_model)
    own = EMBEDDED / EMBEDDED_AUXILIARY
    return own if folder == EMBEDDED and own.is_dir() else None
