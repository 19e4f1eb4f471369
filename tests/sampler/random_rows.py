"""Hypothesis strategies that make rows for the sampler's functions."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.sampler.rows import POLICIES, VOCAB, OpenRow
from vdiff_kserve.sampler import DREAM_POLICIES, SCHEDULED_POLICIES, DecodingParams, Policy

unit = st.floats(0.0, 1.0)


@st.composite
def params_of(draw: st.DrawFn, policy: Policy) -> DecodingParams:
    return DecodingParams(
        policy=policy,
        temperature=draw(st.sampled_from([0.0, 0.0, 0.6, 1.0])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 1, 4])),
        min_p=draw(st.sampled_from([0.0, 0.2])),
        alg_temp=draw(st.sampled_from([0.0, 0.4])) if policy in DREAM_POLICIES else 0.0,
        threshold=draw(unit),
        factor=draw(st.floats(0.0, 5.0)),
        entropy_bound=draw(st.floats(0.0, 6.0)),
        neighbour_threshold=draw(unit),
        radius=draw(st.integers(0, 8)),
        edit_threshold=draw(unit),
        apd_threshold=draw(st.none() | unit),
        logits_eos_inf=draw(st.booleans()),
        confidence_eos_eot_inf=draw(st.booleans()),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )


@st.composite
def open_rows(draw: st.DrawFn, policies: tuple[Policy, ...] = POLICIES) -> OpenRow:
    policy = draw(st.sampled_from(policies))
    positions = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    logits = torch.randn(len(positions), VOCAB, generator=generator) * scale
    written = [-1] * len(positions)
    if policy in ("edit", "p2"):
        written = [draw(st.sampled_from([-1, 0, 1, 2])) for _ in positions]
    quota = draw(st.integers(1, len(positions)))
    if policy not in SCHEDULED_POLICIES:
        quota = draw(st.integers(1, 12))
    return OpenRow(draw(params_of(policy)), tuple(positions), tuple(written), logits, quota)
