"""Every wrong value of every field of vLLM's schema is a 400 that names the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.test_errors import error_of

SCHEMAS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data/schemas/vllm-0.24.0-openai-schemas.json").read_text()
)
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatCompletionRequest": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    ),
    "CompletionRequest": ("/v1/completions", {"prompt": "x", "max_tokens": 4}),
}
WRONG_OF_TYPE: dict[str, tuple[Any, ...]] = {
    "string": (5, True, [3], {"a": 1}),
    "integer": ("x", 1.5, [3], {"a": 1}),
    "number": ("x", [3], {"a": 1}),
    "boolean": ("maybe", 7, [3], {"a": 1}),
    "array": (5, {"a": 1}, "x", [{"a": [1]}]),
    "object": (5, "x", [3]),
}
"""Values that are none of the type, nor anything that could be taken for it."""
KINDS: dict[type, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object",
}  # fmt: skip
# fmt: off
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 2.1, 1e308),
    "top_p": (0, -0.1, 1.1),
    "top_k": (-2, 2**40),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1),
    "n": (0, -1, 10_000, 2**40),
    "max_tokens": (-1, 10_000, 2**40),
    "max_completion_tokens": (0, -1, 10_000, 2**40),
    "min_tokens": (-1, 5, 2**70),
    "logprobs": (-1, 21),
    "top_logprobs": (-1, 21),
    "seed": (2**63, -(2**63) - 1),
    "priority": (2**63, -(2**63) - 1),
    "stop": ("", ["a", ""], ["a"] * 65, ["a" * 1025]),
    "stop_token_ids": ([-1], [320], [1] * 1025),
    "allowed_token_ids": ([], [-1], [320]),
    "logit_bias": (
        {"x": 1}, {"-1": 1}, {"320": 1}, {"1": "x"}, {f"{i:05}": 1 for i in range(1025)},
    ),
    "bad_words": ([""],),
    "prompt": ([], "", [[]], [-1], [320], [[1], "x"], ["x"] * 10_000),
    "messages": ([], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}]),
    "stream_options": ({"include_usage": True},),
}
# fmt: on
"""Values of the right type that no request may have."""
OWN: dict[str, tuple[Any, ...]] = {
    "timeout": (0, -1),
    "steps": (0, -1),
    "block_length": (0, -1),
    "threshold": (-0.1, 1.1),
    "remasking": ("best",),
    "profile": ("best",),
    "policy": ("best",),
    "stream_canvas": (True,),
}
"""The same of fields that only this server has."""
TOLD_AS = {"top_logprobs": "logprobs"}
"""Fields whose refusals name another one, as vLLM's do."""


def kinds_of(schema: dict[str, Any], definitions: dict[str, Any]) -> set[str]:
    """The JSON types that a field may have."""
    if "$ref" in schema:
        return kinds_of(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    members = schema.get("anyOf", schema.get("oneOf", ()))
    if members:
        return set().union(*(kinds_of(member, definitions) for member in members))
    return {schema["type"]} if "type" in schema else set(WRONG_OF_TYPE)


def wrong_values(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[Any]:
    kinds = kinds_of(schema, definitions)
    kinds |= {"integer"} if "number" in kinds else set()
    for value in (each for values in WRONG_OF_TYPE.values() for each in values):
        is_wrong_for = [kind for kind in kinds if value in WRONG_OF_TYPE.get(kind, ())]
        if KINDS[type(value)] not in kinds and len(is_wrong_for) == len(kinds - {"null"}):
            yield value
    for part in (schema, *schema.get("anyOf", ())):
        if "minimum" in part:
            yield part["minimum"] - 1
        if "maximum" in part:
            yield part["maximum"] + 1
        if "enum" in part:
            yield "none of these"


CASES = [
    pytest.param(kind, field, id=f"{kind.removesuffix('Request')}-{field}")
    for kind in ROUTES
    for field in SCHEMAS[kind]["properties"]
]


@pytest.mark.parametrize(("kind", "field"), CASES)
def test_a_wrong_value_is_refused_by_name(http: httpx.Client, kind: str, field: str) -> None:
    path, base = ROUTES[kind]
    schema, definitions = SCHEMAS[kind]["properties"][field], SCHEMAS[kind]["$defs"]
    values = [*wrong_values(schema, definitions), *OUT_OF_RANGE.get(field, ())]
    if kind == "ChatCompletionRequest" and field == "logprobs":
        values = [value for value in values if value not in OUT_OF_RANGE[field]]
    assert values
    for value in values:
        body = base | {field: value}
        if field == "top_logprobs":
            body |= {"logprobs": True}
        error = error_of(http.post(path, json=body), 400)
        told = (error["param"] or "").removeprefix("body.")
        assert told.partition(".")[0] in (field, TOLD_AS.get(field)), (value, error)


@pytest.mark.parametrize("field", sorted(OWN))
def test_so_is_one_of_a_field_that_vllm_does_not_have(http: httpx.Client, field: str) -> None:
    for path, base in ROUTES.values():
        for value in OWN[field]:
            error = error_of(http.post(path, json=base | {field: value}), 400)
            assert error["param"].removeprefix("body.") == field
