"""Checkpoints on the Hugging Face hub.

huggingface_hub's own rules hold: an account's token comes from HF_TOKEN, files are kept below
HF_HOME and downloaded once, and HF_HUB_OFFLINE=1 uses what is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]

from vdiff_kserve.models import CheckpointError

WEIGHTS = ("*.safetensors",)
DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration, tokenizer and index: all that a checkpoint needs beside its weights."""
TOKENIZER_CODE = ("tokenization_*.py",)


def download(
    hub_id: str, revision: str | None, *, weights: bool = True, tokenizer_code: bool = False
) -> Path:
    """The folder of a repository's checkpoint, downloaded where it is not there yet.

    Progress is shown on stderr.

    Args:
        revision: branch, tag or commit; None is the main branch.
        weights: whether they are wanted, too.
        tokenizer_code: whether Python files of tokenizers are; no others ever.

    Raises:
        CheckpointError: it cannot be had; the message says why and what would help.
    """
    patterns = [*DESCRIPTION, *(WEIGHTS if weights else ())]
    patterns += TOKENIZER_CODE if tokenizer_code else ()
    with _told_as_checkpoint_error(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


def stored_shapes(hub_id: str, revision: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type, as safetensors names it, and shape of a repository's tensors, from the files' headers.

    Raises:
        CheckpointError: as `download`.
    """
    with _told_as_checkpoint_error(hub_id, revision):
        metadata = HfApi().get_safetensors_metadata(hub_id, revision=revision)
    return {
        name: (str(tensor.dtype), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


@contextmanager
def _told_as_checkpoint_error(hub_id: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (
        ClientError,  # httpx's, or httpx2's where huggingface_hub is 2.0 or later
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
        OSError,
    ) as error:
        where = hub_id if revision is None else f"{hub_id} at {revision}"
        raise CheckpointError(f"{where} cannot be downloaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    endpoint = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return (
            f"its authors ask for consent. Give it at {endpoint} with your account, and set "
            "HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        token = "HF_TOKEN's account may not read it"
        if not os.environ.get("HF_TOKEN"):
            token = "it is private and HF_TOKEN is not set"
        return f"{endpoint} has no such repository, or {token}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if is_offline_mode():
            return f"HF_HUB_OFFLINE is set and {constants.HF_HUB_CACHE} does not hold it"
        cause = error.__cause__ or error
        return (
            f"{endpoint} cannot be reached ({cause}) and {constants.HF_HUB_CACHE} does not hold "
            "it. Without network, copy the checkpoint to a folder and name that by --model_dir"
        )
    if isinstance(error, ClientError) and not isinstance(error, HfHubHTTPError):
        return f"{endpoint} cannot be reached ({error})"
    return str(error)
