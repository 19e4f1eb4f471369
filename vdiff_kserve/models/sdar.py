"""SDAR 1.7B, 4B, 8B and 30B-A3B (arXiv 2510.06303): Qwen3 weights with block-causal attention.

Format: `JetLM/SDAR-8B-Chat` on the Hugging Face Hub. The length of a block, 4 unless the checkpoint
was trained with another, stands in `config.json` or at the end of its name (`SDAR-8B-Chat-b32`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.moe import MoEConfig
from vdiff_kserve.models.qwen import read_qwen_decoder
from vdiff_kserve.models.spec import ModelSpec

MASK_TOKEN_ID = 151669
END_OF_TURN_TOKEN_ID = 151645
BLOCK_LENGTH = 4

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": {"policy": "low_confidence", "cache": "exact"},
    "quality": {"policy": "dynamic", "threshold": 0.95, "cache": "exact"},
    "fast": {"policy": "dynamic", "threshold": 0.85, "cache": "exact"},
}


def read_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of a dense SDAR."""
    return _read(config, "sdar")


def read_moe_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of SDAR-MoE, in Qwen3-MoE's layout."""
    config.expect("decoder_sparse_step", (1,))
    moe = MoEConfig(
        num_experts=config.experts("num_experts"),
        experts_per_token=config.integer("num_experts_per_tok"),
        expert_size=config.integer("moe_intermediate_size"),
        renormalize=config.boolean("norm_topk_prob"),
    )
    if moe.experts_per_token > moe.num_experts:
        raise config.error("num_experts_per_tok", f"there are only {moe.num_experts} experts")
    return _read(config, "sdar_moe", moe, frozenset(config.integers("mlp_only_layers")))


def _read(
    config: CheckpointConfig,
    family: str,
    moe: MoEConfig | None = None,
    dense_layers: frozenset[int] = frozenset(),
) -> ModelSpec:
    config.expect("attention_bias", (False,))
    context = config.context("max_position_embeddings")
    block = config.block_length(default=BLOCK_LENGTH, most=context)
    decoder = read_qwen_decoder(
        config,
        qkv_bias=False,
        qk_norm=True,
        attention_block=block,
        moe=moe,
        dense_layers=dense_layers,
    )
    vocab_size = decoder.vocab_size
    end, *more_ends = config.end_token_ids(vocab_size)
    return ModelSpec(
        family=family,
        decoder=decoder,
        mask_token_id=config.mask_token_id(vocab_size, default=MASK_TOKEN_ID),
        eos_token_id=end,
        eot_token_id=END_OF_TURN_TOKEN_ID if vocab_size > END_OF_TURN_TOKEN_ID else None,
        max_model_len=context,
        block_length=block,
        profiles=PROFILES,
        eot_token="<|im_end|>",
        more_end_token_ids=tuple(more_ends),
    )
