"""From a chat's answer to a response: whole, or as the events that OpenAI's clients follow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.job import Job
from vdiff_kserve.openai.protocol import (
    ChatCompletionChunk,
    ChatLogprobs,
    DiffusionInfo,
    FinishReason,
    Usage,
)
from vdiff_kserve.openai.response_objects import (
    IncompleteDetails,
    InputTokensDetails,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    TokenLogprob,
)
from vdiff_kserve.openai.responses import ChatWriter, FinishedAnswer, in_one_line
from vdiff_kserve.openai.tool_answers import calls_before_text
from vdiff_kserve.openai.tool_fields import FunctionCall, ToolCall, ToolCallDelta


class ResponseWriter:
    """Writes `response` objects."""

    def __init__(self, job: Job, request: ResponsesRequest) -> None:
        self.id = f"resp_{job.request_id}"
        self._job = job
        self._request = request
        self._created = int(time.time())

    def response(self, answers: Sequence[FinishedAnswer]) -> ResponseObject:
        """The whole response."""
        chat = ChatWriter(self._job).response(answers)
        (choice,) = chat.choices
        status = status_of(choice.finish_reason)
        calls = [self.call(call, status) for call in choice.message.tool_calls or ()]
        output: list[OutputItem] = [*calls]
        if choice.message.content or not calls:
            told = _logprobs(choice.logprobs)
            text = OutputText(text=choice.message.content or "", logprobs=told)
            tools = self._job.tools if calls else None
            place = 0 if tools is None else calls_before_text(answers[0].text, tools)
            output.insert(place, self.message(status, text))
        return self.object(status, output, chat.usage, chat.vdiff)

    def message(self, status: Status, text: OutputText | None = None) -> OutputMessage:
        """The item that holds the text."""
        content = [] if text is None else [text]
        return OutputMessage(id=f"msg_{self._job.request_id}", status=status, content=content)

    def call(self, call: ToolCall, status: Status) -> OutputFunctionCall:
        """The item that is a call."""
        return OutputFunctionCall(
            id=f"fc_{call.id}",
            call_id=call.id,
            name=call.function.name,
            arguments=call.function.arguments,
            status=status,
        )

    def object(
        self,
        status: Status,
        output: Sequence[OutputItem] = (),
        usage: Usage | None = None,
        info: DiffusionInfo | None = None,
        error: str | None = None,
    ) -> ResponseObject:
        """The response as it stands."""
        request, decoding = self._request, self._job.decoding
        return ResponseObject(
            id=self.id,
            created_at=self._created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            error=ResponseError(message=error) if error is not None else None,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self._job.model,
            output=list(output),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning=request.reasoning or {},
            temperature=decoding.temperature,
            text=request.text or {"format": {"type": "text"}},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_logprobs=decoding.top_logprobs or 0,
            top_p=decoding.top_p,
            usage=_usage(usage) if usage is not None else None,
            user=request.user,
            vdiff=info,
        )


def status_of(finish_reason: FinishReason) -> Status:
    """How a response ended whose answer ended so."""
    return "incomplete" if finish_reason == "length" else "completed"


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def _logprobs(told: ChatLogprobs | None) -> list[TokenLogprob] | None:
    return None if told is None else [TokenLogprob.of_chat(each) for each in told.content]


class ResponseEvents:
    """The events of one streamed response, numbered from 0."""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer
        self._number = 0
        self._text = ""
        self._logprobs: list[TokenLogprob] | None = None
        self._message_index: int | None = None
        self._calls: list[tuple[int, OutputFunctionCall]] = []
        self._status: Status = "in_progress"

    def begin(self) -> Iterator[str]:
        """What is told before there is an answer."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._dumped("in_progress"))

    def chunk(self, chunk: ChatCompletionChunk) -> Iterator[str]:
        """What a chunk of the chat tells; the last one has the usage."""
        for choice in chunk["choices"]:
            text, told = choice["delta"].get("content", ""), _logprobs(choice["logprobs"])
            if text or told:
                yield from self._delta(text, told)
            for call in choice["delta"].get("tool_calls", ()):
                yield from self._call(call)
            if choice["finish_reason"] is not None:
                self._status = status_of(choice["finish_reason"])
        if "usage" in chunk:
            yield from self._close(chunk)

    def error(self, error: RequestError) -> Iterator[str]:
        """That it went wrong after it had begun."""
        self._status = "failed"
        response = self._writer.object("failed", self._items(), error=error.message)
        yield self._event("response.failed", response=response.model_dump())

    def end(self) -> Iterator[str]:
        """Nothing: the last event says that it is the last."""
        yield from ()

    def _open(self) -> Iterator[str]:
        self._message_index = len(self._calls)
        yield self._of_item("added", self._message_index, self._writer.message("in_progress"))
        yield self._part("added", OutputText())

    def _call(self, delta: ToolCallDelta) -> Iterator[str]:
        if delta.id is not None:
            function = FunctionCall(name=delta.function.name or "", arguments="")
            begun = self._writer.call(ToolCall(id=delta.id, function=function), "in_progress")
            self._calls.append((len(self._calls) + (self._message_index is not None), begun))
            yield self._of_item("added", *self._calls[-1])
        if delta.function.arguments:
            index, call = self._calls[-1]
            call.arguments += delta.function.arguments
            where = {"item_id": call.id, "output_index": index}
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, **where, delta=delta.function.arguments)

    def _delta(self, text: str, logprobs: list[TokenLogprob] | None) -> Iterator[str]:
        if self._message_index is None:
            yield from self._open()
        self._text += text
        if logprobs is not None:
            self._logprobs = [*(self._logprobs or ()), *logprobs]
        if text:
            told = [each.model_dump() for each in logprobs or ()]
            yield self._in_text("response.output_text.delta", delta=text, logprobs=told)

    def _close(self, chunk: ChatCompletionChunk) -> Iterator[str]:
        if self._message_index is None and not self._calls:
            yield from self._open()
        if self._message_index is not None:
            told = [each.model_dump() for each in self._logprobs or ()]
            yield self._in_text("response.output_text.done", text=self._text, logprobs=told)
            yield self._part("done", self._whole_text())
        items, info = self._items(), chunk["vdiff"]
        assert isinstance(info, DiffusionInfo)
        for index, item in enumerate(items):
            if isinstance(item, OutputFunctionCall):
                where = {"item_id": item.id, "output_index": index, "name": item.name}
                kind = "response.function_call_arguments.done"
                yield self._event(kind, **where, arguments=item.arguments)
            yield self._of_item("done", index, item)
        response = self._writer.object(self._status, items, chunk["usage"], info)
        yield self._event(f"response.{self._status}", response=response.model_dump())

    def _items(self) -> list[OutputItem]:
        status: Status = "incomplete" if self._status == "failed" else self._status
        items: list[OutputItem] = [
            call.model_copy(update={"status": status}) for _, call in self._calls
        ]
        if self._message_index is not None:
            items.insert(self._message_index, self._writer.message(status, self._whole_text()))
        return items

    def _of_item(self, what: str, index: int, item: OutputItem) -> str:
        kind = f"response.output_item.{what}"
        return self._event(kind, output_index=index, item=item.model_dump())

    def _whole_text(self) -> OutputText:
        return OutputText(text=self._text, logprobs=self._logprobs)

    def _part(self, what: str, text: OutputText) -> str:
        return self._in_text(f"response.content_part.{what}", part=text.model_dump())

    def _in_text(self, kind: str, **fields: Any) -> str:
        where = {"item_id": self._writer.message("in_progress").id}
        index = self._message_index
        return self._event(kind, **where, output_index=index, content_index=0, **fields)

    def _dumped(self, status: Status) -> dict[str, Any]:
        return self._writer.object(status).model_dump()

    def _event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {in_one_line(json.dumps(data, ensure_ascii=False))}\n\n"
