"""Which kind of row runs a request."""

from __future__ import annotations

from collections.abc import Mapping

from vdiff_kserve.engine.autoregressive import AutoregressiveRow
from vdiff_kserve.engine.draft_row import DraftRow
from vdiff_kserve.engine.infill_row import InfillEditRow, InfillRemaskRow, InfillRow
from vdiff_kserve.engine.renoising import RenoiseRow
from vdiff_kserve.engine.request import EventSink, GenerationRequest
from vdiff_kserve.engine.row import Row
from vdiff_kserve.engine.row_kinds import (
    ApdRow,
    BlockCausalEditRow,
    BlockCausalRow,
    EditRow,
    RemaskRow,
)
from vdiff_kserve.engine.scoring import ScoringRow
from vdiff_kserve.engine.sub_blocks import SubBlockRow
from vdiff_kserve.models import ModelSpec
from vdiff_kserve.sampler import Policy

REVISING: Mapping[Policy, type[Row]] = {"edit": EditRow, "p2": RemaskRow}
"""Rows of policies that may change what they wrote in an open block."""
INFILLING: Mapping[Policy, type[Row]] = {"edit": InfillEditRow, "p2": InfillRemaskRow}
"""The same for requests with holes."""


def make_row(
    request: GenerationRequest, sink: EventSink, spec: ModelSpec, has_auxiliary: bool
) -> Row:
    """The row of a request, of the kind that its work and its policy need.

    Raises:
        ValueError: a block-causal model is asked to look at what is right of a hole, or a row is
            asked for a policy that its model cannot be decoded with.
    """
    if request.decoding.policy == "p2" and spec.block_causal:
        raise ValueError("policy p2 is for models that see the whole canvas")
    return _kind(request, spec, has_auxiliary)(request, sink, spec)


def _kind(request: GenerationRequest, spec: ModelSpec, has_auxiliary: bool) -> type[Row]:
    policy = request.decoding.policy
    if request.scoring is not None:
        return ScoringRow
    if request.given and spec.block_causal:
        raise ValueError("a block-causal model does not see given tokens right of a mask")
    if request.infills:
        return INFILLING.get(policy, InfillRow)
    if policy == "apd" and has_auxiliary and not request.given:
        return ApdRow
    if spec.autoregressive:
        return AutoregressiveRow
    if spec.renoising is not None:
        return RenoiseRow
    if spec.sub_blocks:
        return SubBlockRow
    if spec.block_causal:
        return BlockCausalEditRow if policy == "edit" else BlockCausalRow
    return REVISING.get(policy) or (DraftRow if request.draft else Row)
