"""From the decoding fields of a request to the decoding that will be used, or a clear refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vdiff_kserve.decoding import APPROXIMATE_CACHES, DECODING_FIELDS, STEPPED
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.sampler import DecodingParams

POLICY_OF_FIELD = {
    "threshold": "threshold",
    "factor": "factor",
    "entropy_bound": "entropy_bound",
    "neighbour_threshold": "local",
    "radius": "local",
    "credit_weight": "credit",
    "credit_decay": "credit",
    "credit_power": "credit",
    "edit_threshold": "edit",
    "max_post_edits": "edit",
    "apd_mixture_weight": "apd",
    "apd_window": "apd",
    "apd_lookahead": "apd",
    "apd_max_parallel": "apd",
    "apd_threshold": "apd",
}
"""The policy that a field asks for when the request names none."""

ALL_AS_VLLM = -1
"""vLLM's value of `top_k` for what is 0 here."""

REQUEST_FIELDS = frozenset(DECODING_FIELDS) | {
    "profile",
    "remasking",
    "apd",
    "use_cache",
    "use_dual_cache",
}
"""The decoding fields of a request, and the further names it may use for them."""


AUTOREGRESSIVE_FIELDS = frozenset({"temperature", "top_p", "top_k", "min_p", "cache", "use_cache"})
"""The decoding fields that mean something to a model which writes one token after the other."""

RENOISING_FIELDS = AUTOREGRESSIVE_FIELDS - {"cache", "use_cache"} | {
    *("profile", "policy", "entropy_bound", "steps", "block_length"),
}
"""Those that mean something to a model which is denoised from random tokens."""


@dataclass(frozen=True)
class ModelTraits:
    """What the served model allows.

    Attributes:
        block_causal: whether its blocks see only themselves and all to their left.
        block_length: the block length it was trained with.
        sub_blocks: whether its blocks are decoded in smaller ones.
        has_auxiliary: whether APD has an auxiliary model.
        autoregressive: whether it writes one token after the other.
        renoises: whether it is denoised from random tokens, a canvas of `block_length` at a time.
        cacheable: whether an autoregressive model's keys and values can be kept.
        allows_apd: False when the server was started without APD.
    """

    block_causal: bool
    block_length: int
    has_auxiliary: bool
    allows_apd: bool = True
    sub_blocks: bool = False
    autoregressive: bool = False
    cacheable: bool = True
    renoises: bool = False


def resolve(
    given: Mapping[str, Any],
    default: DecodingParams,
    profiles: Mapping[str, DecodingParams],
    traits: ModelTraits,
) -> DecodingParams:
    """The decoding that a request asks for.

    Args:
        given: the fields that the request sets, of `REQUEST_FIELDS`.
        default: the server's decoding.
        profiles: named decodings; `profile` takes the place of `default`.

    Raises:
        RequestError: a value out of range, or fields that contradict each other or the model.
    """
    given = _with_own_top_k(given)
    if traits.autoregressive:
        return _resolve_autoregressive(given, default, traits)
    base = default
    if given.get("profile") is not None:
        base = _profile(given["profile"], profiles)
    if traits.renoises:
        return _resolve_renoising(given, base, traits)
    fields = {
        name: given[name]
        for name, field in DECODING_FIELDS.items()
        if name in given and (given[name] is not None or field.nullable)
    }
    for name, value in fields.items():
        _check_value(name, value)
    policy = _policy(given, fields, base)
    _check_fields_fit(fields, policy)
    fields["policy"] = policy
    cache = _cache(given, base.cache)
    fields["cache"] = cache
    _check_cache(fields, given, cache, traits)
    _check_block_length(fields.get("block_length"), traits)
    if traits.block_causal and fields.get("max_lookahead") is not None:
        raise RequestError(
            "max_lookahead is for bidirectional models: a block of this one sees nothing right of "
            "itself.",
            param="max_lookahead",
        )
    if policy == "edit" and traits.sub_blocks:
        raise RequestError(
            "policy edit is not for models whose blocks begin with an autoregressive token.",
            param="policy",
        )
    if policy == "p2" and traits.block_causal:
        raise RequestError(
            "policy p2 is for bidirectional models, whose canvas is planned as a whole.",
            param="policy",
        )
    if policy == "apd" and not traits.allows_apd:
        raise RequestError(
            "policy apd is switched off on this server (--disable_apd).", param="policy"
        )
    if policy == "apd" and traits.block_causal and traits.has_auxiliary:
        raise RequestError(
            "policy apd with an auxiliary model is for bidirectional models.", param="policy"
        )
    return replace(base, **fields)


def _with_own_top_k(given: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**given, "top_k": 0} if given.get("top_k") == ALL_AS_VLLM else given


def _resolve_autoregressive(
    given: Mapping[str, Any], default: DecodingParams, traits: ModelTraits
) -> DecodingParams:
    for name, value in given.items():
        if name not in AUTOREGRESSIVE_FIELDS and value is not None and value is not False:
            raise RequestError(
                f"{name} is for diffusion models. This model is autoregressive: it writes one "
                "token after the other.",
                param=name,
            )
    fields = {name: given[name] for name in DECODING_FIELDS if given.get(name) is not None}
    if given.get("use_cache") is not None:
        fields.setdefault("cache", "exact" if given["use_cache"] else "none")
    for name, value in fields.items():
        _check_value(name, value)
    allowed = ("none", "exact") if traits.cacheable else ("none",)
    if fields.get("cache", default.cache) not in allowed:
        raise RequestError(
            f"cache must be one of {', '.join(allowed)} for this autoregressive model, got "
            f"{fields['cache']}.",
            param="cache" if given.get("cache") else "use_cache",
        )
    return replace(default, **fields)


def _resolve_renoising(
    given: Mapping[str, Any], base: DecodingParams, traits: ModelTraits
) -> DecodingParams:
    for name, value in given.items():
        if name not in RENOISING_FIELDS and value is not None and value is not False:
            raise RequestError(
                f"{name} does not apply to this model: it has no masks, and is denoised from "
                f"random tokens, {traits.block_length} at a time.",
                param=name,
            )
    fields = {name: given[name] for name in DECODING_FIELDS if given.get(name) is not None}
    for name, value in fields.items():
        _check_value(name, value)
    only = {"policy": "entropy_bound", "block_length": traits.block_length}
    for name, allowed in only.items():
        if fields.get(name, allowed) != allowed:
            raise RequestError(
                f"{name} must be {allowed} for this model, got {fields[name]}.", param=name
            )
    return replace(base, **fields)


def _check_block_length(length: int | None, traits: ModelTraits) -> None:
    trained = traits.block_length
    if length is None or not traits.block_causal or length == trained:
        return
    if not traits.sub_blocks:
        raise RequestError(
            f"block_length must be {trained}, the block length that the model was trained with, "
            f"got {length}.",
            param="block_length",
        )
    if trained % length:
        raise RequestError(
            f"block_length must divide {trained}, the block length that the model was trained "
            f"with, got {length}.",
            param="block_length",
        )


def _profile(name: object, profiles: Mapping[str, DecodingParams]) -> DecodingParams:
    if not isinstance(name, str) or name not in profiles:
        allowed = ", ".join(profiles)
        raise RequestError(f"profile must be one of {allowed}, got {name!r}.", param="profile")
    return profiles[name]


def _check_value(name: str, value: object) -> None:
    field = DECODING_FIELDS[name]
    if value is None and field.nullable:
        return
    if problem := field.setting.problem(value):
        raise RequestError(f"{name} {problem}.", param=name)


def _policy(given: Mapping[str, Any], fields: Mapping[str, Any], base: DecodingParams) -> str:
    """The policy that the request names, or that its fields ask for, or the default's."""
    asked = _named_policies(given, fields) or _implied_policies(fields, base)
    if len(set(asked.values())) > 1:
        asks = " and ".join(f"{name} asks for {policy}" for name, policy in asked.items())
        raise RequestError(f"The request names several policies: {asks}.", param=list(asked)[-1])
    policy = next(iter(asked.values()), None)
    if given.get("apd") is False:
        if policy == "apd":
            raise RequestError("apd is false, but the request asks for policy apd.", param="apd")
        if policy is None and base.policy == "apd":
            return "threshold"
    if policy is not None:
        return policy
    if "steps" in fields and base.policy not in STEPPED:
        return "low_confidence"
    return base.policy


def _named_policies(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, str]:
    """What the request says outright, by the name it uses."""
    named: dict[str, str] = {}
    if "policy" in fields:
        named["policy"] = fields["policy"]
    if given.get("apd"):
        named["apd"] = "apd"
    remasking = given.get("remasking")
    by_confidence = remasking == "low_confidence" and ("threshold" in fields or "factor" in fields)
    if remasking is not None and not by_confidence:
        named["remasking"] = remasking
    return named


def _implied_policies(fields: Mapping[str, Any], base: DecodingParams) -> dict[str, str]:
    """What fields of one policy ask for, where the default's policy does not use them."""
    return {
        name: POLICY_OF_FIELD[name]
        for name in fields
        if name in POLICY_OF_FIELD and base.policy not in _policies(name)
    }


def _policies(name: str) -> frozenset[str]:
    return DECODING_FIELDS[name].policies or frozenset()


def _check_fields_fit(fields: Mapping[str, Any], policy: str) -> None:
    for name in fields:
        used_by = DECODING_FIELDS[name].policies
        if used_by is not None and policy not in used_by:
            allowed = ", ".join(sorted(used_by))
            raise RequestError(
                f"{name} belongs to policy {allowed}, and the policy here is {policy}. "
                f"Leave {name} out or choose another policy.",
                param=name,
            )


def _cache(given: Mapping[str, Any], default: str) -> str:
    """The cache that the request names, under any of its names."""
    named: dict[str, str] = {}
    if given.get("cache") is not None:
        named["cache"] = given["cache"]
    use, dual = given.get("use_cache"), given.get("use_dual_cache")
    if dual:
        if use is False:
            raise RequestError(
                "use_dual_cache is true, but use_cache is false.", param="use_dual_cache"
            )
        named["use_dual_cache"] = "dual"
    elif use is not None:
        named["use_cache"] = "prefix" if use else "none"
    if len(set(named.values())) > 1:
        asks = " and ".join(f"{name} asks for {cache}" for name, cache in named.items())
        raise RequestError(f"The request names several caches: {asks}.", param=list(named)[-1])
    return next(iter(named.values()), default)


def _check_cache(
    fields: Mapping[str, Any], given: Mapping[str, Any], cache: str, traits: ModelTraits
) -> None:
    allowed = ("none", "exact") if traits.block_causal else ("none", "prefix", "dual")
    if traits.sub_blocks:
        allowed = ("none", "exact", "dual")
    if cache not in allowed:
        kind = "block-causal" if traits.block_causal else "bidirectional"
        name = next((n for n in ("cache", "use_dual_cache", "use_cache") if given.get(n)), "cache")
        raise RequestError(
            f"cache must be one of {', '.join(allowed)} for a {kind} model, got {cache}.",
            param=name,
        )
    if cache in APPROXIMATE_CACHES:
        return
    for name in ("refresh_interval", "vicinity"):
        if fields.get(name):
            raise RequestError(
                f"{name} needs cache prefix or dual, and the cache here is {cache}.",
                param=name,
            )


def report(params: DecodingParams, max_tokens: int, traits: ModelTraits) -> dict[str, Any]:
    """The decoding that was used, for the response: the parameters that its policy reads."""
    used: dict[str, Any] = {}
    if traits.autoregressive or traits.renoises:
        names = AUTOREGRESSIVE_FIELDS if traits.autoregressive else RENOISING_FIELDS
        used = {name: getattr(params, name) for name in DECODING_FIELDS if name in names}
        if traits.autoregressive:
            used = {"policy": "autoregressive", **used}
        return {**used, "max_tokens": max_tokens, "seed": params.seed}
    for name, field in DECODING_FIELDS.items():
        if field.policies is not None and params.policy not in field.policies:
            continue
        used[name] = getattr(params, name)
    if "steps" in used and used["steps"] is None:
        used["steps"] = max_tokens
    if params.cache not in APPROXIMATE_CACHES:
        del used["refresh_interval"], used["vicinity"]
    if params.policy == "apd":
        used["verifier"] = "auxiliary model" if traits.has_auxiliary else "confidence"
    return {**used, "max_tokens": max_tokens, "seed": params.seed}
