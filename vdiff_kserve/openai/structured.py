"""From a request's fields to the grammar that its answer must match."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, grammar_from
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.engine import GrammarError, Grammars
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.openai.errors import RequestError, shorten, unavailable
from vdiff_kserve.openai.json_schemas import SchemaError, closed, enforceable
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.protocol import GenerationFields
from vdiff_kserve.openai.structured_fields import StructuredOutputs

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

AS_DUMPED: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
}
"""JSON as Python's `json.dumps` writes it: models know it well, and it leaves no choice of spaces,
so that names and signs are forced."""
COMPACT: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
}
logger = logging.getLogger("kserve.vdiff.openai")

COMPILING_THREADS = 4
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must match.

    Attributes:
        field: the request field that asks for it, for refusals.
        grammar: as llguidance reads it.
    """

    field: str
    grammar: str


def answer_format(request: GenerationFields, limits: ServingLimits) -> AnswerFormat | None:
    """The format that a request asks for; None when any text will do.

    Raises:
        RequestError: the fields contradict each other, or what they hold is too long or no grammar.
    """
    form, outputs = request.response_format, request.structured_outputs
    asks = form is not None and form.type != "text"
    if asks and outputs is not None:
        raise RequestError(
            "response_format and structured_outputs both say what the answer must match; give one "
            "of them.",
            param="structured_outputs",
        )
    if outputs is not None:
        with impossible_refused("structured_outputs"):
            return AnswerFormat("structured_outputs", _of_outputs(outputs, limits))
    if form is None or not asks:
        return None
    if form.type == "json_object":
        return AnswerFormat("response_format", json_grammar({"type": "object"}))
    if form.json_schema is None or form.json_schema.json_schema is None:
        missing = "json_schema" if form.json_schema is None else "json_schema.schema"
        raise RequestError(
            f"response_format has the type json_schema, so its field {missing} must be given.",
            param="response_format",
        )
    schema = form.json_schema.json_schema
    check_size("response_format", schema, limits)
    with impossible_refused("response_format"):
        return AnswerFormat("response_format", json_grammar(schema))


def json_grammar(schema: Mapping[str, Any], options: JsonCompileOptions = AS_DUMPED) -> str:
    """The grammar of JSON that a schema describes.

    Args:
        options: how it is written.

    Raises:
        SchemaError: it cannot be enforced.
    """
    return LLMatcher.grammar_from_json_schema(enforceable(schema), overrides=options)


@contextmanager
def impossible_refused(field: str) -> Iterator[None]:
    """Tell a schema that cannot be enforced as a `RequestError` that names its field."""
    try:
        yield
    except SchemaError as error:
        raise _unusable(field, str(error)) from error


def check_size(field: str, text: Any, limits: ServingLimits) -> None:
    """Refuse what is too long to be compiled.

    Raises:
        RequestError: naming the field and what is allowed.
    """
    length = len(text if isinstance(text, str) else json.dumps(text))
    if length > limits.max_schema_bytes:
        raise RequestError(
            f"{field} must have at most {limits.max_schema_bytes} characters "
            f"(--max_schema_bytes), got {length}.",
            param=field,
        )


def _of_outputs(outputs: StructuredOutputs, limits: ServingLimits) -> str:
    field = "structured_outputs"
    if outputs.structural_tag is not None:
        raise RequestError(
            "structured_outputs.structural_tag is not supported; write a grammar instead.",
            param=field,
        )
    given = {
        "json": outputs.json_schema,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "grammar": outputs.grammar,
        "json_object": outputs.json_object or None,
    }
    named = [kind for kind in KINDS if given[kind] is not None]
    if len(named) != 1:
        raise RequestError(
            f"structured_outputs must have exactly one of {', '.join(KINDS)}, got "
            f"{' and '.join(named) or 'none'}.",
            param=field,
        )
    (kind,) = named
    check_size(field, given[kind], limits)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(outputs.regex or "")
    if kind == "choice":
        if not outputs.choice:
            raise RequestError("structured_outputs.choice must not be empty.", param=field)
        return grammar_from("choice", json.dumps(outputs.choice))
    if kind == "grammar":
        try:
            return grammar_from("grammar", outputs.grammar or "")
        except ValueError as error:
            raise _unusable(field, str(error)) from error
    schema = {"type": "object"} if kind == "json_object" else _schema(outputs.json_schema)
    if outputs.disable_additional_properties:
        schema = closed(schema)
    return json_grammar(schema, _options(outputs))


def _options(outputs: StructuredOutputs) -> JsonCompileOptions:
    if outputs.whitespace_pattern is not None:
        return {"whitespace_pattern": outputs.whitespace_pattern}
    return COMPACT if outputs.disable_any_whitespace else AS_DUMPED


def _schema(given: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given or "")
    except (ValueError, RecursionError) as error:
        raise _unusable("structured_outputs", f"json is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _unusable("structured_outputs", "json must be an object")
    return schema


def _unusable(field: str, reason: str) -> RequestError:
    return RequestError(f"{field} cannot be used: {shorten_reason(reason)}.", param=field)


def shorten_reason(reason: str) -> str:
    """A library's reason in one line that does not grow with the request."""
    line = " ".join(reason.split())
    return line.rstrip(".") if len(line) <= 300 else line[:300] + "..."


def load_grammars(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, limits: ServingLimits
) -> Grammars | None:
    """What compiles the grammars of a model's requests; None for the rare tokenizer that it cannot
    read."""
    try:
        return Grammars(tokenizer, limits.vocab_size, spec.end_token_ids, limits.max_model_len)
    except GrammarError as error:
        logger.warning("Structured output and forced tool calls are off: %s.", error)
        return None


class FormatCompiler:
    """Compiles formats on threads of its own, each within a deadline.

    Args:
        grammars: None when there are none, and every format is refused.
        seconds: how long one may take, once its turn has come, and how long it may wait for that.
    """

    def __init__(self, grammars: Grammars | None, seconds: float) -> None:
        self._grammars = grammars
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="vdiff-grammar")

    async def compile(self, wanted: AnswerFormat, room: int) -> None:
        """Have a format ready for the engine.

        Args:
            room: tokens of the answer, in which its shortest text should fit.

        Raises:
            RequestError: it cannot be used, or takes too long, or none of the threads is free in
                time.
        """
        grammars = self._known()
        if grammars.has(wanted.grammar, room):
            return
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def compile_one() -> None:
            loop.call_soon_threadsafe(begun.set)
            grammars.compile(wanted.grammar, room)

        running = loop.run_in_executor(self._threads, compile_one)
        try:
            await asyncio.wait_for(begun.wait(), self._seconds)
            await asyncio.wait_for(running, self._seconds)
        except TimeoutError as error:
            if not begun.is_set():
                raise unavailable(
                    "Too many other formats are being compiled. Try again later."
                ) from error
            raise _unusable(
                wanted.field, f"it is too complex to compile in {self._seconds:g} s"
            ) from error
        except GrammarError as error:
            raise _unusable(wanted.field, str(error)) from error
        finally:
            running.cancel()

    def check_room(self, wanted: AnswerFormat, room: int, field: str) -> None:
        """Refuse an answer that is too short for what it must match.

        Args:
            field: the request field that bounds the answer.

        Raises:
            RequestError: naming that field and how much is needed.
        """
        try:
            shortest = len(self._known().compile(wanted.grammar).shortest)
        except GrammarError as error:
            raise _unusable(wanted.field, str(error)) from error
        if shortest > room:
            raise RequestError(
                f"{field} must leave room for {shortest} tokens, the shortest answer that matches "
                f"{wanted.field}; there is room for {shorten(room)}.",
                param=field,
            )

    def _known(self) -> Grammars:
        if self._grammars is None:
            raise RequestError(
                "This model's tokenizer cannot be used with grammars; the server's log has the "
                "reason.",
                param="response_format",
            )
        return self._grammars
