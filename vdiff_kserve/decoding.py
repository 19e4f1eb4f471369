"""The decoding parameters of a request: names, ranges, and the policies that use them.

One table for the request body, the server's flags and the docs. A parameter comes from the request,
else from the server's flags, else from the model's own default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vdiff_kserve.setting import Kind, Setting

SCHEDULED = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "sequential")
STEPPED = frozenset({*SCHEDULED, "dynamic", "p2"})
"""Policies that `steps` means something to."""
POLICIES = (
    *SCHEDULED,
    *("dynamic", "threshold", "factor", "entropy_bound", "entropy_sum"),
    *("local", "credit", "edit", "p2", "apd"),
)
CACHES = ("none", "prefix", "dual", "exact")
APPROXIMATE_CACHES = frozenset({"prefix", "dual"})
PROFILES = ("exact", "quality", "fast")


@dataclass(frozen=True)
class DecodingField:
    """One decoding parameter.

    Attributes:
        setting: type, range and help.
        policies: the policies that use it; None is all of them.
        flag: the server's flag for its default, when it is not the field's own name.
        nullable: whether null is a value of its own, and not the absence of one.
    """

    setting: Setting
    policies: frozenset[str] | None = None
    flag: str = ""
    nullable: bool = False


def _field(
    kind: Kind,
    help_text: str,
    policies: set[str] | frozenset[str] | None = None,
    flag: str = "",
    nullable: bool = False,
    **facts: Any,
) -> DecodingField:
    facts.setdefault("metavar", "N" if kind is int else "X")
    facts.setdefault("default_text", "the model's own")
    setting = Setting(kind, None, help_text, "decoding", **facts)
    return DecodingField(setting, None if policies is None else frozenset(policies), flag, nullable)


DECODING_FIELDS: dict[str, DecodingField] = {
    "policy": _field(
        str,
        "Which masked positions of a block a step commits.",
        choices=POLICIES,
        metavar="POLICY",
    ),
    "steps": _field(
        int,
        "Denoising steps of the whole answer, for policies that go by schedule.",
        STEPPED,
        flag="diffusion_steps",
        low=1,
        default_text="one token per step",
    ),
    "block_length": _field(
        int, "Tokens decoded together, blocks left to right.", flag="block_size", low=1
    ),
    "temperature": _field(
        float,
        "Sampling temperature; 0 takes the likeliest token.",
        low=0,
        high=2,
        metavar="T",
        default_text="0",
    ),
    "top_p": _field(
        float,
        "Sample only from the likeliest tokens that together have this probability.",
        low=0,
        high=1,
        low_open=True,
        metavar="P",
        default_text="1",
    ),
    "top_k": _field(
        int,
        "Sample only from this many likeliest tokens; 0 or -1 is all.",
        low=-1,
        default_text="0",
    ),
    "min_p": _field(
        float,
        "Sample only tokens at least this likely relative to the likeliest.",
        low=0,
        high=1,
        metavar="P",
        default_text="0",
    ),
    "alg_temp": _field(
        float,
        "Temperature of the choice of positions; 0 takes the surest.",
        {"maskgit_plus", "topk_margin", "entropy"},
        low=0,
        high=100,
        default_text="0",
    ),
    "threshold": _field(
        float,
        "Least confidence of a committed token; of an anchor for `local`.",
        {"threshold", "dynamic", "local", "credit", "edit"},
        low=0,
        high=1,
        low_open=True,
        metavar="P",
    ),
    "factor": _field(
        float,
        "Commit the n surest positions while (n + 1) * (1 - confidence of the n-th) is below this.",
        {"factor"},
        low=0,
        high=100,
        low_open=True,
    ),
    "entropy_bound": _field(
        float,
        "Most entropy, in nats, of the positions committed together; of the largest one too only "
        "for `entropy_sum`.",
        {"entropy_bound", "entropy_sum"},
        low=0,
        high=100,
    ),
    "neighbour_threshold": _field(
        float,
        "Least confidence of a committed neighbour of an anchor.",
        {"local"},
        low=0,
        high=1,
        low_open=True,
        metavar="P",
    ),
    "radius": _field(int, "Positions from an anchor to its neighbours.", {"local"}, low=0),
    "credit_weight": _field(
        float, "Weight of the evidence of earlier steps.", {"credit"}, low=0, high=10
    ),
    "credit_decay": _field(
        float, "What is left of that evidence after each step.", {"credit"}, low=0, high=1
    ),
    "credit_power": _field(
        float, "Power of the probability that counts as evidence.", {"credit"}, low=0, high=10
    ),
    "edit_threshold": _field(
        float, "Least confidence of a token that replaces a written one.", {"edit"}, low=0, high=1
    ),
    "max_post_edits": _field(
        int, "Most steps that only edit, once a block has no mask.", {"edit"}, low=0
    ),
    "cfg_scale": _field(
        float, "Strength of classifier-free guidance; 0 is off.", low=0, high=100, default_text="0"
    ),
    "cache": _field(
        str,
        "What is kept between steps: `prefix` and `dual` for bidirectional models, `exact` for "
        "block-causal ones.",
        choices=CACHES,
        metavar="CACHE",
    ),
    "refresh_interval": _field(
        int,
        "With a prefix or dual cache, recompute everything every so many steps of a block.",
        low=1,
        default_text="once per block",
    ),
    "vicinity": _field(
        int,
        "With a prefix or dual cache, positions either side of the block that are recomputed too.",
        low=0,
        default_text="0",
    ),
    "max_lookahead": _field(
        int,
        "Most masked positions right of the block that the model sees.",
        low=0,
        nullable=True,
        default_text="all",
    ),
    "apd_mixture_weight": _field(
        float, "Weight R of the diffusion model in APD's target.", {"apd"}, low=0, high=1
    ),
    "apd_window": _field(
        int,
        "Positions W left of the frontier that APD recomputes.",
        {"apd"},
        low=1,
        nullable=True,
    ),
    "apd_lookahead": _field(
        int, "Masked positions M that APD sees.", {"apd"}, low=1, nullable=True
    ),
    "apd_max_parallel": _field(
        int, "Most tokens that an APD step commits.", {"apd"}, low=1, default_text="8"
    ),
    "apd_threshold": _field(
        float,
        "Least probability of a token that APD commits beside the first: under its target with an "
        "auxiliary model, else its confidence.",
        {"apd"},
        low=0,
        high=1,
        metavar="P",
        default_text="none with an auxiliary model, else 0.9",
    ),
}
"""Request field (and `DecodingParams` attribute) -> what it is."""
