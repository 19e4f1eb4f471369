"""A closed loop of streamed completions over HTTP, and what it measured.

The client shares the machine with the server, so it does next to nothing per chunk: plain sockets,
one search for the end of an event, one look at the clock. Only the last event of an answer is read
as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/completions"
FULL_LENGTH = {"ignore_eos": True, "logits_eos_inf": True}
"""Answers as long as they were asked to be, with text to their end: a model that may write the end
of text fills the rest of an answer with it, whole blocks in one step."""
PERCENTILES = (50, 95, 99)
LARGEST_EVENT = 1 << 20
REQUEST_LIMIT_S = 1800
ERROR_LENGTH = 200
MOST_OUT_OF_STEP = 64


@dataclass(frozen=True)
class Prompt:
    """One request of the load: token ids, and how many new tokens to write."""

    token_ids: tuple[int, ...]
    max_tokens: int


def workload(
    count: int,
    seed: int,
    token_ids: Sequence[int],
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
    context: int,
) -> list[Prompt]:
    """Random prompts of mixed lengths, uniform between the given bounds (both included).

    Args:
        token_ids: what prompts are made of.
        context: most tokens of prompt and answer together; longer prompts are cut to fit.
    """
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        new = min(rng.randint(*new_tokens), context - 1)
        length = min(rng.randint(*prompt_tokens), context - new)
        prompts.append(Prompt(tuple(rng.choices(token_ids, k=length)), new))
    return prompts


def out_of_step(prompt: Prompt, rng: random.Random) -> Prompt:
    """The prompt with a short answer of random length. Rows that begin together reach the ends of
    their blocks together; asked first, this spreads them as arrivals do."""
    return replace(prompt, max_tokens=rng.randint(1, MOST_OUT_OF_STEP))


@dataclass
class Answer:
    """One request as the client saw it; times are of `time.perf_counter`.

    Attributes:
        arrivals: when each chunk with text came.
        tokens: tokens of the answer, as the server counts them.
        passes: forward passes that the answer took part in.
        decoding: how it was decoded.
        error: why there is no whole answer.
    """

    began: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    passes: int = 0
    decoding: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def first_text(self) -> float:
        """Seconds from sending the request to its first committed text."""
        return self.arrivals[0] - self.began

    @property
    def seconds_per_token(self) -> float:
        """The whole request's time over its tokens."""
        return (self.ended - self.began) / self.tokens


@dataclass(frozen=True)
class Load:
    """What a closed loop measured.

    Attributes:
        seconds: from the first request to the end of the last answer.
        client_seconds: processor time that the client itself used meanwhile.
    """

    concurrency: int
    seconds: float
    client_seconds: float
    answers: Sequence[Answer]

    @property
    def whole(self) -> list[Answer]:
        """The answers that came without an error."""
        return [answer for answer in self.answers if answer.error is None]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.whole)

    @property
    def errors(self) -> Counter[str]:
        """How often each error came."""
        return Counter(answer.error for answer in self.answers if answer.error is not None)

    def summary(self) -> dict[str, Any]:
        """The figures of a level, times in seconds."""
        whole = self.whole
        chunks = sum(len(answer.arrivals) for answer in whole)
        passes = sum(answer.passes for answer in whole)
        gaps = [later - earlier for answer in whole for earlier, later in pairwise(answer.arrivals)]
        return {
            "concurrency": self.concurrency,
            "requests": len(self.answers),
            "errors": dict(self.errors),
            "seconds": self.seconds,
            "prompt_tokens": sum(answer.prompt_tokens for answer in whole),
            "tokens": self.tokens,
            "chunks": chunks,
            "forward_passes": passes,
            "tokens_per_second": self.tokens / self.seconds,
            "requests_per_second": len(whole) / self.seconds,
            "tokens_per_forward": self.tokens / passes if passes else 0.0,
            "tokens_per_chunk": self.tokens / chunks if chunks else 0.0,
            "time_to_first_text": percentiles([a.first_text for a in whole if a.arrivals]),
            "time_per_token": percentiles([a.seconds_per_token for a in whole if a.tokens]),
            "inter_chunk": percentiles(gaps),
            "client_share_of_a_core": self.client_seconds / self.seconds,
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99; empty when there is nothing to rank."""
    return {f"p{q}": percentile(values, q) for q in PERCENTILES} if values else {}


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which `q` percent lie, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class Client:
    """Asks one server for streamed completions of exact length.

    Args:
        base_url: `http://host:port` of the server.
        fields: what every request says beside its prompt and length.
    """

    def __init__(self, base_url: str, model: str, fields: dict[str, Any] | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"the address must be http://host:port, got {base_url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/") + PATH
        self._body = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **FULL_LENGTH,
            **(fields or {}),
        }

    def encode(self, prompt: Prompt) -> bytes:
        """The request as it goes over the wire."""
        body = json.dumps(
            {**self._body, "prompt": prompt.token_ids, "max_tokens": prompt.max_tokens}
        ).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + body

    async def ask(self, request: bytes) -> Answer:
        """Send an encoded request and read its stream to the end; never raises for the server."""
        answer = Answer(began=time.perf_counter())
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                await self._exchange(request, answer)
        except asyncio.IncompleteReadError:
            answer.error = "the stream ended early"
        except TimeoutError:
            answer.error = f"no end within {REQUEST_LIMIT_S} s"
        except OSError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended = time.perf_counter()
        return answer

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=LARGEST_EVENT)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.split(b" ", 2)[1]
            if status != b"200":
                text = (await reader.read()).decode(errors="replace")
                answer.error = f"{status.decode()}: {_message(text)}"
                return
            await _read_events(reader, answer)
        finally:
            writer.close()


async def _read_events(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Note the arrivals of a stream's events, and read what the last one tells.

    Events end with an empty line. Between them lie the lengths of HTTP's chunks, which need no
    reading: JSON has no line breaks, so nothing within an event looks like its end.
    """
    last = b""
    while True:
        event = await reader.readuntil(b"\n\n")
        now = time.perf_counter()
        if b'"choices":[{' in event:
            if b'"text":""' not in event:
                answer.arrivals.append(now)
        elif b"data: [DONE]" in event:
            break
        elif b"data: {" in event:
            last = event
    if not last:
        answer.error = "the stream has no usage"
        return
    data = json.loads(last[last.index(b"{") :])
    if "error" in data:
        answer.error = str(data["error"]["message"])[:ERROR_LENGTH]
        return
    answer.prompt_tokens = data["usage"]["prompt_tokens"]
    answer.tokens = data["usage"]["completion_tokens"]
    answer.passes = data["vdiff"]["nfe"]
    answer.decoding = data["vdiff"]["decoding"]


def _message(body: str) -> str:
    """What a refusal says, without the lengths of HTTP's chunks around it."""
    start, end = body.find("{"), body.rfind("}") + 1
    try:
        return str(json.loads(body[start:end])["error"]["message"])[:ERROR_LENGTH]
    except (ValueError, KeyError, TypeError):
        return body[:ERROR_LENGTH]


async def closed_loop(
    client: Client,
    prompts: Sequence[Prompt],
    concurrency: int,
    on_answer: Callable[[], object] = lambda: None,
) -> Load:
    """Keep `concurrency` requests in flight until all prompts are answered, in their order."""
    waiting: Iterator[bytes] = iter([client.encode(prompt) for prompt in prompts])
    answers: list[Answer] = []

    async def worker() -> None:
        for request in waiting:
            answers.append(await client.ask(request))
            on_answer()

    used, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    return Load(concurrency, seconds, time.process_time() - used, answers)
