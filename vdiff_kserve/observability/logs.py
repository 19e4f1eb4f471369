"""What the process logs, and what it leaves out."""

from __future__ import annotations

import copy
import logging
import logging.config
import re
import warnings

from kserve.logging import KSERVE_LOG_CONFIG, configure_logging
from yaml import YAMLError

from vdiff_kserve.setting import ConfigError

QUIET = re.compile(r"/(|health|ping|metrics|v2/health/\w+|v[12]/models/[^/]+(/ready)?)(\?.*)?$")
"""Paths of probes and scrapes: their successes come every few seconds and say nothing."""

TALKATIVE = ("torchao", "torch.utils._pytree")
"""What warns while torchao is imported, of kernels that this server does not use."""

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def says_nothing(method: object, path: object, status: object) -> bool:
    """Whether a request is a probe or a scrape that succeeded."""
    return method == "GET" and status == 200 and QUIET.fullmatch(str(path)) is not None


class QuietProbes(logging.Filter):
    """Drops the access log's lines of successful probes and scrapes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is worth a look."""
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return True
        _, method, path, _, status = record.args
        return not says_nothing(method, path, status)


def configure(level: str, config_file: str | None = None) -> None:
    """Set up the loggers of KServe, uvicorn and this project (`kserve.vdiff`).

    Args:
        level: least severity that is logged.
        config_file: a logging configuration that takes the place of all this.

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
    settings["formatters"]["kserve"]["fmt"] = FORMAT
    loggers = settings["loggers"]
    loggers["kserve"]["level"] = level.upper()
    loggers["kserve.trace"]["level"] = level.upper()
    loggers["uvicorn.access"]["level"] = level.upper()
    loggers["uvicorn"]["level"] = "DEBUG" if level == "debug" else "WARNING"
    loggers["uvicorn.error"]["level"] = loggers["uvicorn"]["level"]
    for name in TALKATIVE:
        loggers[name] = {"level": "ERROR"}
    logging.config.dictConfig(settings)
