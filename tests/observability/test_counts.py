"""A real server's counters against what its clients saw."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.observability.scrape import Counts, Page
from tests.server.process import ServerProcess
from tests.waiting import wait_until

LONG = {"prompt": "the tale", "max_tokens": 400, "ignore_eos": True, "profile": "exact"}
"""A request of 400 forward passes: seconds, where an aborted one is gone at once."""
PROFILES = (
    {"profile": "exact"},
    {"profile": "fast"},
    {"policy": "threshold", "cache": "dual", "block_length": 8},
    {"policy": "apd", "max_tokens": 16},
)
NAMES = (
    "vdiff_prompt_tokens_total",
    "vdiff_generation_tokens_total",
    "vdiff_time_to_first_text_seconds_count",
    "vdiff_request_latency_seconds_count",
    "vdiff_queue_time_seconds_count",
    "vdiff_answer_generation_tokens_sum",
    "vdiff_answer_prompt_tokens_count",
    "vdiff_inter_chunk_seconds_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:e2e_request_latency_seconds_count",
)
LABELLED = (
    *(("vdiff_request_success_total", {"endpoint": e}) for e in ("chat", "completion", "v1", "v2")),
    *(("vdiff_answers_total", {"finish_reason": r}) for r in ("stop", "length", "abort", "error")),
    *(("vllm:request_success_total", {"finished_reason": r}) for r in ("stop", "length")),
    *(
        ("vdiff_forwards_total", {"kind": kind})
        for kind in ("refresh", "reuse", "commit", "auxiliary")
    ),
)


@dataclass
class Seen:
    """What one client saw of its requests."""

    counts: dict[str, float] = field(default_factory=dict)

    def add(self, key: str, count: float = 1) -> None:
        self.counts[key] = self.counts.get(key, 0) + count

    def response(self, endpoint: str, response: Any) -> None:
        """A whole response of OpenAI's."""
        self.request(endpoint, response.usage, response.vdiff, 1)
        for choice in response.choices:
            self.answer(choice.finish_reason)

    def stream(self, endpoint: str, chunks: list[Any]) -> None:
        """All chunks of one stream; the last has usage and cost."""
        self.request(endpoint, chunks[-1].usage, chunks[-1].vdiff, 1)
        texts = [choice for chunk in chunks for choice in chunk.choices]
        for choice in texts:
            if choice.finish_reason is not None:
                self.answer(choice.finish_reason)
        self.add("chunks", sum(bool(choice.text) for choice in texts) - 1)

    def request(self, endpoint: str, usage: Any, vdiff: Any, answers: int) -> None:
        self.add(f"vdiff_request_success_total/{endpoint}")
        self.add("vdiff_prompt_tokens_total", usage.prompt_tokens)
        self.add("vdiff_generation_tokens_total", usage.completion_tokens)
        for kind, count in vdiff["passes"].items():
            self.add(f"vdiff_forwards_total/{kind}", count)

    def answer(self, finish_reason: str) -> None:
        self.add(f"vdiff_answers_total/{finish_reason}")


def ask(client: OpenAI, seen: Seen, number: int) -> None:
    """One of many different requests."""
    extra = PROFILES[number % len(PROFILES)]
    text = f"What is {number} + 25?"
    common: dict[str, Any] = {"model": "llada", "max_tokens": 24, "seed": number}
    if number % 3 == 0:
        messages = [{"role": "user", "content": text}]
        request = common | {"messages": messages, "n": 1 + number % 2, "temperature": 0.5}
        seen.response("chat", client.chat.completions.create(**request, extra_body=extra))
    elif number % 3 == 1:
        request = common | {"prompt": [text, "Sort 5, 3, 9."]}
        seen.response("completion", client.completions.create(**request, extra_body=extra))
    else:
        request = common | {"prompt": text, "stream": True}
        options = {"include_usage": True}
        chunks = client.completions.create(**request, stream_options=options, extra_body=extra)
        seen.stream("completion", list(chunks))


def total(seen: list[Seen]) -> dict[str, float]:
    keys = {key for each in seen for key in each.counts}
    return {key: sum(each.counts.get(key, 0) for each in seen) for key in keys}


def test_a_hundred_requests_are_counted_as_their_clients_counted_them(
    server: ServerProcess,
) -> None:
    counts = Counts(server.url, *((name, {}) for name in NAMES), *LABELLED)
    seen = [Seen() for _ in range(100)]
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda number: ask(client, seen[number], number), range(100)))
    mine = total(seen)
    answers = sum(mine.get(f"vdiff_answers_total/{reason}", 0) for reason in ("stop", "length"))
    # The engine counts a round after it has sent what the round made final.
    passes = [key for key in mine if key.startswith("vdiff_forwards_total")]
    wait_until(lambda: {k: counts.read()[k] for k in passes} == {k: mine[k] for k in passes})
    theirs = counts.read()
    assert {key: theirs[key] for key in mine if key != "chunks"} == {
        key: value for key, value in mine.items() if key != "chunks"
    }
    assert mine["vdiff_request_success_total/chat"] == 34
    assert mine["vdiff_request_success_total/completion"] == 66
    assert mine["vdiff_forwards_total/auxiliary"] > 0
    assert mine["vdiff_forwards_total/reuse"] > 0
    assert theirs["vdiff_request_latency_seconds_count"] == 100
    assert theirs["vdiff_queue_time_seconds_count"] == answers
    assert theirs["vdiff_answer_prompt_tokens_count"] == answers
    assert theirs["vdiff_answer_generation_tokens_sum"] == mine["vdiff_generation_tokens_total"]
    assert theirs["vdiff_inter_chunk_seconds_count"] >= mine["chunks"]
    assert theirs["vdiff_answers_total/abort"] == theirs["vdiff_answers_total/error"] == 0
    for name in ("prompt_tokens_total", "generation_tokens_total"):
        assert theirs[f"vllm:{name}"] == theirs[f"vdiff_{name}"]
    for reason in ("stop", "length"):
        own = theirs[f"vdiff_answers_total/{reason}"]
        assert theirs[f"vllm:request_success_total/{reason}"] == own
    assert theirs["vllm:e2e_request_latency_seconds_count"] == 100
    assert_idle(server)


def assert_idle(server: ServerProcess) -> None:
    """Every gauge of what is going on returns to zero."""
    gauges = (
        "vdiff_requests_running",
        "vdiff_requests_waiting",
        "vdiff_kv_slots_used",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    )

    def idle() -> bool:
        page = Page(server.url)
        return all(page.value(name) == 0 for name in gauges)

    wait_until(idle)


def test_the_times_of_streams_are_what_the_client_saw(server: ServerProcess) -> None:
    """One request alone, so that the sums are its own."""
    names = (
        "vdiff_inter_chunk_seconds_count",
        "vdiff_inter_chunk_seconds_sum",
        "vdiff_time_to_first_text_seconds_sum",
        "vdiff_request_latency_seconds_sum",
        "vdiff_time_per_output_token_seconds_sum",
        "vdiff_queue_time_seconds_sum",
    )
    counts = Counts(server.url, *((name, {}) for name in names))
    started = time.perf_counter()
    body = LONG | {"stream": True, "block_length": 8, "max_tokens": 80, "temperature": 1}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line[6:7] == "{"]
    wait_until(lambda: counts.read()["vdiff_request_latency_seconds_sum"] > 0)
    seen = counts.read()
    assert seen["vdiff_inter_chunk_seconds_count"] == len(chunks) - 1
    first, latency = (
        seen["vdiff_time_to_first_text_seconds_sum"],
        seen["vdiff_request_latency_seconds_sum"],
    )
    assert 0 < first < latency
    assert first + seen["vdiff_inter_chunk_seconds_sum"] == pytest.approx(latency, rel=0.05)
    busy = latency - seen["vdiff_queue_time_seconds_sum"]
    assert seen["vdiff_time_per_output_token_seconds_sum"] * 80 == pytest.approx(busy, rel=0.01)
    assert latency <= time.perf_counter() - started
    assert_idle(server)


def test_v1_and_v2_count_each_instance_and_each_prompt(server: ServerProcess) -> None:
    counts = Counts(
        server.url,
        ("vdiff_request_success_total", {"endpoint": "v1"}),
        ("vdiff_request_success_total", {"endpoint": "v2"}),
        ("vdiff_generation_tokens_total", {}),
        ("vdiff_forwards_total", {}),
    )
    instances = [{"prompt": "What is 2 + 3?"}, {"prompt": "Sort 5, 3, 9.", "max_tokens": 8}]
    v1 = httpx.post(
        f"{server.url}/v1/models/llada:predict",
        json={"instances": instances, "parameters": {"max_tokens": 16}},
        timeout=60,
    ).json()["predictions"]
    prompts = {"name": "p", "datatype": "BYTES", "shape": [3], "data": ["a", "b", "c"]}
    v2 = httpx.post(
        f"{server.url}/v2/models/llada/infer",
        json={"inputs": [prompts], "parameters": {"max_tokens": 8}},
        timeout=60,
    ).json()["outputs"]
    outputs = {tensor["name"]: tensor["data"] for tensor in v2}
    tokens = sum(each["completion_tokens"] for each in v1) + sum(outputs["completion_tokens"])
    nfe = sum(each["nfe"] for each in v1) + sum(outputs["nfe"])
    wait_until(lambda: counts.read()["vdiff_forwards_total"] == nfe)
    assert counts.read() == {
        "vdiff_request_success_total/v1": 2,
        "vdiff_request_success_total/v2": 3,
        "vdiff_generation_tokens_total": tokens,
        "vdiff_forwards_total": nfe,
    }
    assert_idle(server)


def test_clients_that_leave_are_counted_apart(server: ServerProcess) -> None:
    series = [
        ("vdiff_answers_total", {"finish_reason": reason})
        for reason in ("stop", "length", "abort", "error")
    ]
    series += [
        ("vdiff_errors_total", {"type": "client_closed", "endpoint": "completion"}),
        ("vdiff_request_success_total", {}),
        ("vdiff_request_latency_seconds_count", {}),
        ("vdiff_prompt_tokens_total", {}),
        ("vllm:request_success_total", {"finished_reason": "abort"}),
    ]
    counts = Counts(server.url, *series)
    body = json.dumps(LONG | {"n": 2, "temperature": 1.0, "stream": True})
    url = httpx.URL(server.url)
    for _ in range(3):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(
                "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            wait_until(lambda: Page(server.url).value("vdiff_requests_running") == 2)
        wait_until(lambda: Page(server.url).value("vdiff_requests_running") == 0)
    wait_until(lambda: counts.read()["vdiff_errors_total/client_closed/completion"] == 3)
    seen = counts.read()
    assert seen["vdiff_answers_total/abort"] == 6
    assert seen["vllm:request_success_total/abort"] == 6
    assert seen["vdiff_prompt_tokens_total"] == 3 * len_of(server, LONG["prompt"])
    for name in ("stop", "length", "error"):
        assert seen[f"vdiff_answers_total/{name}"] == 0
    assert seen["vdiff_request_success_total"] == 0
    assert seen["vdiff_request_latency_seconds_count"] == 0
    assert_idle(server)


def len_of(server: ServerProcess, prompt: str) -> int:
    body = {"prompt": prompt, "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body).json()["usage"]["prompt_tokens"]


def test_refusals_are_counted_apart(server: ServerProcess) -> None:
    kinds = ("invalid_request", "queue_full", "internal")
    counts = Counts(
        server.url,
        *(("vdiff_errors_total", {"type": kind}) for kind in kinds),
        ("vdiff_request_success_total", {}),
        ("vdiff_prompt_tokens_total", {}),
    )
    with ThreadPoolExecutor(1) as pool:
        long = LONG | {"n": 4, "temperature": 1.0, "max_tokens": 96}
        running = pool.submit(httpx.post, f"{server.url}/v1/completions", json=long, timeout=120)
        wait_until(lambda: Page(server.url).value("vdiff_requests_running") == 4)
        bad = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "threshold": 7})
        assert bad.status_code == 400
        for _ in range(2):
            full = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["x"] * 12})
            assert full.status_code == 429
        assert counts.read()["vdiff_prompt_tokens_total"] > 0
        assert running.result().status_code == 200
    assert counts.read() == {
        "vdiff_errors_total/invalid_request": 1,
        "vdiff_errors_total/queue_full": 2,
        "vdiff_errors_total/internal": 0,
        "vdiff_request_success_total": 1,
        "vdiff_prompt_tokens_total": len_of(server, LONG["prompt"]),
    }
    assert_idle(server)
