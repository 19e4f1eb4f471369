"""Metrics of an engine that is made of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Counter, Gauge

from vdiff_kserve.observability.families import MODEL

REPLICA = (*MODEL, "replica")
STATES = ("starting", "ready", "retiring")

REPLICAS = Gauge(
    "vdiff_replicas", "Replicas by state: starting, ready, retiring.", [*MODEL, "state"]
)
RUNNING = Gauge("vdiff_replica_requests_running", "Answers in a replica's batch.", REPLICA)
HELD = Gauge(
    "vdiff_replica_requests_held", "Answers that a replica has, its queue included.", REPLICA
)
WORK = Gauge(
    "vdiff_replica_outstanding_work",
    "Forward-pass tokens that a replica's answers will still cost, estimated.",
    REPLICA,
)
KV_USED = Gauge(
    "vdiff_replica_kv_slots_used",
    "Tokens of a replica's cache that running answers have reserved.",
    REPLICA,
)
OUTSTANDING = Gauge(
    "vdiff_outstanding_tokens", "Tokens of accepted answers that are not written yet.", MODEL
)
STARTED = Counter("vdiff_replica_starts", "Replicas that became ready.", MODEL)
LOST = Counter("vdiff_replica_losses", "Replicas that died or stopped answering.", MODEL)
REPLAYED = Counter(
    "vdiff_requests_replayed", "Answers that were begun again on another replica.", MODEL
)


class ReplicaNumbers(Protocol):
    """What is told of one replica."""

    @property
    def slot(self) -> int: ...

    @property
    def state_name(self) -> str: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_held(self) -> int: ...

    @property
    def outstanding(self) -> float: ...

    @property
    def kv_tokens_used(self) -> int: ...


def show(model_name: str, replicas: Sequence[ReplicaNumbers], outstanding_tokens: int) -> None:
    """Set the gauges."""
    states = [replica.state_name for replica in replicas]
    for state in STATES:
        REPLICAS.labels(model_name, state).set(states.count(state))
    OUTSTANDING.labels(model_name).set(outstanding_tokens)
    for replica in replicas:
        labels = model_name, str(replica.slot)
        RUNNING.labels(*labels).set(replica.num_running)
        HELD.labels(*labels).set(replica.num_held)
        WORK.labels(*labels).set(replica.outstanding)
        KV_USED.labels(*labels).set(replica.kv_tokens_used)


def forget(model_name: str, slot: int) -> None:
    """A replica of that number is no more."""
    for gauge in (RUNNING, HELD, WORK, KV_USED):
        gauge.remove(model_name, str(slot))
