"""An engine that answers by script, for tests of what is built on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

from tests.server.checkpoint import make_tokenizer
from vdiff_kserve.engine import (
    EngineError,
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
    TokenLogprob,
)
from vdiff_kserve.openai.decoding import ModelTraits
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.service import GenerationService
from vdiff_kserve.sampler import DecodingParams

TOKENIZER = make_tokenizer()
EOS, EOT, MASK = 314, 319, 318
Script = Sequence[str | EngineError | None]


def limits(**changes: object) -> ServingLimits:
    given = {
        "max_model_len": 100,
        "default_max_tokens": 50,
        "max_choices": 6,
        "vocab_size": 320,
        "decoding": DecodingParams(),
        "profiles": {"exact": DecodingParams()},
        "traits": ModelTraits(block_causal=False, block_length=32, has_auxiliary=False),
    }
    return ServingLimits(**(given | changes))


class ScriptedStream:
    """Plays a script: texts are events, an error is raised, None waits for ever."""

    def __init__(self, script: Script, finish_reason: str, top_logprobs: int | None = None) -> None:
        self._script = script
        self._top_logprobs = top_logprobs
        self._finish_reason = finish_reason
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        tokens = 0
        for step, item in enumerate(self._script, start=1):
            await asyncio.sleep(0)
            if item is None:
                await asyncio.Event().wait()
            if isinstance(item, EngineError):
                raise item
            ids = tuple(TOKENIZER.encode(item, add_special_tokens=False))
            tokens += len(ids)
            is_last = step == len(self._script)
            stopped = is_last and self._finish_reason == "stop"
            told = ids + (EOS,) * stopped
            yield GenerationEvent(
                ids,
                GenerationStats(
                    refreshes=step,
                    reuses=0,
                    commits=0,
                    auxiliary=0,
                    steps=step,
                    completion_tokens=tokens + stopped,
                ),
                self._finish_reason if is_last else None,
                EOS if stopped else None,
                () if self._top_logprobs is None else tuple(map(self._told, told)),
            )

    def _told(self, token: int) -> TokenLogprob:
        """The token is the second likeliest, behind `a`."""
        top = ((TOKENIZER.convert_tokens_to_ids("a"), -0.5), (token, -1.5))
        return TokenLogprob(token, -1.5, 2, top[: self._top_logprobs])


class ScriptedEngine:
    """Gives every request the next script, or refuses them all."""

    spec = SimpleNamespace(
        end_token_ids=(EOS, EOT), mask_token_id=MASK, eos_token_id=EOS, renoising=None
    )

    def __init__(
        self,
        *scripts: Script,
        finish_reason: str = "length",
        refusal: Exception | None = None,
    ) -> None:
        self._scripts = list(scripts)
        self._finish_reason = finish_reason
        self._refusal = refusal
        self.requests: list[GenerationRequest] = []
        self.streams: list[ScriptedStream] = []

    def submit(self, requests: Sequence[GenerationRequest]) -> list[ScriptedStream]:
        if self._refusal is not None:
            raise self._refusal
        self.requests += requests
        streams = [
            ScriptedStream(self._scripts.pop(0), self._finish_reason, each.decoding.top_logprobs)
            for each in requests
        ]
        self.streams += streams
        return streams


def service(engine: ScriptedEngine, **changes: object) -> GenerationService:
    return GenerationService(engine, TOKENIZER, limits(**changes), "tiny")
