"""The folder that ships in the package: LLaDA config, published tensor names, bfloat16."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from hack.embedded.tokenizer import BOS, EOS, EOT, MASK
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.registry import FAMILIES

MAX_LENGTH = 512
ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-5
READABLE = 0o644  # a container may run as any user


def decoder_config(
    vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int
) -> DecoderConfig:
    """The embedded model's shape; embeddings are tied."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        rms_norm_eps=RMS_NORM_EPS,
        rope_theta=ROPE_THETA,
        rope_in_float32=True,
        tie_embeddings=True,
    )


def llada_config(config: DecoderConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """The decoder's shape in LLaDA's own field names."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "bos_token_id": tokenizer.token_to_id(BOS),
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": tokenizer.token_to_id(EOS),
        "eot_token_id": tokenizer.token_to_id(EOT),
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "max_sequence_length": MAX_LENGTH,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": tokenizer.token_to_id(EOS),
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": config.rope_in_float32,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_embeddings,
    }


def save_llada(
    folder: Path, config: DecoderConfig, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write config.json and model.safetensors from `Decoder` parameters of any dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = llada_config(config, tokenizer)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    names = FAMILIES["LLaDAModelLM"].tensor_names
    tensors = {
        names.published_name(name): weight.detach().to(torch.bfloat16).contiguous().clone()
        for name, weight in weights.items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, str(temporary), metadata={"format": "pt"})
    temporary.chmod(READABLE)
    temporary.rename(folder / "model.safetensors")
