"""What a step takes beside the model: with LLaDA's vocabulary and 64 rows, at most 256 MiB."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.device import pack
from tests.engine.tiny import MASK, tiny_decoder
from tests.models.plain_kernels import use_plain_kernels
from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.engine.request import GenerationRequest
from vdiff_kserve.engine.runner import (
    LOGITS_PER_CHUNK,
    ROOMY_LOGITS_PER_CHUNK,
    ModelRunner,
)
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.models import attention as packed_attention
from vdiff_kserve.models import decoder as decoder_module
from vdiff_kserve.models.moe import MoEConfig, Router
from vdiff_kserve.sampler import DecodingParams

VOCAB, ROWS = 126_464, 64
LIMIT = 256 << 20


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, while they live.

    Attributes:
        peak: most bytes at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs or {}))
                 if isinstance(leaf, torch.Tensor)}  # fmt: skip
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                place = storage.data_ptr()
                if place and place not in known and place not in self._live:
                    self._live[place] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, place, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def peak_of_a_step(positions: int, decoding: dict[str, Any]) -> int:
    """Bytes at most, for `positions` open positions of each row."""
    decoder = tiny_decoder(vocab_size=VOCAB)
    spec = ModelSpec("tiny", decoder.config, MASK, 38, None, 16, positions)
    cache = KVCache(decoder.config, 16, decoder.device, decoder.dtype)
    runner = ModelRunner(decoder, spec, cache)
    params = DecodingParams(block_length=positions, **decoding)
    requests = [GenerationRequest((1, i), positions, params) for i in range(ROWS)]
    rows = [make_row(request, lambda _: None, spec, False) for request in requests]
    with LiveMemory() as memory:
        decisions = runner.step(rows)
    assert len(decisions) == ROWS
    return memory.peak


@pytest.mark.parametrize(
    "decoding",
    [
        {"policy": "entropy_bound"},
        {"policy": "maskgit_plus", "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"top_logprobs": 20},
        {"cfg_scale": 1.0},
    ],
    ids=["entropy", "filtered", "logprobs", "guided"],
)
def test_logits_of_64_rows_and_a_large_vocabulary_fit_in_256_mib(decoding: dict[str, Any]) -> None:
    peak = peak_of_a_step(1, decoding)
    assert LOGITS_PER_CHUNK * 4 < peak <= LIMIT, f"{peak / 2**20:.0f} MiB"


def test_greedy_chunks_of_a_gpu_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdiff_kserve.engine.runner.LOGITS_PER_CHUNK", ROOMY_LOGITS_PER_CHUNK)
    peak = peak_of_a_step(3, {})
    assert ROOMY_LOGITS_PER_CHUNK * 4 < peak <= LIMIT, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_heads": 16, "head_dim": 16, "qk_norm": True},
        {"moe": MoEConfig(num_experts=4, experts_per_token=2, expert_size=24, shared_size=24)},
    ],
    ids=["mlp", "attention", "experts"],
)
def test_activations_are_what_a_pass_is_given(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where what stands between two products makes its result and nothing else."""
    tokens = 4000
    decoder = tiny_decoder(**changes).to(torch.bfloat16)
    decoder.join_layers()
    for module in decoder.modules():
        if isinstance(module, Router):
            module.float()
    canvas = torch.zeros(tokens, dtype=torch.long)
    batch = pack([canvas], [RowSpan(0, tokens, tokens, 0, 8)])
    with torch.inference_mode(), LiveMemory() as memory:
        use_plain_kernels(monkeypatch, wrap=result_alone)
        monkeypatch.setattr(decoder_module, "has_kernel", lambda *_: True)
        monkeypatch.setattr(packed_attention, "run_kernel", lambda query, *_: query.clone())
        decoder(batch)
    kept = memory.peak / tokens / decoder.dtype.itemsize
    expected = decoder.config.activations_per_token
    assert 0.7 * expected < kept <= expected + 4 * decoder.config.head_dim + 24


def result_alone(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, of whose memory only the result's is counted."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            result = kernel(*args)
        return tree_map(torch.clone, result)

    return run
