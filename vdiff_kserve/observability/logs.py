"""What the process logs, and what it leaves out."""

from __future__ import annotations

import copy
import json
import logging
import logging.config
import re
import warnings
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from kserve.logging import KSERVE_LOG_CONFIG, configure_logging
from yaml import YAMLError

from vdiff_kserve.setting import ConfigError

QUIET = re.compile(r"/(|health|ping|metrics|v2/health/\w+|v[12]/models/[^/]+(/ready)?)(\?.*)?$")
"""Paths of probes and scrapes: their successes come every few seconds and say nothing."""

TALKATIVE = ("torchao", "torch.utils._pytree")
"""What warns while torchao is imported, of kernels that this server does not use."""

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")
"""The trace that the request at hand belongs to, if its client told of one."""


def says_nothing(method: object, path: object, status: object) -> bool:
    """Whether a request is a probe or a scrape that succeeded."""
    return method == "GET" and status == 200 and QUIET.fullmatch(str(path)) is not None


def access_of(record: logging.LogRecord) -> dict[str, object] | None:
    """What a line of uvicorn's access log tells; None for another line."""
    if not isinstance(record.args, tuple) or len(record.args) != 5:
        return None
    client, method, path, _, status = record.args
    return {"client": client, "method": method, "path": path, "status": status}


class QuietProbes(logging.Filter):
    """Drops the access log's lines of successful probes and scrapes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is worth a look."""
        access = access_of(record)
        return access is None or not says_nothing(
            access["method"], access["path"], access["status"]
        )


class TextLines(logging.Formatter):
    """A line for people, with the trace of a request that has one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, without a traceback."""
        trace_id = TRACE_ID.get()
        return super().formatMessage(record) + (f" trace_id={trace_id}" if trace_id else "")


class JsonLines(logging.Formatter):
    """A line for programs: one JSON object with `time`, `level`, `logger`, `message`, where there
    are, `trace_id` and `exception`, and what the record's `fields` tell besides."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.name == "uvicorn.access":
            line |= access_of(record) or {}
        line |= getattr(record, "fields", {})
        if trace_id := TRACE_ID.get():
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, config_file: str | None = None, line_format: str = "text") -> None:
    """Set up the loggers of KServe, uvicorn and this project (`kserve.vdiff`).

    Args:
        level: least severity that is logged.
        config_file: a logging configuration that takes the place of all this.
        line_format: `text`, or `json` for lines of JSON on standard output, also of warnings and
            other libraries. Progress bars stay on standard error.

    Raises:
        ConfigError: that file cannot be used.
    """
    if config_file is not None:
        try:
            configure_logging(config_file)
        except (OSError, ValueError, KeyError, RuntimeError, YAMLError) as error:
            raise ConfigError(f"--log_config_file {config_file} cannot be used: {error}") from error
        return
    # KServe's choice of response class; there is nothing for an operator to do about it.
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
    settings = copy.deepcopy(KSERVE_LOG_CONFIG)
    settings["filters"] = {"quiet_probes": {"()": QuietProbes}}
    settings["handlers"]["uvicorn_access"]["filters"] = ["quiet_probes"]
    settings["formatters"]["kserve"] |= {"()": TextLines, "fmt": FORMAT}
    loggers = settings["loggers"]
    loggers["kserve"]["level"] = level.upper()
    loggers["kserve.trace"]["level"] = level.upper()
    loggers["uvicorn.access"]["level"] = level.upper()
    loggers["uvicorn"]["level"] = "DEBUG" if level == "debug" else "WARNING"
    loggers["uvicorn.error"]["level"] = loggers["uvicorn"]["level"]
    for name in TALKATIVE:
        loggers[name] = {"level": "ERROR"}
    if line_format == "json":
        _write_json(settings)
        logging.captureWarnings(capture=True)
    logging.config.dictConfig(settings)


def _write_json(settings: dict[str, Any]) -> None:
    """Let every handler of these settings, and one for all other loggers, write lines of JSON."""
    settings["formatters"]["json"] = {"()": JsonLines}
    settings["handlers"]["others"] = {"class": "logging.StreamHandler"}
    for handler in settings["handlers"].values():
        handler |= {"formatter": "json", "stream": "ext://sys.stdout"}
    settings["root"] = {"handlers": ["others"], "level": "WARNING"}
