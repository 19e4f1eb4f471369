"""The loop that joins scheduler, model runner and rows, and the engine's public face."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread

import torch

from vdiff_kserve.engine.grammar import GrammarError, Grammars
from vdiff_kserve.engine.grammar_rows import make_grammar_row
from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.limits import EngineConfig
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.engine.memory import RowMemory
from vdiff_kserve.engine.prefix_cache import PrefixCache
from vdiff_kserve.engine.renoise_runner import RenoiseRunner
from vdiff_kserve.engine.report import RoundClock
from vdiff_kserve.engine.request import (
    EngineError,
    EngineStoppedError,
    EventSink,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    RequestTooLargeError,
)
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.runner import ModelRunner
from vdiff_kserve.engine.scheduler import FollowingScheduler, Scheduler
from vdiff_kserve.engine.stream import GenerationStream
from vdiff_kserve.engine.watch import LOOK_SECONDS, RoundWatch
from vdiff_kserve.gpu import raise_if_lost
from vdiff_kserve.models import (
    LanguageModel,
    ModelSpec,
    RenoisingModel,
    ReuseGraphs,
    keep_freed_memory,
)

Inbox = SimpleQueue[GenerationEvent | EngineError]

logger = logging.getLogger("kserve.vdiff.engine")


class Engine:
    """Denoises many requests at once, a step at a time, on a thread of its own.

    Rows join and leave between steps; each is at its own block and step with its own parameters,
    and none waits for another.

    Attributes:
        failure: what ended the loop when nobody stopped it.
        num_steps: denoising steps run so far, each of one or more rows.
        grammars: compiles what answers must match; None when the engine cannot do that.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        spec: ModelSpec,
        config: EngineConfig,
        auxiliary: LanguageModel | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.grammars = grammars
        self.spec = spec
        self.config = config
        self.failure: BaseException | None = None
        self.num_steps = 0
        self._has_auxiliary = auxiliary is not None
        self._device = decoder.device
        if decoder.device.type == "cpu":
            keep_freed_memory()
        decoders = [decoder] if auxiliary is None else [decoder, auxiliary]
        tokens = self._cache_tokens(decoders)
        self._cache, *others = [
            KVCache(each.config, tokens, each.device, each.dtype) for each in decoders
        ]
        self._auxiliary_cache = others[0] if others else None
        self._prefixes: PrefixCache | None = None
        if spec.block_causal and config.enable_prefix_caching:
            self._prefixes = PrefixCache(self._cache, spec.prefix_block_length)
        self._memory = RowMemory(self._cache, self._auxiliary_cache, self._prefixes)
        self._graphs: ReuseGraphs | None = None
        self._runner = self._make_runner(decoder, auxiliary)
        self._scheduler = self._make_scheduler(decoder.stages)
        self._thread = Thread(target=self._run, name="vdiff-engine", daemon=True)
        self._watch = RoundWatch(self._thread, config.round_timeout)

    def _make_runner(self, decoder: LanguageModel, auxiliary: LanguageModel | None) -> ModelRunner:
        if isinstance(decoder, RenoisingModel):
            return RenoiseRunner(decoder, self.spec, self._cache)
        config = self.config
        if not config.enforce_eager and config.lockstep is None:
            self._graphs = ReuseGraphs.for_model(decoder, self.spec.max_model_len)
        return ModelRunner(
            decoder, self.spec, self._cache, auxiliary, self._auxiliary_cache, self._graphs
        )

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive() and self.failure is None

    @property
    def stuck(self) -> bool:
        """Whether a round takes far longer than rounds do. It may still end."""
        return self._watch.stuck

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self.alive and not self.stuck

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def kv_tokens_total(self) -> int:
        """Canvas tokens that the key-value cache holds."""
        return self._cache.capacity

    @property
    def kv_tokens_used(self) -> int:
        """Canvas tokens of the cache that are lent to running rows."""
        return self._memory.used

    @property
    def captured_sizes(self) -> list[int]:
        """The numbers of rows for which cached passes are captured; none without CUDA graphs."""
        return [] if self._graphs is None else self._graphs.sizes(self.config.max_num_seqs)

    def start(self) -> None:
        """Start the loop. An engine is started once."""
        self._thread.start()
        self._watch.start()

    def stop(self) -> None:
        """End the loop after the step in flight; unfinished requests get `EngineStoppedError`.

        A step that is stuck is not waited for, nor is the loop's own thread, in which the garbage
        collector may come to drop what holds the engine.
        """
        self._close(EngineStoppedError("The engine was stopped."))
        if current_thread() is self._thread:
            return
        while self._thread.is_alive() and not self.stuck:
            self._thread.join(LOOK_SECONDS)

    def fail(self, reason: str) -> None:
        """End the engine for a reason outside of it; unfinished requests are told."""
        if self.alive:
            self.failure = RuntimeError(reason)
            self._close(EngineStoppedError("The engine failed."))

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationStream]:
        """Queue requests, all or none; their events come on the running asyncio loop.

        Raises:
            QueueFullError: they do not all fit in the queue.
            EngineStoppedError: the engine is not running.
        """
        streams = [GenerationStream() for _ in requests]
        aborts = self.post(requests, [stream.put for stream in streams])
        for stream, abort in zip(streams, aborts, strict=True):
            stream.on_abort(abort)
        return streams

    def post(
        self, requests: Sequence[GenerationRequest], sinks: Sequence[EventSink]
    ) -> list[Callable[[], None]]:
        """As `submit`; each sink is told of one request, on the engine's thread.

        Returns:
            What takes each request out before its next forward pass; from any thread, any number
            of times.
        """
        rows = self._queue(requests, sinks)
        return [partial(self._scheduler.abort, row) for row in rows]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Answer requests and wait for all of them; for programs without an asyncio loop.

        Raises:
            EngineError: one of them could not be queued or failed.
        """
        inboxes: list[SimpleQueue[GenerationEvent | EngineError]] = [
            SimpleQueue() for _ in requests
        ]
        self._queue(requests, [inbox.put for inbox in inboxes])
        return [_collect(inbox) for inbox in inboxes]

    def make_row(self, request: GenerationRequest, sink: EventSink) -> Row:
        """The row that will run `request`.

        Raises:
            GrammarError: its grammar cannot be used, or not in so few tokens.
        """
        if request.grammar is None:
            return make_row(request, sink, self.spec, self._has_auxiliary)
        if self.grammars is None:
            raise GrammarError("this engine has no tokenizer, which grammars need")
        cursor = self.grammars.start(request.grammar, request.max_tokens)
        return make_grammar_row(request, sink, self.spec, cursor, self._has_auxiliary)

    def _make_scheduler(self, num_layers: int) -> Scheduler:
        config = self.config
        slots, budget, lockstep = (
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.lockstep,
        )
        if lockstep is None or lockstep.leads:
            return Scheduler(self._memory, slots, config.max_queue, budget, num_layers, lockstep)
        make_row = partial(self.make_row, sink=lambda _: None)
        return FollowingScheduler(self._memory, slots, budget, num_layers, lockstep, make_row)

    def _cache_tokens(self, decoders: Sequence[LanguageModel]) -> int:
        """Canvas tokens for which all models' caches have room, on every rank."""
        tokens, lockstep = self.config.cache_tokens(decoders, self.spec), self.config.lockstep
        return tokens if lockstep is None else lockstep.least(tokens)

    def _queue(
        self, requests: Sequence[GenerationRequest], sinks: Sequence[EventSink]
    ) -> list[Row]:
        if not self.ready:
            raise EngineStoppedError("The engine is not running.")
        rows = [self.make_row(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        for row in rows:
            self._check_it_fits(row)
        self._scheduler.submit(rows)
        return rows

    def _check_it_fits(self, row: Row) -> None:
        needs = [(row.cache_runs, self._cache), (int(row.uses_auxiliary), self._auxiliary_cache)]
        for runs, cache in needs:
            if cache is not None and runs * len(row) > cache.capacity:
                raise RequestTooLargeError(
                    f"Prompt and answer need cache for {runs * len(row)} tokens; the server has "
                    f"{cache.capacity}. Ask for fewer tokens, or for cache none."
                )

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            while True:
                self._scheduler.wait_for_work()
                self._round()
        except EngineStoppedError:
            self._scheduler.dismiss()
        except BaseException as error:
            self.failure = error
            logger.critical("The engine's loop died.", exc_info=error)
            self._close(EngineStoppedError("The engine failed."))
            raise
        finally:
            self._scheduler.forget()
            self._watch.stop()

    def follow(self) -> None:
        """Take part, as a further rank, in the rounds of the first one until it stops.

        Raises:
            RuntimeError: another rank is gone.
        """
        self._run()

    def _round(self) -> None:
        """Choose rows, take one denoising step of each, and let the finished ones go."""
        clock = RoundClock(self._runner.seconds)
        self._watch.begin()
        plan = self._scheduler.next_round()
        for row, reason in plan.expired:
            row.sink(reason)
        self._watch.planned(plan.tokens)
        clock.planned()
        if plan.sliced is not None:
            self._advance(plan.sliced, plan.layers)
        stepped = self._step(plan.rows) if plan.rows else []
        self._scheduler.release([row for row, _ in stepped if row.finish_reason is not None])
        if self.config.observer is not None and (stepped or plan.sliced is not None):
            self.config.observer(clock.report(stepped))
        self._watch.end()

    def _advance(self, row: Row, layers: int) -> None:
        """Run some layers of a pass that is too long for one round."""
        try:
            self._runner.advance(row, layers)
        except Exception as error:  # noqa: BLE001 - whatever the forward pass raised
            self._recover(error)
            self._fail(row, error)

    def _step(self, rows: Sequence[Row]) -> list[tuple[Row, Decision]]:
        """One denoising step of `rows`; returns those that took it. One that fails is tried again
        with half of them, so that a row which fails alone is failed alone."""
        decisions, failure = self._attempt(rows)
        if failure is not None:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self._step(rows[:middle]) + self._step(rows[middle:])
            self._fail(rows[0], failure)
            return []
        self.num_steps += 1
        stepped = []
        for row, decision in zip(rows, decisions, strict=True):
            try:
                was_fresh = row.is_fresh
                row.apply(decision)
                if was_fresh or row.finish_reason is not None:
                    self._memory.publish(row)
                stepped.append((row, decision))
            except Exception as error:  # noqa: BLE001 - one row's fault must not reach the others
                self._fail(row, error)
        return stepped

    def _attempt(self, rows: Sequence[Row]) -> tuple[Sequence[Decision], Exception | None]:
        """The rows' decisions, or what the step raised, with all that it held let go."""
        try:
            return self._runner.step(rows), None
        except Exception as error:  # noqa: BLE001 - whatever the forward pass raised
            self._recover(error)
            return (), error

    def _recover(self, error: Exception) -> None:
        """Let go of the tensors that the failed attempt left in its frames, and give freed memory
        back to the device before the next one.

        Raises:
            RuntimeError: no attempt can succeed any more, so that the loop ends.
        """
        traceback.clear_frames(error.__traceback__)
        raise_if_lost(self._device)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _fail(self, row: Row, failure: Exception) -> None:
        """Take out a row that cannot go on."""
        logger.error("Request %s failed.", row.request.request_id, exc_info=failure)
        self._scheduler.release([row])
        row.sink(EngineError("The model failed on this request."))

    def _close(self, reason: EngineError) -> None:
        for row in self._scheduler.close(reason):
            row.sink(reason)


def _collect(inbox: Inbox) -> GenerationResult:
    token_ids: tuple[int, ...] = ()
    while True:
        event = inbox.get()
        if isinstance(event, EngineError):
            raise event
        token_ids += event.token_ids
        if event.finish_reason is not None:
            return GenerationResult(token_ids, event.finish_reason, event.stats)
