"""Reading a checkpoint's `config.json` with errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A checkpoint folder that cannot be served; the message says what is wrong and where."""


class CheckpointConfig:
    """The fields of one `config.json`, typed on reading."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self._fields = fields

    @classmethod
    def read(cls, folder: Path) -> CheckpointConfig:
        """Read `folder/config.json`.

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
        return cls(path, fields)

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

    def number(self, field: str) -> float:
        """A positive number."""
        value = self._require(field, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(field, f"must be a positive number, not {value!r}")
        return float(value)

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

    def expect(self, field: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a checkpoint whose `field` is present with a value that is not implemented."""
        value = self._fields.get(field)
        if value is not None and value not in allowed:
            names = " or ".join(repr(choice) for choice in allowed)
            raise self.error(field, f"{value!r} is not supported, only {names}")
