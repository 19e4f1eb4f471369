"""Refusals: their status, their body, and how each protocol tells them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from itertools import takewhile
from typing import Any

from grpc import StatusCode  # type: ignore[import-untyped]
from grpc_interceptor.exceptions import GrpcException
from kserve.protocol.rest.openai.errors import OpenAIError

from vdiff_kserve.engine import (
    EngineError,
    EngineStoppedError,
    GrammarError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    RequestTooLargeError,
)
from vdiff_kserve.openai.protocol import ErrorInfo, ErrorResponse

logger = logging.getLogger("kserve.vdiff.openai")

RETRY_AFTER_SECONDS = 1
MAX_REPORTED_ERRORS = 5
MAX_READ_ERRORS = 100
"""Of those that pydantic finds, of which a long body may have millions."""
FORMS = {
    "prompt": "a text, a list of texts, a list of token ids from 0 on, or a list of such lists",
    "stop": "a text or a list of texts",
    "messages.content": "a text or a list of parts",
    "prediction.content": "a text or a list of parts",
    "input": "a text or a list of items",
    "structured_outputs.json": "a schema, as an object or as text",
    "tool_choice": "none, auto, required, or an object that names a function",
}
"""Fields of several forms -> all of them, where pydantic would say of each why it does not fit."""
PARAMETER = "a number, a text, true or false; a list or an object is written as its JSON text"
"""What a parameter of KServe's V2 may be."""
FLAT = ("prompt", "stop")
"""Those in whose forms nothing has a name, so that the forms alone say what is wrong."""
MAX_INPUT_SHOWN = 80

TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
    HTTPStatus.GATEWAY_TIMEOUT: "TimeoutError",
}
GRPC_STATUS = {
    HTTPStatus.BAD_REQUEST: StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: StatusCode.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED: StatusCode.UNIMPLEMENTED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.TOO_MANY_REQUESTS: StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.INTERNAL_SERVER_ERROR: StatusCode.INTERNAL,
    HTTPStatus.SERVICE_UNAVAILABLE: StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
}
RETRIABLE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class RequestError(OpenAIError, GrpcException):  # type: ignore[misc]
    """A request that is refused or failed, as every protocol of the server can tell it.

    Attributes:
        status: the HTTP status; `GRPC_STATUS` has its gRPC counterpart.
        response: the body in OpenAI's shape.
        counted: whether the metrics have it already.
    """

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        error_type: str | None = None,
        retry_after: int = RETRY_AFTER_SECONDS,
    ) -> None:
        GrpcException.__init__(self, details=message, status_code=GRPC_STATUS[status])
        self.status = status
        self.counted = False
        self._retry_after = retry_after
        self.response = ErrorResponse(
            error=ErrorInfo(
                message=message.encode(errors="backslashreplace").decode(),
                type=error_type or TYPES[status],
                param=param,
                code=status.value,
            )
        )

    @property
    def message(self) -> str:
        return str(self.response.error.message)

    @property
    def type(self) -> str:
        """The kind of refusal, in OpenAI's words."""
        return str(self.response.error.type)

    @property
    def param(self) -> str | None:
        """The field at fault."""
        param: str | None = self.response.error.param
        return param

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the refusal."""
        if self.status is HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self._retry_after)} if self.status in RETRIABLE else {}


def nested_too_deep(param: str = "body") -> RequestError:
    """The request's parts lie too deep in each other."""
    return RequestError(f"{param} is nested too deep.", param=param)


def unavailable(message: str) -> RequestError:
    """The server cannot answer now; later or elsewhere it may be possible."""
    return RequestError(message, status=HTTPStatus.SERVICE_UNAVAILABLE)


def unknown_model(name: str, known: Sequence[str]) -> RequestError:
    """The request names a model that is not here."""
    return RequestError(
        f"The model `{shorten(name)}` does not exist. This server has: {', '.join(known)}.",
        status=HTTPStatus.NOT_FOUND,
        param="model",
    )


def out_of_range(field: str, allowed: str, value: object) -> RequestError:
    """A field's value is not allowed; says what is."""
    return RequestError(f"{field} must be {allowed}, got {shorten(value)}.", param=field)


def invalid_body(errors: Sequence[Mapping[str, Any]], text: object = None) -> RequestError:
    """The body does not have the form of the request.

    Args:
        errors: pydantic's, or FastAPI's of a body that is not JSON.
        text: of such a body.
    """
    if isinstance(text, str) and errors[0]["type"] == "json_invalid":
        return _not_json(errors[0], text)
    telling = _telling(errors[:MAX_READ_ERRORS])
    lines = list(dict.fromkeys(f"{_location(e)}: {_message(e)}" for e in telling))
    if len(lines) > MAX_REPORTED_ERRORS:
        lines[MAX_REPORTED_ERRORS:] = [f"and {len(lines) - MAX_REPORTED_ERRORS} more"]
    return RequestError(
        "The request is not valid. " + "; ".join(lines),
        param=_location(telling[0]),
        error_type=HTTPStatus.BAD_REQUEST.phrase,
    )


def invalid_part(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The body, read a second time, does not have the form of the request. `errors` are pydantic's,
    which does not know that it is the body."""
    return invalid_body([{**error, "loc": ("body", *error["loc"])} for error in errors])


def _not_json(error: Mapping[str, Any], text: str) -> RequestError:
    """FastAPI tells the place as a number of characters from the beginning."""
    place = error["loc"][-1]
    before = text[:place] if isinstance(place, int) else text
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return RequestError(
        f"The request is not valid. body: {_message(error)} at line {line}, column {column}",
        param="body",
        error_type=HTTPStatus.BAD_REQUEST.phrase,
    )


def _telling(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a field of several forms, only the errors that come nearest to what was meant."""
    best: dict[tuple[int | str, ...], int] = {}
    for error in errors:
        best[_field(error)] = max(_nearness(error), best.get(_field(error), 0))
    return [error for error in errors if _nearness(error) == best[_field(error)]]


def _nearness(error: Mapping[str, Any]) -> int:
    """A form that only this server refuses fits; one with something wrong inside fits nearly."""
    return 2 if error["type"] == "value_error" else int(_is_inside(error))


def _field(error: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where the field is: a location goes on with the form, and with a place in it."""
    return tuple(takewhile(lambda part: not _is_type(part), error["loc"]))


def _is_inside(error: Mapping[str, Any]) -> bool:
    return len(error["loc"]) > len(_field(error)) + 1


def _location(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return "body"
    parts = error["loc"][: _last_form(error)] if _form(error) else error["loc"]
    return shorten(".".join(str(part) for part in parts if not _is_type(part)))


def _last_form(error: Mapping[str, Any]) -> int | None:
    """Where in a location the innermost field's form stands; None for a field of one form."""
    places = [i for i, part in enumerate(error["loc"]) if _is_type(part)]
    return places[-1] if places else None


def _form(error: Mapping[str, Any]) -> str | None:
    """What a field of several forms may be; None where something inside it is wrong."""
    at = _last_form(error)
    names = [part for part in error["loc"][:at] if isinstance(part, str) and not _is_type(part)]
    name = ".".join(names).removeprefix("body.")
    is_inside = at is not None and len(error["loc"]) > at + 1
    if at is None or error["type"] == "value_error" or (is_inside and name not in FLAT):
        return None
    return PARAMETER if name.startswith("parameters.") else FORMS.get(name)


def _message(error: Mapping[str, Any]) -> str:
    """Pydantic's words, but for those that speak of Python's types to a writer of JSON."""
    if form := _form(error):
        return f"Input should be {form}{'' if _is_inside(error) else _given(error)}"
    if error["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return f"Input should be an object{_given(error)}"
    return f"{error['msg']}{_given(error)}"


def _is_type(part: int | str) -> bool:
    """Whether a part of a location names a member of a union, which says nothing to a client."""
    if not isinstance(part, str):
        return False
    return "[" in part or part[:1].isupper() or part in ("str", "int", "float", "bool", "bytes")


def _given(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if error["type"] == "json_invalid":
        return f" ({error['ctx']['error']})" if "ctx" in error else ""
    if value is None or isinstance(value, dict | list | bytes):
        return ""
    return f", got {shorten(value)}"


def shorten(value: object) -> str:
    """The value's text, cut when it is long: an answer must not grow with what was sent."""
    text = repr(value) if isinstance(value, str) and (" " in value or not value) else str(value)
    return text if len(text) <= MAX_INPUT_SHOWN else text[:MAX_INPUT_SHOWN] + "..."


def from_engine(error: EngineError) -> RequestError:
    """The refusal that stands for an error of the engine."""
    if isinstance(error, QueueFullError):
        return RequestError(str(error), status=HTTPStatus.TOO_MANY_REQUESTS)
    if isinstance(error, GrammarError):
        return RequestError(f"The answer's grammar cannot be used: {error}.")
    if isinstance(error, RequestTooLargeError):
        return RequestError(str(error), param="max_tokens")
    if isinstance(error, QueueTimeoutError):
        return unavailable(str(error))
    if isinstance(error, RequestTimeoutError):
        return RequestError(str(error), status=HTTPStatus.GATEWAY_TIMEOUT, param="timeout")
    if isinstance(error, EngineStoppedError):
        return unavailable("The server is stopping or its engine is down. Try again later.")
    return RequestError(str(error), status=HTTPStatus.INTERNAL_SERVER_ERROR)


def internal_error() -> RequestError:
    """Something broke that should not have; the log has it."""
    return RequestError(
        "Internal server error. The server's log has the cause.",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
    )


@contextmanager
def told_as_request_error() -> Iterator[None]:
    """Turn whatever goes wrong inside into a `RequestError`.

    This is the boundary between the server's own faults and its clients: an unexpected exception is
    logged with its traceback and told as a bare 500. Left alone it would reach KServe's generic
    handler, which shows the exception to the client and costs it the connection.
    """
    try:
        yield
    except RequestError:
        raise
    except EngineError as error:
        raise from_engine(error) from error
    except Exception as error:
        logger.exception("A request failed unexpectedly.")
        raise internal_error() from error


@contextmanager
def nesting_refused() -> Iterator[None]:
    """Tell a request whose parts lie too deep in each other to be read that it is so."""
    try:
        yield
    except RecursionError as error:
        raise nested_too_deep() from error


@contextmanager
def counted_here() -> Iterator[None]:
    """Mark refusals from inside as counted: nobody else counts them on their way out."""
    try:
        yield
    except RequestError as error:
        error.counted = True
        raise
