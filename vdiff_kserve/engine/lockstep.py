"""One engine run by several processes in step, each with its own shard of the model.

Every rank runs the whole engine: the same rows, the same scheduler, the same sampler. What a
scheduler computes comes out alike everywhere; what it cannot compute, since clients and clocks make
it, is the first rank's to tell, once a round. Forward passes meet in the collectives of the sharded
layers, so no rank is ever more than a round ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from vdiff_kserve.engine.request import GenerationRequest


@dataclass(frozen=True)
class News:
    """What happened since the last round.

    Attributes:
        submitted: number and request of each row that arrived, in order.
        aborted: numbers of rows that nobody wants any more.
        expired: numbers of rows whose deadline passed.
        stopped: the engine ends; there is no further round.
    """

    submitted: tuple[tuple[int, GenerationRequest], ...] = ()
    aborted: frozenset[int] = frozenset()
    expired: frozenset[int] = frozenset()
    stopped: bool = False


class Lockstep:
    """Tells the news of the first rank to all others.

    Args:
        group: the processes, over a backend that sends from host memory (gloo). Its timeout must
            outlast the longest time without a request.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    @property
    def leads(self) -> bool:
        """Whether this is the rank that clients talk to."""
        return dist.get_rank(self._group) == 0

    def share(self, news: News) -> News:
        """The first rank's news, on every rank; blocks until it tells them.

        Args:
            news: counts on the first rank only.

        Raises:
            RuntimeError: another rank is gone.
        """
        told: list[Any] = [news]
        dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]

    def least(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return int(found)
