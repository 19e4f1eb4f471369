"""Layers with experts: every way of computing them equals one token at a time."""

import copy
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from vdiff_kserve.models import can_pack
from vdiff_kserve.models.moe import Experts, MoEConfig, Router, SparseMLP
from vdiff_kserve.models.quantization import quantize_experts

HIDDEN = 32


def randomize(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data = value.to(TEST_DEVICE, dtype)
        parameter.requires_grad_(False)


def routed_tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the three experts of each of eight, none of which is the first, and their weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((count, HIDDEN), generator=generator)
    chosen = torch.rand((count, 6), generator=generator).topk(3).indices + 1
    weights = torch.rand((count, 3), generator=generator)
    return x.to(TEST_DEVICE, dtype), chosen.to(TEST_DEVICE), weights.to(TEST_DEVICE)


def skip_unless_possible(how: Callable[[Experts], None], dtype: torch.dtype) -> None:
    if how is Experts.pack and not can_pack(TEST_DEVICE, dtype):
        pytest.skip("this processor packs nothing")
    if how is in_eight_bits and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


def token_by_token(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The definition: each token through each of its experts, in float64."""
    rows = []
    for token, own, shares in zip(x.double(), chosen.tolist(), weights.double(), strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(own, shares, strict=True):
            gate, up = (experts.gate_up_proj[expert].double() @ token).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            total += share * (experts.down_proj[expert].double() @ inner)
        rows.append(total)
    return torch.stack(rows)


def as_loaded(experts: Experts) -> None:
    pass


def in_two_kernels(experts: Experts) -> None:
    experts._one_by_one = experts._grouped  # type: ignore[method-assign]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [as_loaded, in_two_kernels, Experts.pack])
@torch.inference_mode()
def test_experts_compute_what_their_tokens_need(
    how: Callable[[Experts], None], dtype: torch.dtype, tokens: int
) -> None:
    """Also experts without tokens, and a token that all others share an expert with."""
    skip_unless_possible(how, dtype)
    experts = Experts(HIDDEN, MoEConfig(num_experts=8, experts_per_token=3, expert_size=16))
    randomize(experts, dtype)
    x, chosen, weights = routed_tokens(tokens, dtype)
    expected = token_by_token(experts, x, chosen, weights)
    how(experts)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    computed = experts(x, chosen, weights)
    assert computed.dtype == dtype
    torch.testing.assert_close(computed.double(), expected, atol=tolerance, rtol=tolerance)


def in_eight_bits(experts: Experts) -> None:
    quantize_experts(experts, "int8", stacked=True)
    in_two_kernels(experts)


@pytest.mark.parametrize("how", [as_loaded, in_two_kernels, Experts.pack, in_eight_bits])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@torch.inference_mode()
def test_experts_that_are_spread_over_ranks_add_up(
    how: Callable[[Experts], None], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no token chose an expert of a rank."""
    skip_unless_possible(how, torch.float32)
    config = MoEConfig(num_experts=8, experts_per_token=3, expert_size=16)
    whole = Experts(HIDDEN, config)
    randomize(whole)
    x, chosen, weights = routed_tokens(20)
    alone = copy.deepcopy(whole)
    how(alone)
    expected = alone(x, chosen, weights)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm_of_a_gpu)
    total = torch.zeros_like(x)
    for rank in range(num_ranks):
        held = 8 // num_ranks
        experts = copy.deepcopy(whole)
        experts.hold(rank * held, held)
        how(experts)
        total += experts(x, chosen, weights)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


def grouped_mm_of_a_gpu(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """Leaves rows that belong to no group as the memory was."""
    rows = x.new_full((len(x), weights.shape[-1]), torch.nan)
    start = 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        rows[start:end] = x[start:end] @ weight
        start = end
    return rows


@torch.inference_mode()
def test_a_token_is_computed_as_if_it_were_alone() -> None:
    layer = SparseMLP(HIDDEN, MoEConfig(8, 2, 16, shared_size=24))
    randomize(layer)
    x, _, _ = routed_tokens(20)
    together = layer(x)
    for token, expected in zip(x, together, strict=True):
        torch.testing.assert_close(layer(token[None])[0], expected, atol=1e-5, rtol=1e-5)


def choose(scores: list[float], bias: list[float], groups: int, kept: int, count: int) -> list[int]:
    """Group-limited choice, one token, without tensors."""
    preference = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    best = [sum(sorted(preference[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: -best[g])[:kept]
    experts = [e for g in allowed for e in range(g * size, (g + 1) * size)]
    return sorted(experts, key=lambda e: -preference[e])[:count]


@torch.inference_mode()
def test_router_limits_groups_and_leaves_the_bias_out_of_the_weights() -> None:
    config = MoEConfig(
        num_experts=12,
        experts_per_token=4,
        expert_size=8,
        scoring="sigmoid",
        renormalize=True,
        scaling=2.5,
        choice_bias=True,
        num_groups=4,
        groups_kept=2,
    )
    router = Router(HIDDEN, config)
    randomize(router)
    assert router.bias is not None
    router.bias *= 3
    x, _, _ = routed_tokens(50)
    experts, weights = router(x)
    by_bias = 0
    for token, own, shares in zip(x, experts, weights, strict=True):
        scores = (router.weight @ token).sigmoid()
        expected = choose(scores.tolist(), router.bias.tolist(), 4, 2, 4)
        assert own.tolist() == expected
        chosen = scores[own]
        torch.testing.assert_close(shares, chosen / chosen.sum() * 2.5)
        by_bias += expected != choose(scores.tolist(), [0.0] * 12, 4, 2, 4)
    assert by_bias > 10, "the bias never mattered: the test says nothing"


@torch.inference_mode()
def test_router_takes_the_softmax_over_all_experts_as_it_is() -> None:
    router = Router(HIDDEN, MoEConfig(num_experts=8, experts_per_token=2, expert_size=8))
    randomize(router)
    x, _, _ = routed_tokens(9)
    experts, weights = router(x.bfloat16())
    expected = (x.bfloat16().float() @ router.weight.T).softmax(-1).topk(2)
    assert torch.equal(experts, expected.indices)
    torch.testing.assert_close(weights, expected.values)
    assert (weights.sum(dim=-1) < 0.99).any()
