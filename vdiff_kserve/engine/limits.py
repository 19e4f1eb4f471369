"""The limits of an engine: its rows, its rounds, and the memory of its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vdiff_kserve.engine.kv_cache import LEAST_SCRATCH, bytes_per_token, memory_for_cache
from vdiff_kserve.engine.lockstep import Lockstep
from vdiff_kserve.engine.report import RoundObserver
from vdiff_kserve.models import DecoderConfig, LanguageModel, ModelSpec

LOGITS_BYTES = 256 << 20


def scratch_bytes(config: DecoderConfig, dtype: torch.dtype, tokens: int) -> int:
    """GPU memory of a round's logits and activations.

    Args:
        tokens: of its longest pass.
    """
    activations = tokens * config.activations_per_token * dtype.itemsize
    return max(LEAST_SCRATCH, LOGITS_BYTES + activations)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_num_seqs: most rows in one forward pass.
        max_queue: most rows waiting for a slot; beyond it, `submit` raises `QueueFullError`.
        max_num_batched_tokens: most tokens that a round spends on passes over whole canvases,
            beside the short ones of rows that use a cache.
        kv_cache_tokens: canvas tokens that the key-value cache holds; None is room for
            `max_num_seqs` canvases of the model's full length, as far as memory allows.
        kv_cache_memory: the same in bytes, for the models together; None is what is free.
        gpu_memory_utilization: share of a GPU's memory that the process may use in all.
        cpu_memory_utilization: share of the host memory free now that the caches may take.
        enable_prefix_caching: whether a block-causal model keeps finished requests' keys and
            values for others that begin alike.
        enforce_eager: whether a GPU runs cached passes without CUDA graphs.
        round_timeout: seconds after which a round counts as stuck; None compares it with earlier
            ones, 0 waits for ever.
        observer: told of every round.
        lockstep: the ranks that run this engine together, each with a shard of the model; None when
            the model is whole. All else in the configuration must be the same on every rank.
    """

    max_num_seqs: int = 8
    max_queue: int = 256
    max_num_batched_tokens: int = 2048
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    cpu_memory_utilization: float = 0.5
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    round_timeout: float | None = None
    observer: RoundObserver | None = None
    lockstep: Lockstep | None = None

    def cache_tokens(self, models: Sequence[LanguageModel], spec: ModelSpec) -> int:
        """Canvas tokens for which all models' caches have room, once their weights are loaded.

        Args:
            models: the served one first; all are on its device.
            spec: of the served one.
        """
        if self.kv_cache_tokens is not None:
            return self.kv_cache_tokens
        memory = self.kv_cache_memory
        if memory is None:
            memory = memory_for_cache(
                models[0].device,
                self.gpu_memory_utilization,
                self.cpu_memory_utilization,
                scratch_bytes(
                    models[0].config,
                    models[0].dtype,
                    max(self.max_num_batched_tokens, spec.max_model_len),
                ),
            )
        affordable = memory // sum(bytes_per_token(each.config, each.dtype) for each in models)
        return min(self.max_num_seqs * spec.max_model_len, affordable)
