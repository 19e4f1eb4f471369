"""Which kind of row runs a request."""

from __future__ import annotations

from vdiff_kserve.engine.autoregressive import AutoregressiveRow
from vdiff_kserve.engine.draft_row import DraftRow
from vdiff_kserve.engine.infill_row import InfillEditRow, InfillRow
from vdiff_kserve.engine.renoising import RenoiseRow
from vdiff_kserve.engine.request import EventSink, GenerationRequest
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.row_kinds import ApdRow, BlockCausalEditRow, BlockCausalRow, EditRow
from vdiff_kserve.engine.scoring import ScoringRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import ModelSpec


def make_row(
    request: GenerationRequest, sink: EventSink, spec: ModelSpec, has_auxiliary: bool
) -> Row:
    """The row of a request, of the kind that its work and its policy need.

    Raises:
        ValueError: a block-causal model is asked to look at what is right of a hole.
    """
    return _kind(request, spec, has_auxiliary)(request, sink, spec)


def _kind(request: GenerationRequest, spec: ModelSpec, has_auxiliary: bool) -> type[Row]:
    edits = request.decoding.policy == "edit"
    if request.scoring is not None:
        return ScoringRow
    if request.given and spec.block_causal:
        raise ValueError("a block-causal model does not see given tokens right of a mask")
    if request.infills:
        return InfillEditRow if edits else InfillRow
    if request.decoding.policy == "apd" and has_auxiliary and not request.given:
        return ApdRow
    if spec.autoregressive:
        return AutoregressiveRow
    if spec.renoising is not None:
        return RenoiseRow
    if spec.sub_blocks:
        return SubBlockRow
    if spec.block_causal:
        return BlockCausalEditRow if edits else BlockCausalRow
    if edits:
        return EditRow
    return DraftRow if request.draft else Row
