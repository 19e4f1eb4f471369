"""Checkpoints of Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5 weights, decoded in blocks of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.qwen import read_qwen_decoder
from vdiff_kserve.models.spec import ModelSpec

MASK_TOKEN_ID = 151665
END_OF_TEXT_TOKEN_ID = 151643
BLOCK_LENGTH = 32
SUB_BLOCK_LENGTH = 8

_AS_PUBLISHED = {
    "block_length": SUB_BLOCK_LENGTH,
    "policy": "threshold",
    "strict_threshold": True,
    "filtered_confidence": True,
}
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "exact": _AS_PUBLISHED | {"threshold": 1.0, "cache": "exact"},
    "quality": _AS_PUBLISHED | {"threshold": 0.9, "cache": "exact"},
    "fast": _AS_PUBLISHED | {"threshold": 0.8, "cache": "dual"},
}


def read_spec(config: CheckpointConfig) -> ModelSpec:
    """Translate the `config.json` of Fast-dLLM v2.

    Attention is block-causal, the logits at position i predict token i + 1 within a block, and the
    first token of a block is predicted from the block before.
    """
    context = config.context("max_position_embeddings")
    block = config.integer("bd_size", default=BLOCK_LENGTH, most=context)
    if block % SUB_BLOCK_LENGTH:
        raise config.error("bd_size", f"must be a multiple of {SUB_BLOCK_LENGTH}, not {block}")
    decoder = read_qwen_decoder(config, qkv_bias=True, qk_norm=False, attention_block=block)
    vocab_size = decoder.vocab_size
    end, *more_ends = config.end_token_ids(vocab_size)
    return ModelSpec(
        family="fast_dllm_v2",
        decoder=decoder,
        mask_token_id=config.mask_token_id(vocab_size, default=MASK_TOKEN_ID),
        eos_token_id=end,
        eot_token_id=END_OF_TEXT_TOKEN_ID if vocab_size > END_OF_TEXT_TOKEN_ID else None,
        max_model_len=context,
        block_length=block,
        profiles=PROFILES,
        eot_token="<|endoftext|>",
        more_end_token_ids=tuple(more_ends),
        shifted_logits=True,
        sub_blocks=True,
    )
