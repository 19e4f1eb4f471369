"""Replicas over minutes and machines: many requests, nodes that end, kills without pattern."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster
from tqdm import tqdm

from tests.distributed.replicas import (
    ReplicatedServer,
    complete,
    long_requests,
    mixed_requests,
    stream,
)
from tests.distributed.test_replicas import expected
from tests.distributed.test_tensor_parallel import ranks_of
from tests.waiting import wait_until
from vdiff_kserve import LLM
from vdiff_kserve.distributed.ticket import MAX_LOSSES

pytestmark = pytest.mark.slow

SOAK_SECONDS = float(os.environ.get("VDIFF_SOAK_SECONDS", "300"))
KILLS = 50


@pytest.fixture(scope="module")
def three(arguments: tuple[str, ...]) -> Iterator[ReplicatedServer]:
    with ReplicatedServer(*arguments, "--replicas", "3") as process:
        process.wait_until_ready()
        process.wait_for_replicas(3)
        yield process


async def test_three_replicas_answer_200_requests_as_one_engine(
    three: ReplicatedServer, one_engine: LLM
) -> None:
    bodies = mixed_requests(200)
    assert await complete(three.url, bodies) == expected(one_engine, bodies)


async def test_random_kills_lose_nothing(three: ReplicatedServer, one_engine: LLM) -> None:
    chosen = random.Random(8)
    bodies = long_requests(8) + mixed_requests(24)
    texts = expected(one_engine, bodies)
    answered = 0
    # Kills since each client's requests began: one that loses too many replicas is given up.
    survived = [0] * 4
    stopped = asyncio.Event()

    async def client(number: int) -> None:
        nonlocal answered
        mine = slice(number, None, len(survived))
        while not stopped.is_set():
            survived[number] = 0
            assert await stream(three.url, bodies[mine]) == texts[mine]
            answered += len(bodies[mine])

    async def kill() -> None:
        for _ in tqdm(range(KILLS), unit="kill"):
            await asyncio.sleep(chosen.uniform(0.5, 1.5) * SOAK_SECONDS / KILLS)
            await asyncio.to_thread(wait_until, lambda: max(survived) < MAX_LOSSES - 1)
            if pids := three.pids():
                survived[:] = [kills + 1 for kills in survived]
                os.kill(chosen.choice(pids), signal.SIGKILL)
        stopped.set()

    async with asyncio.TaskGroup() as group:
        for number in range(len(survived)):
            group.create_task(client(number))
        group.create_task(kill())
    assert answered > 0
    three.wait_for_replicas(3)


async def test_a_replica_whose_engine_hangs_is_replaced_with_all_its_processes(
    arguments: tuple[str, ...], one_engine: LLM
) -> None:
    """Its engine waits inside a round, as for a GPU that hangs; its actor's loop is well."""
    bodies = long_requests(4)
    own = ("--replicas", "1", "--tensor_parallel_size", "2")
    with ReplicatedServer(*arguments, *own) as server:
        server.wait_until_ready()
        server.wait_for_replicas(1)
        (pid,) = server.pids()
        (rank,) = ranks_of(pid)
        assert await stream(server.url, bodies, rank.suspend) == expected(one_engine, bodies)
        assert "Replica 0 is lost: its engine is stuck in a round" in server.output
        assert pid not in server.pids()
        wait_until(lambda: not rank.is_running())


@pytest.fixture
def cluster(ray_token: None) -> Iterator[Cluster]:
    """A Ray of three nodes, the head without cores."""
    memory = {"object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        nodes.add_node(num_cpus=1, **memory)
    yield nodes
    nodes.shutdown()


async def test_a_killed_node_loses_nothing(
    cluster: Cluster, arguments: tuple[str, ...], one_engine: LLM
) -> None:
    bodies = long_requests(20)
    own = ("--replicas", "2", "--replica_cpus", "1", "--ray_address", cluster.address)
    with ReplicatedServer(*arguments, *own) as server:
        server.wait_until_ready()
        wait_until(lambda: server.num_ready == 2)
        node = next(iter(cluster.worker_nodes))

        def kill() -> None:
            cluster.remove_node(node, allow_graceful=False)
            wait_until(lambda: server.metric("vdiff_replica_losses_total") == 1)

        assert await stream(server.url, bodies, kill) == expected(one_engine, bodies)
        assert server.num_ready == 1
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        wait_until(lambda: server.num_ready == 2)
