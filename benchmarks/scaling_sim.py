"""From one replica to a thousand: a simulation of queue, routing, front ends and failures.

    python -m benchmarks.scaling_sim

Replicas run rounds as the engine does: all their rows take a step together, and a round lasts
`--round_ms` and `--row_ms` for each row. Answers differ in length (log-normal) and arrive at random
(Poisson). A front end is a core: a request takes `--front_ms` of it when it comes, and `--chunk_ms`
for each round of each row, so one that is busy for more than 100% of the time falls behind;
`--hop_ms` is the way to a replica. Routing is what `vdiff_kserve.distributed` does: one queue per
front end, from which a replica is given a request when it has room, the one with the least
outstanding work first; `random` and `turns` send each request to a replica at once instead. Losses
come to each replica every `--hours` hours on average; what it had begins again.

The defaults of the five times are parameters, not claims about a GPU: measure them with
`benchmarks.serving` (rounds) and `benchmarks.replicas` (the others) where the replicas will run.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tqdm import tqdm

Routing = Literal["pool", "random", "turns"]
LOOK_AHEAD = 0.25


@dataclass(frozen=True)
class World:
    """What is simulated; times in seconds."""

    replicas: int
    front_ends: int
    routing: Routing
    load: float
    slots: int
    round_time: float
    row_time: float
    front_time: float
    chunk_time: float
    hop_time: float
    tokens_per_step: float
    mean_tokens: float
    mean_time_to_loss: float
    load_time: float
    seconds: float
    seed: int = 0

    @property
    def full_round(self) -> float:
        return self.round_time + self.row_time * self.slots

    @property
    def capacity(self) -> float:
        """Requests per second of full replicas."""
        steps = self.mean_tokens / self.tokens_per_step
        return self.replicas * self.slots / (steps * self.full_round)


@dataclass(eq=False)
class Request:
    """Attributes: `steps` it takes in all, `left` of them, and when it `arrived`."""

    arrived: float
    steps: int
    left: int


@dataclass(eq=False)
class Replica:
    """A batch of rows, and what waits for a place in it."""

    up_at: float = 0.0
    running: bool = False
    rows: list[Request] = field(default_factory=list)
    queue: deque[Request] = field(default_factory=deque)

    @property
    def held(self) -> int:
        return len(self.rows) + len(self.queue)

    @property
    def outstanding(self) -> int:
        return sum(each.left for each in (*self.rows, *self.queue))


@dataclass(eq=False)
class FrontEnd:
    """One process: its replicas, its queue, and the time that it has work until."""

    replicas: list[Replica]
    queue: deque[Request] = field(default_factory=deque)
    busy_until: float = 0.0
    busy: float = 0.0
    turn: int = 0

    def work(self, now: float, seconds: float) -> float:
        """When work that begins now, or after what is before it, is done."""
        self.busy_until = max(self.busy_until, now) + seconds
        self.busy += seconds
        return self.busy_until


@dataclass(frozen=True)
class Outcome:
    """Latencies and waits are over the requests that arrived after the warm-up."""

    requests_per_second: float
    latencies: np.ndarray
    front_end_share: float
    losses: int
    replayed: int


class Simulation:
    """Events in the order of their times."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.seed)
        each = world.replicas // world.front_ends
        self._fronts = [FrontEnd([Replica() for _ in range(each)]) for _ in range(world.front_ends)]
        self._events: list[tuple[float, int, str, FrontEnd, object]] = []
        self._order = itertools.count()
        self._latencies: list[float] = []
        self._losses = self._replayed = 0

    def run(self) -> Outcome:
        """Simulate `seconds`, of which the first third only fills the replicas."""
        world = self._world
        for front in self._fronts:
            self._next_arrival(0.0, front)
            for replica in front.replicas:
                self._next_loss(0.0, front, replica)
        handlers = {"arrive": self._arrive, "give": self._give, "round": self._round}
        handlers |= {"lose": self._lose, "up": self._up}
        while self._events[0][0] < world.seconds:
            now, _, kind, front, subject = heapq.heappop(self._events)
            handlers[kind](now, front, subject)
        measured = world.seconds * 2 / 3
        busy = sum(front.busy for front in self._fronts) / (len(self._fronts) * world.seconds)
        rate = len(self._latencies) / measured
        return Outcome(rate, np.array(self._latencies), busy, self._losses, self._replayed)

    def _at(self, when: float, kind: str, front: FrontEnd, subject: object = None) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, front, subject))

    def _next_arrival(self, now: float, front: FrontEnd) -> None:
        rate = self._world.load * self._world.capacity / len(self._fronts)
        self._at(now + self._random.expovariate(rate), "arrive", front)

    def _next_loss(self, now: float, front: FrontEnd, replica: Replica) -> None:
        when = now + self._random.expovariate(1 / self._world.mean_time_to_loss)
        self._at(when, "lose", front, replica)

    def _arrive(self, now: float, front: FrontEnd, _: object) -> None:
        world = self._world
        self._next_arrival(now, front)
        tokens = self._random.lognormvariate(np.log(world.mean_tokens) - 0.32, 0.8)
        steps = max(1, round(tokens / world.tokens_per_step))
        self._at(front.work(now, world.front_time), "give", front, Request(now, steps, steps))

    def _give(self, now: float, front: FrontEnd, request: object) -> None:
        assert isinstance(request, Request)
        if self._world.routing == "pool":
            front.queue.append(request)
            self._dispatch(now, front)
            return
        up = [each for each in front.replicas if each.up_at <= now] or front.replicas
        front.turn += 1
        chosen = front.turn % len(up)
        if self._world.routing == "random":
            chosen = self._random.randrange(len(up))
        self._begin(now, front, up[chosen], request)

    def _dispatch(self, now: float, front: FrontEnd) -> None:
        most = self._world.slots * (1 + LOOK_AHEAD)
        while front.queue:
            free = [r for r in front.replicas if r.up_at <= now and r.held < most]
            if not free:
                return
            # Ties and near ties are many: a few candidates are as good as all.
            few = self._random.sample(free, min(8, len(free)))
            best = min(few, key=lambda replica: replica.outstanding)
            self._begin(now, front, best, front.queue.popleft())

    def _begin(self, now: float, front: FrontEnd, replica: Replica, request: Request) -> None:
        replica.queue.append(request)
        if not replica.running:
            replica.running = True
            self._at(now + self._world.hop_time, "round", front, replica)

    def _round(self, now: float, front: FrontEnd, replica: object) -> None:
        """A round ends, and the next begins."""
        assert isinstance(replica, Replica)
        world = self._world
        if replica.up_at > now:
            return
        for row in replica.rows:
            row.left -= 1
        told = now + world.hop_time
        if replica.rows:
            told = front.work(now + world.hop_time, world.chunk_time * len(replica.rows))
        for row in (row for row in replica.rows if row.left == 0):
            if row.arrived > world.seconds / 3:
                self._latencies.append(told - row.arrived)
        replica.rows = [row for row in replica.rows if row.left]
        while replica.queue and len(replica.rows) < world.slots:
            replica.rows.append(replica.queue.popleft())
        self._dispatch(now, front)
        replica.running = bool(replica.rows or replica.queue)
        if replica.running:
            lasts = world.round_time + world.row_time * len(replica.rows)
            self._at(now + lasts, "round", front, replica)

    def _lose(self, now: float, front: FrontEnd, replica: object) -> None:
        assert isinstance(replica, Replica)
        self._losses += 1
        held = [*replica.rows, *replica.queue]
        self._replayed += len(held)
        replica.rows, replica.queue, replica.running = [], deque(), False
        replica.up_at = now + self._world.load_time
        self._at(replica.up_at, "up", front, replica)
        for request in held:
            request.left = request.steps
            self._at(now, "give", front, request)
        self._next_loss(replica.up_at, front, replica)

    def _up(self, now: float, front: FrontEnd, _: object) -> None:
        self._dispatch(now, front)


def row(world: World) -> str:
    """The outcome as a row of the table."""
    outcome = Simulation(world).run()
    share = outcome.requests_per_second / world.capacity
    latencies = " | ".join(["none ended"] * 3)
    if outcome.latencies.size:
        shares = np.percentile(outcome.latencies, (50, 95, 99))
        latencies = " | ".join(f"{each:.1f} s" for each in shares)
    return (
        f"| {world.replicas} | {world.front_ends} | {world.routing} | {world.load:.0%} "
        f"| {outcome.requests_per_second:.0f} | {share:.0%} | {latencies} "
        f"| {outcome.front_end_share:.0%} | {outcome.losses} | {outcome.replayed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 96, 1000])
    parser.add_argument("--per_front_end", type=int, default=8, help="replicas, at most")
    parser.add_argument("--load", type=float, default=0.8, help="of what full replicas answer")
    parser.add_argument("--slots", type=int, default=16, help="rows of a replica")
    parser.add_argument("--round_ms", type=float, default=30.0)
    parser.add_argument("--row_ms", type=float, default=2.0)
    parser.add_argument("--front_ms", type=float, default=2.0)
    parser.add_argument("--chunk_ms", type=float, default=0.15)
    parser.add_argument("--hop_ms", type=float, default=0.4)
    parser.add_argument("--tokens_per_step", type=float, default=4.0)
    parser.add_argument("--mean_tokens", type=float, default=256.0)
    parser.add_argument("--hours", type=float, default=500.0, help="between a replica's losses")
    parser.add_argument("--load_seconds", type=float, default=60.0, help="of a new replica")
    parser.add_argument("--seconds", type=float, default=90.0)
    args = parser.parse_args()

    def world(replicas: int, front_ends: int, routing: Routing) -> World:
        return World(
            replicas, front_ends, routing, args.load, args.slots, args.round_ms / 1000,
            args.row_ms / 1000, args.front_ms / 1000, args.chunk_ms / 1000, args.hop_ms / 1000,
            args.tokens_per_step, args.mean_tokens, args.hours * 3600, args.load_seconds,
            args.seconds,
        )  # fmt: skip

    worlds = []
    for replicas in args.replicas:
        fronts = -(-replicas // args.per_front_end)
        fronts = next(n for n in range(fronts, replicas + 1) if replicas % n == 0)
        worlds += [world(replicas, fronts, routing) for routing in ("pool", "random", "turns")]
        if fronts > 1:
            worlds.append(world(replicas, 1, "pool"))
    rows = [row(each) for each in tqdm(worlds, unit="run")]
    print(
        "| replicas | front ends | routing | load | requests/s | of full | p50 | p95 | p99 ", end=""
    )
    print("| front ends busy | losses | begun again |\n|" + "---|" * 12)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
