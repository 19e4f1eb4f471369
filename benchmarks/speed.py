"""Speed of the engine against a reference-style loop on the same weights, in the same run.

    python -m benchmarks.speed                      the 12-layer random checkpoint, float32
    python -m benchmarks.speed --threshold 0.6      decoding by confidence, at equal forward passes
    python -m benchmarks.speed --rounds 3           the median of three runs of each

The baseline does what the published loops do: logits for the whole canvas at every step, a softmax
in float64, one token per step. Machines differ, so only the ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.serving_machine import on_a_passing_thread
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import (
    Decoder,
    DecoderConfig,
    ForwardBatch,
    ModelSpec,
    can_pack,
    pack_linear_layers,
)
from vdiff_kserve.sampler import DecodingParams

MASK, EOS = 8190, 8191
SPEC = ModelSpec(
    family="llada",
    decoder=DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=12,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_in_float32=True,
        tie_embeddings=False,
    ),
    mask_token_id=MASK,
    eos_token_id=EOS,
    eot_token_id=None,
    max_model_len=512,
    block_length=32,
)


@dataclass(frozen=True)
class Measurement:
    """One way of decoding: seconds for the whole answer and the forward passes it took."""

    name: str
    seconds: float
    nfe: int


def random_decoder(seed: int = 0) -> Decoder:
    """A decoder with random weights whose confidences spread, float32."""
    torch.manual_seed(seed)
    decoder = Decoder(SPEC.decoder)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return decoder.requires_grad_(False).eval()


def served_decoder(*, packed: bool) -> Decoder:
    """The same, its linear layers packed as the loader packs them."""
    decoder = random_decoder()
    if packed and can_pack(decoder.device, decoder.dtype):
        pack_linear_layers(decoder)
    return decoder


@torch.inference_mode()
def reference_loop(
    decoder: Decoder, prompt: list[int], length: int, block: int, threshold: float | None
) -> tuple[list[int], int]:
    """LLaDA's published loop, without a cache; returns the answer and its forward passes."""
    canvas = torch.tensor([prompt + [MASK] * length])
    nfe = 0
    for start in range(len(prompt), len(prompt) + length, block):
        while (canvas[0, start : start + block] == MASK).any():
            logits = decoder.logits(decoder(ForwardBatch.dense(canvas)))[None]
            nfe += 1
            probabilities = logits.to(torch.float64).softmax(dim=-1)
            logits[..., MASK] = -torch.inf
            token = logits.argmax(dim=-1)
            confidence = probabilities.gather(-1, token[..., None]).squeeze(-1)
            confidence[canvas != MASK] = -torch.inf
            confidence[:, start + block :] = -torch.inf
            if threshold is None:
                chosen = confidence[0].topk(1).indices
            else:
                sure = (confidence[0] >= threshold).nonzero().squeeze(-1)
                chosen = torch.cat([confidence[0].topk(1).indices, sure])
            canvas[0, chosen] = token[0, chosen]
    return canvas[0, len(prompt) :].tolist(), nfe


def measure(name: str, rounds: int, run: Callable[[], int]) -> Measurement:
    """Median seconds of `rounds` runs; `run` returns the forward passes."""
    seconds, nfe = [], 0
    for _ in range(rounds):
        began = time.perf_counter()
        nfe = run()
        seconds.append(time.perf_counter() - began)
    return Measurement(name, statistics.median(seconds), nfe)


def compare(args: argparse.Namespace) -> list[Measurement]:
    """The baseline first, then the engine with each cache; each has the OpenMP threads alone."""
    decoder = on_a_passing_thread(random_decoder)
    served = on_a_passing_thread(lambda: served_decoder(packed=not args.plain_linear))
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, MASK, (args.prompt,), generator=generator).tolist()
    policy = "low_confidence" if args.threshold is None else "threshold"
    engine = Engine(served, SPEC, EngineConfig(max_num_seqs=1))
    engine.start()

    def with_engine(cache: str, length: int) -> int:
        decoding = DecodingParams(
            policy=policy, threshold=args.threshold or 0.9, block_length=args.block, cache=cache
        )
        (result,) = engine.generate([GenerationRequest(tuple(prompt), length, decoding)])
        return result.stats.nfe

    def baseline(length: int) -> int:
        return on_a_passing_thread(
            lambda: reference_loop(decoder, prompt, length, args.block, args.threshold)[1]
        )

    baseline(args.block)
    runs: list[tuple[str, Callable[[], int]]] = [
        ("reference-style loop", lambda: baseline(args.new))
    ]
    for cache in ("none", "prefix", "dual"):
        with_engine(cache, args.block)
        runs.append((f"engine, cache {cache}", lambda cache=cache: with_engine(cache, args.new)))
    measured = [
        measure(name, args.rounds, run) for name, run in tqdm(runs, desc="Measuring", unit="run")
    ]
    engine.stop()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--block", type=int, default=32, help="block length")
    parser.add_argument("--threshold", type=float, help="decode by confidence")
    parser.add_argument(
        "--plain_linear", action="store_true", help="without the packed CPU layers of the loader"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    measured = compare(args)
    base = measured[0]
    print(f"\n{'':<22} {'seconds':>8} {'NFE':>5} {'ms/token':>9} {'ms/pass':>8} {'speed-up':>9}")
    for m in measured:
        per_token = m.seconds / args.new * 1000
        print(
            f"{m.name:<22} {m.seconds:8.2f} {m.nfe:5d} {per_token:9.1f} "
            f"{m.seconds / m.nfe * 1000:8.1f} {base.seconds / m.seconds:8.2f}x"
        )
    if args.json:
        rows = [{**vars(m), "speed_up": base.seconds / m.seconds} for m in measured]
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
