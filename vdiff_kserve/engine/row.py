"""One running request: its canvas, its place in it, and what it has cost."""

from __future__ import annotations

import torch
from torch import Tensor

from vdiff_kserve.engine.request import (
    EventSink,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    GenerationStats,
)
from vdiff_kserve.sampler import DecodingParams, block_steps, quota


class Row:
    """The state of one request while it is in the batch.

    The canvas is the prompt followed by `max_tokens` masked positions. Which positions are masked is
    kept apart from the ids, since a prompt may hold the mask token's id.
    """

    def __init__(self, request: GenerationRequest, sink: EventSink, mask_token_id: int) -> None:
        self.request = request
        self.sink = sink
        self.prompt_length = len(request.prompt_ids)
        self.canvas = torch.full((self.prompt_length + request.max_tokens,), mask_token_id)
        self.canvas[: self.prompt_length] = torch.tensor(request.prompt_ids)
        self.masked = torch.arange(len(self.canvas)) >= self.prompt_length
        self.frontier = self.prompt_length
        self.nfe = 0
        self.steps = 0
        self.aborted = False
        self._end_token_id: int | None = None
        self._enter_block(self.prompt_length)

    @property
    def params(self) -> DecodingParams:
        return self.request.decoding

    def __len__(self) -> int:
        """Tokens of the canvas."""
        return len(self.canvas)

    @property
    def block_span(self) -> tuple[int, int]:
        """The active block: (first position, length)."""
        return self.block_start, self.block_end - self.block_start

    @property
    def quota(self) -> int:
        """Tokens that the next step commits if it goes by schedule."""
        return quota(self._block_masks, self._block_steps, self._block_step)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the row is done; None while it is not."""
        if self._end_token_id is not None:
            return "stop"
        return "length" if self.frontier == len(self) and self._block_done else None

    @property
    def stats(self) -> GenerationStats:
        return GenerationStats(self.nfe, self.steps, self.frontier - self.prompt_length)

    def masked_in_block(self) -> Tensor:
        """Masked positions of the active block: int64 [n], absolute, ascending."""
        start, end = self.block_start, self.block_end
        return self.masked[start:end].nonzero().squeeze(-1) + start

    def commit(self, positions: Tensor, tokens: Tensor) -> None:
        """Apply one step: write `tokens` at `positions` (both int64 [n]) and send what is final."""
        self.canvas[positions] = tokens
        self.masked[positions] = False
        self.nfe += 1
        self.steps += len(positions) > 0
        self._block_step += 1
        self._advance_frontier()
        if self._block_done and self.finish_reason is None:
            self._enter_block(self.block_end)

    def _enter_block(self, start: int) -> None:
        self.block_start = start
        self.block_end = min(start + self.params.block_length, len(self))
        self._block_masks = self.block_end - start
        self._block_steps = block_steps(self.params, self.request.max_tokens, self._block_masks)
        if not self.params.idle_steps:
            self._block_steps = min(self._block_steps, self._block_masks)
        self._block_step = 0

    @property
    def _block_done(self) -> bool:
        if self.params.idle_steps and self._block_step < self._block_steps:
            return False
        return not self.masked[self.block_start : self.block_end].any()

    def _advance_frontier(self) -> None:
        """Move the frontier to the first mask, or past the first end token; send what it passed."""
        masks = self.masked[self.frontier :].nonzero()
        reached = self.frontier + int(masks[0]) if len(masks) else len(self)
        fresh = self.canvas[self.frontier : reached].tolist()
        ends = [i for i, token in enumerate(fresh) if token in self.request.end_token_ids]
        if ends:
            self._end_token_id = fresh[ends[0]]
            self.frontier += ends[0] + 1
            fresh = fresh[: ends[0]]
        else:
            self.frontier = reached
        if fresh or self.finish_reason is not None:
            event = GenerationEvent(
                tuple(fresh), self.stats, self.finish_reason, self._end_token_id
            )
            self.sink(event)
