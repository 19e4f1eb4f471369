"""One denoising step: logits -> probabilities -> which positions commit."""

from vdiff_kserve.sampler.params import DecodingParams
from vdiff_kserve.sampler.schedule import block_steps, quota
from vdiff_kserve.sampler.step import (
    Proposal,
    SpecialTokens,
    StepRows,
    guide,
    propose,
    select,
)

__all__ = [
    "DecodingParams",
    "Proposal",
    "SpecialTokens",
    "StepRows",
    "block_steps",
    "guide",
    "propose",
    "quota",
    "select",
]
