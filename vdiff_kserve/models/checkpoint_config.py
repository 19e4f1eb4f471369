"""Reading a checkpoint's `config.json` with errors that name the field."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SIZE = 1 << 20
"""Beyond every size of a model (widths, vocabulary, layers, heads): a larger one is a mistake."""
MAX_EXPERTS = 1 << 16
MAX_CONTEXT = 1 << 30
MAX_ROTARY_BASE = 1e15
MAX_TOLD = 60


class CheckpointError(Exception):
    """A checkpoint folder that cannot be served; the message says what is wrong and where."""


@dataclass(frozen=True)
class Hints:
    """What is known of a checkpoint beside its `config.json`; None is nothing.

    Attributes:
        family: the diffusion family that it is of, whatever class its `architectures` names.
        mask_token_id: the mask, which then need not be looked for.
        tokenizer_mask_token_id: what the tokenizer calls its mask.
        block_length: the length of blocks that the model was trained with.
        name: of the repository or folder; some tell the block length by ending in `-b32`.
    """

    family: str | None = None
    mask_token_id: int | None = None
    tokenizer_mask_token_id: int | None = None
    block_length: int | None = None
    name: str = ""


def no_config(folder: Path) -> CheckpointError:
    """An error about a folder without `config.json`, with what it probably is, to be raised."""
    inner = sorted(file.parent for file in folder.glob("*/config.json"))
    if folder.is_dir() and not any(folder.iterdir()):
        return CheckpointError(f"{folder} is empty: it has no config.json")
    hint = f"; did you mean {inner[0]}?" if inner else ""
    if (folder / "adapter_config.json").is_file():
        hint = ", but an adapter, which must be merged into its model"
    return CheckpointError(f"{folder} has no config.json: it is not a model checkpoint{hint}")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what `git clone` leaves in its place without Git LFS."""
    with file.open("rb") as stream:
        return stream.read(24) == b"version https://git-lfs."


class CheckpointConfig:
    """The fields of one `config.json`, typed on reading."""

    def __init__(self, path: Path, fields: dict[str, Any], hints: Hints | None = None) -> None:
        self.path = path
        self.hints = hints or Hints(name=path.parent.name)
        self._fields = fields

    @classmethod
    def read(cls, folder: Path, hints: Hints | None = None) -> CheckpointConfig:
        """Read `folder/config.json`.

        Args:
            hints: without them, the folder's name is all there is.

        Raises:
            CheckpointError: the file is missing, not JSON, or not an object.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise no_config(folder)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return cls(path, fields, hints)

    def error(self, field: str, problem: str) -> CheckpointError:
        """An error about `field`, to be raised by the caller."""
        return CheckpointError(f"{self.path}: field `{field}`: {problem}")

    @property
    def architectures(self) -> list[str]:
        names = self._fields.get("architectures")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error("architectures", "missing; it names the model class, as a list")
        return names

    def is_called(self, model: str) -> bool:
        """Whether `model`, given in lower case, is a part of the checkpoint's name."""
        return model in self.hints.name.lower()

    def get(self, field: str) -> Any:
        """The raw value of `field`, None when absent."""
        return self._fields.get(field)

    def _require(self, field: str, default: Any) -> Any:
        value = self._fields.get(field)
        if value is None:
            value = default
        if value is None:
            raise self.error(field, "missing")
        return value

    def integer(self, field: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """A positive whole number."""
        value = self._require(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, f"must be a positive integer, not {_told(value)}")
        return self._at_most(field, value, most)

    def count(self, field: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """A whole number that may be 0."""
        value = self._require(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(field, f"must be 0 or a positive integer, not {_told(value)}")
        return self._at_most(field, value, most)

    def _at_most(self, field: str, value: int, most: int) -> int:
        if value > most:
            raise self.error(field, f"must be at most {most}, not {_told(value)}")
        return value

    def experts(self, field: str) -> int:
        """How many experts a layer has."""
        return self.integer(field, most=MAX_EXPERTS)

    def context(self, field: str) -> int:
        """The most tokens of a text: a prompt of one and an answer of one, or more."""
        value = self.integer(field, most=MAX_CONTEXT)
        if value < 2:
            raise self.error(field, f"must be at least 2, not {value}")
        return value

    def integers(self, field: str) -> list[int]:
        """A list of whole numbers, empty when the field is absent."""
        value = self._fields.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(field, f"must be a list of integers, not {_told(value)}")
        return value

    def number(
        self, field: str, default: float | None = None, *, least: float = 0, most: float
    ) -> float:
        """A positive number from `least` to `most`."""
        value = self._require(field, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value > 0:
            raise self.error(field, f"must be a positive number, not {_told(value)}")
        if not least <= value <= most:
            raise self.error(field, f"must be from {least:g} to {most:g}, not {_told(value)}")
        return float(value)

    def table(self, field: str) -> dict[str, Any]:
        """An object, empty when the field is absent."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.error(field, f"must be an object, not {_told(value)}")
        return value or {}

    def part(self, field: str) -> CheckpointConfig:
        """The fields of an object inside of this one; none when it is absent."""
        return CheckpointConfig(self.path, self.table(field), self.hints)

    def integers_by_name(self) -> dict[str, int]:
        """All fields that are whole numbers."""
        return {field: value for field, value in self._fields.items() if type(value) is int}

    def boolean(self, field: str, default: bool | None = None) -> bool:
        value = self._require(field, default)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, not {_told(value)}")
        return value

    def token_id(self, field: str, vocab_size: int, default: int | None = None) -> int:
        """A token id inside the vocabulary."""
        value = self._require(field, default)
        if not _is_token_id(value, vocab_size):
            allowed = f"must be a token id from 0 to {vocab_size - 1}"
            raise self.error(field, f"{allowed}, not {_told(value)}")
        return value

    def end_token_ids(self, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """The tokens that end a text, of which `eos_token_id` may list several; at least one."""
        field = "eos_token_id"
        value = self._require(field, default)
        ends = tuple(value) if isinstance(value, list) else (value,)
        if not ends or not all(_is_token_id(end, vocab_size) for end in ends):
            allowed = f"must be a token id from 0 to {vocab_size - 1}, or a list of them"
            raise self.error(field, f"{allowed}, not {_told(value)}")
        return ends

    def rotary_base(self) -> float:
        """The base of rotary positions."""
        return self.number("rope_theta", least=1, most=MAX_ROTARY_BASE)

    def norm_eps(self) -> float:
        """What is added to the mean square before its root."""
        return self.number("rms_norm_eps", most=1)

    def head_dim(self, hidden_size: int, heads_field: str) -> int:
        """The dimensions of a head: as stated, else the heads share the width of the model."""
        heads = self.integer(heads_field)
        if self.get("head_dim") is None and hidden_size % heads:
            raise self.error(heads_field, f"{heads} does not divide the width, {hidden_size}")
        size = self.integer("head_dim", default=hidden_size // heads)
        if size % 2:
            raise self.error("head_dim", f"must be even to be rotated, not {size}")
        return size

    def divisor(self, field: str, of: int) -> int:
        """A positive whole number that divides `of`, which it is when the field is absent."""
        value = self.integer(field, default=of)
        if of % value:
            raise self.error(field, f"{value} does not divide {of}")
        return value

    def mask_token_id(self, vocab_size: int, default: int) -> int:
        """The mask: as the operator says, else this file, else the tokenizer, else `default`."""
        told = self.hints.mask_token_id
        if told is not None and not 0 <= told < vocab_size:
            raise CheckpointError(
                f"the mask token must be an id from 0 to {vocab_size - 1}, not {told}"
            )
        if told is not None:
            return told
        of_tokenizer = self.hints.tokenizer_mask_token_id
        if of_tokenizer is None and self.get("mask_token_id") is None and default >= vocab_size:
            raise self.error(
                "mask_token_id",
                f"missing, the tokenizer names no mask, and the family's own, {default}, is beyond "
                f"this vocabulary of {vocab_size}; name it by --mask_token_id",
            )
        fallback = default if of_tokenizer is None else of_tokenizer
        return self.token_id("mask_token_id", vocab_size, default=fallback)

    def block_length(self, default: int, most: int) -> int:
        """How many positions see each other: as the operator says, else this file, else the name
        of the checkpoint, else `default`; a text of the model has `most`."""
        if self.hints.block_length is not None:
            return self.hints.block_length
        named = re.search(r"-b(\d{1,9})$", self.hints.name)
        return self.integer("block_size", int(named[1]) if named else default, most)

    def expect(self, field: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a checkpoint whose `field` is present with a value that is not implemented."""
        value = self._fields.get(field)
        if value is not None and value not in allowed:
            names = " or ".join(repr(choice) for choice in allowed)
            raise self.error(field, f"{_told(value)} is not supported, only {names}")


def _is_token_id(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _told(value: object) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]}..."
