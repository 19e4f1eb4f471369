"""Many engines that are used as one: the queue, who runs what, and what outlives a replica."""

from __future__ import annotations

import asyncio
import itertools
import logging
from bisect import insort
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import Event, get_ident

from vdiff_kserve.distributed.link import ReplicaLink, State
from vdiff_kserve.distributed.messages import Batch
from vdiff_kserve.distributed.routing import denoising_work, prompt_prefixes
from vdiff_kserve.distributed.ticket import LOSSES_TO_ISOLATE, MAX_LOSSES, Ticket
from vdiff_kserve.engine import (
    EngineError,
    EngineStoppedError,
    GenerationRequest,
    GenerationStream,
    QueueFullError,
    QueueTimeoutError,
    RoundObserver,
)
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.observability import replicas as metrics

logger = logging.getLogger("kserve.vdiff.replicas")

LOOK_AHEAD = 0.25
"""Requests that a replica has beside those in its batch, as a share of them, so that a slot that
becomes free is filled before the front end hears of it."""
STOP_SECONDS = 5.0
"""How long a loop that is busy may take to end the requests."""


def _nothing() -> None:
    """Before somebody says what is to be done."""


def room_of(max_num_seqs: int, max_queue: int) -> int:
    """Requests that one replica is given at a time; its own queue must hold the further ones."""
    return max_num_seqs + min(max_queue, max(1, int(max_num_seqs * LOOK_AHEAD)))


class ReplicaPool:
    """A `GenerationEngine` made of replicas. It belongs to the loop on which it is used.

    Requests wait here, in order of priority and arrival, until a replica has room: so a new replica
    has work at once, and a lost one takes little with it. Each goes to the replica where it should
    be done first.

    Attributes:
        links: the replicas that there are, in any state.
        expecting: whether a replica is being replaced on purpose, so that requests may wait for it.
        on_stop: called when the pool is stopped.
    """

    def __init__(
        self, name: str, max_num_seqs: int, max_queue: int, observer: RoundObserver | None = None
    ) -> None:
        self.links: list[ReplicaLink] = []
        self.expecting = False
        self.on_stop: Callable[[], None] = _nothing
        self._name = name
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._spec: ModelSpec | None = None
        self._keys = itertools.count()
        self._waiting: list[Ticket] = []
        self._closed = False

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model; known once a replica was ready."""
        assert self._spec is not None
        return self._spec

    @property
    def alive(self) -> bool:
        """Until it is stopped: lost replicas are replaced."""
        return not self._closed

    @property
    def stuck(self) -> bool:
        """Never: replicas that are stuck are replaced."""
        return False

    @property
    def ready(self) -> bool:
        """Whether a replica answers, or is about to."""
        return not self._closed and (
            self.expecting or any(link.state is State.READY for link in self.links)
        )

    @property
    def num_running(self) -> int:
        return sum(link.latest.num_running for link in self._live)

    @property
    def num_waiting(self) -> int:
        """Requests in the batch of no replica, as far as the replicas have told."""
        held = sum(len(link.tickets) for link in self._live)
        return len(self._waiting) + max(0, held - self.num_running)

    @property
    def kv_tokens_total(self) -> int:
        return sum(link.latest.kv_tokens_total for link in self._live)

    @property
    def kv_tokens_used(self) -> int:
        return sum(link.latest.kv_tokens_used for link in self._live)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens of answers that are not delivered yet, waiting requests included."""
        held = (ticket for link in self._live for ticket in link.tickets.values())
        return sum(ticket.tokens_left for ticket in itertools.chain(self._waiting, held))

    @property
    def _live(self) -> list[ReplicaLink]:
        return [link for link in self.links if link.state in (State.READY, State.RETIRING)]

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationStream]:
        """Queue requests, all or none; their events come on the running asyncio loop.

        Raises:
            QueueFullError: they do not all fit in the queue.
            EngineStoppedError: the pool was stopped.
        """
        if self._closed:
            raise EngineStoppedError("The replicas were stopped.")
        self._check_room(len(requests))
        tickets = [self._ticket(request) for request in requests]
        for ticket in tickets:
            self._wait(ticket)
        self.dispatch()
        return [ticket.stream for ticket in tickets]

    def dispatch(self) -> None:
        """Give waiting requests to replicas, as far as those have room."""
        waiting, self._waiting = self._waiting, []
        for number, ticket in enumerate(waiting):
            link = self._alone_on(ticket) if ticket.must_run_alone else self._best_for(ticket)
            if link is not None:
                if ticket.timer is not None:
                    ticket.timer.cancel()
                link.submit(ticket)
            elif ticket.must_run_alone:
                self._waiting.append(ticket)
            else:
                self._waiting += waiting[number:]
                return

    def loaded(self, link: ReplicaLink) -> None:
        """A replica is ready."""
        assert link.facts is not None
        self._spec = link.facts.spec
        self.dispatch()

    def heard(self, batch: Batch) -> None:
        """A batch came, whose events are delivered."""
        if self._observer is not None:
            for report in batch.rounds:
                self._observer(report)
        self.dispatch()

    def remove(self, link: ReplicaLink, *, lost: bool) -> None:
        """Forget a replica. Its requests run again elsewhere.

        Args:
            lost: whether its requests may be the cause.
        """
        if link not in self.links:
            return
        self.links.remove(link)
        link.let_go()
        tickets = link.take_tickets()
        metrics.REPLAYED.labels(self._name).inc(len(tickets))
        for ticket in tickets:
            ticket.losses += lost
            if ticket.losses >= MAX_LOSSES:
                self._give_up(ticket)
            else:
                self._wait(ticket)
        self.dispatch()

    def stop(self) -> None:
        """Take no more; unfinished requests are told. From any thread."""
        if self._closed:
            return
        self._closed = True
        self._run_on_loop(self._end_requests)
        for link in list(self.links):
            link.end()
        self.on_stop()

    def _end_requests(self) -> None:
        waiting, self._waiting = self._waiting, []
        held = [ticket for link in self.links for ticket in link.take_tickets()]
        for ticket in (*held, *waiting):
            ticket.fail(EngineStoppedError("The replicas were stopped."))

    def _run_on_loop(self, work: Callable[[], None]) -> None:
        """Do what belongs to the loop, where batches come meanwhile, and wait for it; here when the
        loop is this thread's own, or runs no more."""
        if get_ident() == self._thread or not self._loop.is_running():
            work()
            return
        done = Event()

        def run() -> None:
            work()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(STOP_SECONDS)

    def _check_room(self, count: int) -> None:
        slots = self._max_num_seqs * len(self._live)
        held = sum(len(link.tickets) for link in self._live)
        if len(self._waiting) + held + count > slots + self._max_queue:
            raise QueueFullError(
                f"The server is at its limit of {slots} running and {self._max_queue} waiting "
                "requests. Try again later."
            )

    def _ticket(self, request: GenerationRequest) -> Ticket:
        ticket = Ticket(
            next(self._keys),
            request,
            GenerationStream(),
            denoising_work(request, self.spec),
            prompt_prefixes(request, self.spec),
        )
        ticket.stream.on_abort(partial(self._abort_soon, ticket))
        return ticket

    def _wait(self, ticket: Ticket) -> None:
        insort(self._waiting, ticket, key=lambda waiting: waiting.place)
        if (left := ticket.seconds_left) is not None:
            ticket.timer = self._loop.call_later(left, self._expire, ticket)

    def _expire(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            ticket.fail(QueueTimeoutError("The request's time was over while it waited."))

    def _abort_soon(self, ticket: Ticket) -> None:
        with suppress(RuntimeError):  # the loop may be closed, and the replicas gone with it
            self._loop.call_soon_threadsafe(self._abort, ticket)

    def _abort(self, ticket: Ticket) -> None:
        if ticket.done:
            return
        ticket.close()
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        for link in self.links:
            link.abort(ticket)
        self.dispatch()

    def _give_up(self, ticket: Ticket) -> None:
        logger.error(
            "Request %s is given up: %d replicas were lost while they had it, the last %d of them "
            "with no other request.",
            ticket.request.request_id,
            ticket.losses,
            MAX_LOSSES - LOSSES_TO_ISOLATE,
        )
        ticket.fail(EngineError("The request was given up: every replica that ran it was lost."))

    def _best_for(self, ticket: Ticket) -> ReplicaLink | None:
        free = [link for link in self.links if link.has_room]
        # Idle replicas are alike: the one that did least so far.
        return min(free, key=lambda link: (link.cost_of(ticket), link.work_given), default=None)

    def _alone_on(self, ticket: Ticket) -> ReplicaLink | None:
        """The replica that is kept for a request which must run alone, once it has no other."""
        ready = [link for link in self.links if link.state is State.READY]
        kept = next((link for link in ready if link.reserved_for is ticket), None)
        if kept is None:
            free = [link for link in ready if link.reserved_for is None]
            kept = min(free, key=lambda link: link.outstanding, default=None)
            if kept is None:
                return None
            kept.reserved_for = ticket
        return kept if not kept.tickets else None
