"""An engine that answers at once, and the server around it: what is left is the front end.

    python -m benchmarks.instant --tokens_per_chunk 8 --port 8000

Every flag but the first is the server's. The checkpoint is loaded as always, for its tokenizer and
its limits; no forward pass is ever run. The answer to a prompt is the prompt's own tokens, over and
over, `max_tokens` of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vdiff_kserve.engine import (
    Engine,
    EngineStoppedError,
    EventSink,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    QueueFullError,
)

TOKENS_PER_CHUNK = 8


def _nothing() -> None:
    """Take out a request that is answered already."""


class InstantEngine(Engine):
    """Has the engine's whole face and none of its work: its loop never runs.

    Attributes:
        tokens_per_chunk: tokens of one event, as a step that commits so many would send them.
    """

    tokens_per_chunk = TOKENS_PER_CHUNK

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answers = False
        self._never = {
            *self.spec.end_token_ids, self.spec.eos_token_id, self.spec.mask_token_id,
        }  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it was started and not stopped."""
        return self._answers

    def start(self) -> None:
        """Answer from now on."""
        self._answers = True

    def stop(self) -> None:
        """Answer no more."""
        self._answers = False

    def post(
        self, requests: Sequence[GenerationRequest], sinks: Sequence[EventSink]
    ) -> list[Callable[[], None]]:
        """Tell the whole answers at once.

        Raises:
            QueueFullError: more at once than the engine would have room for.
            EngineStoppedError: the engine is not running.
        """
        if not self._answers:
            raise EngineStoppedError("The engine is not running.")
        if len(requests) > self.config.max_queue + self.config.max_num_seqs:
            raise QueueFullError("The queue is full.")
        for request, sink in zip(requests, sinks, strict=True):
            for event in self._events(request):
                sink(event)
        return [_nothing for _ in requests]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """The answers of `submit`, for programs without an asyncio loop."""
        results = []
        for request in requests:
            events = list(self._events(request))
            ids = tuple(token for event in events for token in event.token_ids)
            results.append(GenerationResult(ids, "length", events[-1].stats))
        return results

    def _events(self, request: GenerationRequest) -> Iterator[GenerationEvent]:
        words = [token for token in request.prompt_ids if token not in self._never] or [0]
        length = request.max_tokens
        answer = tuple((words * (length // len(words) + 1))[:length])
        size = self.tokens_per_chunk
        for step, start in enumerate(range(0, length, size), start=1):
            end = min(start + size, length)
            self.num_steps += 1
            yield GenerationEvent(
                answer[start:end],
                GenerationStats(
                    refreshes=step,
                    reuses=0,
                    commits=0,
                    auxiliary=0,
                    steps=step,
                    completion_tokens=end,
                ),
                "length" if end == length else None,
            )


def use_instant_engine(tokens_per_chunk: int = TOKENS_PER_CHUNK) -> None:
    """Let models that are loaded from now on answer by an instant engine."""
    from vdiff_kserve import loading

    InstantEngine.tokens_per_chunk = tokens_per_chunk
    loading.Engine = InstantEngine  # type: ignore[misc]


def main() -> int:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokens_per_chunk", type=int, default=TOKENS_PER_CHUNK)
    own, server_flags = parser.parse_known_args()
    use_instant_engine(own.tokens_per_chunk)
    from vdiff_kserve.__main__ import main as serve

    sys.argv[1:] = server_flags
    return serve()


if __name__ == "__main__":
    sys.exit(main())
