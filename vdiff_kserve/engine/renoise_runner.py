"""Running DiffusionGemma over the canvases of a round and stepping its sampler on the result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.renoising import CanvasDecision, RenoiseRow
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.runner import ModelRunner
from vdiff_kserve.engine.step_tables import OpenPositions, constraints_of, logprobs_by_row
from vdiff_kserve.gpu import to_device
from vdiff_kserve.models import ForwardBatch, ModelSpec, RenoisingModel
from vdiff_kserve.sampler import (
    Logprobs,
    Proposal,
    StepRows,
    constrain,
    propose,
    raw_logprobs,
    select,
    tell,
)

LOGITS_PER_CHUNK = 1 << 24
"""Most logits at a time: 64 MiB in float32. The vocabulary is large and every position needs them,
so that smaller pieces would make many small matrix products."""


class RenoiseRunner(ModelRunner):
    """One step of many canvases at once: the encoder where something is to be read, then the
    decoder."""

    def __init__(self, model: RenoisingModel, spec: ModelSpec, cache: KVCache) -> None:
        super().__init__(model, spec, cache)
        self._model = model
        self._positions_at_a_time = max(1, LOGITS_PER_CHUNK // self._vocab_size)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Decision]:
        """What each row's next step decides; the rows are not changed."""
        canvases = [row for row in rows if isinstance(row, RenoiseRow)]
        assert len(canvases) == len(rows)
        with self._timed("forward"):
            read = self._encode(canvases)
            hidden = self._denoise(canvases)
        with self._timed("sample"):
            return self._choose(canvases, hidden, read)

    @torch.inference_mode()
    def advance(self, row: Row, layers: int) -> None:
        """Run the next parts of the encoder's pass over a long text; `step` runs the rest."""
        assert isinstance(row, RenoiseRow)
        with self._timed("forward"):
            if row.begun_pass is None:
                span = row.encoder_span()
                assert span is not None, "only a pass of the encoder is long"
                batch = ForwardBatch.pack([row.canvas], [span], self._cache.store, self._device)
                row.begun_pass = self._model.begin(batch)
            row.begun_pass.advance(layers)

    def _encode(self, rows: Sequence[RenoiseRow]) -> list[bool]:
        """Whether the encoder ran for each row."""
        spans = [row.encoder_span() for row in rows]
        passes = []
        for row, span in zip(rows, spans, strict=True):
            if row.begun_pass is not None:
                row.begun_pass.advance(row.begun_pass.layers_left)
            elif span is not None:
                passes.append((row, span))
        if passes:
            texts, places = [row.canvas for row, _ in passes], [span for _, span in passes]
            self._model(ForwardBatch.pack(texts, places, self._cache.store, self._device))
        return [span is not None for span in spans]

    def _denoise(self, rows: Sequence[RenoiseRow]) -> Tensor:
        texts = []
        for row in rows:
            text = row.canvas.clone()
            text[row.block_start : row.block_end] = row.noisy
            texts.append(text)
        spans = [row.canvas_span() for row in rows]
        soft = None
        if any(row.soft is not None for row in rows):
            shape = (rows[0].block_end - rows[0].block_start, self._model.config.hidden_size)
            nothing = torch.zeros(shape, dtype=self._model.dtype, device=self._device)
            soft = torch.cat([nothing if row.soft is None else row.soft for row in rows])
        batch = ForwardBatch.pack(texts, spans, self._cache.store, self._device)
        return self._model.denoise(batch, soft)

    def _choose(
        self, rows: Sequence[RenoiseRow], hidden: Tensor, read: Sequence[bool]
    ) -> list[Decision]:
        opened = OpenPositions.of([np.arange(row.block_start, row.block_end) for row in rows])
        counts = opened.counts
        positions = to_device(opened.joined, self._device)
        step_rows = StepRows(
            row=to_device(opened.row, self._device),
            position=positions,
            written=torch.full_like(positions, -1),
            params=[row.params for row in rows],
            seeds=[row.step_seed for row in rows],
            quotas=counts,
            lengths=[len(row) for row in rows],
            constraints=constraints_of(rows, opened, self._vocab_size, self._device),
            host_row=opened.row,
        )
        temperatures = to_device(torch.stack([row.temperature for row in rows]), self._device)
        proposal, likeliest, soft, told = self._propose_all(hidden, step_rows, temperatures)
        accept = select(proposal, step_rows).cpu().split(counts)
        drawn, best = proposal.token.cpu().split(counts), likeliest.cpu().split(counts)
        entropies = (-proposal.score).cpu().split(counts)
        done = [
            row.is_done(tokens, float(entropy.mean()))
            for row, tokens, entropy in zip(rows, best, entropies, strict=True)
        ]
        written = [torch.full((count,), yes) for count, yes in zip(counts, done, strict=True)]
        logprobs = [None] * len(rows) if told is None else logprobs_by_row(told, rows, written)
        return [
            CanvasDecision(
                row.next_span(),
                places if yes else places[:0],
                tokens.numpy() if yes else places[:0],
                logprobs=scores,
                noisy=torch.where(kept, draw, row.draw_canvas(row.draws)),
                likeliest=tokens,
                soft=conditioning,
                encoded=was_read,
            )
            for row, places, yes, tokens, kept, draw, conditioning, was_read, scores in zip(
                rows, opened.of_rows, done, best, accept, drawn, soft.split(counts), read, logprobs,
                strict=True,
            )
        ]  # fmt: skip

    def _propose_all(
        self, hidden: Tensor, rows: StepRows, temperatures: Tensor
    ) -> tuple[Proposal, Tensor, Tensor, Logprobs | None]:
        """Drawn tokens with their entropies, the likeliest ones, and what the next step is
        conditioned on, of all positions."""
        parts, likeliest, soft, told = [], [], [], []
        for start in range(0, len(hidden), self._positions_at_a_time):
            chunk = slice(start, min(start + self._positions_at_a_time, len(hidden)))
            part = rows.part(chunk)
            logits = self._model.logits(hidden[chunk])
            raw = raw_logprobs(logits, part)
            logits = constrain(logits / temperatures[part.row][:, None], part)
            likeliest.append(logits.argmax(dim=-1))
            soft.append(self._model.soften(logits))
            parts.append(propose(logits, part, self._special))
            if raw is not None:
                told.append(tell(raw, likeliest[-1], part, self._special.mask))
        return (
            Proposal.join(parts),
            torch.cat(likeliest),
            torch.cat(soft),
            Logprobs.join(told).to_host() if told else None,
        )
