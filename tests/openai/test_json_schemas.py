"""Schemas that llguidance reads otherwise than the standard means are rewritten or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.openai.test_structured import accepts, compiled
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.json_schemas import closed, enforceable


def matcher_of(schema: dict[str, Any]) -> Any:
    return compiled(structured_outputs={"json": schema})


@pytest.mark.parametrize(
    ("bounds", "allowed", "forbidden"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.25"], ["0", "0.0", "-0"]),
        ({"exclusiveMinimum": 5, "exclusiveMaximum": 5.5}, ["5.25"], ["5", "5.5", "5.0"]),
        ({"minimum": 5, "exclusiveMinimum": True, "maximum": 5.5}, ["5.25"], ["5", "5.0"]),
        ({"exclusiveMaximum": -5, "minimum": -5.5}, ["-5.5", "-5.25"], ["-5", "-5.0", "-6"]),
        ({"exclusiveMaximum": 0, "minimum": -0.5}, ["-0.5", "-0.25"], ["0", "-0"]),
        ({"exclusiveMinimum": 0, "maximum": 1}, ["1", "0.999"], ["0"]),
        ({"exclusiveMaximum": 1, "minimum": 0}, ["0", "0.999"], ["1"]),
    ],
)
def test_a_bound_that_is_not_allowed_is_not_written(
    bounds: dict[str, Any], allowed: list[str], forbidden: list[str]
) -> None:
    for schema in (
        {"type": "number", **bounds},
        {"anyOf": [{"type": ["null", "number"], **bounds}]},
    ):
        matcher = matcher_of(schema)
        assert [text for text in allowed if not accepts(matcher, text)] == []
        assert [text for text in forbidden if accepts(matcher, text)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "number", "exclusiveMinimum": 5}, {"maximum": 5.5}]},
        {"type": "number", "exclusiveMinimum": 5, "allOf": [{"maximum": 5.5}]},
        {"anyOf": [{"type": "number", "exclusiveMinimum": 5}], "exclusiveMaximum": 5.6},
        {"$ref": "#/$defs/a", "maximum": 5.5, "$defs": {
            "a": {"type": "number", "minimum": 5, "exclusiveMinimum": True}}},
    ],
)  # fmt: skip
def test_bounds_that_meet_in_another_part_of_the_schema_hold(schema: dict[str, Any]) -> None:
    matcher = matcher_of(schema)
    assert all(accepts(matcher, text) for text in ("5.5", "5.25"))
    assert not any(accepts(matcher, text) for text in ("5", "5.0", "6"))


def test_bounds_that_are_far_from_each_other_stay_as_they_are() -> None:
    schema = {"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 10, "minimum": 0.5}}}
    assert enforceable(schema) == schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "minimum": 10**30}, "at most 64 bits"),
        ({"properties": {"a": {"enum": [1, [-(10**30)]]}}}, "at most 64 bits"),
        ({"const": float("inf")}, "finite"),
        ({"type": "object", "minProperties": 2}, "minProperties must be at most one more"),
        ({"anyOf": [{"minProperties": 3, "required": ["a"]}]}, "got 3 and 1"),
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refusal:
        compiled(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        )
    assert refusal.value.param == "response_format"


def test_one_more_property_than_is_required_can_be_asked_for() -> None:
    matcher = matcher_of({"properties": {"a": {}}, "required": ["a"], "minProperties": 2})
    assert accepts(matcher, json.dumps({"a": 1, "b": 2}))
    assert not accepts(matcher, json.dumps({"a": 1}))


def test_values_and_names_are_no_keywords() -> None:
    schema = {
        "enum": [{"exclusiveMinimum": 0, "maximum": 0.5, "minProperties": 9}],
        "properties": {"minProperties": {"type": "object"}, "default": {"type": "object"}},
    }
    assert enforceable(schema) == schema
    properties = closed(schema)["properties"]
    assert properties["default"] == {"type": "object", "additionalProperties": False}
    assert closed(schema)["enum"] == schema["enum"]


def test_an_end_is_found_behind_a_number_between_whole_ones() -> None:
    between = {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 2}
    fields = {"a": between, "b": {"type": ["integer", "string"], "maxLength": 4}, "c": between}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    assert accepts(matcher_of(schema), json.dumps({"a": 1.5, "b": 3, "c": 1.01}))
