"""LLaDA with experts: LLaDA-MoE 7B-A1B, and LLaDA2.0 / 2.1 mini and flash.

Formats: `inclusionAI/LLaDA-MoE-7B-A1B-Instruct` and `inclusionAI/LLaDA2.0-mini` on the Hugging Face
Hub. The two share a vocabulary; LLaDA2 attends block by block and limits experts by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdiff_kserve.models.checkpoint_config import MAX_EXPERTS, CheckpointConfig
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.llada import PROFILES as LLADA_PROFILES
from vdiff_kserve.models.moe import MoEConfig
from vdiff_kserve.models.qwen import EXPERT_TENSORS, MOE_TENSORS, rope_fields, rope_theta
from vdiff_kserve.models.spec import ModelSpec
from vdiff_kserve.models.tensor_names import TensorNames

MASK_TOKEN_ID = 156895
EOS_TOKEN_ID = 156892
END_OF_TURN = "<|role_end|>"
BLOCK_LENGTH = 32
MAX_SCALING = 1e4

_AS_PUBLISHED = {"cache": "exact", "filtered_confidence": True}
LLADA2_PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": _AS_PUBLISHED | {"policy": "low_confidence"},
    "quality": _AS_PUBLISHED | {"policy": "dynamic", "threshold": 0.95},
    "fast": _AS_PUBLISHED | {"policy": "dynamic", "threshold": 0.85},
}
_EDITING = _AS_PUBLISHED | {"policy": "edit"}
EDITING_PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": LLADA2_PROFILES["exact"],
    "quality": _EDITING | {"threshold": 0.7, "edit_threshold": 0.5},
    "fast": _EDITING | {"threshold": 0.5, "edit_threshold": 0.0},
}
"""The two modes of LLaDA2.1's model card. Its weights were trained to edit, those of 2.0 not, and
only the checkpoint's name tells them apart."""

LLADA_MOE_TENSORS = TensorNames(
    {
        **MOE_TENSORS.by_published,
        "model.layers.{}.shared_expert.gate_proj.weight": "layers.{}.mlp.shared.gate_proj.weight",
        "model.layers.{}.shared_expert.up_proj.weight": "layers.{}.mlp.shared.up_proj.weight",
        "model.layers.{}.shared_expert.down_proj.weight": "layers.{}.mlp.shared.down_proj.weight",
    },
    stacked=EXPERT_TENSORS,
)

_SHARED = "model.layers.{}.mlp.shared_experts"
LLADA2_TENSORS = TensorNames(
    {
        "model.word_embeddings.weight": "embed_tokens.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
        "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
        "model.layers.{}.attention.query_layernorm.weight": "layers.{}.attention.q_norm.weight",
        "model.layers.{}.attention.key_layernorm.weight": "layers.{}.attention.k_norm.weight",
        "model.layers.{}.attention.dense.weight": "layers.{}.attention.o_proj.weight",
        "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
        "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up_proj.weight",
        "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down_proj.weight",
        "model.layers.{}.mlp.gate.weight": "layers.{}.mlp.router.weight",
        "model.layers.{}.mlp.gate.expert_bias": "layers.{}.mlp.router.bias",
        f"{_SHARED}.gate_proj.weight": "layers.{}.mlp.shared.gate_proj.weight",
        f"{_SHARED}.up_proj.weight": "layers.{}.mlp.shared.up_proj.weight",
        f"{_SHARED}.down_proj.weight": "layers.{}.mlp.shared.down_proj.weight",
    },
    stacked=EXPERT_TENSORS,
    fused={
        "model.layers.{}.attention.query_key_value.weight": (
            "layers.{}.attention.q_proj.weight",
            "layers.{}.attention.k_proj.weight",
            "layers.{}.attention.v_proj.weight",
        )
    },
)

LLADA_MOE_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (False,),
    "qk_layernorm": (True,),
}
LLADA2_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False,),
    "norm_topk_prob": (True,),
    "score_function": ("sigmoid",),
    "use_bias": (False,),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
}
"""Variants that the published classes know and no published checkpoint uses, as for LLaDA."""


def read_llada_moe_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of LLaDA-MoE.

    Its published class reads neither `norm_topk_prob` nor `routed_scaling_factor` nor the fields of
    expert groups: the weights are the softmax over all experts as it is.
    """
    for field, allowed in LLADA_MOE_FIXED.items():
        config.expect(field, allowed)
    if config.get("clip_qkv") is not None:
        raise config.error("clip_qkv", "clipped queries and keys are not supported")
    frequencies = config.integers("moe_layer_freq")
    decoder = _read_decoder(
        config,
        moe=MoEConfig(
            num_experts=config.experts("num_experts"),
            experts_per_token=config.integer("num_experts_per_tok"),
            expert_size=config.integer("expert_intermediate_size"),
            shared_size=config.count("shared_expert_intermediate_size", default=0),
        ),
        dense_layers=frozenset(i for i, each in enumerate(frequencies) if each == 0),
        dense_field="dense_intermediate_size",
        attention_block=None,
    )
    return _spec(config, decoder, "llada_moe", LLADA_PROFILES)


def read_llada2_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of LLaDA2.0 and 2.1."""
    for field, allowed in LLADA2_FIXED.items():
        config.expect(field, allowed)
    expert_size = config.integer("moe_intermediate_size")
    num_experts = config.experts("num_experts")
    decoder = _read_decoder(
        config,
        moe=MoEConfig(
            num_experts=num_experts,
            experts_per_token=config.integer("num_experts_per_tok"),
            expert_size=expert_size,
            scoring="sigmoid",
            renormalize=True,
            scaling=config.number("routed_scaling_factor", most=MAX_SCALING),
            choice_bias=True,
            num_groups=config.divisor("n_group", of=num_experts),
            groups_kept=config.integer("topk_group"),
            shared_size=expert_size * config.count("num_shared_experts", most=MAX_EXPERTS),
        ),
        dense_layers=_first_layers(config, config.count("first_k_dense_replace")),
        dense_field="intermediate_size",
        attention_block=config.block_length(
            default=BLOCK_LENGTH, most=config.context("max_position_embeddings")
        ),
    )
    edits = config.is_called("llada2.1")
    return _spec(config, decoder, "llada2", EDITING_PROFILES if edits else LLADA2_PROFILES)


def _read_decoder(
    config: CheckpointConfig,
    *,
    moe: MoEConfig,
    dense_layers: frozenset[int],
    dense_field: str,
    attention_block: int | None,
) -> DecoderConfig:
    candidates = moe.num_experts * min(moe.groups_kept, moe.num_groups) // moe.num_groups
    if moe.experts_per_token > candidates:
        raise config.error("num_experts_per_tok", f"a token can choose of {candidates} only")
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_layers = config.integer("num_hidden_layers")
    head_dim = config.head_dim(hidden_size, "num_attention_heads")
    has_dense = any(layer < num_layers for layer in dense_layers)
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer(dense_field) if has_dense else moe.expert_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.divisor("num_key_value_heads", of=num_heads),
        head_dim=head_dim,
        rms_norm_eps=config.norm_eps(),
        rope_theta=rope_theta(config),
        rope_in_float32=False,
        tie_embeddings=config.boolean("tie_word_embeddings", default=False),
        qk_norm=True,
        attention_block=attention_block,
        rotary_dim=_rotary_dim(config, head_dim),
        moe=moe,
        dense_layers=dense_layers,
    )


def _first_layers(config: CheckpointConfig, count: int) -> frozenset[int]:
    return frozenset(range(min(count, config.integer("num_hidden_layers"))))


def _rotary_dim(config: CheckpointConfig, head_dim: int) -> int:
    stated = config.integer("rotary_dim", default=head_dim, most=head_dim) / head_dim
    fields = rope_fields(config, "partial_rotary_factor")
    rotary_dim = int(head_dim * fields.number("partial_rotary_factor", default=stated, most=1))
    if rotary_dim == 0 or rotary_dim % 2:
        raise config.error(
            "partial_rotary_factor", f"rotates {rotary_dim} of {head_dim} dimensions of a head"
        )
    return rotary_dim


def _spec(
    config: CheckpointConfig,
    decoder: DecoderConfig,
    family: str,
    profiles: Mapping[str, Mapping[str, Any]],
) -> ModelSpec:
    vocab_size = decoder.vocab_size
    pad = config.get("pad_token_id")
    end, *more_ends = config.end_token_ids(vocab_size, default=EOS_TOKEN_ID if pad is None else pad)
    return ModelSpec(
        family=family,
        decoder=decoder,
        mask_token_id=config.mask_token_id(vocab_size, default=MASK_TOKEN_ID),
        eos_token_id=end,
        eot_token_id=None,
        max_model_len=config.context("max_position_embeddings"),
        block_length=decoder.attention_block or BLOCK_LENGTH,
        profiles=profiles,
        eot_token=END_OF_TURN,
        more_end_token_ids=tuple(more_ends),
    )
