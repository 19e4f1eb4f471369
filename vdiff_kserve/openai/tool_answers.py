"""The calls of a chat's answer, whole and as the deltas of a stream."""

from __future__ import annotations

from itertools import takewhile

from vdiff_kserve.openai.protocol import ChatDelta, ChatMessage, FinishReason
from vdiff_kserve.openai.tool_fields import FunctionCall, FunctionDelta, ToolCall, ToolCallDelta
from vdiff_kserve.openai.tool_parsers import Found, ToolParser, make_parser, parse_whole
from vdiff_kserve.openai.tools import ToolUse


def _parser(use: ToolUse) -> ToolParser:
    return make_parser(use.parser, use.names, only_arguments=use.only_arguments)


def message_of(text: str, use: ToolUse | None) -> ChatMessage:
    """The message that an answer is."""
    if use is None:
        return ChatMessage(content=text)
    said: list[str] = []
    calls: list[ToolCall] = []
    for found in parse_whole(_parser(use), text):
        if found.call is None:
            said.append(found.text)
        elif found.name is not None and found.call_id is not None:
            function = FunctionCall(name=found.name, arguments="")
            calls.append(ToolCall(id=found.call_id, function=function))
        else:
            calls[-1].function.arguments += found.text
    content = "".join(said)
    return ChatMessage(content=content if content or not calls else None, tool_calls=calls or None)


def calls_before_text(text: str, use: ToolUse) -> int:
    """How many calls an answer begins with before it says anything."""
    begun = (found.call for found in parse_whole(_parser(use), text))
    return len(set(takewhile(lambda call: call is not None, begun)))


def finish_reason_of(reason: FinishReason | None, *, has_calls: bool) -> FinishReason | None:
    """Why an answer ended, for one that calls functions or does not."""
    return "tool_calls" if has_calls and reason == "stop" else reason


class AnswerDeltas:
    """One streamed answer: pieces of text in, deltas out.

    Attributes:
        has_calls: whether a call has begun.
    """

    def __init__(self, use: ToolUse | None) -> None:
        self._parser = None if use is None else _parser(use)
        self._is_open = False
        self.has_calls = False

    def open(self) -> ChatDelta:
        """The role, before there is any text."""
        self._is_open = True
        return {"role": "assistant", "content": ""}

    def of(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        """The deltas that new text comes to; the answer's first one has the role and text, be it
        empty."""
        deltas = self._deltas(text, is_last=is_last)
        if not self._is_open and (deltas or is_last):
            self._is_open = True
            first = deltas.pop(0)["content"] if deltas and "content" in deltas[0] else ""
            deltas.insert(0, {"role": "assistant", "content": first})
        return deltas

    def _deltas(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        if self._parser is None:
            return [{"content": text}]
        found = self._parser.add(text) + (self._parser.finish() if is_last else [])
        return [self._delta(each) for each in found]

    def _delta(self, found: Found) -> ChatDelta:
        if found.call is None:
            return {"content": found.text}
        self.has_calls = True
        begins = found.name is not None
        call = ToolCallDelta(
            index=found.call,
            id=found.call_id,
            type="function" if begins else None,
            function=FunctionDelta(name=found.name, arguments=found.text),
        )
        return {"tool_calls": [call]}
