"""Causal models in the engine against transformers' `generate`, on the same weights.

    python -m benchmarks.autoregressive             8 layers of width 512, float32 and bfloat16

Prompts of one length, so that `generate` needs no padding, answered greedily: one at a time and
several together. Native is a Qwen2 checkpoint, which the decoder reads; Mistral runs on
transformers' layers over the engine's rows and cache. Machines differ, so only the ratios mean
something.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.serving_machine import on_a_passing_thread
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import load_causal_model
from vdiff_kserve.sampler import DecodingParams

SIZES: dict[str, Any] = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS = {"qwen2": "native", "mistral": "transformers' layers"}
TRIES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_checkpoint(kind: str, folder: Path) -> None:
    """A random checkpoint of `kind`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(folder)


def seconds_of_generate(model: PreTrainedModel, prompts: Tensor, tokens: int) -> float:
    """Time of transformers' `generate` for all prompts together, its answers of full length."""
    started = time.perf_counter()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return time.perf_counter() - started


def seconds_of_engine(engine: Engine, prompts: Tensor, tokens: int) -> float:
    """Time of the engine for the same."""
    decoding = DecodingParams(**engine.spec.profiles["quality"])
    requests = [GenerationRequest(tuple(row), tokens, decoding) for row in prompts.tolist()]
    started = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - started


def compare(folder: Path, dtype: torch.dtype, rows: list[int], length: int, tokens: int) -> None:
    """Print a line for each number of rows."""
    reference = on_a_passing_thread(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    )
    model, spec = on_a_passing_thread(lambda: load_causal_model(folder, dtype=dtype))
    config = EngineConfig(max_num_seqs=max(rows), enable_prefix_caching=False)
    engine = Engine(model, spec, config)
    engine.start()
    for count in rows:
        prompts = torch.randint(3, SIZES["vocab_size"], (count, length))
        theirs = on_a_passing_thread(
            lambda prompts=prompts: min(
                seconds_of_generate(reference, prompts, tokens) for _ in range(TRIES)
            )
        )
        ours = min(seconds_of_engine(engine, prompts, tokens) for _ in range(TRIES))
        rates = [f"{count * tokens / seconds:10.1f}" for seconds in (theirs, ours)]
        kind, name = KINDS[spec.family], str(dtype).removeprefix("torch.")
        print(f"{kind:22}{name:10}{count:5}{rates[0]}{rates[1]}{theirs / ours:8.2f}")
    engine.stop()


def main() -> None:
    """Compare every kind in every number type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    print(f"{'':32}{'rows':>5}{'generate':>10}{'engine':>10}{'ratio':>8}   tokens/s")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            on_a_passing_thread(partial(write_checkpoint, kind, Path(folder)))
            for name in args.dtype:
                compare(Path(folder), DTYPES[name], args.rows, args.prompt_tokens, args.tokens)


if __name__ == "__main__":
    main()
