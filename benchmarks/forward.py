"""One forward pass against others on the same weights, in the same run.

    python -m benchmarks.forward                    every dense family, and layers with experts
    python -m benchmarks.forward --tokens 1024      longer canvases

Dense families: 12 layers of width 512, logits of all positions, against transformers' own
implementation with the family's mask. Layers with experts: against the loop over all experts that
published implementations have. Machines differ, so only the ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vdiff_kserve.models import Decoder, ForwardBatch, can_pack, load_decoder
from vdiff_kserve.models.moe import MoEConfig, SparseMLP
from vdiff_kserve.models.registry import FAMILIES

SIZES: dict[str, Any] = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=4096,
    eos_token_id=8191,
    rope_theta=1e4,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERTS = MoEConfig(num_experts=64, experts_per_token=8, expert_size=256)
TOKENS_OF_EXPERTS = 256


@dataclass(frozen=True)
class Stock:
    """A family's equal in transformers.

    Attributes:
        block: how far a token sees beyond itself; None is everything.
    """

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    block: int | None
    kv_heads: int = 8


STOCK: Mapping[str, Stock] = {
    "LLaDAModelLM": Stock(LlamaForCausalLM, LlamaConfig, None),
    "DreamModel": Stock(Qwen2ForCausalLM, Qwen2Config, None, kv_heads=2),
    "SDARForCausalLM": Stock(Qwen3ForCausalLM, Qwen3Config, 4, kv_heads=4),
    "Fast_dLLM_QwenForCausalLM": Stock(Qwen2ForCausalLM, Qwen2Config, 32, kv_heads=2),
}
"""`architectures` -> what transformers has of the same arithmetic."""


def fastest(rounds: int, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The least time of each way, in seconds; they take turns, so that load meets all of them."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def make_pair(
    architecture: str, dtype: torch.dtype, folder: Path
) -> tuple[PreTrainedModel, Decoder]:
    """A random model of transformers, and its weights as a checkpoint of the family, loaded."""
    stock = STOCK[architecture]
    torch.manual_seed(0)
    config = stock.config(**SIZES, num_key_value_heads=stock.kv_heads)
    model = stock.model(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    fields = {**config.to_dict(), "mask_token_id": 8190, "rope_theta": SIZES["rope_theta"]}
    fields.pop("rope_parameters", None)
    if architecture == "LLaDAModelLM":
        fields = _as_llada(folder)
    fields["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    decoder, _ = load_decoder(folder, dtype=dtype)
    return model.to(dtype), decoder


def _as_llada(folder: Path) -> dict[str, Any]:
    """Give the tensors in `folder` LLaDA's names; the fields of its `config.json`."""
    llama, llada = (FAMILIES[name].tensor_names for name in ("DreamModel", "LLaDAModelLM"))
    names = {
        published.format(layer): llada.published_name(parameter.format(layer))
        for layer in range(SIZES["num_hidden_layers"])
        for published, parameter in llama.by_published.items()
        if parameter in llada.by_published.values()
    }
    file = folder / "model.safetensors"
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file)
    return {
        "d_model": SIZES["hidden_size"],
        "mlp_hidden_size": SIZES["intermediate_size"],
        "n_layers": SIZES["num_hidden_layers"],
        "n_heads": SIZES["num_attention_heads"],
        "vocab_size": SIZES["vocab_size"],
        "max_sequence_length": SIZES["max_position_embeddings"],
        "eos_token_id": SIZES["eos_token_id"],
        "mask_token_id": 8190,
        "rms_norm_eps": 1e-6,
        "rope_theta": SIZES["rope_theta"],
        "rope_full_precision": True,
        "weight_tying": False,
    }


@torch.inference_mode()
def time_family(
    architecture: str, dtype: torch.dtype, tokens: int, rounds: int
) -> tuple[float, float]:
    """Seconds of our pass over a canvas, and of transformers'.

    Raises:
        RuntimeError: they do not compute the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, decoder = make_pair(architecture, dtype, Path(folder))
    ids = torch.randint(8000, (1, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype)
    if (block := STOCK[architecture].block) is not None:
        blocks = torch.arange(tokens) // block
        mask.masked_fill_(blocks[:, None] < blocks, torch.finfo(dtype).min)

    def ours() -> Tensor:
        return decoder.logits(decoder(ForwardBatch.dense(ids)))

    def theirs() -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).logits[0]

    difference = (ours() - theirs()).abs().max() / theirs().abs().max()
    if difference > (1e-4 if dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"{architecture}: the logits differ by {difference:.2g} of the largest")
    seconds = fastest(rounds, {"ours": ours, "theirs": theirs})
    return seconds["ours"], seconds["theirs"]


class ExpertLoop:
    """A layer with experts as published implementations compute it: all experts in a loop."""

    def __init__(self, layer: SparseMLP) -> None:
        gates, ups = layer.experts.gate_up_proj.chunk(2, dim=1)
        downs = layer.experts.down_proj
        self._router = layer.router
        self._experts = [
            (gate.contiguous(), up.contiguous(), down)
            for gate, up, down in zip(gates, ups, downs, strict=True)
        ]

    def own_tokens(self, x: Tensor) -> Tensor:
        """Every expert looks for its tokens and computes those."""
        experts, weights = self._router(x)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self._experts):
            tokens, place = torch.where(experts == number)
            share = weights[tokens, place, None].to(x.dtype)
            total.index_add_(0, tokens, _mlp(x[tokens], *expert) * share)
        return total

    def all_tokens(self, x: Tensor) -> Tensor:
        """Every expert computes all tokens."""
        experts, weights = self._router(x)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self._experts):
            share = (weights * (experts == number)).sum(dim=-1, keepdim=True).to(x.dtype)
            total += _mlp(x, *expert) * share
        return total


def _mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@torch.inference_mode()
def time_experts(config: MoEConfig, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of a layer for 256 tokens: ours, and the loops'."""
    generator = torch.Generator().manual_seed(0)
    width = SIZES["hidden_size"]
    layer = SparseMLP(width, config)
    for parameter in layer.parameters():
        value = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data = value if parameter is layer.router.weight else value.to(dtype)
    loop = ExpertLoop(layer)
    x = torch.randn((TOKENS_OF_EXPERTS, width), generator=generator).to(dtype)
    expected = loop.own_tokens(x)
    if can_pack(x.device, dtype):
        layer.experts.pack()
    torch.testing.assert_close(layer(x), expected, atol=5e-2, rtol=5e-2)
    return fastest(
        rounds,
        {
            "ours": lambda: layer(x),
            "own": lambda: loop.own_tokens(x),
            "all": lambda: loop.all_tokens(x),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the canvas (256)")
    parser.add_argument("--rounds", type=int, default=20, help="the best of so many passes (20)")
    arguments = parser.parse_args()
    families = [(name, dtype) for name in STOCK for dtype in DTYPES]
    layers = [(count, dtype) for count in (16, 64, 256) for dtype in DTYPES]
    with tqdm(total=len(families) + len(layers)) as progress:
        print(f"\n{arguments.tokens} tokens | ours ms | transformers ms | ratio")
        for name, dtype in families:
            ours, theirs = time_family(name, DTYPES[dtype], arguments.tokens, arguments.rounds)
            line = f"{name} {dtype} | {ours * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / ours:.2f}"
            tqdm.write(line)
            progress.update()
        tqdm.write(
            f"{TOKENS_OF_EXPERTS} tokens, {EXPERTS.experts_per_token} experts each | ours ms"
            " | loop, own tokens ms | ratio | loop, all tokens ms | ratio"
        )
        for count, dtype in layers:
            config = replace(EXPERTS, num_experts=count)
            seconds = time_experts(config, DTYPES[dtype], arguments.rounds)
            ours, own, every = (seconds[way] for way in ("ours", "own", "all"))
            tqdm.write(
                f"{count} experts {dtype} | {ours * 1e3:.1f} | {own * 1e3:.1f} | {own / ours:.2f}"
                f" | {every * 1e3:.1f} | {every / ours:.2f}"
            )
            progress.update()


if __name__ == "__main__":
    main()
