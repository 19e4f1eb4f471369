"""The front end's side of one replica."""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import ray

from vdiff_kserve.distributed.channel import Channel
from vdiff_kserve.distributed.meeting import Listener, arrival
from vdiff_kserve.distributed.messages import Abort, Batch, EngineLoad, ReplicaFacts, ends
from vdiff_kserve.distributed.routing import PrefixMemory
from vdiff_kserve.distributed.ticket import Ticket
from vdiff_kserve.engine import EngineStoppedError


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

    def __init__(self, slot: int, actor: Any, owner: Owner, room: int, listener: Listener) -> None:
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
        self._listener = listener
        self._channel = Channel(self._hear, self._lost)

    async def load(self) -> ReplicaFacts:
        """Wait until the replica has loaded its model and called; hear it from then on.

        Raises:
            RayTaskError: loading failed; its `cause` says why.
            RayActorError: the replica was lost meanwhile.
            OSError: so was its connection.
        """
        await self._actor.ping.remote()
        self.placed = True
        with self._listener.invite() as (invitation, connection):
            self.facts = await self._actor.load.remote(invitation)
            await self._channel.begin(await arrival(connection), called=True)
        if self.state is State.GONE:
            self._channel.close()
        else:
            self.state = State.READY
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
        self._channel.send(ticket.begin())

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
        """Hear it no more; on the loop's thread."""
        self._channel.close()

    def _hear(self, batch: Batch) -> None:
        self.silence = 0
        if batch.trouble is not None:
            self._lost(batch.trouble)
        else:
            self._deliver(batch)
            self._owner.heard(batch)

    def _lost(self, reason: str) -> None:
        self._owner.lost(self, reason)

    def _deliver(self, batch: Batch) -> None:
        for key, event in batch.events:
            ticket = self.tickets.get(key)
            if ticket is None or isinstance(event, EngineStoppedError):
                continue
            ticket.put(event)
            if ticket.done:
                self._close(ticket, still_runs=not ends(event))
        self.latest = batch.load

    def _close(self, ticket: Ticket, *, still_runs: bool) -> None:
        del self.tickets[ticket.key]
        if self.reserved_for is ticket:
            self.reserved_for = None
        if still_runs:
            self._channel.send(Abort(ticket.key))
