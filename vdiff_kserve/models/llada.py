"""LLaDA-8B, LLaDA-1.5 and iLLaDA-8B: how their checkpoints describe and name themselves.

Format: `GSAI-ML/LLaDA-8B-Instruct` on the Hugging Face Hub (OLMo-style field names). iLLaDA is the
same with another vocabulary; where its files leave the mask out, its name tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.spec import ModelSpec

MASK_TOKEN_ID = 126336
ILLADA_MASK_TOKEN_ID = 5
EOT_TOKEN_ID = 126348
BLOCK_LENGTH = 32

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": {"policy": "low_confidence", "cache": "none"},
    "quality": {"policy": "threshold", "threshold": 0.98, "cache": "none"},
    "fast": {"policy": "threshold", "threshold": 0.8, "cache": "dual", "max_lookahead": 64},
}

TENSOR_NAMES = {
    "model.transformer.wte.weight": "embed_tokens.weight",
    "model.transformer.ln_f.weight": "norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    "model.transformer.blocks.{}.attn_norm.weight": "layers.{}.attention_norm.weight",
    "model.transformer.blocks.{}.q_proj.weight": "layers.{}.attention.q_proj.weight",
    "model.transformer.blocks.{}.k_proj.weight": "layers.{}.attention.k_proj.weight",
    "model.transformer.blocks.{}.v_proj.weight": "layers.{}.attention.v_proj.weight",
    "model.transformer.blocks.{}.attn_out.weight": "layers.{}.attention.o_proj.weight",
    "model.transformer.blocks.{}.ff_norm.weight": "layers.{}.mlp_norm.weight",
    "model.transformer.blocks.{}.ff_proj.weight": "layers.{}.mlp.gate_proj.weight",
    "model.transformer.blocks.{}.up_proj.weight": "layers.{}.mlp.up_proj.weight",
    "model.transformer.blocks.{}.ff_out.weight": "layers.{}.mlp.down_proj.weight",
}
"""Published tensor name -> name in `Decoder`; `{}` stands for the layer's number."""

FIXED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "scale_logits": (False,),
}
"""Variants that the published class knows and no published checkpoint uses: anything else here
would change the arithmetic, so it is refused rather than served wrongly."""


def read_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate LLaDA's `config.json`; every size must be stated, none has a default."""
    for field, allowed in FIXED_FIELDS.items():
        config.expect(field, allowed)
    hidden_size = config.integer("d_model")
    num_heads = config.integer("n_heads")
    if hidden_size % (2 * num_heads):
        raise config.error("d_model", f"{hidden_size} is no even multiple of n_heads = {num_heads}")
    embedding_size = config.integer("embedding_size", default=config.integer("vocab_size"))
    is_illada = config.is_called("illada")
    end, *more_ends = config.end_token_ids(embedding_size)
    decoder = DecoderConfig(
        vocab_size=embedding_size,
        hidden_size=hidden_size,
        intermediate_size=config.integer("mlp_hidden_size"),
        num_layers=config.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=config.divisor("n_kv_heads", of=num_heads),
        head_dim=hidden_size // num_heads,
        rms_norm_eps=config.norm_eps(),
        rope_theta=config.rotary_base(),
        rope_in_float32=config.boolean("rope_full_precision"),
        tie_embeddings=config.boolean("weight_tying"),
    )
    return ModelSpec(
        family="llada",
        decoder=decoder,
        mask_token_id=config.mask_token_id(
            embedding_size, default=ILLADA_MASK_TOKEN_ID if is_illada else MASK_TOKEN_ID
        ),
        eos_token_id=end,
        eot_token_id=None if is_illada or embedding_size <= EOT_TOKEN_ID else EOT_TOKEN_ID,
        max_model_len=config.context("max_sequence_length"),
        block_length=BLOCK_LENGTH,
        profiles=PROFILES,
        eot_token="<|eot_id|>",
        more_end_token_ids=tuple(more_ends),
    )
