"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.models.checkpoint_config import CheckpointError


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """Read `tokenizer.json` and the chat template; no code of the checkpoint is run.

    Raises:
        CheckpointError: the folder has no `tokenizer.json` or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
