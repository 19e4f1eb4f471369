"""Running the models over the rows of a round and stepping the sampler on the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vdiff_kserve.engine.grammar_rows import GrammarRow
from vdiff_kserve.engine.kv_cache import KVCache
from vdiff_kserve.engine.passes import Pass, by_blocks, passes_of, twins_of
from vdiff_kserve.engine.row import Decision, Row
from vdiff_kserve.engine.row_kinds import ApdRow
from vdiff_kserve.engine.step_tables import (
    OpenPositions,
    evidence_of,
    keep_evidence,
    logprobs_by_row,
    table_of,
)
from vdiff_kserve.gpu import to_device
from vdiff_kserve.models import (
    MOST_ROWS,
    ForwardBatch,
    LanguageModel,
    ModelSpec,
    ReuseGraphs,
    RowSpan,
    VocabShard,
)
from vdiff_kserve.sampler import (
    Evidence,
    Logprobs,
    Proposal,
    SpecialTokens,
    StepRows,
    accumulate,
    can_propose_from_shards,
    constrain,
    draws_by_kernel,
    fuse,
    guide,
    hold_back,
    propose,
    propose_from_shards,
    raw_logprobs,
    select,
    tell,
    verify,
)

LOGITS_PER_CHUNK = 1 << 22
"""Most logits at a time: 16 MiB in float32. Sampling keeps at most seven tensors of that many
float64 numbers, so a step's scratch stays under 256 MiB."""

ROOMY_LOGITS_PER_CHUNK = 1 << 24
"""The same on a GPU where all rows take the likeliest token, or draw it by a kernel: that keeps
three float32 numbers for each, and every chunk reads the model's head anew. A CPU's caches are too
small to gain from it."""


class ModelRunner:
    """One denoising step for many rows at once.

    The rows' canvases (or the parts that a cached step needs) lie end to end in one forward pass.
    Only the hidden states that predict open positions are computed in the last layer, and only they
    get logits, a chunk at a time.

    Attributes:
        seconds: time spent so far in forward passes of the diffusion model, and in the rest of the
            step (logits, candidates, choices, the auxiliary model). On a GPU work is queued: what
            a phase waits for counts as its own.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        spec: ModelSpec,
        cache: KVCache,
        auxiliary: LanguageModel | None = None,
        auxiliary_cache: KVCache | None = None,
        graphs: ReuseGraphs | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._auxiliary = auxiliary
        self._auxiliary_cache = auxiliary_cache
        self._graphs = graphs
        self._device = decoder.device
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                draws_by_kernel(self._device)  # is compiled now, not in a round
        self.seconds = {"forward": 0.0, "sample": 0.0}
        self._mask_token_id = spec.mask_token_id
        self._special = SpecialTokens(spec.mask_token_id, spec.eos_token_id, spec.eot_token_id)
        self._vocab_size = spec.decoder.vocab_size

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Decision]:
        """What each row's next step decides.

        The rows are not changed: a caller may run the same step again with fewer of them.
        """
        spans = [row.next_span() for row in rows]
        opened = OpenPositions.of([row.open_positions() for row in rows])
        with self._timed("forward"):
            hidden, unguided = self._hidden(rows, spans, opened)
        with self._timed("sample"):
            # Made while a GPU is at the pass that has been queued.
            step_rows = table_of(rows, opened, self._vocab_size, self._device)
            return self._decide(rows, spans, opened, step_rows, hidden, unguided)

    def _decide(
        self,
        rows: Sequence[Row],
        spans: list[RowSpan],
        opened: OpenPositions,
        step_rows: StepRows,
        hidden: Tensor,
        unguided: Tensor | None,
    ) -> list[Decision]:
        """Candidates for the open positions, and which of them are committed."""
        evidence = evidence_of(rows, opened, self._device)
        proposal, evidence, told = self._propose(hidden, unguided, step_rows, evidence)
        accept = select(proposal, step_rows)
        drafted = [i for i, row in enumerate(rows) if row.uses_auxiliary]
        if drafted:
            self._verify(accept, proposal, hidden, unguided, step_rows, rows)
        chosen, proposed = torch.stack([accept.long(), proposal.token]).cpu()
        chosen = hold_back(chosen.bool(), proposed, step_rows)
        for i, row in enumerate(rows):
            if isinstance(row, GrammarRow):
                own = opened.row == i
                chosen[own] = row.review(opened.joined[own], chosen[own], proposed[own])
        nothing = [None] * len(rows)
        kept = keep_evidence(rows, opened, evidence) if evidence else nothing
        logprobs = logprobs_by_row(told, rows, chosen.split(opened.counts)) if told else nothing
        taken = chosen.numpy()
        places, tokens = opened.joined.numpy()[taken], proposed.numpy()[taken]
        ends = np.bincount(opened.row.numpy()[taken], minlength=len(rows)).cumsum().tolist()
        return [
            Decision(
                span, places[first:end], tokens[first:end], credit, int(row.uses_auxiliary), scores
            )
            for row, span, (first, end), credit, scores in zip(
                rows, spans, pairwise([0, *ends]), kept, logprobs, strict=True
            )
        ]

    @torch.inference_mode()
    def advance(self, row: Row, layers: int) -> None:
        """Run the next layers of a row's pass; `step` takes it up when all of them have run."""
        with self._timed("forward"):
            if row.begun_pass is None:
                batch = self._pack(passes_of([(row, row.next_span())], self._mask_token_id))
                row.begun_pass = self._decoder.begin(batch)
            row.begun_pass.advance(layers)

    def _hidden(
        self, rows: Sequence[Row], spans: list[RowSpan], opened: OpenPositions
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states that predict the open positions, with the prompt and (for guidance)
        without it. Rows without guidance have their own state in both."""
        hidden, starts = self._compute(rows, spans)

        def states(*, without_prompt: bool) -> Tensor:
            begins = [starts.get((row, without_prompt), starts[row, False]) for row in rows]
            shifts = [
                begin - row.shift - span.output_start
                for begin, row, span in zip(begins, rows, spans, strict=True)
            ]
            own = opened.joined + torch.from_numpy(np.array(shifts).repeat(opened.counts))
            return hidden.index_select(0, to_device(own, self._device))

        is_guided = any(row.params.cfg_scale > 0 for row in rows)
        unguided = states(without_prompt=True) if is_guided else None
        return states(without_prompt=False), unguided

    def _compute(
        self, rows: Sequence[Row], spans: Sequence[RowSpan]
    ) -> tuple[Tensor, dict[tuple[Row, bool], int]]:
        """Run the rows' passes: all hidden states that they want, and where those of a row begin,
        by row and whether its pass was the one without a prompt."""
        twins = twins_of(rows, spans)
        both = list(zip(rows, spans, strict=True))
        leaders = [each for each in both if each[0].begun_pass is None and each[0] not in twins]
        parts = self._run(passes_of(leaders, self._mask_token_id)) if leaders else []
        for row, span in both:
            if row.begun_pass is not None:
                row.begun_pass.advance(row.begun_pass.layers_left)
                passes = passes_of([(row, span)], self._mask_token_id)
                parts.append((passes, row.begun_pass.outputs))
        starts: dict[tuple[Row, bool], int] = {}
        total = 0
        for each in (each for passes, _ in parts for each in passes):
            starts[each.row, each.without_prompt] = total
            total += each.span.outputs
        for twin, leader in twins.items():
            for without_prompt in (False, True):
                if (leader, without_prompt) in starts:
                    starts[twin, without_prompt] = starts[leader, without_prompt]
            for own, source in zip(twin.cache_offsets, leader.cache_offsets, strict=True):
                self._cache.copy(source, own, leader.next_span().queries)
        hidden = parts[0][1] if len(parts) == 1 else torch.cat([states for _, states in parts])
        return hidden, starts

    def _run(self, passes: list[Pass]) -> list[tuple[list[Pass], Tensor]]:
        """Passes and their hidden states: captured ones of one shape, and all others in one go."""
        if self._graphs is None:
            return [(passes, self._decoder(self._pack(passes)))]
        if self._graphs.takes_blocks is not None:
            passes = by_blocks(passes, self._graphs.takes_blocks, MOST_ROWS)
        # Rows that lie in the cache as they come in the pass take one attention call.
        passes = sorted(passes, key=lambda each: each.place)
        parts = []
        indices = self._graphs.choose([each.span for each in passes])
        chosen = [passes[i] for i in indices]
        if chosen:
            canvases, spans = [each.canvas for each in chosen], [each.span for each in chosen]
            states = self._graphs.run(canvases, spans, self._cache.store)
            if states is not None:
                parts.append((chosen, states))
                taken = set(indices)
                passes = [each for i, each in enumerate(passes) if i not in taken]
        if len(passes) == 1:
            alone = passes[0]
            states = self._graphs.run_whole(alone.canvas, alone.span, self._cache.store)
            if states is not None:
                return [*parts, (passes, states)]
        if passes:
            parts.append((passes, self._decoder(self._pack(passes))))
        return parts

    def _pack(self, passes: Sequence[Pass]) -> ForwardBatch:
        spans = [each.span for each in passes]
        store = self._cache.store if any(span.cache_offset is not None for span in spans) else None
        return ForwardBatch.pack([each.canvas for each in passes], spans, store, self._device)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def _logits(
        self, hidden: Tensor, unguided: Tensor | None, rows: StepRows, *, own: bool = False
    ) -> Tensor:
        """Logits of the vocabulary, or of this rank's `own` part of it."""
        logits_of = self._decoder.own_logits if own else self._decoder.logits
        logits = logits_of(hidden)
        if unguided is None:
            return logits
        scale = rows.per_position([p.cfg_scale for p in rows.params])
        return guide(logits, logits_of(unguided), scale)

    def _positions_per_chunk(self, rows: StepRows, guided: bool) -> int:
        greedy = all(p.temperature == 0 for p in rows.params)
        shared = self._decoder.vocab_shard is not None
        roomy = (
            self._device.type == "cuda"
            and not guided
            and can_propose_from_shards(rows)
            and (greedy or (not shared and draws_by_kernel(self._device)))
        )
        return max(1, (ROOMY_LOGITS_PER_CHUNK if roomy else LOGITS_PER_CHUNK) // self._vocab_size)

    def _propose_from_shards(
        self, hidden: Tensor, unguided: Tensor | None, rows: StepRows, shard: VocabShard
    ) -> Proposal:
        logits = self._logits(hidden, unguided, rows, own=True)
        return propose_from_shards(logits, shard.start, rows, self._special, shard.gather)

    def _propose(
        self, hidden: Tensor, unguided: Tensor | None, rows: StepRows, evidence: Evidence | None
    ) -> tuple[Proposal, Evidence | None, Logprobs | None]:
        """Candidates, what the rows' evidence becomes, and log probabilities where asked for."""
        parts, evidence_parts, told = [], [], []
        shard = self._decoder.vocab_shard
        if shard is not None and not can_propose_from_shards(rows):
            shard = None
        positions = self._positions_per_chunk(rows, guided=unguided is not None)
        for start in range(0, max(1, len(hidden)), positions):
            chunk = slice(start, min(start + positions, len(hidden)))
            part = rows.part(chunk)
            without_prompt = None if unguided is None else unguided[chunk]
            if shard is not None:
                parts.append(self._propose_from_shards(hidden[chunk], without_prompt, part, shard))
                continue
            logits = self._logits(hidden[chunk], without_prompt, part)
            raw = raw_logprobs(logits, part)
            logits = constrain(logits, part)
            if evidence is not None:
                evidence_parts.append(accumulate(evidence.part(chunk), logits, part))
                logits = fuse(logits, evidence_parts[-1], part)
            parts.append(propose(logits, part, self._special))
            if raw is not None:
                told.append(tell(raw, part.told(parts[-1].token), part, self._special.mask))
        return (
            Proposal.join(parts),
            Evidence.join(evidence_parts) if evidence_parts else None,
            Logprobs.join(told).to_host() if told else None,
        )

    def _verify(
        self,
        accept: Tensor,
        proposal: Proposal,
        hidden: Tensor,
        unguided: Tensor | None,
        step_rows: StepRows,
        rows: Sequence[Row],
    ) -> None:
        """Overwrite `accept` where the auxiliary model checks a row's draft."""
        assert self._auxiliary is not None
        assert self._auxiliary_cache is not None
        drafting = [row for row in rows if isinstance(row, ApdRow)]
        own = step_rows.host_places([row.uses_auxiliary for row in rows])
        checked = to_device(own, self._device)
        drafts = proposal.token[checked].cpu().split([row.draft_length for row in drafting])
        canvases, spans = [], []
        for row, draft in zip(drafting, drafts, strict=True):
            canvas = row.canvas.clone()
            canvas[row.frontier : row.frontier + len(draft)] = draft
            canvases.append(canvas)
            spans.append(row.auxiliary_span())
        store = self._auxiliary_cache.store
        batch = ForwardBatch.pack(canvases, spans, store, self._device)
        auxiliary = self._auxiliary.logits(self._auxiliary(batch))
        part = step_rows.part(own)
        without_prompt = None if unguided is None else unguided[checked]
        diffusion = constrain(self._logits(hidden[checked], without_prompt, part), part)
        auxiliary = constrain(auxiliary[:, : self._vocab_size], part)
        mask = self._special.mask
        assert mask is not None, "only masks are drafted"
        diffusion[:, mask] = -torch.inf
        if mask < auxiliary.shape[-1]:
            auxiliary[:, mask] = -torch.inf
        suppressed = part.where(lambda p: p.logits_eos_inf)
        if suppressed is not None:
            diffusion[:, self._special.eos].masked_fill_(suppressed, -torch.inf)
        accept[checked] = verify(proposal.token[checked], diffusion, auxiliary, part)
