"""A round waits for a GPU once, when it fetches what was decided: whatever else the host would wait
for, it would wait for the whole forward pass. A stand-in for a GPU notes every wait; on a real one
`tests/models/test_gpu.py` asks CUDA itself."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.engine import tiny
from tests.engine.tiny import request_of, tiny_auxiliary, tiny_decoder, tiny_spec
from tests.gpu_stand_in import GPU, GpuStandIn, RemoteTensor, gpu_stand_in, move_there
from tests.models.plain_kernels import use_plain_kernels
from tests.models.test_attention import plain_kernel
from vdiff_kserve.engine import Engine, EngineConfig, budget, measured_token_budget, runner
from vdiff_kserve.engine.make_row import make_row
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.runner import ModelRunner
from vdiff_kserve.models import Decoder, ReuseGraphs, fused, fused_experts
from vdiff_kserve.models import attention as packed_attention
from vdiff_kserve.models import decoder as decoder_module
from vdiff_kserve.models.attention import VarlenCall
from vdiff_kserve.models.moe import MoEConfig, Router
from vdiff_kserve.sampler import (
    AllowedTokens,
    Constraints,
    DecodingParams,
    Policy,
    StepRows,
    constrain,
    draw,
)

STEPS = 4
POLICIES = [{"policy": policy} for policy in get_args(Policy)]
RULES = Constraints(
    logit_bias=((3, 1.0),),
    bad_words=((5,), (3, 4)),
    min_tokens=9,
    end_token_ids=(38,),
    repetition_penalty=1.2,
)


def kernel(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, causal: bool) -> Tensor:
    with torch._C.DisableTorchFunction():
        own = VarlenCall(call.cu_queries.inner, call.cu_keys.inner, call.max_queries, call.max_keys)
        return RemoteTensor(plain_kernel(query.inner, key.inner, value.inner, own, causal))


def run_again(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    output = run()
    return output, lambda: output.copy_(run())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GpuStandIn:
    """With the attention kernel replaced by what it is documented to do, also where there is a
    real GPU."""
    monkeypatch.setattr(tiny, "TEST_DEVICE", torch.device("cpu"))
    monkeypatch.setattr(decoder_module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(packed_attention, "run_kernel", kernel)
    monkeypatch.setattr(fused, "usable", lambda _: False)
    monkeypatch.setattr(fused_experts, "usable", lambda *_: False)
    monkeypatch.setattr(draw, "usable", lambda _: False)
    monkeypatch.setattr(runner, "draws_by_kernel", lambda _: False)
    with gpu_stand_in(monkeypatch) as stand_in, torch.inference_mode():
        yield stand_in


def engine_of(decoder: Decoder, auxiliary: Decoder | None = None) -> Engine:
    """An engine that is not started."""
    for model in (decoder, auxiliary):
        if model is not None:
            move_there(model)
    config = EngineConfig(kv_cache_tokens=400, enforce_eager=True)
    return Engine(decoder, tiny_spec(decoder), config, auxiliary)


def waits_of_rounds(
    gpu: GpuStandIn, engine: Engine, count: int = 4, **decoding: Any
) -> list[list[str]]:
    """What each of the first rounds of so many rows waits for."""
    rows: list[Row] = []
    for i in range(count):
        own = decoding if i % 2 else {"cache": decoding.get("cache", "dual")}
        request = request_of((1, 2, i), 24, **own | {"seed": i})
        rows.append(make_row(request, lambda _: None, engine.spec, engine._has_auxiliary))
        assert engine._memory.reserve(rows[-1])
    waits = []
    for _ in range(STEPS):
        gpu.waits.clear()
        for row, decision in zip(rows, engine._runner.step(rows), strict=True):
            row.apply(decision)
        waits.append(list(gpu.waits))
    return waits


@pytest.mark.parametrize(
    "decoding",
    [
        *POLICIES,
        {"cache": "none"},
        {"cache": "prefix", "refresh_interval": 2, "vicinity": 2},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logits_eos_inf": True},
        {"policy": "maskgit_plus", "alg_temp": 0.5},
        {"confidence_eos_eot_inf": True},
        {"cfg_scale": 1.5},
        {"top_logprobs": 2},
        {"constraints": RULES},
    ],
    ids=str,
)
def test_a_round_waits_once(decoding: dict[str, Any], gpu: GpuStandIn) -> None:
    engine = engine_of(tiny_decoder())
    for waits in waits_of_rounds(gpu, engine, **{"cache": "dual"} | decoding):
        assert len(waits) == 1, waits
        assert "cpu" in waits[0]


@pytest.mark.parametrize("decoding", [{}, {"policy": "threshold", "threshold": 0.5}], ids=str)
def test_captured_passes_wait_no_more(decoding: dict[str, Any], gpu: GpuStandIn) -> None:
    engine = engine_of(tiny_decoder())
    decoder, cache = engine._runner._decoder, engine._cache
    graphs = ReuseGraphs(decoder, 96, run_again)
    engine._runner = ModelRunner(decoder, engine.spec, cache, graphs=graphs)
    for waits in waits_of_rounds(gpu, engine, cache="dual", **decoding):
        assert len(waits) == 1, waits
    assert graphs._captured, "nothing was captured"


def test_a_captured_whole_pass_waits_no_more(gpu: GpuStandIn) -> None:
    engine = engine_of(tiny_decoder())
    graphs = ReuseGraphs(engine._runner._decoder, 96, run_again)
    engine._runner._graphs = graphs
    for waits in waits_of_rounds(gpu, engine, count=1, cache="none"):
        assert len(waits) == 1, waits
    assert graphs._captured, "nothing was captured"


@pytest.mark.parametrize("cache", ["dual", "none"])
def test_joined_layers_wait_no_more(
    cache: str, gpu: GpuStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_decoder(qkv_bias=True))
    decoder = engine._runner._decoder
    decoder.join_layers()
    use_plain_kernels(monkeypatch)
    for waits in waits_of_rounds(gpu, engine, cache=cache):
        assert len(waits) == 1, waits
    assert decoder.layers[0].attention.is_joined


def test_experts_are_chosen_on_the_gpu(gpu: GpuStandIn) -> None:
    experts = MoEConfig(num_experts=4, experts_per_token=2, expert_size=16, shared_size=16)
    decoder = tiny_decoder(moe=experts).to(torch.bfloat16)
    for module in decoder.modules():
        if isinstance(module, Router):
            module.float()
    engine = engine_of(decoder)
    engine._runner._graphs = ReuseGraphs(decoder, 96, run_again)
    for waits in waits_of_rounds(gpu, engine, cache="dual"):
        assert len(waits) == 1, waits


def test_checking_a_draft_waits_once_more(gpu: GpuStandIn) -> None:
    """The draft goes by way of the host into the canvas that the auxiliary model reads."""
    engine = engine_of(tiny_decoder(), tiny_auxiliary())
    for waits in waits_of_rounds(gpu, engine, cache="dual", policy="apd"):
        assert len(waits) == 2, waits


def test_a_grammar_waits_for_nothing(gpu: GpuStandIn) -> None:
    """A position that it governs may be in another chunk."""
    row, position = torch.arange(2).repeat_interleave(3), torch.arange(6)
    allowed = torch.zeros(2, 5, dtype=torch.bool)
    allowed[:, 2] = True
    governed = AllowedTokens(*map(RemoteTensor, (torch.arange(2), torch.tensor([1, 5]), allowed)))
    there = RemoteTensor(row), RemoteTensor(position), RemoteTensor(torch.full((6,), -1))
    rows = StepRows(*there, [DecodingParams()] * 2, [0, 0], [1, 1], [9, 9], None, governed, row)
    logits = RemoteTensor(torch.randn(6, 5))
    before = logits.inner.clone()
    constrain(logits[:4], rows.part(slice(0, 4)))
    assert gpu.waits == []
    changed = (logits.inner != before).nonzero().tolist()
    assert changed == [[1, token] for token in (0, 1, 3, 4)]


def test_the_stand_in_notices_waits(gpu: GpuStandIn) -> None:
    there = torch.arange(4).to(GPU)
    uses: list[Callable[[], object]] = [
        lambda: torch.arange(4).to(GPU, non_blocking=True),
        lambda: there[there > 1],
        lambda: there[torch.tensor([1])],
        lambda: there.nonzero(),
        lambda: int(there[0]),
        lambda: bool(there.any()),
        lambda: there.tolist(),
        lambda: torch.tensor([1], device=GPU),
        lambda: torch.zeros(4, device=GPU).copy_(torch.ones(4)),
        lambda: there.repeat_interleave(there),
    ]
    for use in uses:
        gpu.waits.clear()
        use()
        assert len(gpu.waits) == 1, use
    with pytest.raises(RuntimeError, match="pinned"):
        there.pin_memory()
    gpu.waits.clear()
    assert (torch.arange(4).pin_memory().to(GPU, non_blocking=True) + there).device == GPU
    assert gpu.waits == []


def test_the_budget_is_not_of_the_first_pass_on_a_gpu(
    gpu: GpuStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one loads libraries and compiles kernels."""
    seconds = iter([9.0, 0.02, 0.01, 0.03, 0.02])
    monkeypatch.setattr(budget, "_seconds", lambda *_: next(seconds))
    decoder = tiny_decoder()
    move_there(decoder)
    assert measured_token_budget(decoder, 512) == 2 * 3840
