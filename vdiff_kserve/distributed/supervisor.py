"""Keeps as many replicas as there should be: starts, watches, replaces and retires them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.distributed.autoscale import Autoscaler
from vdiff_kserve.distributed.cluster import ReplicaResources
from vdiff_kserve.distributed.link import ReplicaLink, State
from vdiff_kserve.distributed.meeting import Listener
from vdiff_kserve.distributed.messages import Batch, ReplicaFacts
from vdiff_kserve.distributed.pool import ReplicaPool, room_of
from vdiff_kserve.distributed.replica import Loader
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.observability import replicas as metrics

logger = logging.getLogger("kserve.vdiff.replicas")

LOOK_SECONDS = 0.5
"""How often the replicas are looked after."""
SILENT_LOOKS = 8
"""A replica that was not heard for so many looks is lost; it should be heard every second. Looks,
not seconds: a front end that stood still itself has no right to call others silent."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""Between failed starts; the pause doubles each time."""
HOPELESS_STARTS = 3
"""So many failures before any replica was ready end the server: its operator should know."""
PLACING_SECONDS = 10.0
"""How long Ray may look for a place for a replica that there is perhaps none for."""
POLL_SECONDS = 0.05


class Supervisor:
    """Owner of the replicas of a pool.

    Args:
        listener: where the replicas call; closed with the supervisor.
    """

    def __init__(
        self,
        config: ServerConfig,
        pool: ReplicaPool,
        resources: ReplicaResources,
        autoscaler: Autoscaler,
        loader: Loader,
        listener: Listener,
    ) -> None:
        self._config = config
        self._pool = pool
        self._resources = resources
        self._autoscaler = autoscaler
        self._loader = loader
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[ReplicaFacts] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._extra = 0
        self._failures = 0
        self._next_start = 0.0
        self._closed = False

    async def start(self) -> ReplicaFacts:
        """Start the replicas; the facts of the first that is ready.

        Raises:
            CheckpointError: none becomes ready.
            Exception: whatever else keeps the supervisor from starting them.
        """
        self._spawn(self._watch())
        return await self._first

    def restart(self) -> None:
        """Put new replicas in the place of all, one after the other; requests go on."""
        if self._restarting is None or self._restarting.done():
            self._restarting = self._spawn(self._restart())

    def close(self) -> None:
        """Replace nothing more. From any thread."""
        self._closed = True
        with suppress(RuntimeError):  # the loop may be closed, and its tasks with it
            self._loop.call_soon_threadsafe(self._let_go)

    def heard(self, batch: Batch) -> None:
        """A batch came."""
        self._pool.heard(batch)

    def lost(self, link: ReplicaLink, reason: str) -> None:
        """A replica answers no more: forget it, and start another."""
        if self._closed or link.state is State.GONE:
            return
        logger.warning(
            "Replica %d is lost: %s; its %d requests run again.",
            link.slot, reason, len(link.tickets),
        )  # fmt: skip
        metrics.LOST.labels(self._config.model_name).inc()
        self._remove(link, lost=True)
        self._keep_number()

    @property
    def _active(self) -> list[ReplicaLink]:
        """Replicas that are there to stay."""
        return [each for each in self._pool.links if each.state in (State.STARTING, State.READY)]

    @property
    def _target(self) -> int:
        return self._autoscaler.target + self._extra

    @property
    def _is_restarting(self) -> bool:
        return self._restarting is not None and not self._restarting.done()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Without one of its tasks the supervisor would keep nothing alive any more: what fails
        ends the pool, so that the server is not taken for healthy."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None or self._closed:
            return
        logger.critical("The replicas are looked after no more.", exc_info=error)
        if not self._first.done():
            self._first.set_exception(error)
        self._pool.stop()

    def _let_go(self) -> None:
        for task in self._tasks:
            task.cancel()
        for link in self._pool.links:
            link.let_go()
        self._listener.close()

    async def _watch(self) -> None:
        """Look after the replicas for ever."""
        while True:
            self._find_silent()
            if not self._is_restarting:
                self._autoscaler.look(self._pool.outstanding_tokens, self._loop.time())
                self._let_one_go()
            self._keep_number()
            metrics.show(self._config.model_name, self._pool.links, self._pool.outstanding_tokens)
            await asyncio.sleep(LOOK_SECONDS)

    def _find_silent(self) -> None:
        for link in list(self._pool.links):
            if link.state in (State.READY, State.RETIRING):
                link.silence += 1
                if link.silence > SILENT_LOOKS:
                    self.lost(link, f"it was silent for {SILENT_LOOKS * LOOK_SECONDS:.0f} seconds")

    def _keep_number(self) -> None:
        """Start replicas while there are too few, unless a start has just failed."""
        while len(self._active) < self._target:
            if self._loop.time() < self._next_start:
                return
            self._start_one()

    def _let_one_go(self) -> None:
        active = self._active
        if len(active) > self._target:
            self._spawn(self._retire(min(active, key=lambda link: link.outstanding)))

    def _start_one(self) -> None:
        slots = {link.slot for link in self._pool.links}
        slot = min(set(range(len(slots) + 1)) - slots)
        config = self._config
        actor = self._resources.start(config, self._loader)
        room = room_of(config.max_num_seqs, config.max_queue)
        link = ReplicaLink(slot, actor, self, room, self._listener)
        self._pool.links.append(link)
        self._spawn(self._bring_up(link))

    async def _bring_up(self, link: ReplicaLink) -> None:
        try:
            facts = await link.load()
        except Exception as error:  # noqa: BLE001 - whatever its process, or Ray, came to
            self._start_failed(link, error)
            return
        if link.state is State.GONE:
            return
        self._failures = 0
        metrics.STARTED.labels(self._config.model_name).inc()
        logger.info("Replica %d is ready on %s (%s).", link.slot, facts.node, facts.device)
        self._pool.loaded(link)
        if not self._first.done():
            self._first.set_result(facts)

    def _start_failed(self, link: ReplicaLink, error: Exception) -> None:
        if self._closed or link.state is State.GONE:
            return
        self._remove(link, lost=False)
        self._failures += 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS)
        self._next_start = self._loop.time() + pause
        cause = getattr(error, "cause", None) or error
        if not self._first.done() and isinstance(cause, CheckpointError):
            self._first.set_exception(cause)
            return
        logger.error("Replica %d did not start: %s", link.slot, cause)
        if not self._first.done() and self._failures >= HOPELESS_STARTS:
            self._first.set_exception(CheckpointError(f"no replica could be started: {cause}"))

    async def _restart(self) -> None:
        old = self._active
        logger.info("Restarting %d replicas, one after the other.", len(old))
        for link in old:
            if link.state is State.GONE:
                continue
            if len(self._active) == 1:
                await self._try_one_more()
            self._pool.expecting = True
            await self._retire(link)
            complete = await self._until_all_are_ready()
            self._pool.expecting = False
            if not complete:
                logger.error("The restart ends here: a new replica did not start.")
                return
        logger.info("All replicas are new.")

    async def _try_one_more(self) -> None:
        """A second replica before the only one goes, where the cluster has room for it."""
        self._extra = 1
        self._keep_number()
        deadline = self._loop.time() + PLACING_SECONDS
        while not all(link.placed for link in self._active):
            await asyncio.sleep(POLL_SECONDS)
            if self._loop.time() > deadline:
                self._extra = 0
                for link in self._active:
                    if not link.placed:
                        self._remove(link, lost=False)
                return
        await self._until_all_are_ready()
        self._extra = 0

    async def _until_all_are_ready(self) -> bool:
        """Wait for the replicas that there should be; False when one does not start."""
        while len(self._active) < self._target or any(
            link.state is State.STARTING for link in self._active
        ):
            if self._failures:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def _retire(self, link: ReplicaLink) -> None:
        """Give a replica nothing more; end it when it is idle, or its grace is over."""
        link.retire()
        self._pool.dispatch()
        deadline = self._loop.time() + self._config.grace_period
        while link.tickets and self._loop.time() < deadline:  # noqa: ASYNC110 - see the server's end
            await asyncio.sleep(POLL_SECONDS)
        if link.state is not State.GONE:
            self._remove(link, lost=False)

    def _remove(self, link: ReplicaLink, *, lost: bool) -> None:
        link.end()
        self._pool.remove(link, lost=lost)
        metrics.forget(self._config.model_name, link.slot)
