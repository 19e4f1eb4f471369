"""One denoising step: logits -> probabilities -> which positions commit."""

from vdiff_kserve.sampler.apd import verify
from vdiff_kserve.sampler.credit import Evidence, accumulate, fuse
from vdiff_kserve.sampler.params import (
    DREAM_POLICIES,
    SCHEDULED_POLICIES,
    CacheMode,
    DecodingParams,
    Policy,
)
from vdiff_kserve.sampler.schedule import block_steps, quota
from vdiff_kserve.sampler.select import select
from vdiff_kserve.sampler.step import Proposal, SpecialTokens, StepRows, guide, propose

__all__ = [
    "DREAM_POLICIES",
    "SCHEDULED_POLICIES",
    "CacheMode",
    "DecodingParams",
    "Evidence",
    "Policy",
    "Proposal",
    "SpecialTokens",
    "StepRows",
    "accumulate",
    "block_steps",
    "fuse",
    "guide",
    "propose",
    "quota",
    "select",
    "verify",
]
