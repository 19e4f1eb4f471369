"""Checkpoints in Qwen2 / Qwen3 / Llama layout: Dream, and the auxiliary models of APD.

Dream-v0 7B, DiffuCoder and Dream-Coder are Qwen2.5 weights run without a causal mask; their logits
at position i predict token i + 1. The same names describe causal language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.moe import MoEConfig
from vdiff_kserve.models.spec import ModelSpec
from vdiff_kserve.models.tensor_names import TensorNames

DREAM_MASK_TOKEN_ID = 151666
DREAM_EOT_TOKEN_ID = 151645
DREAM_BLOCK_LENGTH = 32
DREAM_FILLER_TOKENS = ("<|dlm_pad|>",)
"""What DiffuCoder writes behind its answers, where Dream writes the end of the text."""

DREAM_PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": {"policy": "entropy", "cache": "none"},
    "quality": {"policy": "threshold", "threshold": 0.9, "cache": "prefix"},
    "fast": {"policy": "threshold", "threshold": 0.8, "cache": "dual", "max_lookahead": 64},
}
TENSOR_NAMES = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.q_proj.weight",
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attention.q_proj.bias",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.k_proj.weight",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attention.k_proj.bias",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.v_proj.weight",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attention.v_proj.bias",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.o_proj.weight",
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attention.k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down_proj.weight",
}
"""Published tensor name -> name in `Decoder`; `{}` stands for the layer's number."""

EXPERT_TENSORS = {
    "layers.{}.mlp.experts.gate_up_proj": (
        "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "model.layers.{}.mlp.experts.{}.up_proj.weight",
    ),
    "layers.{}.mlp.experts.down_proj": ("model.layers.{}.mlp.experts.{}.down_proj.weight",),
}
"""Stacked parameter -> tensors of an expert, one above the other."""
MOE_TENSORS = TensorNames(
    {**TENSOR_NAMES, "model.layers.{}.mlp.gate.weight": "layers.{}.mlp.router.weight"},
    stacked=EXPERT_TENSORS,
)


def read_dream_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of Dream and its relatives.

    The authors decode the whole answer as one block.
    """
    if config.get("expand_token_id") is not None:
        raise config.error(
            "expand_token_id", "DreamOn, whose tokens make holes longer and shorter, is not served"
        )
    decoder = read_qwen_decoder(config, qkv_bias=True, qk_norm=False, attention_block=None)
    vocab_size = decoder.vocab_size
    context = config.context("max_position_embeddings")
    one_block = {"exact": {**DREAM_PROFILES["exact"], "block_length": context}}
    end, *more_ends = config.end_token_ids(vocab_size, default=config.get("pad_token_id"))
    return ModelSpec(
        family="dream",
        decoder=decoder,
        mask_token_id=config.mask_token_id(vocab_size, default=DREAM_MASK_TOKEN_ID),
        eos_token_id=end,
        eot_token_id=DREAM_EOT_TOKEN_ID if vocab_size > DREAM_EOT_TOKEN_ID else None,
        max_model_len=context,
        block_length=DREAM_BLOCK_LENGTH,
        profiles={**DREAM_PROFILES, **one_block},
        eot_token="<|im_end|>",
        more_end_token_ids=tuple(more_ends),
        filler_tokens=DREAM_FILLER_TOKENS,
        shifted_logits=True,
    )


def read_qwen2_decoder(config: CheckpointConfig) -> DecoderConfig:
    """A causal `Qwen2ForCausalLM`."""
    return read_qwen_decoder(config, qkv_bias=True, qk_norm=False, attention_block=1)


def read_qwen3_decoder(config: CheckpointConfig) -> DecoderConfig:
    """A causal `Qwen3ForCausalLM`."""
    config.expect("attention_bias", (False,))
    return read_qwen_decoder(config, qkv_bias=False, qk_norm=True, attention_block=1)


def read_llama_decoder(config: CheckpointConfig) -> DecoderConfig:
    """A causal `LlamaForCausalLM`."""
    config.expect("attention_bias", (False,))
    config.expect("mlp_bias", (False,))
    return read_qwen_decoder(config, qkv_bias=False, qk_norm=False, attention_block=1)


def read_qwen_decoder(
    config: CheckpointConfig,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    attention_block: int | None,
    moe: MoEConfig | None = None,
    dense_layers: frozenset[int] = frozenset(),
) -> DecoderConfig:
    """What `config.json` says in the field names of Qwen2, Qwen3 and Llama."""
    config.expect("hidden_act", ("silu",))
    config.expect("use_sliding_window", (False,))
    rope_fields(config, "partial_rotary_factor").expect("partial_rotary_factor", (1,))
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.divisor("num_key_value_heads", of=num_heads),
        head_dim=config.head_dim(hidden_size, "num_attention_heads"),
        rms_norm_eps=config.norm_eps(),
        rope_theta=rope_theta(config),
        rope_in_float32=False,
        tie_embeddings=config.boolean("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        attention_block=attention_block,
        moe=moe,
        dense_layers=dense_layers,
    )


def rope_theta(config: CheckpointConfig) -> float:
    """The rotary base."""
    parameters = config.table("rope_parameters") or config.table("rope_scaling")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise config.error("rope_scaling", f"{kind!r} is not supported, only 'default'")
    return rope_fields(config, "rope_theta").rotary_base()


def rope_fields(config: CheckpointConfig, field: str) -> CheckpointConfig:
    """Where `field` of the rotary positions is to be read: `config` itself, or its part
    `rope_parameters`, as transformers 5 writes it."""
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(field) is None and field in config.table(name):
            return config.part(name)
    return config
