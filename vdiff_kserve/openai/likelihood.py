"""How likely a prompt is: what is asked of the engine, and what its answers come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

from vdiff_kserve.engine import GenerationStats, Scoring, TokenLogprob, add_scores
from vdiff_kserve.openai.candidates import EventSource
from vdiff_kserve.openai.errors import RequestError, out_of_range, shorten
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.prompts import TokenIds
from vdiff_kserve.openai.protocol import CompletionRequest, Likelihood

MOST_SAMPLES = 4096
ROWS_PER_TEXT = 8
"""Into how many rows the passes of one text are divided, at most, so that they run side by side."""


@dataclass(frozen=True)
class Scorer:
    """How the prompts of a request are scored."""

    likelihood: Likelihood
    is_causal: bool
    seed: int
    rows: int

    def parts(self, prompt: TokenIds) -> list[Scoring]:
        """The work on one prompt, in parts that run side by side; none when it is too short."""
        asked, context = self.likelihood, self.likelihood.context
        probes = len(prompt) - context
        if probes < 1:
            return []
        if self.is_causal:
            return [Scoring("causal", context, (0, 1))]
        if asked.method == "monte_carlo":
            probes = asked.samples
        bounds = [i * probes // self.rows for i in range(self.rows + 1)]
        return [
            Scoring(asked.method, context, (first, end), asked.samples, self.seed)
            for first, end in pairwise(bounds)
            if first < end
        ]

    @property
    def are_sums(self) -> bool:
        """Whether each part tells a part of every token's score, and not the scores of some."""
        return self.likelihood.method == "monte_carlo" and not self.is_causal


def scorer_of(
    request: CompletionRequest, limits: ServingLimits, prompts: Sequence[TokenIds], seed: int
) -> Scorer | None:
    """How the request wants its prompts scored; None when it does not.

    Raises:
        RequestError: a value out of range, or nothing that would be scored.
    """
    if not (request.echo and request.logprobs is not None):
        if request.likelihood is not None:
            raise RequestError("likelihood needs echo and logprobs.", param="likelihood")
        return None
    asked = request.likelihood or Likelihood()
    _check_fields(asked)
    if limits.traits.renoises:
        raise RequestError(
            "echo with logprobs is not supported by this model: it is denoised from random tokens, "
            "not masks, and has no probability of a text.",
            param="logprobs",
        )
    if limits.traits.autoregressive and asked.method != "chain":
        raise RequestError(
            "likelihood.method must be chain for a causal model, which knows the probability of "
            f"every token given those before it; got {asked.method}.",
            param="likelihood",
        )
    if not 1 <= asked.samples <= MOST_SAMPLES:
        raise out_of_range("likelihood.samples", f"in [1, {MOST_SAMPLES}]", asked.samples)
    shortest = min(map(len, prompts))
    if asked.context != 1 and not 1 <= asked.context < shortest:
        allowed = f"in [1, {shortest - 1}], so that every prompt has a token behind it"
        raise out_of_range("likelihood.context", allowed, asked.context)
    spare = limits.max_choices // len(prompts) - 1
    return Scorer(asked, limits.traits.autoregressive, seed, max(1, min(ROWS_PER_TEXT, spare)))


def _check_fields(asked: Likelihood) -> None:
    if unknown := next(iter(asked.model_extra or {}), None):
        raise RequestError(
            f"There is no field likelihood.{shorten(unknown)}; there are "
            f"{', '.join(Likelihood.model_fields)}.",
            param="likelihood",
        )
    if "samples" in asked.model_fields_set and asked.method != "monte_carlo":
        raise RequestError(
            f"likelihood.samples is for the method monte_carlo, and the method here is "
            f"{asked.method}.",
            param="likelihood.samples",
        )


class Scores:
    """What the rows of one text told, once all of them have.

    Args:
        rows: the rows' events, in the order of the parts of the work.
        are_sums: whether each row told a part of every token's score.

    Attributes:
        stats: what they cost.
    """

    def __init__(self, rows: Sequence[EventSource], *, are_sums: bool) -> None:
        self._rows = rows
        self._are_sums = are_sums
        self.stats = GenerationStats(0, 0, 0, 0, 0, 0)

    async def gather(self) -> tuple[TokenLogprob, ...]:
        """One for each scored token, in their order.

        Raises:
            EngineError: a row failed.
        """
        told = []
        for row in self._rows:
            async for event in row:
                told.append(event.logprobs)
                self.stats = self.stats.plus(event.stats)
        if self._are_sums:
            return tuple(reduce(add_scores, parts) for parts in zip(*told, strict=True))
        return tuple(each for part in told for each in part)
