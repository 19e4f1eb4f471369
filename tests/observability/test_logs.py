"""Lines of the log for people and for programs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from vdiff_kserve.observability.logs import FORMAT, TRACE_ID, JsonLines, TextLines
from vdiff_kserve.openai.request_ids import trace_of

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def traced() -> Iterator[None]:
    token = TRACE_ID.set(TRACE)
    yield
    TRACE_ID.reset(token)


def record(message: str, *args: object, name: str = "kserve.vdiff", **more: object):
    made = logging.LogRecord(name, logging.INFO, "", 0, message, args, None)
    made.created = 1_700_000_000.25
    vars(made).update(more)
    return made


def as_json(made: logging.LogRecord) -> dict[str, object]:
    (line,) = JsonLines().format(made).splitlines()
    return json.loads(line)


def test_a_line_of_json_says_when_how_bad_who_and_what() -> None:
    assert as_json(record("%d of\n%s", 2, "é")) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "kserve.vdiff",
        "message": "2 of\né",
    }


def test_it_has_what_the_record_tells_besides(traced: None) -> None:
    line = as_json(record("x", fields={"status": 200, "seconds": 0.5}))
    assert line["status"] == 200
    assert line["seconds"] == 0.5
    assert line["trace_id"] == TRACE


def test_an_exception_stays_within_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = record("It failed.", exc_info=sys.exc_info())
    exception = as_json(made)["exception"]
    assert exception.startswith("Traceback")
    assert exception.endswith("ValueError: why")


def test_an_access_line_has_its_parts() -> None:
    args = ("1.2.3.4:5", "GET", "/v1/models", "1.1", 200)
    line = as_json(record('%s - "%s %s HTTP/%s" %d', *args, name="uvicorn.access"))
    assert line["message"] == '1.2.3.4:5 - "GET /v1/models HTTP/1.1" 200'
    assert [line[key] for key in ("client", "method", "path", "status")] == [*args[:3], 200]


def test_a_line_for_people_ends_with_its_trace(traced: None) -> None:
    assert TextLines(FORMAT).format(record("done")).endswith(f"kserve.vdiff: done trace_id={TRACE}")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"01-{TRACE}-b7ad6b7169203331-00-more", TRACE),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", ""),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"ff-{TRACE}-b7ad6b7169203331-01", ""),
        (f"00-{TRACE}\n-b7ad6b7169203331-01", ""),
        (TRACE, ""),
        (None, ""),
    ],
)
def test_only_a_well_formed_traceparent_names_a_trace(header: str | None, found: str) -> None:
    assert trace_of(header) == found
