"""`python -m vdiff_kserve`: serve a diffusion language model."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys

from vdiff_kserve.config import ServerConfig, parse_args
from vdiff_kserve.setting import ConfigError

QUESTION = "What is 17 + 25?"


def main() -> int:
    """Serve until a signal comes. Returns the process's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = parse_args()

    gc.disable()  # all that is imported stays: searching it for garbage takes half a second
    from vdiff_kserve.model import DiffusionModel
    from vdiff_kserve.models import CheckpointError
    from vdiff_kserve.observability import logs
    from vdiff_kserve.server import Server, ServerError

    gc.freeze()  # nor is it searched while requests wait
    gc.enable()
    model = DiffusionModel(config)
    code = 0
    try:
        logs.configure(config.log_level, config.kserve.log_config_file)
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


def announce(config: ServerConfig, url: str) -> None:
    """Tell the person who started the server where it is and what to try."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64})
    sys.stdout.write(
        f"{config.model_name} is ready at {url}\nTry:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
