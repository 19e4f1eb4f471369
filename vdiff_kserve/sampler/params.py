"""How one request is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal[
    "low_confidence",
    "random",
    "maskgit_plus",
    "topk_margin",
    "entropy",
    "sequential",
    "dynamic",
    "threshold",
    "factor",
    "entropy_bound",
    "entropy_sum",
    "local",
    "credit",
    "edit",
    "p2",
    "apd",
]
CacheMode = Literal["none", "prefix", "dual", "exact"]

DREAM_POLICIES: frozenset[Policy] = frozenset({"maskgit_plus", "topk_margin", "entropy"})
"""Scheduled by Dream's time steps, with confidence after temperature and filters."""

APD_CONFIDENCE = 0.9
"""`apd_threshold` when there is no auxiliary model."""

SCHEDULED_POLICIES: frozenset[Policy] = DREAM_POLICIES | {"low_confidence", "random", "sequential"}
"""Policies that commit a fixed number of tokens per step."""

FILTERED_POLICIES: frozenset[Policy] = DREAM_POLICIES | {"p2"}
"""Policies whose confidence is the probability after temperature and filters."""

ENTROPY_POLICIES: frozenset[Policy] = frozenset({"entropy", "entropy_bound", "entropy_sum"})
"""Policies that rank positions by the entropy of all their tokens."""

STRICT_POLICIES: frozenset[Policy] = frozenset({"dynamic", "edit"})
"""Policies whose tokens must exceed the threshold, as in the published loops."""


MAX_TOP_LOGPROBS = 20
"""Most likely tokens that a row's log probabilities tell per position, at most."""


@dataclass(frozen=True)
class Constraints:
    """What a request asks of its tokens, whatever the policy; `constrain` says how each is meant.

    Attributes:
        logit_bias: (token, what is added to its logit).
        allowed_token_ids: the only tokens that may be written; None is all.
        bad_words: runs of tokens that must not stand in the answer.
        min_tokens: answer positions from the left where no end token may stand.
        end_token_ids: which tokens these are, for `min_tokens`; they are never counted either.
        presence_penalty: taken from the logit of every token that the answer has.
        frequency_penalty: taken once for every time that it has it.
        repetition_penalty: divides the logits of the prompt's and the answer's tokens when they
            are positive, multiplies them when not; 1 is off.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalizes(self) -> bool:
        """Whether what the answer has so far matters for each token alone."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties)


@dataclass(frozen=True)
class DecodingParams:
    """The parameters of one request's denoising; every row of a batch has its own.

    Attributes:
        policy: which masked positions of the active block a step commits.
            By schedule: `low_confidence` and `random` (LLaDA, arXiv 2502.09992), `maskgit_plus`,
            `topk_margin` and `entropy` (Dream, arXiv 2508.15487), `sequential` (SDAR: from the
            left).
            By confidence, but never fewer than by schedule: `dynamic` (SDAR, arXiv 2510.06303, and
            LLaDA2.0).
            By confidence, never fewer than one: `threshold` and `factor` (Fast-dLLM, arXiv
            2505.22618), `entropy_bound` (EB-Sampler, arXiv 2505.24857), `entropy_sum` (the same in
            SDAR's form), `local` (LocalLeap, arXiv 2510.07081), `credit` (CreditDecoding, arXiv
            2510.06133), `edit` (LLaDA2.1: also replaces written tokens).
            By schedule, but every step chooses anew, so that a written token may become a mask
            again: `p2` (Path Planning, arXiv 2502.03540, as Open-dLLM's `diffusion_generate` has
            it).
            Left to right, checked by an auxiliary causal model: `apd` (arXiv 2506.00413); without
            one, by confidence: every position of the block that reaches `apd_threshold`, at most
            `apd_max_parallel`.
        steps: denoising steps for the whole answer, shared out over its blocks; None commits one
            token per step. For scheduled policies.
        block_length: tokens decoded together; blocks are finished left to right.
        temperature: 0 takes the most likely token; above it, samples from softmax(logits / T).
        top_p: sample only from the smallest set of tokens whose probability reaches this.
        top_k: sample only from this many most likely tokens; 0 is all.
        min_p: sample only tokens at least this likely, relative to the most likely one.
        alg_temp: temperature of the choice of positions, for Dream's policies; 0 takes the best.
        threshold: least confidence of a committed token; for `local` that of an anchor, for `edit`
            that of a token in place of a mask.
        strict_threshold: whether a committed token's confidence must exceed `threshold`, as it
            always must for `dynamic` and `edit`.
        filtered_confidence: whether a sampled token's confidence is its probability after
            temperature and filters, as it always is for Dream's policies and `p2`.
        factor: a step commits the most confident n positions while (n + 1) * (1 - confidence of the
            n-th) < factor.
        entropy_bound: most entropy, in nats, of the positions committed together, the largest one
            not counted; for `entropy_sum`, what all of theirs together stay below.
        neighbour_threshold: least confidence of a committed neighbour of an anchor, for `local`.
        radius: how many positions from an anchor its neighbours are, for `local`.
        credit_weight: weight of the evidence of earlier steps, for `credit`; its decay per step is
            `credit_decay`, and `credit_power` the power of the probability that is added.
        edit_threshold: least confidence of a token that replaces a written one, for `edit`.
        max_post_edits: most steps that only edit, once a block has no mask, for `edit`.
        apd_mixture_weight: R of APD's target `p_diffusion^R * p_AR^(1 - R)`.
        apd_window: W of APD: positions left of the frontier whose keys and values are recomputed;
            None recomputes all and keeps no cache.
        apd_lookahead: M of APD: masked positions that the diffusion model sees; None is all.
        apd_max_parallel: most tokens that an APD step commits.
        apd_threshold: least probability of a token that APD commits beside the first: under its
            target with an auxiliary model (None asks for none), else its confidence (None is 0.9).
        cfg_scale: strength of classifier-free guidance; 0 is off, above it costs twice the compute.
        logits_eos_inf: never write the end-of-text token.
        confidence_eos_eot_inf: leave end tokens for last.
        seed: of the row's random numbers.
        cache: what is remembered between the steps of a block. For bidirectional models nothing,
            the keys and values left of the block (`prefix`), or also those right of it (`dual`):
            Fast-dLLM's caches, approximate. For block-causal models nothing or those of all
            finished blocks (`exact`).
        refresh_interval: recompute the whole canvas every so many steps inside a block; None only
            when a block begins.
        vicinity: positions on either side of the block that a cached step recomputes too.
        max_lookahead: most masked positions right of the active block that the model sees; None is
            the whole canvas, as the published loops have it.
        constraints: what is asked of the tokens; None is nothing.
        top_logprobs: how many of the likeliest tokens to tell beside each committed token's log
            probability, at most `MAX_TOP_LOGPROBS`; None tells neither.
    """

    policy: Policy = "low_confidence"
    steps: int | None = None
    block_length: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    alg_temp: float = 0.0
    threshold: float = 0.9
    strict_threshold: bool = False
    filtered_confidence: bool = False
    factor: float = 1.0
    entropy_bound: float = 0.1
    neighbour_threshold: float = 0.75
    radius: int = 4
    credit_weight: float = 0.7
    credit_decay: float = 0.8
    credit_power: float = 0.2
    edit_threshold: float = 0.9
    max_post_edits: int = 16
    apd_mixture_weight: float = 0.7
    apd_window: int | None = 16
    apd_lookahead: int | None = 100
    apd_max_parallel: int = 8
    apd_threshold: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    seed: int = 0
    cache: CacheMode = "none"
    refresh_interval: int | None = None
    vicinity: int = 0
    max_lookahead: int | None = None
    constraints: Constraints | None = None
    top_logprobs: int | None = None
