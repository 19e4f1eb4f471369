"""A short request among long ones, over HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.load import Answer, Client, Prompt, out_of_step, percentiles
from benchmarks.serving_server import Rounds, scrape

START_LIMIT_S = 300
POLL_S = 0.05
LONGEST_PAUSE_S = 0.25


async def short_among_long(
    url: str,
    long_client: Client,
    short_client: Client,
    long: Sequence[Prompt],
    short: Sequence[Prompt],
    on_probe: Callable[[], object],
) -> dict[str, Any]:
    """Time to the first chunk of short requests, in rounds, while long ones run.

    Each long prompt is asked again and again by a client of its own, all out of step. The short
    ones come one at a time with random pauses, so that they meet rounds at any moment.

    Raises:
        SystemExit: a request failed, so that there is nothing to measure.
    """
    rng = random.Random(0)
    begun: list[None] = []
    loops = [
        asyncio.create_task(
            _keep_asking(long_client, out_of_step(prompt, rng), prompt, lambda: begun.append(None))
        )
        for prompt in long
    ]
    answers: list[Answer] = []
    try:
        await _until_running(url, len(long), begun, loops)
        before = await asyncio.to_thread(scrape, url)
        for prompt in short:
            await asyncio.sleep(rng.uniform(0, LONGEST_PAUSE_S))
            answers.append(await short_client.ask(short_client.encode(prompt)))
            on_probe()
        after = await asyncio.to_thread(scrape, url)
    finally:
        for loop in loops:
            loop.cancel()
        ended = await asyncio.gather(*loops, return_exceptions=True)
    failed = [answer.error or "no text" for answer in answers if not answer.arrivals]
    failed += [str(each) for each in ended if not isinstance(each, asyncio.CancelledError)]
    if failed:
        raise SystemExit(f"Requests failed: {failed[0]}")
    rounds = Rounds.between(before, after)
    first = percentiles([answer.first_text for answer in answers])
    return {
        "long_requests": len(long),
        "short_requests": len(short),
        "round_seconds": rounds.mean_seconds,
        "rows_per_round": rounds.rows / rounds.count if rounds.count else 0.0,
        "time_to_first_text": first,
        "in_rounds": {q: value / rounds.mean_seconds for q, value in first.items()},
    }


async def _keep_asking(
    client: Client, first: Prompt, prompt: Prompt, on_first: Callable[[], object]
) -> None:
    answer = await client.ask(client.encode(first))
    on_first()
    request = client.encode(prompt)
    while answer.error is None:
        answer = await client.ask(request)
    raise RuntimeError(answer.error)


async def _until_running(
    url: str, rows: int, begun: Sequence[None], loops: Sequence[asyncio.Task[None]]
) -> None:
    """Wait until the server decodes all long requests.

    Raises:
        SystemExit: they failed, or do not all run in time.
    """
    limit = time.monotonic() + START_LIMIT_S
    running = 0.0
    while len(begun) < rows or running < rows:
        if failed := next((loop for loop in loops if loop.done()), None):
            raise SystemExit(f"A long request failed: {failed.exception()}")
        if time.monotonic() > limit:
            raise SystemExit(f"Only {running:.0f} of {rows} long requests run.")
        await asyncio.sleep(POLL_S)
        running = (await asyncio.to_thread(scrape, url))["vdiff_requests_running", ""]
