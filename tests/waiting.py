"""Waiting for what becomes true without telling anybody."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Return as soon as `condition` holds; fail when it has not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def post_until_it_runs(url: str, body: dict[str, Any]) -> httpx.Response:
    """The answer to a request whose time is short, but not over before it got a place.

    How long that takes is the machine's affair, so the time is doubled until it is enough.
    """
    for doublings in range(7):
        response = httpx.post(url, json=body | {"timeout": 0.05 * 2**doublings}, timeout=60)
        if response.status_code != 503:
            break
    return response
