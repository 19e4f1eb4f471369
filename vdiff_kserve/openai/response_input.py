"""From a request to the Responses API to the chat that it stands for.

Nothing is stored: whatever an earlier response is needed for is refused with that reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from vdiff_kserve.openai.errors import RequestError, invalid_part, out_of_range, shorten
from vdiff_kserve.openai.fields import Refused, refuse_fields, refuse_misspelled
from vdiff_kserve.openai.near_misses import Names
from vdiff_kserve.openai.protocol import ChatCompletionRequest, GenerationFields
from vdiff_kserve.openai.response_objects import ResponsesRequest

NOT_STORED = "this server stores no responses; send the conversation in `input`"
REFUSED = {
    "background": Refused(NOT_STORED, (None, False)),
    "conversation": Refused(NOT_STORED),
    "n": Refused("a response is one answer", (None, 1)),
    "previous_response_id": Refused(NOT_STORED),
    "prompt": Refused("this server has no stored prompts"),
    "response_format": Refused("this route has `text.format`"),
    "stream_canvas": Refused("its events have no place for steps", (None, False)),
    "truncation": Refused("an input that is too long is refused, not cut", (None, "disabled")),
}
"""Fields of the route that are refused, unless they ask for nothing."""

NAMES = {
    "logprobs": "top_logprobs",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
"""Fields of a chat, and what the same is called here."""

RENAMED = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "logprobs": "top_logprobs",
}
"""Fields of chats that clients send here by mistake."""

OWN = Names(ResponsesRequest.model_fields.keys() - GenerationFields.model_fields.keys())
"""Fields that chats do not all have."""

TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    LOGPROBS,
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What `include` may ask for; all but `LOGPROBS` are of items that no answer here has."""


def as_chat(request: ResponsesRequest) -> ChatCompletionRequest:
    """The chat whose answer is the response.

    Raises:
        RequestError: naming a field or an item of the input that this route does not have.
    """
    refuse_fields(request, REFUSED)
    fields = _chats_own(request.model_extra or {})
    refuse_misspelled(request, OWN)
    if not request.input:
        raise RequestError("input must be given and not be empty.", param="input")
    _check_include(request.include or ())
    given = request.model_fields_set & GenerationFields.model_fields.keys()
    fields |= {name: getattr(request, name) for name in given - REFUSED.keys() - {"stream_options"}}
    fields |= {
        "messages": list(_messages(request)),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": bool(request.top_logprobs) or LOGPROBS in (request.include or ()),
        "top_logprobs": request.top_logprobs or 0,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    if (form := _format(request.text or {})) is not None:
        fields["response_format"] = form
    if request.tools:
        fields["tools"] = [_tool(tool, i) for i, tool in enumerate(request.tools)]
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    if request.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(request.tool_choice)
    with in_own_names():
        try:
            return ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid_part(error.errors()) from error


def _check_include(include: Sequence[str]) -> None:
    for each in include:
        if each not in INCLUDABLE:
            raise out_of_range("include", f"a list of {', '.join(INCLUDABLE)}", each)


def _chats_own(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that this route does not have; the chat does with them what it does with its own."""
    given = {name: value for name, value in extra.items() if value is not None}
    for name in RENAMED.keys() & given.keys():
        raise RequestError(f"There is no field {name} here; it is {RENAMED[name]}.", param=name)
    return given


@contextmanager
def in_own_names() -> Iterator[None]:
    """Tell refusals of a chat by the names that its fields have on this route."""
    try:
        yield
    except RequestError as error:
        param = error.param or ""
        body = "body." if param.startswith("body.") else ""
        first, _, rest = param.removeprefix(body).partition(".")
        if first not in NAMES:
            raise
        own = NAMES[first]
        told = RequestError(
            re.sub(rf"\b{first}\b", own, error.message),
            status=error.status,
            param=body + (f"{own}.{rest}" if rest else own),
            error_type=error.type,
        )
        told.counted = error.counted
        raise told from error


def _messages(request: ResponsesRequest) -> Iterator[dict[str, Any]]:
    if request.instructions:
        yield {"role": "system", "content": request.instructions}
    if isinstance(request.input, str):
        yield {"role": "user", "content": request.input}
        return
    said: dict[str, Any] | None = None  # the assistant's latest, which may go on with calls
    for index, item in enumerate(request.input or ()):
        kind, where = item.get("type") or "message", f"input.{index}"
        if kind == "reasoning":
            continue
        if kind == "function_call":
            said = said or {"role": "assistant", "content": ""}
            said.setdefault("tool_calls", []).append(_call(item, where))
            continue
        if said is not None:
            yield said
        said, message = None, _message(item, kind, where)
        if message["role"] == "assistant":
            said = message
        else:
            yield message
    if said is not None:
        yield said


def _message(item: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The message that an item is."""
    if kind == "message":
        content = _joined(item.get("content"), f"{where}.content")
        return {"role": _text(item, "role", where), "content": content}
    if kind == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": _text(item, "call_id", where),
            "content": _joined(item.get("output"), f"{where}.output"),
        }
    reason = NOT_STORED if kind == "item_reference" else "this model reads text only"
    raise RequestError(f"{where} has the type '{shorten(kind)}'; {reason}.", param=f"{where}.type")


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "id": _text(item, "call_id", where),
        "type": "function",
        "function": {
            "name": _text(item, "name", where),
            "arguments": _text(item, "arguments", where),
        },
    }


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a text.", param=f"{where}.{name}")
    return value


def _joined(content: Any, where: str) -> str:
    """The text of a content that is a text or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text parts.", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind else None
        if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{where} has a part of type '{shorten(kind)}'; this model reads text only.",
                param=where,
            )
        texts.append(text)
    return "\n".join(texts)


def _format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """The response format of a chat; OpenAI has a schema's fields one level higher here."""
    form = text.get("format")
    if form is None or form == {"type": "text"}:
        return None
    if not isinstance(form, dict) or form.get("type") not in ("json_object", "json_schema"):
        raise RequestError(
            "text.format must have the type text, json_object or json_schema.", param="text.format"
        )
    if form["type"] == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"tools.{index} has the type '{shorten(tool.get('type'))}'; there are functions only.",
            param="tools",
        )
    return {"type": "function", "function": {k: tool[k] for k in tool if k != "type"}}


def _tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function":
        raise RequestError(
            "tool_choice must be none, auto, required, or name a function.", param="tool_choice"
        )
    return {"type": "function", "function": {"name": _text(choice, "name", "tool_choice")}}
