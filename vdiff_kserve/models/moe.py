"""Mixture of experts: a router chooses a few of many MLPs for each token.

Tokens are sorted by expert, so that every expert computes its own in one piece: the cost grows with
tokens times chosen experts, not with the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdiff_kserve.models import fused, fused_experts
from vdiff_kserve.models.layers import GatedMLP
from vdiff_kserve.models.packed_linear import linear_packed, pack_weight

EXPERTS_PER_GROUP_SCORE = 2
"""A group of experts is as good as its best two together."""
GROUPED_DTYPES = (torch.bfloat16,)
"""What `torch.nn.functional.grouped_mm` multiplies on every GPU that it runs on."""
GROUPED_CAPABILITIES = (9, 10)
"""Major ones of GPUs on which it is one kernel; elsewhere torch reads the groups' ends on the host
and multiplies one by one."""
WIDENED_BYTES = 256 << 20
"""Weights in fewer bits are made whole again in pieces of at most this, so that a pass of many
experts takes no more memory than others."""


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a layer and how a token's are chosen; sizes in elements.

    Attributes:
        num_experts: experts of a layer.
        experts_per_token: how many of them a token passes through.
        expert_size: width of an expert's MLP.
        scoring: what makes scores of the router's logits.
        renormalize: whether the weights of a token's experts are made to sum to 1.
        scaling: factor on the weights.
        choice_bias: whether a learned bias is added to the scores for the choice, not the weights.
        num_groups, groups_kept: experts come in groups; a token's are taken from the best groups.
        shared_size: width of an MLP that every token passes through besides; 0 is none.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scaling: float = 1.0
    choice_bias: bool = False
    num_groups: int = 1
    groups_kept: int = 1
    shared_size: int = 0

    def is_aligned(self, hidden_size: int) -> bool:
        """Whether `torch.nn.functional.grouped_mm` takes the experts' matrices: it wants rows of
        whole multiples of 16 bytes, and fewer than 1,024 experts."""
        return hidden_size % 8 == self.expert_size % 8 == 0 and self.num_experts < 1024


class SparseMLP(nn.Module):
    """The mixture in the place of a layer's MLP."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)
        self.shared: GatedMLP | None = None
        if config.shared_size:
            self.shared = GatedMLP(hidden_size, config.shared_size)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> the same."""
        shared = None if self.shared is None else self.shared(x)
        if fused_experts.usable(x, self.router.config):
            router, experts = self.router, self.experts
            logits = router.logits(x)
            copies = fused_experts.spread(x, logits, router.bias, router.config, experts.first)
            computed = experts.multiply(copies.rows, copies.chosen, copies.ends)
            return fused_experts.join(computed, copies, experts.num_held, shared)
        mixed = self.experts(x, *self.router(x))
        return mixed if shared is None else mixed + shared


class Router(nn.Module):
    """Which experts a token passes through, and with what weight.

    Weights and arithmetic are float32 whatever the model's dtype: a rounded score can change the
    choice, and so everything after it.
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.bias: nn.Parameter | None = None
        if config.choice_bias:
            self.bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden_size] -> experts, int64, and weights, float32: [tokens, chosen] each."""
        return choose_experts(self.logits(x), self.bias, self.config)

    def logits(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> float32 [tokens, experts]."""
        return F.linear(x.float(), self.weight)


def choose_experts(logits: Tensor, bias: Tensor | None, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """A token's experts and their weights, as `Router` gives them.

    Groups are limited as in DeepSeek-V3 (arXiv 2412.19437), which LLaDA2 follows.
    """
    scores = logits.softmax(dim=-1) if config.scoring == "softmax" else logits.sigmoid()
    preference = scores if bias is None else scores + bias
    if config.groups_kept < config.num_groups:
        preference = _best_groups(preference, config.num_groups, config.groups_kept)
    experts = preference.topk(config.experts_per_token, dim=-1).indices
    weights = scores.gather(-1, experts)
    if config.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * config.scaling


def _best_groups(preference: Tensor, groups: int, kept: int) -> Tensor:
    """`preference` [tokens, experts] with -inf outside of each token's best groups."""
    grouped = preference.unflatten(-1, (groups, -1))
    top = min(EXPERTS_PER_GROUP_SCORE, grouped.shape[-1])
    best = grouped.topk(top, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    left_out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=preference.device)
    left_out = left_out.scatter(-1, best, False)
    return grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)


@dataclass(frozen=True)
class RoundedStack:
    """Stacked weights in fewer bits, with a scale for each row.

    Attributes:
        data: [experts, rows, columns], int8 or float8.
        scales: [experts, rows].
    """

    data: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weights: list[Any], dtype: torch.dtype) -> RoundedStack:
        """Every expert's weight as torchao has rounded it, for activations of `dtype`."""
        data = torch.stack([weight.qdata for weight in weights])
        return cls(data, torch.stack([weight.scale[:, 0] for weight in weights]).to(dtype))

    def multiply(self, x: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        """Each token times the weight of its expert: [tokens, columns] -> [tokens, rows].

        Args:
            chosen: the tokens' experts, ascending, [tokens]; those of experts behind the last one
                come out as anything.
            ends: where each expert's tokens end, int32 [experts].
        """
        step = max(1, WIDENED_BYTES // (self.data[0].numel() * x.element_size()))
        product: Tensor | None = None
        for first in range(0, len(self.data), step):
            some = slice(first, first + step)
            whole = self.data[some].to(x.dtype).transpose(1, 2)
            part = F.grouped_mm(x, whole, offs=ends[some])  # of use for these experts' tokens only
            own = chosen[:, None] >= first
            product = part if product is None else torch.where(own, part, product)
        assert product is not None
        return product * self.scales[chosen.clamp(max=len(self.scales) - 1)]


class Experts(nn.Module):
    """Experts of a layer, their weights stacked: all, or those that a rank of a shared model holds.

    Attributes:
        first: the first expert that is held.
        num_held: how many are.
        gate_up_proj: [experts held, 2 * expert_size, hidden_size], gate rows first.
        down_proj: [experts held, hidden_size, expert_size].
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        experts, size = config.num_experts, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, size))
        self._num_experts, self._is_aligned = experts, config.is_aligned(hidden_size)
        self.first, self.num_held = 0, experts
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._linear: Callable[[Tensor, Tensor], Tensor] = linear_packed
        self._rounded: tuple[RoundedStack, RoundedStack] | None = None

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts, as far as they are held, make of it.

        Args:
            x: [tokens, hidden_size].
            experts: int64 [tokens, experts_per_token]; as `weights`, float32.
        """
        # Numbered from the first held one on, so that those held elsewhere come last.
        held = (experts - self.first) % self._num_experts
        chosen, order = held.flatten().sort(stable=True)
        sorted_x = x[order // experts.shape[1]]
        if x.is_cuda and x.dtype in GROUPED_DTYPES and self._is_aligned:
            computed = self._grouped(sorted_x, chosen)
        else:
            computed = self._one_by_one(sorted_x, chosen)
        by_token = torch.empty_like(computed)
        by_token[order] = computed
        by_token = by_token.unflatten(0, experts.shape).float()
        return torch.bmm(weights[:, None], by_token).squeeze(1).to(x.dtype)

    def hold(self, first: int, count: int) -> None:
        """Keep `count` experts from `first` on; for others `forward` adds nothing."""
        self.first, self.num_held = first, count
        for name, parameter in list(self.named_parameters()):
            kept = parameter.detach()[first : first + count]
            self.register_parameter(name, nn.Parameter(kept, requires_grad=False))

    def pack(self) -> None:
        """Lay the weights out as CPUs multiply them fastest; the stacked ones are freed."""
        for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            self._packed.append((pack_weight(gate_up), pack_weight(down)))
        del self.gate_up_proj, self.down_proj

    def round(self, quantize: Callable[[Tensor], Tensor], *, stacked: bool) -> None:
        """Keep the weights in fewer bits; the plain ones are freed.

        Args:
            quantize: what makes torchao's tensor of an expert's weight.
            stacked: whether experts are computed together, as on a GPU; else one by one.
        """
        gate_up = [quantize(weight) for weight in self.gate_up_proj]
        down = [quantize(weight) for weight in self.down_proj]
        if stacked and self._is_aligned:
            dtype = self.gate_up_proj.dtype
            self._rounded = RoundedStack.of(gate_up, dtype), RoundedStack.of(down, dtype)
        else:
            self._packed = list(zip(gate_up, down, strict=True))
            self._linear = F.linear
        del self.gate_up_proj, self.down_proj

    def multiply(self, x: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        """What experts make of tokens that are sorted by them, in a few kernels, without waiting
        for the GPU: [tokens, hidden_size]. Those of experts that are not held come out as anything.

        Args:
            chosen: each token's expert, [tokens], numbered from the first held one on.
            ends: int32 [experts], where the tokens of each end; those not held may be left out.
        """
        ends = ends[: self.num_held]
        if self._rounded is not None:
            first, second = self._rounded
            return second.multiply(_activate(first.multiply(x, chosen, ends)), chosen, ends)
        gate_up = F.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=ends)
        return F.grouped_mm(_activate(gate_up), self.down_proj.transpose(1, 2), offs=ends)

    def _grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The same, with 0 for experts that are not held."""
        numbers = torch.arange(self.num_held, device=x.device)
        ends = torch.searchsorted(chosen, numbers, right=True).to(torch.int32)
        computed = self.multiply(x, chosen, ends)
        if self.num_held == self._num_experts:
            return computed
        return computed.masked_fill_((chosen >= self.num_held)[:, None], 0)

    def _one_by_one(self, x: Tensor, chosen: Tensor) -> Tensor:
        """One expert after the other, of those that have tokens."""
        hit, counts = chosen.unique_consecutive(return_counts=True)
        parts = x.split(counts.tolist())
        computed = [self._expert(e, part) for e, part in zip(hit.tolist(), parts, strict=True)]
        return torch.cat(computed)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        if expert >= self.num_held:
            return torch.zeros_like(x)
        if not self._packed:
            hidden = _activate(F.linear(x, self.gate_up_proj[expert]))
            return F.linear(hidden, self.down_proj[expert])
        gate_up, down = self._packed[expert]
        return self._linear(_activate(self._linear(x, gate_up)), down)


def has_expert_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU computes experts without asking the host which tokens are whose."""
    if device.type != "cuda" or dtype not in GROUPED_DTYPES or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if fused.usable(gate_up):
        return fused.silu_product(gate, up)
    return F.silu(gate) * up
