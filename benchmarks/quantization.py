"""Weights in fewer bits on the embedded model: `python -m benchmarks.quantization`.

Runs the held-out suite of `benchmarks.quality` once for every kind that `--quantization` knows, and
without. Prints a Markdown table and, last, one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality import EMBEDDED, loaded, run_suite, total
from hack.embedded.corpus import held_out_suite
from vdiff_kserve.models import QUANTIZATIONS, choose_device, choose_dtype, load_decoder
from vdiff_kserve.models.fp8 import Fp8Linear
from vdiff_kserve.sampler.params import DecodingParams


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=EMBEDDED)
    parser.add_argument("--n", type=int, default=240, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.98)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=32, help="prompts in one forward pass")
    return parser.parse_args()


def bytes_of(layer: nn.Linear | Fp8Linear) -> int:
    """What a weight takes, in however many tensors it is kept."""
    if isinstance(layer, Fp8Linear):
        return layer.weight.nbytes + layer.scales.nbytes
    weight = layer.weight
    names = getattr(weight, "tensor_data_names", None)
    parts = [weight] if names is None else [getattr(weight, name) for name in names]
    optional = getattr(weight, "optional_tensor_data_names", None) or ()
    parts += [part for name in optional if isinstance(part := getattr(weight, name), Tensor)]
    return sum(part.nbytes for part in parts)


def weight_bytes(arguments: argparse.Namespace) -> int:
    """What the linear layers of the blocks take; packed ones hide it, so it is counted plain."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    decoder, _ = load_decoder(
        arguments.model_dir, device, dtype, quantization=arguments.quantization
    )
    if arguments.quantization is None:
        shapes = load_decoder(arguments.model_dir, "cpu", torch.float16)[0].layers
        linear = [layer for layer in shapes.modules() if isinstance(layer, nn.Linear)]
        return sum(layer.weight.numel() for layer in linear) * dtype.itemsize
    kinds = nn.Linear | Fp8Linear
    linear = [layer for layer in decoder.layers.modules() if isinstance(layer, kinds)]
    return sum(map(bytes_of, linear))


def main() -> None:
    arguments = parse_arguments()
    suite = held_out_suite(arguments.n, arguments.seed)
    decoding = DecodingParams(policy="threshold", threshold=arguments.threshold, block_length=32)
    report = {}
    for kind in (None, *QUANTIZATIONS):
        arguments.quantization = kind
        name = kind or "none"
        with loaded(arguments) as model:
            # The first passes are slow.
            run_suite(model, suite[:1], decoding, arguments.max_tokens, f"{name}, first")
            started = time.monotonic()
            scores = run_suite(model, suite, decoding, arguments.max_tokens, name)
            seconds = time.monotonic() - started
        score = total(scores)
        report[name] = {
            "exact_match": score.right / score.prompts,
            "tokens_per_s": sum(each.tokens for each in scores.values()) / seconds,
            "weight_bytes": weight_bytes(arguments),
        }
    print("| weights | exact match | tokens/s | bytes of the blocks' weights |\n|---|---|---|---|")
    for name, row in report.items():
        print(
            f"| {name} | {row['exact_match']:.1%} | {row['tokens_per_s']:.0f} "
            f"| {row['weight_bytes'] / 1e6:.2f} MB |"
        )
    print(json.dumps({"n": arguments.n, "threads": torch.get_num_threads(), "rows": report}))


if __name__ == "__main__":
    main()
