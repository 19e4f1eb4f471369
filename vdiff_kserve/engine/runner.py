"""Running the model over the rows of a round and stepping the sampler on the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff_kserve.engine.row import Row
from vdiff_kserve.models import Decoder, ForwardBatch, ModelSpec
from vdiff_kserve.sampler import Proposal, SpecialTokens, StepRows, guide, propose, select

LOGITS_PER_CHUNK = 1 << 24
"""Most logits at a time: 64 MiB in float32, so a step's scratch stays under 256 MiB."""


class ModelRunner:
    """One denoising step for many rows at once.

    The rows' canvases lie end to end in one forward pass. Only the active blocks' hidden states are
    computed in the last layer, and only their masked positions get logits, a chunk at a time.
    """

    def __init__(self, decoder: Decoder, spec: ModelSpec) -> None:
        self._decoder = decoder
        self._mask_token_id = spec.mask_token_id
        self._special = SpecialTokens(spec.mask_token_id, spec.eos_token_id, spec.eot_token_id)
        self._positions_per_chunk = max(1, LOGITS_PER_CHUNK // spec.decoder.vocab_size)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """What each row commits next: (positions, tokens), both int64 on the CPU.

        The rows are not changed: a caller may run the same step again with fewer of them.
        """
        masked = [row.masked_in_block() for row in rows]
        counts = torch.tensor([len(positions) for positions in masked])
        step_rows = StepRows(
            row=torch.arange(len(rows)).repeat_interleave(counts).to(self._decoder.device),
            position=torch.cat(masked).to(self._decoder.device),
            params=[row.params for row in rows],
            quotas=[row.quota for row in rows],
            lengths=[len(row) for row in rows],
        )
        hidden, unguided = self._hidden(rows, masked)
        proposal = self._propose(hidden, unguided, step_rows)
        accepted = select(proposal, step_rows).cpu().split(counts.tolist())
        tokens = proposal.token.cpu().split(counts.tolist())
        return [
            (positions[accept], token[accept])
            for positions, accept, token in zip(masked, accepted, tokens, strict=True)
        ]

    def _hidden(self, rows: Sequence[Row], masked: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the masked positions, with the prompt and (for guidance) without it.

        Rows without guidance have their own state in both.
        """
        canvases, spans = [row.canvas for row in rows], [row.block_span for row in rows]
        guided = [i for i, row in enumerate(rows) if row.params.cfg_scale > 0]
        for i in guided:
            canvas = rows[i].canvas.clone()
            canvas[: rows[i].prompt_length] = self._mask_token_id
            canvases.append(canvas)
            spans.append(spans[i])
        device = self._decoder.device
        hidden = self._decoder(ForwardBatch.pack(canvases, spans, device))
        starts = torch.tensor([0] + [length for _, length in spans]).cumsum(0).tolist()
        own = [masked[i] - spans[i][0] + starts[i] for i in range(len(rows))]
        with_prompt = hidden[torch.cat(own).to(device)]
        if not guided:
            return with_prompt, None
        for extra, i in enumerate(guided, start=len(rows)):
            own[i] = masked[i] - spans[i][0] + starts[extra]
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
