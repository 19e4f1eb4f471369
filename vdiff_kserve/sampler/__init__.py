"""One denoising step: logits -> probabilities -> which positions commit."""

from vdiff_kserve.sampler.apd import verify
from vdiff_kserve.sampler.constrain import ConstraintTable, constrain, hold_back
from vdiff_kserve.sampler.credit import Evidence, accumulate, fuse
from vdiff_kserve.sampler.draw import works as draws_by_kernel
from vdiff_kserve.sampler.logprobs import Logprobs, raw_logprobs, tell
from vdiff_kserve.sampler.noise import random_tokens, seed_of_draw
from vdiff_kserve.sampler.params import (
    DREAM_POLICIES,
    MAX_TOP_LOGPROBS,
    SCHEDULED_POLICIES,
    CacheMode,
    Constraints,
    DecodingParams,
    Policy,
)
from vdiff_kserve.sampler.schedule import block_steps, quota
from vdiff_kserve.sampler.select import select
from vdiff_kserve.sampler.sharded import can_propose_from_shards, propose_from_shards
from vdiff_kserve.sampler.step import (
    AllowedTokens,
    Proposal,
    SpecialTokens,
    StepRows,
    guide,
    propose,
)
from vdiff_kserve.sampler.token_rules import ConstrainedRow, TokenRules

__all__ = [
    "DREAM_POLICIES",
    "MAX_TOP_LOGPROBS",
    "SCHEDULED_POLICIES",
    "AllowedTokens",
    "CacheMode",
    "ConstrainedRow",
    "ConstraintTable",
    "Constraints",
    "DecodingParams",
    "Evidence",
    "Logprobs",
    "Policy",
    "Proposal",
    "SpecialTokens",
    "StepRows",
    "TokenRules",
    "accumulate",
    "block_steps",
    "can_propose_from_shards",
    "constrain",
    "draws_by_kernel",
    "fuse",
    "guide",
    "hold_back",
    "propose",
    "propose_from_shards",
    "quota",
    "random_tokens",
    "raw_logprobs",
    "seed_of_draw",
    "select",
    "tell",
    "verify",
]
