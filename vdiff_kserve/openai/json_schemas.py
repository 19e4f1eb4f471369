"""JSON schemas as llguidance enforces them.

It reads some of what the standard allows otherwise than the standard does. Such schemas are written
so that it enforces what is meant, or refused, so that no answer breaks its schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

VALUES = frozenset({"enum", "const", "default", "examples"})
"""Keywords that hold values, which are no schemas."""
BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords that hold schemas under names, which are no keywords."""
DIGITS = 6
"""How near numbers come to a bound that is not allowed, relative to how many are."""
INT64 = 2**63


class SchemaError(ValueError):
    """A schema that cannot be enforced."""


def enforceable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in a form that llguidance enforces.

    Raises:
        SchemaError: there is none.
    """
    _check_numbers(schema)
    return _rewritten(schema)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with no other properties than those it names, unless it says something else."""
    parts = _with_parts(schema, closed)
    if schema.get("type") == "object" or isinstance(schema.get("properties"), dict):
        parts.setdefault("additionalProperties", False)
    return parts


def _with_parts(
    schema: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """The schema with the schemas in it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(each) for each in value]
        return change(value) if isinstance(value, Mapping) else value

    parts = dict(schema)
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, Mapping):
            parts[keyword] = {name: changed(each) for name, each in value.items()}
        elif keyword not in VALUES:
            parts[keyword] = changed(value)
    return parts


def _check_numbers(value: Any) -> None:
    if isinstance(value, Mapping):
        for each in value.values():
            _check_numbers(each)
    elif isinstance(value, list):
        for each in value:
            _check_numbers(each)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SchemaError("its numbers must be finite")
    elif isinstance(value, int) and not -INT64 <= value < INT64:
        raise SchemaError("its integers must have at most 64 bits")


def _rewritten(schema: Mapping[str, Any]) -> dict[str, Any]:
    _check_names_count(schema)
    return _with_inner_bounds(_with_parts(schema, _rewritten))


def _check_names_count(schema: Mapping[str, Any]) -> None:
    """llguidance counts members, of which several may have the same name."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > named + 1:
        raise SchemaError(
            f"minProperties must be at most one more than the names in required, got {least} and "
            f"{named}"
        )


def _with_inner_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with a bound that is allowed itself in place of a whole one that is not, where
    llguidance 1.9 lets it pass: 5 as above 5 where all is below 6, and -5 likewise."""
    for inner, outer, other_names, way in (
        ("minimum", "exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("maximum", "exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        is_flag = schema.get(outer) is True  # as draft 4 has it
        bound = schema.get(inner if is_flag else outer)
        others = [schema[name] for name in other_names if _is_number(schema.get(name))]
        if not _is_number(bound) or bound % 1 or way * bound < 0 or not others:
            continue
        width = min(abs(other - bound) for other in others)
        if 0 < width < 1:
            del schema[outer]
            schema[inner] = bound + way * 10.0 ** (math.floor(math.log10(width)) - DIGITS)
    return schema


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
