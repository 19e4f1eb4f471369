"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.spec import ModelSpec


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


def with_end_of_turn(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    """The spec with the id that the tokenizer gives the end-of-turn token, if it has one."""
    token_id = tokenizer.get_vocab().get(spec.eot_token)
    return spec if token_id is None else replace(spec, eot_token_id=token_id)


def check_same_vocabulary(
    auxiliary: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Refuse an auxiliary model whose token ids mean other tokens.

    The models may have ids that the other one lacks: Dream adds its mask to Qwen2.5's vocabulary.

    Raises:
        CheckpointError: an id that both have is not the same token; the message names some.
    """
    ours, theirs = (
        {i: token for token, i in t.get_vocab().items()} for t in (tokenizer, auxiliary)
    )
    shared = ours.keys() & theirs.keys()
    different = sorted(i for i in shared if ours[i] != theirs[i])
    if different or not shared:
        some = ", ".join(f"{i} is {ours[i]!r} and {theirs[i]!r}" for i in different[:3])
        raise CheckpointError(
            f"the auxiliary model of APD has another vocabulary than the served one: of "
            f"{len(shared)} shared token ids {len(different)} differ ({some})"
        )
