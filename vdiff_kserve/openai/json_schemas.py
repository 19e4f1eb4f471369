"""JSON schemas as llguidance enforces them.

It reads some of what the standard allows otherwise than the standard does. Such schemas are written
so that it enforces what is meant, or refused, so that no answer breaks its schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard

VALUES = frozenset({"enum", "const", "default", "examples"})
"""Keywords that hold values, which are no schemas."""
BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords that hold schemas under names, which are no keywords."""
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
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
    bounds: dict[str, set[float]] = {name: set() for name in BOUNDS}
    _collect_bounds(schema, bounds)
    return _rewritten(schema, bounds)


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


def _collect_bounds(value: Any, bounds: Mapping[str, set[float]]) -> None:
    """Every bound of the schema and of those in it: `allOf` and `$ref` bring any two together."""
    if isinstance(value, Mapping):
        for keyword, each in value.items():
            if keyword in bounds and _is_number(each):
                bounds[keyword].add(each)
            _collect_bounds(each, bounds)
    elif isinstance(value, list):
        for each in value:
            _collect_bounds(each, bounds)


def _rewritten(schema: Mapping[str, Any], bounds: Mapping[str, set[float]]) -> dict[str, Any]:
    _check_names_count(schema)
    parts = _with_parts(schema, partial(_rewritten, bounds=bounds))
    return _with_inner_bounds(parts, bounds)


def _check_names_count(schema: Mapping[str, Any]) -> None:
    """llguidance counts members, of which several may have the same name."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > named + 1:
        raise SchemaError(
            f"minProperties must be at most one more than the names in required, got {least} and "
            f"{named}"
        )


def _with_inner_bounds(schema: dict[str, Any], bounds: Mapping[str, set[float]]) -> dict[str, Any]:
    """The schema with a bound that is allowed itself in place of a whole one that is not, where
    llguidance 1.9 lets it pass: 5 as above 5 where all is below 6, and -5 likewise."""
    for inner, outer, other_names, way in (
        ("minimum", "exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("maximum", "exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        is_flag = schema.get(outer) is True  # as draft 4 has it
        bound = schema.get(inner if is_flag else outer)
        if not _is_number(bound) or bound % 1 or way * bound < 0:
            continue
        ranges = [way * (other - bound) for name in other_names for other in bounds[name]]
        width = min((each for each in ranges if each > 0), default=1.0)
        if width < 1:
            del schema[outer]
            schema[inner] = bound + way * 10.0 ** (math.floor(math.log10(width)) - DIGITS)
    return schema


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
