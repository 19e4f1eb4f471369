"""Rows that are told what their answer will probably be (OpenAI's predicted outputs)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vdiff_kserve.engine.request import EventSink, GenerationRequest, GenerationStats
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.models import ModelSpec, RowSpan
from vdiff_kserve.sampler import DecodingParams

CONFIDENCE = 0.5
"""Least probability of a drafted token that is accepted."""
RUN = 3
"""Least number of neighbouring tokens that must be the draft's together."""
REACH = 64
"""How many tokens longer or shorter than the draft the answer may be at any place."""


class DraftRow(Row):
    """Decoding with a draft of the answer, of which is taken what the model would write itself.

    When a block begins, a check looks at everything that is still masked, right of the block too.
    A token of the draft is accepted where the model, which does not see it, finds it likeliest with
    a probability of at least `CONFIDENCE`, and where it stands in a run of at least `RUN` tokens
    that the draft has too, at this place or at one not far from it. So an answer in which a word is
    longer or shorter than in the draft still follows it behind that word. Checks go on while they
    accept a run; all that is in doubt stays masked, and the rest of the block is decoded as ever.

    The drafted tokens are never shown to the model before they are accepted: it says nothing useful
    of a token that it sees, and a wrong draft agrees with itself. With the policy `threshold`, a
    check also commits what an ordinary step would.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, spec: ModelSpec) -> None:
        self._draft = torch.tensor(request.draft)
        self._checks = True
        self._accepted = 0
        self._newly_committed = 0
        super().__init__(request, sink, spec)

    @property
    def params(self) -> DecodingParams:
        """A check proposes whatever is sure enough; all else goes by the request."""
        asked = self.request.decoding
        if not self._checks:
            return asked
        return replace(
            asked,
            policy="threshold",
            threshold=CONFIDENCE,
            temperature=0.0,
            top_logprobs=asked.top_logprobs or 0,
        )

    @property
    def stats(self) -> GenerationStats:
        return replace(super().stats, accepted=self._accepted)

    def next_span(self) -> RowSpan:
        span = super().next_span()
        if not self._checks:
            return span
        first = self.block_start - self.shift
        outputs = len(self) - self.block_start
        return RowSpan(0, len(self), len(self), first, outputs, span.cache_offset)

    def open_positions(self) -> NDArray[np.int64]:
        return self._masks.nonzero()[0] if self._checks else super().open_positions()

    def num_committed(self, decision: Decision) -> int:  # noqa: ARG002 - a check takes a part of it
        return self._newly_committed

    def apply(self, decision: Decision) -> None:
        """Take a step; of a check, what agrees with the draft."""
        if self._checks:
            decision = self._checked(decision)
        self._newly_committed = len(decision.positions)
        super().apply(decision)

    def _enter_block(self, start: int) -> None:
        self._checks = True
        super()._enter_block(start)

    def _checked(self, decision: Decision) -> Decision:
        """The part of a check's decision that is taken; sets whether another check follows."""
        assert decision.logprobs is not None
        confidence = decision.logprobs.chosen.exp()
        positions, tokens = map(torch.from_numpy, (decision.positions, decision.tokens))
        agrees = self._agrees(positions, tokens, confidence >= CONFIDENCE)
        self._accepted += int(agrees.sum())
        self._checks = int(agrees.sum()) >= RUN
        asked = self.request.decoding
        taken = agrees
        if asked.policy == "threshold" and asked.temperature == 0:
            in_block = positions < self.block_end
            taken = agrees | (in_block & (confidence >= asked.threshold))
            if in_block.any() and not taken.any():
                taken = in_block & (confidence == confidence[in_block].max())
        return replace(
            decision,
            positions=positions[taken].numpy(),
            tokens=tokens[taken].numpy(),
            logprobs=None if asked.top_logprobs is None else decision.logprobs.part(taken),
        )

    def _agrees(self, positions: Tensor, tokens: Tensor, likely: Tensor) -> Tensor:
        """Which of the tokens are in a run of the draft's: bool [n].

        Args:
            positions: int64 [n], of the canvas.
            tokens: int64 [n].
            likely: bool [n], those that are sure enough.
        """
        answer = self.written_answer
        places = positions - self.prompt_length
        answer[places[likely]] = tokens[likely]
        shifts = torch.arange(-REACH, REACH + 1)
        drafted = torch.arange(len(answer)) - shifts[:, None]  # [shifts, answer]
        inside = (drafted >= 0) & (drafted < len(self._draft))
        alike = self._draft[drafted.clamp(0, len(self._draft) - 1)] == answer
        return likely & in_runs(alike & inside & (answer >= 0), RUN).any(0)[places]


def in_runs(alike: Tensor, length: int) -> Tensor:
    """Which entries are in a run of at least `length` true ones, along the last dimension."""
    if alike.shape[-1] < length:
        return torch.zeros_like(alike)
    begins = alike.clone()
    for k in range(1, length):
        begins &= pad(alike[..., k:], (0, k))
    member = begins.clone()
    for k in range(1, length):
        member |= pad(begins[..., :-k], (k, 0))
    return member
