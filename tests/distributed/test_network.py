"""A machine that is cut off: Ray nodes in two network namespaces, and the cable between them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.distributed.replicas import ReplicatedServer, long_requests, stream
from tests.distributed.test_replicas import expected
from tests.waiting import wait_until
from vdiff_kserve import LLM

pytestmark = pytest.mark.slow

NEAR, FAR = "10.213.77.1", "10.213.77.2"
SPACE, NEAR_END, FAR_END = "vdiff-far", "vdiff-near", "vdiff-far"
RAY = Path(sys.executable).parent / "ray"
MEMORY = 100 * 2**20


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def _cable() -> Iterator[None]:
    """A pair of network devices, one of them in a namespace of its own."""
    try:
        ip("netns", "add", SPACE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "add", NEAR_END, "type", "veth", "peer", "name", FAR_END, "netns", SPACE)
        ip("addr", "add", f"{NEAR}/30", "dev", NEAR_END)
        ip("link", "set", NEAR_END, "up")
        for arguments in (
            ("addr", "add", f"{FAR}/30", "dev", FAR_END),
            ("link", "set", FAR_END, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", SPACE, *arguments)
        yield
    finally:
        ip("netns", "del", SPACE)


@pytest.fixture
def cluster(_cable: None, ray_token: None) -> Iterator[Cluster]:
    """The head, at the near end."""
    own = {"num_cpus": 1, "node_ip_address": NEAR, "object_store_memory": MEMORY}
    nodes = Cluster(initialize_head=True, head_node_args=own)
    yield nodes
    nodes.shutdown()


@contextmanager
def far_node(cluster: Cluster) -> Iterator[None]:
    """A node at the far end."""
    node = subprocess.Popen(
        [
            "ip", "netns", "exec", SPACE, str(RAY), "start", f"--address={cluster.address}",
            f"--node-ip-address={FAR}", "--num-cpus=1", f"--object-store-memory={MEMORY}",
            "--disable-usage-stats", "--block",
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        node.terminate()
        node.wait(60)


async def test_a_machine_that_is_cut_off_loses_nothing(
    cluster: Cluster, arguments: tuple[str, ...], one_engine: LLM
) -> None:
    bodies = long_requests(20)
    own = ("--replicas", "2", "--replica_cpus", "1", "--ray_address", cluster.address)
    with far_node(cluster), ReplicatedServer(*arguments, *own) as server:
        server.wait_until_ready()
        wait_until(lambda: server.num_ready == 2)
        assert f"is ready on {FAR}" in server.output

        def cut() -> None:
            ip("link", "set", NEAR_END, "down")
            wait_until(lambda: server.metric("vdiff_replica_losses_total") == 1)

        assert await stream(server.url, bodies, cut) == expected(one_engine, bodies)
        assert server.num_ready == 1
        ip("link", "set", NEAR_END, "up")
        # Ray has given the old node up; it ends itself, and a new one takes its place.
        with far_node(cluster):
            wait_until(lambda: server.num_ready == 2)
            assert await stream(server.url, bodies) == expected(one_engine, bodies)
