"""What the front end and its replicas tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdiff_kserve.engine import EngineError, GenerationEvent, GenerationRequest, RoundReport
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.openai.limits import ServingLimits


@dataclass(frozen=True)
class Submit:
    """Run a request.

    Attributes:
        key: names it in every later message.
        request: without its deadline, which is a time on the front end's clock.
        seconds_left: until the deadline; None is for ever.
    """

    key: int
    request: GenerationRequest
    seconds_left: float | None


@dataclass(frozen=True)
class Abort:
    """Take a request out before the next denoising step."""

    key: int


Command = Submit | Abort


@dataclass(frozen=True)
class EngineLoad:
    """The gauges of a replica's engine."""

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


@dataclass(frozen=True)
class Batch:
    """What happened on a replica since its last batch; an empty one says that it is well.

    Attributes:
        events: (key, event) in the order in which they happened.
        rounds: what the engine's rounds did.
        trouble: why the engine can answer no more; None while it can.
    """

    events: Sequence[tuple[int, GenerationEvent | EngineError]]
    rounds: Sequence[RoundReport]
    load: EngineLoad
    trouble: str | None


def ends(event: GenerationEvent | EngineError) -> bool:
    """Whether it is a request's last."""
    return isinstance(event, EngineError) or event.finish_reason is not None


@dataclass(frozen=True)
class ReplicaFacts:
    """A replica that answers.

    Attributes:
        dtype, device: where and in what the model runs, in words.
        node: address of its machine.
    """

    spec: ModelSpec
    limits: ServingLimits
    dtype: str
    device: str
    node: str
    pid: int
