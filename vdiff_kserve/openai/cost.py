"""What answers cost, as `usage` and as the `vdiff` object."""

from __future__ import annotations

from collections.abc import Sequence

from vdiff_kserve.openai.answers import Piece
from vdiff_kserve.openai.job import Job
from vdiff_kserve.openai.protocol import (
    ChoiceCost,
    CompletionTokensDetails,
    DiffusionInfo,
    Passes,
    PromptTokensDetails,
    Usage,
)


def usage(job: Job, ends: Sequence[Piece]) -> Usage:
    """Tokens of the prompts (once each, however many answers) and of the answers so far."""
    completion = sum(piece.completion_tokens for piece in ends)
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=completion,
        total_tokens=job.prompt_tokens + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached_tokens(job, ends)),
        completion_tokens_details=_prediction_details(job, ends),
    )


def _prediction_details(job: Job, ends: Sequence[Piece]) -> CompletionTokensDetails | None:
    """How much of the predicted tokens the answers have; None without a prediction."""
    drafted = sum(token >= 0 for token in job.draft)
    if not drafted:
        return None
    accepted = sum(piece.stats.accepted for piece in ends)
    return CompletionTokensDetails(
        accepted_prediction_tokens=accepted,
        rejected_prediction_tokens=drafted * len(ends) - accepted,
    )


def _cached_tokens(job: Job, ends: Sequence[Piece]) -> int:
    """Prompt tokens that came from the prefix cache; once each, however many answers."""
    return sum({piece.index // job.n: piece.stats.cached_tokens for piece in ends}.values())


def diffusion_info(job: Job, ends: Sequence[Piece]) -> DiffusionInfo:
    """What the answers cost together, and each when there are several."""
    costs = [
        ChoiceCost(
            nfe=piece.stats.nfe,
            passes=Passes(
                refresh=piece.stats.refreshes,
                reuse=piece.stats.reuses,
                commit=piece.stats.commits,
                auxiliary=piece.stats.auxiliary,
            ),
            steps=piece.stats.steps,
            tokens_per_forward=round(piece.tokens_per_forward, 4),
        )
        for piece in ends
    ]
    nfe = sum(cost.nfe for cost in costs)
    tokens = sum(piece.completion_tokens for piece in ends)
    return DiffusionInfo(
        nfe=nfe,
        passes=Passes(
            refresh=sum(cost.passes.refresh for cost in costs),
            reuse=sum(cost.passes.reuse for cost in costs),
            commit=sum(cost.passes.commit for cost in costs),
            auxiliary=sum(cost.passes.auxiliary for cost in costs),
        ),
        steps=sum(cost.steps for cost in costs),
        tokens_per_forward=round(tokens / nfe, 4) if nfe else 0.0,
        decoding=dict(job.decoding_report),
        encoder_passes=sum(piece.stats.encoder for piece in ends) or None,
        choices=costs if len(costs) > 1 else None,
    )
