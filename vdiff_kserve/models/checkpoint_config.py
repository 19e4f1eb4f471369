"""Reading a checkpoint's `config.json` with errors that name the field."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
            raise CheckpointError(f"{folder} has no config.json: it is not a model checkpoint")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
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

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._require(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, f"must be a positive integer, not {value!r}")
        return value

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number that may be 0."""
        value = self._require(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(field, f"must be 0 or a positive integer, not {value!r}")
        return value

    def integers(self, field: str) -> list[int]:
        """A list of whole numbers, empty when the field is absent."""
        value = self._fields.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(field, f"must be a list of integers, not {value!r}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._require(field, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise self.error(field, f"must be a positive number, not {value!r}")
        return float(value)

    def table(self, field: str) -> dict[str, Any]:
        """An object, empty when the field is absent."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.error(field, f"must be an object, not {value!r}")
        return value or {}

    def boolean(self, field: str) -> bool:
        value = self._require(field, None)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, not {value!r}")
        return value

    def token_id(self, field: str, vocab_size: int, default: int | None = None) -> int:
        """A token id inside the vocabulary."""
        value = self._require(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.error(field, f"must be a token id from 0 to {vocab_size - 1}, not {value!r}")
        return value

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
        fallback = default if of_tokenizer is None else of_tokenizer
        return self.token_id("mask_token_id", vocab_size, default=fallback)

    def block_length(self, default: int) -> int:
        """How many positions see each other: as the operator says, else this file, else the name
        of the checkpoint, else `default`."""
        if self.hints.block_length is not None:
            return self.hints.block_length
        named = re.search(r"-b(\d+)$", self.hints.name)
        return self.integer("block_size", default=int(named[1]) if named else default)

    def expect(self, field: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a checkpoint whose `field` is present with a value that is not implemented."""
        value = self._fields.get(field)
        if value is not None and value not in allowed:
            names = " or ".join(repr(choice) for choice in allowed)
            raise self.error(field, f"{value!r} is not supported, only {names}")
