"""One denoising step over many rows, first half: logits -> candidate tokens and how sure they are.

Pure functions of tensors. All open positions of all rows' active blocks lie in one dimension
("positions"); what differs between rows is gathered to it, so no row is ever looped over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdiff_kserve.gpu import to_device
from vdiff_kserve.sampler import draw, likeliest
from vdiff_kserve.sampler.noise import gumbel
from vdiff_kserve.sampler.params import (
    ENTROPY_POLICIES,
    FILTERED_POLICIES,
    DecodingParams,
    Policy,
)

if TYPE_CHECKING:
    from vdiff_kserve.sampler.constrain import ConstraintTable

LEAST_SCORE = -1e9
"""Score of a position of which nothing can be said."""


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that decoding treats apart; a model may lack those that are None."""

    mask: int | None
    eos: int
    eot: int | None


@dataclass(frozen=True)
class AllowedTokens:
    """What grammars let stand at single positions of a step.

    Attributes:
        row: int64 [n], the row of each position.
        position: int64 [n], its place in the row's canvas.
        allowed: bool [n, vocab].
    """

    row: Tensor
    position: Tensor
    allowed: Tensor


@dataclass(frozen=True)
class StepRows:
    """The rows of a step and where their open positions are.

    Attributes:
        row: int64 [positions], the row of each position, ascending.
        position: int64 [positions], place in the row's canvas, ascending within a row.
        written: int64 [positions], the token that stands there; -1 for a mask. Only rows whose
            policy edits, or is `p2`, have written positions.
        params: one per row.
        seeds: one per row, of the random numbers of this step.
        quotas: tokens to commit per row in a scheduled step; for `p2` those that stay.
        lengths: tokens of each row's canvas.
        constraints: of the rows that ask something of their tokens; None when none does.
        allowed: of the rows that follow a grammar; None when none does.
        host_row: `row` on the host, when it is not there itself.
        targets: int64 [positions], the token whose log probability is told in place of the
            candidate's, -1 for none; None when there is none at all.
    """

    row: Tensor
    position: Tensor
    written: Tensor
    params: Sequence[DecodingParams]
    seeds: Sequence[int]
    quotas: Sequence[int]
    lengths: Sequence[int]
    constraints: ConstraintTable | None = None
    allowed: AllowedTokens | None = None
    host_row: Tensor | None = None
    targets: Tensor | None = None

    @cached_property
    def masked(self) -> Tensor:
        """bool [positions], where there is a mask."""
        return self.written < 0

    @cached_property
    def policies(self) -> Set[Policy]:
        """Those of the rows."""
        return {p.policy for p in self.params}

    def part(self, index: slice | Tensor) -> StepRows:
        """The same rows, with only some of the positions: a slice of them, or indices on the
        host."""
        if isinstance(index, slice) and index == slice(0, len(self.row)):
            return self
        there = index if isinstance(index, slice) else to_device(index, self.row.device)
        return replace(
            self,
            row=self.row[there],
            position=self.position[there],
            written=self.written[there],
            host_row=None if self.host_row is None else self.host_row[index],
            targets=None if self.targets is None else self.targets[there],
        )

    def told(self, candidates: Tensor) -> Tensor:
        """The tokens whose log probabilities are told: int64 [positions]."""
        if self.targets is None:
            return candidates
        return torch.where(self.targets >= 0, self.targets, candidates)

    def per_position(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        """One value per row -> one per position. Where all rows have the same, a GPU is sent
        nothing."""
        if len(set(values)) == 1:
            return torch.full_like(self.row, values[0], dtype=dtype)
        return to_device(torch.tensor(values, dtype=dtype), self.row.device)[self.row]

    def unless_all(
        self, values: Sequence[float], off: float, dtype: torch.dtype = torch.float64
    ) -> Tensor | None:
        """One value per row -> one per position; None when every row's is `off`."""
        return self.per_position(values, dtype) if any(v != off for v in values) else None

    def where(self, condition: Callable[[DecodingParams], bool]) -> Tensor | None:
        """bool [positions]: those of rows that fulfil `condition`; None when no row does."""
        fulfilled = [condition(p) for p in self.params]
        return self.per_position(fulfilled, torch.bool) if any(fulfilled) else None

    def places(self, condition: Callable[[DecodingParams], bool]) -> Tensor | None:
        """int64 [n], indices of the positions of rows that fulfil `condition`; None when no row
        does. Unlike what `where` gives, they index without a GPU being waited for."""
        fulfilled = [condition(p) for p in self.params]
        if not any(fulfilled):
            return None
        return to_device(self.host_places(fulfilled), self.row.device)

    def host_places(self, chosen: Sequence[bool]) -> Tensor:
        """int64 [n] on the host, indices of the positions of the chosen rows."""
        host_row = self.row.cpu() if self.host_row is None else self.host_row
        return torch.tensor(chosen)[host_row].nonzero().squeeze(-1)

    def with_policy(self, *policies: Policy) -> Tensor | None:
        """bool [positions]: those of rows with one of `policies`; None when no row has."""
        if self.policies.isdisjoint(policies):
            return None
        return self.where(lambda p: p.policy in policies)


@dataclass(frozen=True)
class Proposal:
    """What each open position would become.

    Attributes:
        token: int64 [positions].
        confidence: float64 [positions], probability of `token`.
        score: float64 [positions], how sure the row's policy is of the position; higher is surer.
            For the policies by entropy the negative entropy, in nats.
    """

    token: Tensor
    confidence: Tensor
    score: Tensor

    @classmethod
    def of(cls, token: Tensor, confidence: Tensor, score: Tensor) -> Proposal:
        """Where filters left nothing but end tokens that go last, the softmax is no number; such a
        position is the least sure."""
        return cls(token, confidence.nan_to_num(0.0), score.nan_to_num(LEAST_SCORE))

    @classmethod
    def join(cls, parts: Sequence[Proposal]) -> Proposal:
        """The parts' positions one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.token for part in parts]),
            torch.cat([part.confidence for part in parts]),
            torch.cat([part.score for part in parts]),
        )


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance as LLaDA applies it: `u + (scale + 1) * (c - u)`.

    Args:
        conditional: [positions, vocab], logits given the prompt.
        unconditional: [positions, vocab], logits given a masked prompt.
        scale: float [positions].
    """
    factor = (scale[:, None] + 1).to(conditional.dtype)
    return unconditional + factor * (conditional - unconditional)


def propose(logits: Tensor, rows: StepRows, special: SpecialTokens) -> Proposal:
    """Candidate token and confidence of every position.

    The candidate is the arg max of `logits / temperature + gumbel` after top-k, top-p and min-p, so
    a sample of the filtered softmax; at temperature 0 the arg max of the logits. The mask token is
    never a candidate. Its confidence is softmax(logits)[candidate] as in LLaDA's `generate`, or the
    probability after temperature and filters: for Dream's policies, as in its `diffusion_generate`,
    for `p2`, and where the row asks for it.

    Args:
        logits: [positions, vocab]; overwritten.
    """
    suppressed = rows.where(lambda p: p.logits_eos_inf)
    if likeliest.usable(logits) and not any(map(_looks_further, rows.params)):
        token, confidence = likeliest.find(logits, special.mask, special.eos, suppressed)
        return Proposal.of(token, confidence, confidence)
    logits = logits.float()
    if suppressed is not None:
        logits[:, special.eos].masked_fill_(suppressed, -torch.inf)
    token = _without(logits, special.mask, lambda: logits.argmax(dim=-1))
    sampled = rows.places(lambda p: p.temperature > 0)
    if sampled is not None:
        token, logits = _sample(logits, token, sampled, rows, special.mask)
    last = rows.where(lambda p: p.confidence_eos_eot_inf)
    if last is not None:
        for end_token in (special.eos, special.eot):
            if end_token is not None:
                logits[:, end_token].masked_fill_(last, -torch.inf)
    chosen = logits.gather(-1, token[:, None]).squeeze(-1)
    confidence = (chosen - logits.logsumexp(dim=-1)).exp().double()
    score = _score(logits, confidence, rows)
    return Proposal.of(token, confidence, score)


_FURTHER_POLICIES = ENTROPY_POLICIES | {"topk_margin"}


def _looks_further(p: DecodingParams) -> bool:
    """Whether a row's proposals need more of the logits than the likeliest token's probability."""
    return p.temperature > 0 or p.confidence_eos_eot_inf or p.policy in _FURTHER_POLICIES


def _without(logits: Tensor, token: int | None, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()` while the column of `token`, if there is one, is -inf."""
    if token is None:
        return compute()
    column = logits[:, token].clone()
    logits[:, token] = -torch.inf
    result = compute()
    logits[:, token] = column
    return result


def _sample(
    logits: Tensor, greedy: Tensor, sampled: Tensor, rows: StepRows, mask_token: int | None
) -> tuple[Tensor, Tensor]:
    """Tokens with those at `sampled` drawn, and the logits their confidence is of."""
    drawn = replace(rows, row=rows.row[sampled], position=rows.position[sampled])
    params = rows.params
    temperature = drawn.per_position([p.temperature for p in params])
    seeds = drawn.per_position(drawn.seeds, torch.int64)
    token = greedy.clone()
    if not any(map(is_filtered, params)) and draw.usable(logits):
        token[sampled] = draw.draw(logits, sampled, temperature, seeds, drawn.position, mask_token)
        return token, logits
    scores = logits[sampled].double() / temperature[:, None]
    if mask_token is not None:
        scores[:, mask_token] = -torch.inf
    scores = filter_tokens(
        scores,
        top_k=drawn.unless_all([p.top_k for p in params], 0, torch.int64),
        top_p=drawn.unless_all([p.top_p for p in params], 1.0),
        min_p=drawn.unless_all([p.min_p for p in params], 0.0),
    )
    noise = gumbel(seeds, drawn.position, scores.shape[-1])
    token[sampled] = (scores + noise).argmax(dim=-1)
    filtered = drawn.where(lambda p: p.policy in FILTERED_POLICIES or p.filtered_confidence)
    if filtered is not None:
        logits[sampled] = torch.where(filtered[:, None], scores.float(), logits[sampled])
    return token, logits


def is_filtered(p: DecodingParams) -> bool:
    """Whether a row samples from a part of the distribution, or its confidence is not of the plain
    softmax."""
    partial = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    return p.temperature > 0 and (partial or p.filtered_confidence or p.policy in FILTERED_POLICIES)


def filter_tokens(
    logits: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Set to -inf the tokens that must not be sampled; the most likely one always remains.

    Args:
        logits: [positions, vocab], already divided by the temperature.
        top_k: int64 [positions], 0 keeps all; None is 0 everywhere.
        top_p: [positions]; the token that crosses the bound is kept. 1, or None, keeps all.
        min_p: [positions]; least probability relative to the highest one. 0, or None, keeps all.
    """
    if min_p is not None:
        floor = logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True)
    drop = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k is not None:
        rank = torch.arange(logits.shape[-1], device=logits.device)
        drop |= rank >= torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    if top_p is not None:
        probability = ranked.masked_fill(drop, -torch.inf).softmax(dim=-1)
        drop |= probability.cumsum(dim=-1) - probability >= top_p[:, None]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def _score(logits: Tensor, confidence: Tensor, rows: StepRows) -> Tensor:
    """How sure each row's policy is of its positions."""
    score = confidence
    by_margin = rows.with_policy("topk_margin")
    if by_margin is not None:
        top = logits.softmax(dim=-1).topk(2, dim=-1).values.double()
        score = torch.where(by_margin, top[:, 0] - top[:, 1], score)
    by_entropy = rows.with_policy(*ENTROPY_POLICIES)
    if by_entropy is not None:
        probability = logits.softmax(dim=-1)
        negative_entropy = (probability * (probability + 1e-10).log()).sum(dim=-1).double()
        score = torch.where(by_entropy, negative_entropy, score)
    return score
