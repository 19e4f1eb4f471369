"""`python -m vdiff_kserve`: serve a diffusion language model."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdiff_kserve.config import ServerConfig

QUESTION = "What is 17 + 25?"

LOOKS = 20_000
"""How often one of torch's threads looks for work before it sleeps: long enough for most waits
within a round. OpenMP's own number is 300,000; where other programs want the processors too,
threads that have work would wait behind threads that only look for some."""


def main() -> int:
    """Serve until a signal comes. Returns the process's exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)  # until the server, which ends in order, has its own
    let_threads_sleep()
    gc.disable()  # all that is imported stays: searching it for garbage takes half a second
    from vdiff_kserve import cpu_library
    from vdiff_kserve.config import parse_args

    config = parse_args()
    cpu_library.begin()  # while the rest is imported
    from vdiff_kserve.loading import check_before_loading
    from vdiff_kserve.model import DiffusionModel
    from vdiff_kserve.models import CheckpointError
    from vdiff_kserve.observability import logs
    from vdiff_kserve.ports import ServerError
    from vdiff_kserve.server import Server
    from vdiff_kserve.setting import ConfigError

    gc.freeze()  # nor is it searched while requests wait
    gc.enable()
    model = DiffusionModel(config)
    code = 0
    try:
        if config.kserve.configure_logging:
            logs.configure(config.log_level, config.kserve.log_config_file, config.log_format)
        check_before_loading(config)
        Server(config, model).run(lambda url: announce(config, url))
    except (CheckpointError, ConfigError, ServerError) as error:
        sys.stderr.write(f"error: {error}\n")
        code = 1
    if model.loading:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Python's own exit can crash under a thread that is inside torch
    gc.freeze()  # the process ends: searching all of it for garbage takes another second
    return code


def let_threads_sleep() -> None:
    """Let threads that wait for work sleep soon, unless the environment says how they wait. This
    has to be said before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(LOOKS))


def leave(*_: object) -> None:
    """End the process on a signal, from wherever it is.

    An exception instead would be raised inside of whatever is being imported or begun; gRPC and
    torch crash when that is cut off.
    """
    os._exit(0)


def announce(config: ServerConfig, url: str) -> None:
    """Tell the person who started the server where it is and what to try; to programs that read
    its log, where it is."""
    if config.log_format == "json":
        logging.getLogger("kserve.vdiff").info("%s is ready at %s", config.model_name, url)
        return
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64})
    key = "-H 'Authorization: Bearer YOUR_API_KEY' " if config.api_key else ""
    sys.stdout.write(
        f"{config.model_name} is ready at {url}\nTry:\n"
        f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
