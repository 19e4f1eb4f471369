"""What replicas ask of the machines that they run on, and how they share them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.cluster import ReplicaResources, replicas_beside
from vdiff_kserve.distributed.replica import ReplicaModel
from vdiff_kserve.distributed.start import listen, start_replicas
from vdiff_kserve.engine import RoundObserver, bytes_per_token
from vdiff_kserve.loading import load_model
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.setting import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
    ("changes", "cluster", "expected"),
    [
        ({}, {"CPU": 8}, (0, 1, None)),
        ({}, {"CPU": 8, "GPU": 4}, (1, 1, None)),
        ({"tensor_parallel_size": 2}, {"GPU": 4}, (2, 1, None)),
        ({"device": "cpu"}, {"GPU": 4}, (0, 1, None)),
        ({"replica_gpus": 0.5, "replica_cpus": 4.0}, {"GPU": 4}, (0.5, 4, None)),
        ({"replica_memory": "2GiB"}, {}, (0, 1, 2 * GIB)),
    ],
)
def test_a_replica_asks_for_what_is_configured(
    changes: dict[str, object], cluster: Mapping[str, float], expected: tuple[object, ...]
) -> None:
    config = ServerConfig(replicas="2", **changes)
    assert ReplicaResources.of(config, cluster) == ReplicaResources(*expected)


@pytest.mark.parametrize(
    ("own", "number"),
    [
        ({"CPU": 2.0}, 4),
        ({"CPU": 0.5}, 6),
        ({"CPU": 1.0, "memory": 3.0 * GIB}, 2),
        ({"CPU": 1.0, "GPU": 1.0}, 1),
        ({}, 6),
        ({"CPU": 16.0}, 1),
    ],
)
def test_a_machine_holds_as_many_as_its_scarcest_resource_allows(
    own: Mapping[str, float], number: int
) -> None:
    machine = {"CPU": 8.0, "GPU": 1.0, "memory": 7.0 * GIB, "node:10.0.0.1": 1.0}
    assert replicas_beside(own, machine, most=6) == number


@pytest.mark.parametrize("share", [0.5, 0.125])
def test_a_cache_on_a_cpu_takes_its_share_of_what_is_free(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 64 * 2**20

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    engine = load_model(
        ServerConfig(
            device="cpu",
            dtype="float32",
            enable_apd=False,
            max_num_seqs=4096,
            cpu_memory_utilization=share,
        )
    ).engine
    engine.stop()
    per_token = bytes_per_token(engine.spec.decoder, torch.float32)
    assert engine.kv_tokens_total == int(Memory.available * share) // per_token


async def test_a_port_for_the_replicas_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--replica_port {port} on 127\.0\.0\.1"):
            listen(ServerConfig(replicas="1", replica_port=port))


async def test_replicas_call_where_the_configuration_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listener = listen(ServerConfig(replicas="1", replica_port=port))
    with listener.invite() as (invitation, _):
        assert (invitation.host, invitation.port) == ("127.0.0.1", port)
    listener.close()


def tell_share(config: ServerConfig, observer: RoundObserver) -> ReplicaModel:
    """A loader that fails with what it was given."""
    raise CheckpointError(f"a share of {config.cpu_memory_utilization}")


@pytest.mark.slow
async def test_replicas_of_one_machine_share_its_memory() -> None:
    config = ServerConfig(replicas="2:4", replica_cpus=0.5, cpu_memory_utilization=0.8)
    with pytest.raises(CheckpointError, match=r"a share of 0\.2$"):
        await start_replicas(config, loader=tell_share)


@pytest.mark.slow
def test_a_cluster_that_nobody_waits_for_any_more_ends_in_order() -> None:
    """Ray would wait a minute for one whose processes had ended with the thread that started it."""
    code = (
        "from vdiff_kserve.config import ServerConfig\n"
        "from vdiff_kserve.distributed.cluster import Membership\n"
        "membership = Membership(ServerConfig(replicas='1'))\n"
        "membership.leave(wait=False)\n"
        "membership.joined.result()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert "Failed to connect to GCS" not in ended.stderr
