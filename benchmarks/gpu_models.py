"""Models of published sizes with random weights, for the benchmark of a GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.gpu_timing import BLOCK
from vdiff_kserve.models import Decoder, DecoderConfig, KeyValueStore, ModelSpec
from vdiff_kserve.models.fp8 import Fp8Linear
from vdiff_kserve.models.moe import MoEConfig, Router
from vdiff_kserve.models.quantization import prepare_quantization

LLADA_8B = DecoderConfig(
    vocab_size=126_464,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_in_float32=True,
    tie_embeddings=False,
)
LLADA2_MINI = DecoderConfig(
    vocab_size=157_184,
    hidden_size=2048,
    intermediate_size=5120,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=6e5,
    rope_in_float32=False,
    tie_embeddings=False,
    qk_norm=True,
    attention_block=BLOCK,
    rotary_dim=64,
    moe=MoEConfig(
        num_experts=256,
        experts_per_token=8,
        expert_size=512,
        scoring="sigmoid",
        renormalize=True,
        scaling=2.5,
        choice_bias=True,
        num_groups=8,
        groups_kept=4,
        shared_size=512,
    ),
    dense_layers=frozenset({0}),
)
MODELS = {"llada-8b": LLADA_8B, "llada2-mini": LLADA2_MINI}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, and what is to differ from its published size."""
    add = parser.add_argument
    add("--model", default="llada-8b", choices=tuple(MODELS))
    add("--quantization", choices=("fp8",), help="of a dense model")
    add("--layers", type=int)
    add("--width", type=int)
    add("--inner", type=int, help="width of the MLP (in the published ratio to the model's)")
    add("--heads", type=int, help="(one per 128 of the width)")
    add("--vocabulary", type=int)


def config_of(args: argparse.Namespace) -> DecoderConfig:
    """The published size unless told otherwise."""
    config = MODELS[args.model]
    width = args.width or config.hidden_size
    heads = args.heads or max(1, width * config.num_heads // config.hidden_size)
    grouped = config.num_heads // config.num_kv_heads
    head_dim = config.head_dim if width == config.hidden_size else max(8, width // heads)
    experts = config.moe
    if experts is not None and width < config.hidden_size:
        experts = replace(experts, expert_size=64, shared_size=64)
    return replace(
        config,
        vocab_size=args.vocabulary or config.vocab_size,
        hidden_size=width,
        intermediate_size=args.inner or width * config.intermediate_size // config.hidden_size,
        num_layers=args.layers or config.num_layers,
        num_heads=heads,
        num_kv_heads=max(1, heads // grouped),
        head_dim=head_dim,
        rotary_dim=config.rotary_dim and head_dim // 2,
        moe=experts,
    )


def spec_of(config: DecoderConfig, context: int) -> ModelSpec:
    """As the engine wants it; the last two tokens are those of masks and of the end."""
    mask = config.vocab_size - 1
    return ModelSpec("random", config, mask, mask - 1, None, context, BLOCK)


@torch.no_grad()
def random_decoder(
    config: DecoderConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> Decoder:
    """Weights made where they stay."""
    with torch.device("meta"):
        decoder = Decoder(config)
    if quantization is not None:
        prepare_quantization(decoder, quantization)
    for module in decoder.modules():
        if not isinstance(module, Router | Fp8Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    decoder = decoder.to_empty(device=device)
    torch.manual_seed(0)
    for module in decoder.modules():
        if isinstance(module, Fp8Linear):
            module.fill(torch.randn(module.weight.shape, device=device, dtype=dtype) * 0.02)
        else:
            _fill(module)
    if device.type == "cuda":
        decoder.join_layers()
    return decoder.requires_grad_(False).eval()


def _fill(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            parameter.fill_(0 if name == "bias" else 1)


def cache_for(decoder: Decoder, places: int) -> KeyValueStore:
    """Random keys and values for so many tokens."""
    config = decoder.config
    shape = (config.num_layers, places + 1, config.num_kv_heads, config.head_dim)
    keys, values = (torch.empty(shape, device=decoder.device, dtype=decoder.dtype) for _ in "kv")
    return KeyValueStore(keys.normal_(), values.normal_())


def random_tokens(config: DecoderConfig, count: int) -> torch.Tensor:
    """Zeros would take a GPU less power, and so less time."""
    return torch.randint(config.vocab_size, (count,))
