"""A random checkpoint in LLaDA's format, of any size, for measuring speed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.speed import SPEC
from vdiff_kserve.models import Decoder, DecoderConfig, ModelSpec, load_tokenizer
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.registry import FAMILIES, find_by_architecture

ARCHITECTURE = "LLaDAModelLM"
HEAD_DIM = 64
CONTEXT = 2304
SIZES = re.compile(r"(\d+)x(\d+)x(\d+)")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def parse_sizes(text: str) -> DecoderConfig:
    """`12x512x8192` as a decoder of 12 layers, width 512 and 8192 tokens.

    The rest is as in `benchmarks.speed`: heads of 64, the MLP three times as wide as the model.

    Raises:
        ValueError: the text has another form, or the width is no multiple of 64.
    """
    found = SIZES.fullmatch(text)
    if found is None:
        raise ValueError(f"sizes must look like 12x512x8192, got {text!r}")
    layers, width, vocabulary = (int(size) for size in found.groups())
    if width % HEAD_DIM or not layers or not width or vocabulary < 8:
        raise ValueError(f"the width must be a multiple of {HEAD_DIM}, got {text!r}")
    heads = width // HEAD_DIM
    return replace(
        SPEC.decoder,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD_DIM,
    )


def write_random_checkpoint(folder: Path, config: DecoderConfig, seed: int = 0) -> Path:
    """Write weights in bfloat16, `config.json` and a tokenizer into `folder`.

    The last two tokens are the mask and the end of text; every other one is a word of its own.
    """
    torch.manual_seed(seed)
    decoder = Decoder(config)
    names = FAMILIES[ARCHITECTURE].tensor_names
    tensors = {}
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
        tensors[names.published_name(name)] = parameter.detach().to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_fields(config)), encoding="utf-8")
    _tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _fields(config: DecoderConfig) -> dict[str, object]:
    return {
        "architectures": [ARCHITECTURE],
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.vocab_size - 1,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": config.vocab_size - 2,
        "max_sequence_length": CONTEXT,
        "mlp_hidden_size": config.intermediate_size,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": config.rope_in_float32,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_embeddings,
    }


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = [f"w{i}" for i in range(vocabulary - 2)]
    special = ["<|mdm_mask|>", "<|endoftext|>"]
    ids = {word: i for i, word in enumerate([*words, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=special[0], eos_token=special[1]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def read_checkpoint(folder: Path) -> tuple[ModelSpec, list[int]]:
    """What a checkpoint says of itself, and the token ids that make plain text.

    Raises:
        CheckpointError: the folder cannot be served.
    """
    config = CheckpointConfig.read(folder)
    spec = find_by_architecture(config, FAMILIES).read_spec(config)
    tokenizer = load_tokenizer(folder)
    special = {spec.mask_token_id, spec.eos_token_id, *tokenizer.all_special_ids}
    special |= tokenizer.added_tokens_decoder.keys()
    size = min(spec.decoder.vocab_size, len(tokenizer))
    return spec, [i for i in range(size) if i not in special]
