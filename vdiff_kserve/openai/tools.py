"""What a request's `tools` ask for: the grammar of forced calls, and how models are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.json_schemas import enforceable
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.protocol import ChatCompletionRequest
from vdiff_kserve.openai.structured import (
    AS_DUMPED,
    AnswerFormat,
    check_size,
    impossible_refused,
    json_grammar,
)
from vdiff_kserve.openai.tool_fields import NamedTool, Tool
from vdiff_kserve.openai.tool_parsers import CLOSE_TAG, OPEN_TAG, ParserName

NO_ARGUMENTS = {"type": "object", "additionalProperties": False}
"""What a function takes that tells no parameters, as OpenAI has it."""
ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """How a request's answers may call functions.

    Attributes:
        tools: those that may be called.
        forced: whether nothing but calls may be answered.
        many: whether there may be several calls.
        parser: how calls are written.
        only_arguments: the answer is the arguments of the one function and nothing else.
    """

    tools: tuple[Tool, ...]
    forced: bool
    many: bool
    parser: ParserName
    only_arguments: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)


def tool_use(request: ChatCompletionRequest, limits: ServingLimits) -> ToolUse | None:
    """What the request's tools come to; None when nothing may be called.

    Raises:
        RequestError: naming the field that contradicts the others or the server's settings.
    """
    tools, choice = request.tools, request.tool_choice
    if tools == []:
        raise RequestError(
            "tools must not be empty: give at least one, or leave the field out.", param="tools"
        )
    if tools is None:
        if choice not in (None, "none"):
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        return None
    if choice == "none":
        return None
    check_size("tools", [tool.model_dump() for tool in tools], limits)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name][:1]
        if not tools:
            raise RequestError(
                f"tool_choice must name one of the tools, got {choice.function.name!r}.",
                param="tool_choice",
            )
    elif choice != "required" and not limits.auto_tool_choice:
        raise RequestError(
            "tool_choice auto is switched off on this server (--disable_auto_tool_choice); it may "
            "be none, required or name a function.",
            param="tool_choice",
        )
    is_named = isinstance(choice, NamedTool)
    forced = is_named or choice == "required"
    only_arguments = forced and len(tools) == 1 and not limits.template_takes_tools
    return ToolUse(
        tools=tuple(tools),
        forced=forced,
        many=request.parallel_tool_calls is not False and not is_named and not only_arguments,
        parser=limits.tool_call_parser,
        only_arguments=only_arguments,
    )


def forced_calls(use: ToolUse) -> AnswerFormat:
    """The grammar of answers that are calls, in the way that the parser reads.

    Raises:
        RequestError: a function's parameters are a schema that cannot be enforced.
    """
    with impossible_refused("tools"):
        return AnswerFormat("tools", _calls_grammar(use))


def calls_or(use: ToolUse, answer: AnswerFormat) -> AnswerFormat:
    """The grammar of answers that are calls, or else match a format of JSON: models of agents call
    functions before they answer. The calls' arguments are any, as without a format."""
    (wanted,) = json.loads(answer.grammar)["grammars"]
    rules = _call_rules(use, [ANY_ARGUMENTS for _ in use.tools])
    rules += ["start: calls | answer", f"answer: %json {json.dumps(wanted['json_schema'])}"]
    return AnswerFormat(answer.field, LLMatcher.grammar_from_lark("\n".join(rules)))


def _calls_grammar(use: ToolUse) -> str:
    if use.only_arguments:
        return json_grammar(_parameters(use.tools[0]))
    rules = _call_rules(use, [_parameters(tool) for tool in use.tools])
    return LLMatcher.grammar_from_lark("\n".join([*rules, "start: calls"]))


def _call_rules(use: ToolUse, parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rule `calls`, in the way that the parser reads, and those that it needs."""
    calls, rules = [], []
    for i, (tool, schema) in enumerate(zip(use.tools, parameters, strict=True)):
        head = f'{{"name": {json.dumps(tool.function.name)}, "arguments": '
        arguments = {**enforceable(schema), "x-guidance": AS_DUMPED}
        rules.append(f'call_{i}: {_literal(head)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(arguments)}")
        calls.append(f"call_{i}")
    before, between, after = "[", ", ", "]"
    if use.parser == "hermes":
        before, between, after = f"{OPEN_TAG}\n", f"\n{CLOSE_TAG}\n{OPEN_TAG}\n", f"\n{CLOSE_TAG}"
    more = f" ({_literal(between)} call)*" if use.many else ""
    whole = f"calls: {_literal(before)} call{more} {_literal(after)}"
    return [whole, f"call: {' | '.join(calls)}", *rules]


def _parameters(tool: Tool) -> Mapping[str, Any]:
    if tool.function.parameters is None:
        return NO_ARGUMENTS
    return tool.function.parameters or ANY_ARGUMENTS


def _literal(text: str) -> str:
    return json.dumps(text)


def tool_text(use: ToolUse) -> str:
    """What a model is told whose chat template takes no tools: a line for each function, and how a
    call is written."""
    lines = [
        json.dumps(tool.function.model_dump(exclude_none=True), ensure_ascii=False)
        for tool in use.tools
    ]
    call = '{"name": ..., "arguments": ...}'
    form = f"{OPEN_TAG}\n{call}\n{CLOSE_TAG}" if use.parser == "hermes" else f"[{call}]"
    if use.only_arguments:
        return "\n".join(["Answer with the arguments of this function, in JSON:", *lines])
    return "\n".join(["You may call these functions:", *lines, f"Write a call as\n{form}"])


def with_tool_text(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with a text at the end of the system message, or as one."""
    told = [dict(message) for message in messages]
    if told and told[0].get("role") == "system":
        told[0]["content"] = f"{told[0]['content']}\n\n{text}"
        return told
    return [{"role": "system", "content": text}, *told]


def as_plain_text(message: Mapping[str, Any], parser: ParserName) -> dict[str, Any]:
    """A message with calls, or a tool's answer, for templates that know neither."""
    plain = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
    if message.get("role") == "tool":
        return plain | {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    if not (calls := message.get("tool_calls")):
        return plain
    written = [
        json.dumps(
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
            ensure_ascii=False,
        )
        for call in calls
    ]
    if parser == "hermes":
        text = "\n".join(f"{OPEN_TAG}\n{each}\n{CLOSE_TAG}" for each in written)
    else:
        text = f"[{', '.join(written)}]"
    return plain | {"content": "\n".join(filter(None, (message.get("content"), text)))}


def read_arguments(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose calls have their arguments as objects, which is what templates write.

    Raises:
        RequestError: a call has no name, or arguments that are not a JSON object.
    """
    if not (calls := message.get("tool_calls")):
        return message
    where = f"messages.{index}.tool_calls"
    read = []
    try:
        for call in calls:
            function = dict(call["function"])
            given = function.get("arguments") or "{}"
            arguments = json.loads(given) if isinstance(given, str) else given
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                raise TypeError
            read.append({**call, "function": {**function, "arguments": arguments}})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{where} must be a list of calls, each with function.name and function.arguments, "
            "the text of a JSON object.",
            param=where,
        ) from error
    return {**message, "tool_calls": read}
