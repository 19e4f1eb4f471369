"""The Ray cluster that replicas run on, and what each of them asks of it."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.autoscale import Bounds
from vdiff_kserve.distributed.replica import Loader, Replica, ReplicaModel
from vdiff_kserve.engine import RoundObserver
from vdiff_kserve.setting import ConfigError, parse_size

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that this process starts. Messages are small and never come near it."""


class Membership:
    """This process in the cluster at `config.ray_address`, or in one that it starts here.

    A thread of its own joins, which takes seconds, stays and leaves: Linux kills what such a one
    runs as soon as the thread that started it ends, and Ray would then wait a minute
    for it. Until `leave` was called the program does not end.

    Attributes:
        joined: done when the process is in it; a ConfigError when it is not there.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.joined: Future[None] = Future()
        self.joined.set_running_or_notify_cancel()  # who waits may give up, Ray does not
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(config,), name="ray-membership")
        self._thread.start()

    def leave(self, *, wait: bool = True) -> None:
        """Leave the cluster, as soon as this process is in it; one that it started ends.

        Args:
            wait: until it is done.
        """
        self._leaves.set()
        if wait:
            self._thread.join()

    def _stay(self, config: ServerConfig) -> None:
        try:
            _join(config)
        except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
            self.joined.set_exception(error)
            return
        self.joined.set_result(None)
        self._leaves.wait()
        ray.shutdown()


def _join(config: ServerConfig) -> None:
    """Join the cluster, or start one.

    Raises:
        ConfigError: there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else every other program comes first
    own: dict[str, Any] = {}
    if _is_own(config):
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        own = {
            "include_dashboard": config.ray_dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(address=config.ray_address or "local", logging_level="WARNING", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray_address: {error}") from error


def own_address(config: ServerConfig) -> str:
    """Where the replicas' machines reach this one."""
    return "127.0.0.1" if _is_own(config) else str(ray.util.get_node_ip_address())


def _is_own(config: ServerConfig) -> bool:
    """Whether this process starts the cluster, on this machine."""
    return config.ray_address in (None, "local")


def keep_signal_handlers() -> None:
    """Let SIGTERM mean again what it meant before this process joined, which gives it to Ray.

    On the main thread only; others have no handlers to keep.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@dataclass(frozen=True)
class ReplicaResources:
    """What one replica asks of the cluster; Ray gives it to nobody else.

    Attributes:
        num_gpus: GPUs, all on one machine.
        memory: bytes; None asks for none.
    """

    num_gpus: float
    num_cpus: float
    memory: int | None

    @classmethod
    def of(cls, config: ServerConfig, cluster: Mapping[str, float]) -> ReplicaResources:
        """As configured; by itself a GPU for each rank, where the cluster has GPUs."""
        gpus = config.replica_gpus
        if gpus is None:
            has_gpus = config.device != "cpu" and cluster.get("GPU", 0) >= 1
            gpus = float(config.tensor_parallel_size) if has_gpus else 0.0
        memory = config.replica_memory
        return cls(gpus, config.replica_cpus, parse_size(memory) if memory else None)

    def start(self, config: ServerConfig, loader: Loader) -> Any:
        """The actor of a new replica, which Ray places where there is room, now or later."""
        actor = ray.remote(Replica).options(
            num_gpus=self.num_gpus,
            num_cpus=self.num_cpus,
            memory=self.memory,
            max_restarts=0,
        )
        return actor.remote(config, partial(load_beside_others, loader))


def load_beside_others(
    loader: Loader, config: ServerConfig, observer: RoundObserver
) -> ReplicaModel:
    """Load a replica's model, with its part only of the host memory that is for caches.

    It runs in the replica's process.
    """
    context = ray.get_runtime_context()
    machine = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    most = Bounds.parse(config.replicas or "1").high
    number = replicas_beside(context.get_assigned_resources(), machine["Resources"], most)
    share = config.cpu_memory_utilization / number
    return loader(replace(config, cpu_memory_utilization=share), observer)


def replicas_beside(own: Mapping[str, float], machine: Mapping[str, float], most: int) -> int:
    """Replicas that a machine may have to hold, one included.

    Args:
        own: Ray's resources of one replica.
        machine: those of the machine.
        most: replicas that there are at all.
    """
    fitting = (int(machine.get(name, 0) / amount) for name, amount in own.items() if amount)
    return max(1, min([most, *fitting]))
