"""The heart: requests in, committed tokens out, batched at the denoising step."""

from vdiff_kserve.engine.budget import REFRESH_SECONDS, measured_token_budget
from vdiff_kserve.engine.engine import Engine
from vdiff_kserve.engine.grammar import CompiledGrammar, GrammarError, Grammars
from vdiff_kserve.engine.interface import GenerationEngine, LocalEngine
from vdiff_kserve.engine.kv_cache import bytes_per_token, without_scratch
from vdiff_kserve.engine.limits import EngineConfig, scratch_bytes
from vdiff_kserve.engine.lockstep import Lockstep
from vdiff_kserve.engine.prefix_cache import block_hashes
from vdiff_kserve.engine.report import RoundObserver, RoundReport
from vdiff_kserve.engine.request import (
    EngineError,
    EngineStoppedError,
    EventSink,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    RequestTooLargeError,
    Scoring,
    ScoringMethod,
    StepView,
    TokenLogprob,
)
from vdiff_kserve.engine.scoring import add_scores
from vdiff_kserve.engine.stream import GenerationStream

__all__ = [
    "REFRESH_SECONDS",
    "CompiledGrammar",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStoppedError",
    "EventSink",
    "GenerationEngine",
    "GenerationEvent",
    "GenerationRequest",
    "GenerationResult",
    "GenerationStats",
    "GenerationStream",
    "GrammarError",
    "Grammars",
    "LocalEngine",
    "Lockstep",
    "QueueFullError",
    "QueueTimeoutError",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "RoundObserver",
    "RoundReport",
    "Scoring",
    "ScoringMethod",
    "StepView",
    "TokenLogprob",
    "add_scores",
    "block_hashes",
    "bytes_per_token",
    "measured_token_budget",
    "scratch_bytes",
    "without_scratch",
]
