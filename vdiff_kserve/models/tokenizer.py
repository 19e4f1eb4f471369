"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from vdiff_kserve.models.checkpoint_config import CheckpointError, is_lfs_pointer, no_config
from vdiff_kserve.models.spec import ModelSpec

logger = logging.getLogger("kserve.vdiff.model")

VOCABULARY_FILES = ("vocab.json", "merges.txt")


def load_tokenizer(
    folder: Path | str, chat_template: Path | str | None = None, *, trust_code: bool = False
) -> PreTrainedTokenizerFast:
    """Read `tokenizer.json`, or build the tokenizer from `vocab.json` and `merges.txt`.

    Args:
        chat_template: file of the chat template; None takes the checkpoint's own, of
            `chat_template.jinja` or `tokenizer_config.json`.
        trust_code: whether a tokenizer that has neither may be made by the checkpoint's own code.
            Otherwise, and for everything else, no code of the checkpoint is run.

    Raises:
        CheckpointError: the folder has no tokenizer, or it or the template cannot be read.
    """
    folder = Path(folder)
    try:
        tokenizer = _read(folder, trust_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        file = folder / "tokenizer.json"
        if file.is_file() and is_lfs_pointer(file):
            raise CheckpointError(f"{file} is a pointer: run `git lfs pull` there") from error
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(Path(chat_template))
    tokenizer.model_max_length = sys.maxsize  # else the library warns of prompts we refuse anyway
    return tokenizer


def _read(folder: Path, trust_code: bool) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if all((folder / name).is_file() for name in VOCABULARY_FILES):
        return _from_vocabulary(folder)
    if trust_code and _has_code(folder):
        logger.warning("Running the tokenizer's code in %s, as --trust_remote_code allows.", folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            return tokenizer
        raise CheckpointError(
            f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; make it a tokenizer.json"
        )
    if not any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        raise no_config(folder)
    raise CheckpointError(missing_tokenizer(folder, trust_code))


def missing_tokenizer(folder: Path, trust_code: bool) -> str:
    """What to say about a folder that has no tokenizer's files; empty when it has."""
    has_code = _has_code(folder)
    if (
        (folder / "tokenizer.json").is_file()
        or all((folder / name).is_file() for name in VOCABULARY_FILES)
        or (trust_code and has_code)
    ):
        return ""
    return (
        f"{folder} has no tokenizer.json, nor {' and '.join(VOCABULARY_FILES)}. Copy it from the "
        "model that this one was made from"
        + (", or let the checkpoint's code run by --trust_remote_code" if has_code else "")
    )


def _has_code(folder: Path) -> bool:
    return "AutoTokenizer" in _json(folder / "tokenizer_config.json").get("auto_map", {})


def _from_vocabulary(folder: Path) -> PreTrainedTokenizerFast:
    """Qwen2's byte-level BPE, of which Dream has the files; LLaDA2's splits words alike."""
    for name in ("vocab.json", "tokenizer_config.json"):
        _json(folder / name)  # the library tells damaged ones by an exception without a type
    return Qwen2Tokenizer.from_pretrained(folder)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_chat_template(file: Path) -> str:
    """The chat template in a file.

    Raises:
        CheckpointError: it cannot be read, or has an error.
    """
    try:
        text = file.read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        if "{" in str(file):
            raise CheckpointError("the chat template must be given as a file") from error
        raise CheckpointError(f"the chat template {file} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template {file} has an error in line {error.lineno}: {error.message}"
        ) from error
    return text


def with_end_of_turn(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    """The spec with the ids that the tokenizer gives the end-of-turn token and those that fill the
    canvas behind an answer, of which the model has them."""
    vocabulary = tokenizer.get_vocab()

    def ids_of(*tokens: str) -> tuple[int, ...]:
        found = (vocabulary.get(token) for token in tokens)
        return tuple(i for i in found if i is not None and i < spec.decoder.vocab_size)

    (end_of_turn,) = ids_of(spec.eot_token) or (spec.eot_token_id,)
    ends = (*spec.more_end_token_ids, *ids_of(*spec.filler_tokens))
    return replace(spec, eot_token_id=end_of_turn, more_end_token_ids=ends)


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
