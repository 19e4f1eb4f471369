"""The front end's side of one replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from enum import Enum
from typing import Any, Protocol

import ray

from vdiff_kserve.distributed.messages import (
    Abort,
    Batch,
    Command,
    EngineLoad,
    ReplicaFacts,
)
from vdiff_kserve.distributed.routing import PrefixMemory
from vdiff_kserve.distributed.ticket import Ticket
from vdiff_kserve.engine import EngineError, EngineStoppedError, GenerationEvent

logger = logging.getLogger("kserve.vdiff.replicas")


class State(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"
    GONE = "gone"


class Owner(Protocol):
    """Who is told what happens to a replica."""

    def heard(self, batch: Batch) -> None:
        """A batch came; its events are delivered."""
        ...

    def lost(self, link: ReplicaLink, reason: str) -> None:
        """The replica answers no more."""
        ...


class ReplicaLink:
    """Sends a replica its commands, and hears its batches.

    Attributes:
        slot: its number among the replicas; one that takes a lost one's place has the same.
        placed: whether its process runs; before that Ray looks for room.
        facts: what it told of itself once it was ready.
        tickets: the requests that it has, by key.
        latest: the gauges of its engine.
        silence: how often the supervisor has looked since the last batch.
        work_given: of all its requests so far, estimated.
        reserved_for: the request that is to run here alone.
    """

    def __init__(self, slot: int, actor: Any, owner: Owner, room: int) -> None:
        self.slot = slot
        self.state = State.STARTING
        self.placed = False
        self.facts: ReplicaFacts | None = None
        self.tickets: dict[int, Ticket] = {}
        self.latest = EngineLoad()
        self.silence = 0
        self.work_given = 0
        self.reserved_for: Ticket | None = None
        self.prefixes = PrefixMemory()
        self._actor = actor
        self._owner = owner
        self._room = room
        self._commands: list[Command] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def load(self) -> ReplicaFacts:
        """Wait until the replica has loaded its model, and then begin to hear it.

        Raises:
            RayTaskError: loading failed; its `cause` says why.
            RayActorError: the replica was lost meanwhile.
        """
        await self._actor.ping.remote()
        self.placed = True
        self.facts = await self._actor.load.remote()
        if self.state is State.GONE:
            return self.facts
        self.state = State.READY
        self._tasks = [
            asyncio.create_task(self._guarded(work()), name=f"replica-{self.slot}")
            for work in (self._send, self._hear)
        ]
        return self.facts

    @property
    def state_name(self) -> str:
        return self.state.value

    @property
    def num_running(self) -> int:
        return self.latest.num_running

    @property
    def num_held(self) -> int:
        return len(self.tickets)

    @property
    def kv_tokens_used(self) -> int:
        return self.latest.kv_tokens_used

    @property
    def has_room(self) -> bool:
        """Whether a request may be sent here that does not have to be alone."""
        return (
            self.state is State.READY
            and self.reserved_for is None
            and len(self.tickets) < self._room
        )

    @property
    def outstanding(self) -> float:
        """Forward-pass tokens that its requests will still cost, estimated."""
        return sum(ticket.work_left for ticket in self.tickets.values())

    def cost_of(self, ticket: Ticket) -> float:
        """What would lie before the end of a request that came here, its own cost included."""
        if not ticket.prefixes or self.facts is None:
            return self.outstanding + ticket.work
        known = self.prefixes.blocks_known(ticket.prefixes)
        return self.outstanding + ticket.work - known * self.facts.spec.block_length

    def submit(self, ticket: Ticket) -> None:
        """Run a request here."""
        self.tickets[ticket.key] = ticket
        self.work_given += ticket.work
        self.prefixes.add(ticket.prefixes)
        self._tell(ticket.begin())

    def abort(self, ticket: Ticket) -> None:
        """Run a request no longer, and keep no place for it."""
        if ticket.key in self.tickets:
            self._close(ticket, still_runs=True)
        elif self.reserved_for is ticket:
            self.reserved_for = None

    def retire(self) -> None:
        """Take no further requests."""
        self.state = State.RETIRING
        if self.reserved_for is not None and self.reserved_for.key not in self.tickets:
            self.reserved_for = None

    def take_tickets(self) -> list[Ticket]:
        """The unfinished requests, which are no longer this replica's."""
        tickets = [ticket for ticket in self.tickets.values() if not ticket.done]
        self.tickets.clear()
        self.reserved_for = None
        return tickets

    def end(self) -> None:
        """End the replica's process and hear no more of it; from any thread."""
        self.state = State.GONE
        ray.kill(self._actor)

    def let_go(self) -> None:
        """Stop the tasks that hear it; on the loop's thread."""
        for task in self._tasks:
            task.cancel()

    def _tell(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    async def _send(self) -> None:
        """Send what there is to say, one list after the other, so that order is kept."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands, self._commands = self._commands, []
            await self._actor.control.remote(commands)

    async def _hear(self) -> None:
        while True:
            batch: Batch = await self._actor.poll.remote()
            self.silence = 0
            if batch.trouble is not None:
                self._owner.lost(self, batch.trouble)
                return
            self._deliver(batch)
            self._owner.heard(batch)

    def _deliver(self, batch: Batch) -> None:
        for key, event in batch.events:
            ticket = self.tickets.get(key)
            if ticket is None or isinstance(event, EngineStoppedError):
                continue
            ticket.put(event)
            if ticket.done:
                self._close(ticket, still_runs=_is_unfinished(event))
        self.latest = batch.load

    def _close(self, ticket: Ticket, *, still_runs: bool) -> None:
        del self.tickets[ticket.key]
        if self.reserved_for is ticket:
            self.reserved_for = None
        if still_runs:
            self._tell(Abort(ticket.key))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Whatever ends the conversation means that the replica is lost."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except ray.exceptions.RayError as error:
            self._owner.lost(self, _short(error))
        except Exception as error:
            logger.exception("The conversation with replica %d broke.", self.slot)
            self._owner.lost(self, repr(error))


def _is_unfinished(event: GenerationEvent | EngineError) -> bool:
    return isinstance(event, GenerationEvent) and event.finish_reason is None


def _short(error: Exception) -> str:
    """The first line of one of Ray's long messages."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
