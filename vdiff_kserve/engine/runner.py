"""Running the model over the rows of a round and stepping the sampler on the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.row import Row
from vdiff_kserve.models import Decoder, ForwardBatch, ModelSpec, RowSpan
from vdiff_kserve.sampler import Proposal, SpecialTokens, StepRows, guide, propose, select

LOGITS_PER_CHUNK = 1 << 24
"""Most logits at a time: 64 MiB in float32, so a step's scratch stays under 256 MiB."""


@dataclass(frozen=True)
class Commit:
    """What one row's step decided: the span it ran over and the tokens (int64 [n]) to write."""

    span: RowSpan
    positions: Tensor
    tokens: Tensor


class ModelRunner:
    """One denoising step for many rows at once.

    The rows' canvases (or the parts that a cached step needs) lie end to end in one forward pass.
    Only the active blocks' hidden states are computed in the last layer, and only their masked
    positions get logits, a chunk at a time.
    """

    def __init__(self, decoder: Decoder, spec: ModelSpec, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._mask_token_id = spec.mask_token_id
        self._special = SpecialTokens(spec.mask_token_id, spec.eos_token_id, spec.eot_token_id)
        self._positions_per_chunk = max(1, LOGITS_PER_CHUNK // spec.decoder.vocab_size)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Commit]:
        """What each row commits next.

        The rows are not changed: a caller may run the same step again with fewer of them.
        """
        spans = [row.next_span() for row in rows]
        masked = [row.masked_in_block() for row in rows]
        counts = torch.tensor([len(positions) for positions in masked])
        step_rows = StepRows(
            row=torch.arange(len(rows)).repeat_interleave(counts).to(self._decoder.device),
            position=torch.cat(masked).to(self._decoder.device),
            params=[row.params for row in rows],
            quotas=[row.quota for row in rows],
            lengths=[len(row) for row in rows],
        )
        hidden, unguided = self._hidden(rows, spans, masked)
        proposal = self._propose(hidden, unguided, step_rows)
        accepted = select(proposal, step_rows).cpu().split(counts.tolist())
        tokens = proposal.token.cpu().split(counts.tolist())
        return [
            Commit(span, positions[accept], token[accept])
            for span, positions, accept, token in zip(spans, masked, accepted, tokens, strict=True)
        ]

    def _hidden(
        self, rows: Sequence[Row], spans: list[RowSpan], masked: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states that predict the masked positions, with the prompt and (for guidance)
        without it. Rows without guidance have their own state in both."""
        canvases, passes = [row.canvas for row in rows], list(spans)
        guided = [i for i, row in enumerate(rows) if row.params.cfg_scale > 0]
        for i in guided:
            canvas = rows[i].canvas.clone()
            canvas[: rows[i].prompt_length] = self._mask_token_id
            canvases.append(canvas)
            offset = rows[i].cache_offsets[1] if rows[i].cache_offsets else None
            passes.append(replace(spans[i], cache_offset=offset))
        cached = any(span.cache_offset is not None for span in passes)
        store = self._cache.store if cached else None
        device = self._decoder.device
        hidden = self._decoder(ForwardBatch.pack(canvases, passes, store, device))
        starts = torch.tensor([0] + [span.outputs for span in passes]).cumsum(0).tolist()
        own = [
            positions - row.shift - span.output_start + start
            for row, span, positions, start in zip(rows, spans, masked, starts, strict=False)
        ]
        with_prompt = hidden[torch.cat(own).to(device)]
        if not guided:
            return with_prompt, None
        for extra, i in enumerate(guided, start=len(rows)):
            own[i] = own[i] - starts[i] + starts[extra]
        return with_prompt, hidden[torch.cat(own).to(device)]

    def _propose(self, hidden: Tensor, unguided: Tensor | None, rows: StepRows) -> Proposal:
        parts = []
        for start in range(0, max(1, len(hidden)), self._positions_per_chunk):
            end = min(start + self._positions_per_chunk, len(hidden))
            chunk = rows.part(start, end)
            logits = self._decoder.logits(hidden[start:end])
            if unguided is not None:
                without_prompt = self._decoder.logits(unguided[start:end])
                scale = chunk.per_position([p.cfg_scale for p in rows.params])
                logits = guide(logits, without_prompt, scale)
            parts.append(propose(logits, chunk, self._special))
        return Proposal.join(parts)
