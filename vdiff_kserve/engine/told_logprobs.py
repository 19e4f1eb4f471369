"""What a row tells of its tokens: kept from the step that wrote one until its text is sent."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vdiff_kserve.engine.request import TokenLogprob
from vdiff_kserve.sampler import Logprobs


class ToldLogprobs:
    """Log probabilities by canvas position."""

    def __init__(self) -> None:
        self._told: dict[int, TokenLogprob] = {}

    def note(
        self,
        positions: NDArray[np.int64],
        tokens: NDArray[np.int64],
        told: Logprobs,
        count: int,
    ) -> None:
        """Keep what a step told of the tokens that it wrote.

        Args:
            positions: int64 [n], of the canvas.
            tokens: int64 [n], what was written there.
            told: of each of them.
            count: how many of the likeliest tokens are kept beside each.
        """
        tops = zip(told.top_tokens[:, :count].tolist(), told.top[:, :count].tolist(), strict=True)
        for position, token, chosen, rank, (top_tokens, top) in zip(
            positions.tolist(),
            tokens.tolist(),
            told.chosen.tolist(),
            told.rank.tolist(),
            tops,
            strict=True,
        ):
            best = tuple(zip(top_tokens, top, strict=True))
            self._told[position] = TokenLogprob(token, chosen, rank, best)

    def forget(self, position: int) -> None:
        """What stood at a position is there no more."""
        self._told.pop(position, None)

    def probability(self, position: int) -> float:
        """Of the token that was written at a position."""
        return math.exp(self._told[position].logprob)

    def take(self, position: int) -> TokenLogprob | None:
        """What is told of a position, once; None where the model had no choice."""
        return self._told.pop(position, None)
