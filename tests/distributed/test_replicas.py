"""Two replicas behind one front end answer as one engine does, whatever happens to them."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx
import pytest

from tests.distributed.replicas import (
    ReplicatedServer,
    complete,
    long_requests,
    mixed_requests,
    stream,
)
from tests.waiting import post_until_it_runs, wait_until
from vdiff_kserve import LLM, SamplingParams


def expected(llm: LLM, bodies: list[dict[str, Any]]) -> list[str]:
    prompts = [body["prompt"] for body in bodies]
    params = [SamplingParams(**{k: v for k, v in b.items() if k != "prompt"}) for b in bodies]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [each.outputs[0].text for each in outputs]


async def test_replicas_answer_as_one_engine(server: ReplicatedServer, one_engine: LLM) -> None:
    bodies = mixed_requests(60)
    assert await complete(server.url, bodies) == expected(one_engine, bodies)


async def test_a_killed_replica_costs_a_pause(server: ReplicatedServer, one_engine: LLM) -> None:
    bodies = long_requests(20)
    lost = server.metric("vdiff_replica_losses_total")
    replayed = server.metric("vdiff_requests_replayed_total")
    assert await stream(server.url, bodies, server.kill_one) == expected(one_engine, bodies)
    assert server.metric("vdiff_replica_losses_total") == lost + 1
    assert server.metric("vdiff_requests_replayed_total") > replayed
    server.wait_for_replicas(2)


@pytest.mark.slow
async def test_a_replica_that_stands_still_is_replaced(
    server: ReplicatedServer, one_engine: LLM
) -> None:
    bodies = long_requests(4)
    pid = server.pids()[0]
    texts = await stream(server.url, bodies, lambda: os.kill(pid, signal.SIGSTOP))
    assert texts == expected(one_engine, bodies)
    wait_until(lambda: pid not in server.pids())
    server.wait_for_replicas(2)


async def test_a_rolling_restart_fails_no_request(
    server: ReplicatedServer, one_engine: LLM
) -> None:
    before = set(server.pids())
    bodies = long_requests(12)

    def restart() -> None:
        assert httpx.post(f"{server.url}/admin/restart").status_code == 202
        server.wait_for_line("All replicas are new")

    assert await stream(server.url, bodies, restart) == expected(one_engine, bodies)
    server.wait_for_replicas(2)
    assert not before & set(server.pids())


def test_a_client_that_leaves_frees_its_place_on_the_replica(server: ReplicatedServer) -> None:
    body = {"prompt": "x", "max_tokens": 240, "block_length": 240, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}):
        wait_until(lambda: server.metric("vdiff_replica_requests_running") == 1)
    wait_until(lambda: server.metric("vdiff_replica_requests_running") == 0)
    assert server.metric("vdiff_outstanding_tokens") == 0


def test_replicas_are_no_less_urgent_than_the_server(server: ReplicatedServer) -> None:
    """Ray's own niceness lets any busy program on the machine stop them."""
    own = os.getpriority(os.PRIO_PROCESS, server.process.pid)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in server.pids()] == [own, own]


def test_deadlines_reach_the_replica(server: ReplicatedServer) -> None:
    body = {"prompt": "x", "max_tokens": 240, "block_length": 8, "ignore_eos": True}
    assert post_until_it_runs(f"{server.url}/v1/completions", body).status_code == 504


def test_the_rounds_of_all_replicas_are_counted(server: ReplicatedServer) -> None:
    before = server.metric("vdiff_forwards_total")
    body = {"prompt": "xyz", "max_tokens": 6, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    wait_until(lambda: server.metric("vdiff_forwards_total") == before + 6)


@pytest.mark.slow
def test_a_hangup_restarts_the_replicas(server: ReplicatedServer) -> None:
    started = server.metric("vdiff_replica_starts_total")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.metric("vdiff_replica_starts_total") == started + 2)
    server.wait_for_line("All replicas are new")


@pytest.mark.slow
def test_ray_that_is_not_there_is_told_in_one_line() -> None:
    with ReplicatedServer("--replicas", "1", "--ray_address", "auto") as process:
        assert process.wait(120) == 1
    assert "Traceback" not in process.output
    assert process.lines[-1].startswith("error: --ray_address: ")


async def test_a_server_that_is_ended_finishes_its_answers_and_all_its_processes(
    server: ReplicatedServer, one_engine: LLM
) -> None:
    """The last test of the module."""
    pids = server.pids()
    bodies = long_requests(12)
    assert await stream(server.url, bodies, server.terminate) == expected(one_engine, bodies)
    assert server.wait() == 0
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))  # noqa: PTH110
