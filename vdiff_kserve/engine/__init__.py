"""The heart: requests in, committed tokens out, batched at the denoising step."""

from vdiff_kserve.engine.engine import Engine, EngineConfig
from vdiff_kserve.engine.request import (
    EngineError,
    EngineStoppedError,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    GenerationStats,
    QueueFullError,
    RequestTooLargeError,
)
from vdiff_kserve.engine.stream import GenerationStream

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStoppedError",
    "GenerationEvent",
    "GenerationRequest",
    "GenerationResult",
    "GenerationStats",
    "GenerationStream",
    "QueueFullError",
    "RequestTooLargeError",
]
