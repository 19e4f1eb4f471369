"""The access log in a format of the operator's own, by the package asgi-logger."""

from __future__ import annotations

import logging
import re
from typing import Any

from asgi_logger.middleware import AccessLogAtoms, AccessLoggerMiddleware
from fastapi import FastAPI

from vdiff_kserve.observability.logs import says_nothing
from vdiff_kserve.observability.requests import CLIENT_CLOSED

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What could end a line, or move a terminal's cursor."""


UNNAMED = re.compile(r"%(?!\()")
"""A placeholder that would show everything there is, the environment too."""

SAMPLE_SCOPE: dict[str, Any] = {
    "http_version": "1.1",
    "method": "GET",
    "root_path": "",
    "path": "/",
    "query_string": b"",
    "headers": [],
    "client": ("127.0.0.1", 1),
}
SAMPLE_INFO: dict[str, Any] = {"response": {"status": 200}, "start_time": 0.0, "end_time": 0.0}


def check_format(line_format: str) -> None:
    """Write a line of this format to nowhere.

    Raises:
        ValueError: it is no format.
    """
    if UNNAMED.search(line_format.replace("%%", "")):
        raise ValueError("each % must have a name, as in %(s)s, or be %%")
    try:
        line_format % AccessLogAtoms(SAMPLE_SCOPE, SAMPLE_INFO)
    except TypeError as error:
        raise ValueError(str(error)) from error


def install(app: FastAPI, line_format: str) -> None:
    """Let `app` write a line of this format for every request, refused ones too, in place of
    uvicorn's; add it after all other middleware.

    Args:
        line_format: of https://github.com/Kludex/asgi-logger#usage.
    """
    logging.getLogger("uvicorn.access").handlers = []
    logging.getLogger("uvicorn.access").propagate = False
    app.add_middleware(AccessLog, format=line_format)
    logging.getLogger("access").propagate = False  # the middleware gave it a handler


class AccessLog(AccessLoggerMiddleware):  # type: ignore[misc]
    """One line for each request that is worth a look, also when its client left early."""

    def log(self, scope: Any, info: Any) -> None:
        """Write the line of a request that is over."""
        status = info["response"].setdefault("status", CLIENT_CLOSED)
        if not says_nothing(scope["method"], scope["path"], status):
            super().log(scope | {"path": CONTROL.sub("_", scope["path"])}, info)
