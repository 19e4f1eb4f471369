"""Where the served checkpoint is: in a folder, on the Hugging Face hub, or inside the package."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.models import CheckpointError

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_AUXILIARY = "apd"
"""Folder of the auxiliary model inside the embedded one; they share a tokenizer."""
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def find_checkpoint(config: ServerConfig) -> Path:
    """The folder of the checkpoint; one on the hub is downloaded, with progress bars.

    Raises:
        CheckpointError: it cannot be had.
    """
    if config.checkpoint_dir is not None:
        return config.checkpoint_dir
    if config.hub_id is None:
        return EMBEDDED
    try:
        return Path(snapshot_download(config.hub_id, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{config.hub_id} cannot be downloaded: {error}") from error


def auxiliary_checkpoint(config: ServerConfig, folder: Path) -> Path | None:
    """The folder of APD's auxiliary model: the one that is named, or the embedded model's own."""
    if not config.enable_apd:
        return None
    if config.apd_model is not None:
        return Path(config.apd_model)
    own = EMBEDDED / EMBEDDED_AUXILIARY
    return own if folder == EMBEDDED and own.is_dir() else None
