"""What stands around the matrix products of experts as three GPU kernels.

Choosing a token's experts, laying its copies out by expert and summing what comes of them is some
forty kernels of torch's, which in a cached pass take as long as half of the experts' weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdiff_kserve.gpu import kernels_work, power_of_2
from vdiff_kserve.models.fused import LARGEST

if TYPE_CHECKING:
    from vdiff_kserve.models.moe import MoEConfig

DTYPES = (torch.bfloat16,)
MOST_EXPERTS, MOST_CHOSEN = 1024, 16
JOINED_BLOCK = 1024


@dataclass(frozen=True)
class Spread:
    """Copies of tokens, one for each of a token's experts, those of one expert together.

    Attributes:
        rows: [copies, hidden_size].
        chosen: int32 [copies], the expert of each, ascending.
        ends: int32 [experts], where the copies of each end.
        experts: int32 [tokens, experts per token].
        places: int32, the same shape: where a token's copies are.
        weights: float32, the same shape.
    """

    rows: Tensor
    chosen: Tensor
    ends: Tensor
    experts: Tensor
    places: Tensor
    weights: Tensor


def usable(x: Tensor, config: MoEConfig) -> bool:
    """Whether experts of `x`, [tokens, hidden_size], take the kernels."""
    number, groups = config.num_experts, config.num_groups
    even = all(each == power_of_2(each) for each in (number, groups)) and number >= 2 * groups
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.is_contiguous()
        and x.shape[-1] <= LARGEST
        and number <= MOST_EXPERTS
        and config.experts_per_token <= MOST_CHOSEN
        and config.is_aligned(x.shape[-1])
        and (even or config.groups_kept == groups)
        and not torch.is_grad_enabled()
        and x.device.index == torch.cuda.current_device()
        and works(x.device, config)
    )


def spread(
    x: Tensor, logits: Tensor, bias: Tensor | None, config: MoEConfig, first: int = 0
) -> Spread:
    """The copies of `x` for the experts that the router chooses.

    Args:
        x: [tokens, hidden_size].
        logits: float32 [tokens, experts]; `bias`, float32 [experts], is added to their scores for
            the choice.
        first: the expert that is number 0; those before it come last.
    """
    (tokens, size), number, chosen = x.shape, config.num_experts, config.experts_per_token
    counts = torch.zeros(number, dtype=torch.int32, device=x.device)
    experts, ranks, places = counts.new_empty((3, tokens, chosen))
    weights = logits.new_empty((tokens, chosen))
    block = power_of_2(number)
    kernels = _kernels()
    kernels.choose_kernel[(tokens,)](
        logits,
        logits if bias is None else bias,
        experts,
        ranks,
        weights,
        counts,
        number,
        first,
        config.scaling,
        SOFTMAX=config.scoring == "softmax",
        BIASED=bias is not None,
        RENORMALIZES=config.renormalize,
        GROUPS=config.num_groups,
        KEPT=config.groups_kept,
        CHOSEN=chosen,
        SLOTS=power_of_2(chosen),
        BLOCK=block,
        num_warps=1 if block <= 256 else 4,
    )
    rows, ends = x.new_empty((tokens * chosen, size)), torch.empty_like(counts)
    whose = counts.new_empty(tokens * chosen)
    kernels.spread_kernel[(tokens * chosen,)](
        x,
        experts,
        ranks,
        counts,
        rows,
        places,
        whose,
        ends,
        size,
        number,
        CHOSEN=chosen,
        EXPERTS=block,
        BLOCK=power_of_2(size),
        num_warps=4,
    )
    return Spread(rows, whose, ends, experts, places, weights)


def join(computed: Tensor, copies: Spread, held: int, other: Tensor | None) -> Tensor:
    """The weighted sums of what experts made of each token's copies: [tokens, hidden_size].

    Args:
        computed: [copies, hidden_size], in the order of `copies`.
        held: how many experts there are here; what others make of a token is left out.
        other: [tokens, hidden_size], added besides.
    """
    tokens, chosen = copies.experts.shape
    size = computed.shape[-1]
    out = computed.new_empty((tokens, size))
    _kernels().join_kernel[(tokens, -(-size // JOINED_BLOCK))](
        computed,
        copies.experts,
        copies.places,
        copies.weights,
        out if other is None else other,
        out,
        size,
        held,
        ADDS=other is not None,
        CHOSEN=chosen,
        BLOCK=JOINED_BLOCK,
        num_warps=4,
    )
    return out


@cache
def works(device: torch.device, config: MoEConfig) -> bool:
    """Whether the kernels compile for this GPU and these experts and compute what they should."""
    return kernels_work(lambda: agrees(device, config), "Experts run without fused kernels")


def agrees(device: torch.device, config: MoEConfig) -> bool:
    """Whether the kernels choose, lay out and sum as torch does, on a few random numbers, with all
    experts and with three quarters of them."""
    from vdiff_kserve.models.moe import choose_experts

    generator, number = torch.Generator().manual_seed(0), config.num_experts
    x, other = torch.randn((2, 7, 24), generator=generator).to(device, torch.bfloat16)
    logits, bias = torch.randn((8, number), generator=generator).to(device).split((7, 1))
    added = bias[0] if config.choice_bias else None
    chosen, weights = choose_experts(logits, added, config)
    for first, held in ((0, number), (number // 3, number * 3 // 4)):
        experts = (chosen - first) % number
        copies = spread(x, logits, added, config, first)
        made = copies.rows * (copies.chosen[:, None] % 4 + 1).to(x.dtype)
        summed = join(made, copies, held, other)
        factors = (weights * (experts % 4 + 1) * (experts < held)).double().sum(-1, keepdim=True)
        ends = (experts.flatten()[:, None] <= torch.arange(number, device=device)).sum(dim=0)
        own = x[:, None].expand(-1, chosen.shape[1], -1)
        if not (
            torch.equal(copies.experts.sort().values, experts.sort().values.int())
            and torch.equal(copies.ends, ends.int())
            and torch.equal(copies.rows[copies.places.long()], own)
            and torch.allclose(
                summed.double(), factors * x.double() + other.double(), atol=0.1, rtol=0.03
            )
        ):
            return False
    return True


@cache
def _kernels() -> Any:
    """Their module; Triton comes with torch's builds for GPUs only."""
    from vdiff_kserve.models import fused_experts_kernels

    return fused_experts_kernels
