"""Every field of vLLM's requests has a place in the tables, and does what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.fields import (
    IGNORED,
    MAX_UNKNOWN,
    NAMED_ELSEWHERE,
    REFUSED,
    SUPPORTED,
    refuse_unsupported,
    render_table,
)
from vdiff_kserve.openai.protocol import ChatCompletionRequest, CompletionRequest

SCHEMAS = json.loads(
    (Path(__file__).parents[1] / "data/schemas/vllm-0.24.0-openai-schemas.json").read_text()
)
KINDS: tuple[type[BaseModel], ...] = (ChatCompletionRequest, CompletionRequest)
MESSAGES = [{"role": "user", "content": "x"}]
ASKING: dict[str, Any] = {
    "audio": {"voice": "alloy"}, "modalities": ["text", "audio"], "web_search_options": {},
    "best_of": 2, "chat_template": "x", "documents": [{"a": "b"}],
    "function_call": {"name": "f"}, "functions": [{"name": "f"}], "prompt_embeds": "x",
    "guided_choice": ["a"], "guided_grammar": "x", "guided_json": {}, "guided_regex": "a",
    "prompt_logprobs": 0, "repetition_detection": {},
    "thinking_token_budget": 3, "use_beam_search": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_vllm_is_known(kind: type[BaseModel]) -> None:
    theirs = SCHEMAS[kind.__name__]["properties"].keys()
    assert theirs <= kind.model_fields.keys()
    assert theirs <= SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys()


def test_every_own_field_is_in_exactly_one_table() -> None:
    fields = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    for field in fields:
        assert (field in SUPPORTED) + (field in IGNORED) + (field in REFUSED) == 1, field
    assert (SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys()) == fields


def test_the_table_of_the_documentation_is_current_and_has_every_field_of_vllm() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    table = render_table()
    assert table in page, "python -m vdiff_kserve.openai.fields writes it anew"
    for kind in KINDS:
        for field in SCHEMAS[kind.__name__]["properties"]:
            assert f"| `{field}` |" in table


def request_with(field: str, value: Any) -> BaseModel:
    if field in CompletionRequest.model_fields:
        return CompletionRequest.model_validate({"prompt": "x", field: value})
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, field: value})


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_refused_with_its_reason_when_it_asks_for_something(
    field: str,
) -> None:
    with pytest.raises(RequestError, match=f"`{field}`") as caught:
        refuse_unsupported(request_with(field, ASKING[field]))
    assert caught.value.status == 400
    assert REFUSED[field].reason in caught.value.message
    assert caught.value.response.error.param == field


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, each in sorted(REFUSED.items()) for v in each.neutral]
)
def test_a_refused_field_may_hold_its_neutral_value(field: str, value: Any) -> None:
    refuse_unsupported(request_with(field, value))


def test_an_unknown_field_is_ignored() -> None:
    refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", "store": True}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("field", "meant"),
    [
        *(("treshold", "threshold"), ("Block_Length", "block_length"), ("maxTokens", "max_tokens")),
        *(("response_fromat", "response_format"), ("structured_output", "structured_outputs")),
        *(
            ("temprature", "temperature"),
            ("max_token", "max_tokens"),
            ("logit_biass", "logit_bias"),
        ),
        *(("topp", "top_p"), ("top-k", "top_k"), ("strem", "stream"), ("stops", "stop")),
        *(("seeed", "seed"), ("presense_penality", "presence_penalty")),
        *NAMED_ELSEWHERE.items(),
    ],
)
def test_a_field_by_another_name_is_refused_with_its_own(
    kind: type[BaseModel], field: str, meant: str
) -> None:
    with pytest.raises(RequestError, match=f"no field {field}. Did you mean {meant}[?]") as caught:
        refuse_unsupported(a_request(kind, {field: 1}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("likelihood", {"methode": "pseudo"}, "no field likelihood.methode. Did you mean .*method"),
        ("structured_outputs", {"grammer": "x"}, "Did you mean structured_outputs.grammar"),
        ("structured_outputs", {"JSON": {}}, "Did you mean structured_outputs.json"),
        ("structured_outputs", {"disable_any_whitspace": True}, "disable_any_whitespace"),
        ("stream_options", {"includeUsage": True}, "Did you mean stream_options.include_usage"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schemas": {}}},
            "no field response_format.json_schema.schemas. .*json_schema.schema[?]",
        ),
    ],
)
def test_a_misspelled_field_of_an_object_is_refused_with_its_place(
    field: str, value: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", field: value}))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("extra_body", {"threshold": 0.5}, "beside the others"),
        ("diffusion_max_steps", 4, "a field of vllm_xargs"),
    ],
)
def test_a_field_in_the_wrong_place_is_told_the_right_one(
    field: str, value: Any, told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", field: value}))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ChatCompletionRequest, "suffix", "x"), (ChatCompletionRequest, "infill", True),
        (ChatCompletionRequest, "likelihood", "chain"), (ChatCompletionRequest, "prompt", "x"),
        (CompletionRequest, "messages", MESSAGES), (CompletionRequest, "tools", [{}]),
        (CompletionRequest, "max_completion_tokens", 5),
    ],
)  # fmt: skip
def test_a_field_of_the_other_endpoint_is_refused_unless_it_asks_for_nothing(
    kind: type[BaseModel], field: str, value: Any
) -> None:
    with pytest.raises(RequestError, match=f"{field} is a field of c.*, not of c") as caught:
        refuse_unsupported(a_request(kind, {field: value}))
    assert caught.value.param == field
    refuse_unsupported(a_request(kind, {field: None}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"max_tokens": 5, "max_completion_tokens": 5}),
        (CompletionRequest, {"add_generation_prompt": True, "tools": [], "tool_choice": "none"}),
        (CompletionRequest, {"top_logprobs": 0, "parallel_tool_calls": True, "user": "u"}),
        (ChatCompletionRequest, {"add_special_tokens": True, "suffix": "", "infill": False}),
        (ChatCompletionRequest, {"extra_body": {}, "structured_outputs": {"regex": "a", "x": 1}}),
    ],
)
def test_what_asks_for_nothing_there_is_accepted(
    kind: type[BaseModel], fields: dict[str, Any]
) -> None:
    refuse_unsupported(a_request(kind, fields))


CLIENTS_SEND = (
    # OpenAI, OpenRouter, Mistral, Groq and other hosts
    "metadata", "moderation", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "verbosity", "tool_resources", "max_tool_calls", "random_seed",
    "safe_prompt", "prompt_mode", "models", "plugins", "provider", "reasoning", "route", "top_a",
    "session_id", "trace", "transforms", "usage", "speed", "system", "thinking", "enable_thinking",
    "thinking_budget", "enable_search", "result_format", "reasoning_format", "search_parameters",
    "documents_only", "deferred", "citation_options",
    # llama.cpp, Ollama, SGLang, text-generation-webui, KoboldCpp, TGI
    "cache_prompt", "format", "id", "id_slot", "keep_alive", "max_length", "min_length", "mirostat",
    "n_keep", "n_predict", "n_probs", "num_ctx", "num_predict", "options", "raw", "repeat_penalty",
    "response_fields", "return_tokens", "template", "think", "typical_p", "ebnf", "lora_path",
    "regex", "return_hidden_states", "separate_reasoning", "mode", "character", "preset", "tfs",
    "guidance_scale", "negative_prompt", "rep_pen", "sampler_order", "stop_sequence", "do_sample",
    "return_full_text", "typical", "watermark",
    # vLLM of other versions, litellm, LibreChat, load generators
    "guided_decoding_backend", "early_stopping", "ec_transfer_params", "lora_request", "api_base",
    "caching", "custom_llm_provider", "drop_params", "fallbacks", "headers", "num_retries", "tags",
    "conversationId", "endpoint", "maxContextTokens", "modelLabel", "promptPrefix", "requestId",
    "resendFiles", "stopSequence", "useResponsesApi", "web_search", "nvext",
)  # fmt: skip
"""Fields that servers and programs have beside those that are known here."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", CLIENTS_SEND)
def test_fields_that_clients_send_to_every_server_are_ignored(
    kind: type[BaseModel], field: str
) -> None:
    refuse_unsupported(a_request(kind, {field: "x"}))


def a_request(kind: type[BaseModel], fields: dict[str, Any]) -> BaseModel:
    own = {"prompt": "x"} if kind is CompletionRequest else {"messages": MESSAGES}
    return kind.model_validate({**own, **fields})


@pytest.mark.parametrize(
    ("body", "is_refused"),
    [
        ({"seeds": 1}, True),
        ({"seeds": 1, "seed": 2}, False),
        ({"seeds": 1, "seed": None}, True),
        ({"streams": 1}, True),
        ({"streams": 1, "stream": False}, False),
        ({"max_new_tokens": 9}, True),
        ({"max_new_tokens": 9, "max_tokens": 9}, False),
        ({"structured_outputs": {"regexp": "x"}}, True),
        ({"structured_outputs": {"regexp": "x", "regex": "x"}}, False),
        ({"message": "x"}, False),
    ],
)
def test_a_name_beside_the_one_that_it_resembles_is_the_clients_own(
    body: dict[str, Any], is_refused: bool
) -> None:
    request = a_request(ChatCompletionRequest, body)
    if is_refused:
        with pytest.raises(RequestError, match="Did you mean"):
            refuse_unsupported(request)
    else:
        refuse_unsupported(request)


def test_names_from_elsewhere_stand_for_fields_and_are_none_themselves() -> None:
    assert set(NAMED_ELSEWHERE.values()) <= SUPPORTED.keys()
    assert NAMED_ELSEWHERE.keys().isdisjoint(SUPPORTED.keys() | IGNORED.keys() | REFUSED.keys())


@pytest.mark.parametrize("body", [{"foo": 1}, {"block_size": None}, {"top_a": 0.5}])
def test_other_unknown_fields_and_empty_ones_are_ignored(body: dict[str, Any]) -> None:
    refuse_unsupported(CompletionRequest.model_validate({"prompt": "x", **body}))


def test_only_so_many_unknown_fields_are_compared() -> None:
    """Comparing takes time, and a body has room for millions of them."""
    unknown = {f"u{i}": 1 for i in range(MAX_UNKNOWN)}
    many = CompletionRequest.model_validate({"prompt": "x", **unknown, "treshold": 0.5})
    refuse_unsupported(many)
    unknown.popitem()
    few = CompletionRequest.model_validate({"prompt": "x", **unknown, "treshold": 0.5})
    with pytest.raises(RequestError, match="Did you mean threshold"):
        refuse_unsupported(few)
