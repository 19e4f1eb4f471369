"""`python -m vdiff_kserve.sizing`: what a checkpoint needs of a GPU's memory, before one is there.

Reads `config.json` alone, so the weights need not be downloaded. The rule is the engine's own:

    cache = utilization x memory - context - weights - scratch
    requests that fit = cache / (bytes per token x tokens of a request)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vdiff_kserve.engine import bytes_per_token, scratch_bytes, without_scratch
from vdiff_kserve.models import CheckpointError, Decoder, DecoderConfig
from vdiff_kserve.models.causal import is_causal, native_layout
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.matching import NoInitialValues
from vdiff_kserve.models.moe import Router
from vdiff_kserve.models.registry import CAUSAL_FORMATS, FAMILIES, find_by_architecture
from vdiff_kserve.setting import parse_size, with_underscores

CONTEXT_BYTES = 600 << 20
"""What CUDA itself and the libraries' code take of a GPU; 400 to 700 MiB, by GPU and driver."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sizing:
    """What a server needs, in bytes, and what then fits.

    Attributes:
        weights: of the model, and of the auxiliary model if there is one.
        per_token: keys and values of one token in all layers of all models.
        request_tokens: tokens of a request, prompt and answer together.
        scratch: activations of a pass over a whole request, and logits.
        memory: of the GPU.
        utilization: share of it that the server may use.
    """

    weights: int
    per_token: int
    request_tokens: int
    scratch: int
    memory: int
    utilization: float

    @property
    def cache(self) -> int:
        """What is left for keys and values; negative when the model does not fit."""
        allowed = int(self.memory * self.utilization)
        return without_scratch(allowed - CONTEXT_BYTES - self.weights, self.scratch)

    @property
    def per_request(self) -> int:
        """Keys and values of one request."""
        return self.per_token * self.request_tokens

    @property
    def requests(self) -> int:
        """Requests whose keys and values fit at the same time."""
        return max(0, self.cache) // self.per_request

    @property
    def least_memory(self) -> int:
        """The smallest GPU that serves one request."""
        needed = CONTEXT_BYTES + self.weights + self.scratch + self.per_request
        return round(needed / self.utilization)

    def lines(self) -> list[str]:
        """The result for people."""
        rows = [
            ("weights", _text(self.weights)),
            ("CUDA and libraries", _text(CONTEXT_BYTES)),
            ("scratch (activations, logits)", _text(self.scratch)),
            ("left for keys and values", _text(max(0, self.cache))),
            ("keys and values of a token", _text(self.per_token)),
            (f"of a request of {self.request_tokens} tokens", _text(self.per_request)),
            ("requests that fit with a cache", str(self.requests)),
            ("least GPU memory for one", _text(self.least_memory)),
        ]
        return [f"{name:<36}{value:>12}" for name, value in rows]


def size(
    model_dir: Path,
    memory: int,
    *,
    auxiliary_dir: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    request_tokens: int | None = None,
    utilization: float = 0.9,
) -> Sizing:
    """What the checkpoint in `model_dir` needs.

    Args:
        memory: of the GPU, in bytes.
        auxiliary_dir: the model that checks drafts (`--apd_model`).
        request_tokens: prompt and answer together; None is the model's whole context.

    Raises:
        CheckpointError: a `config.json` that is missing, or of no family that is served.
    """
    weights, decoder, longest = _measure(model_dir, dtype)
    per_token = bytes_per_token(decoder, dtype)
    if auxiliary_dir is not None:
        causal = CheckpointConfig.read(auxiliary_dir)
        auxiliary = find_by_architecture(causal, CAUSAL_FORMATS).read_decoder(causal)
        weights += weight_bytes(auxiliary, dtype)
        per_token += bytes_per_token(auxiliary, dtype)
    tokens = request_tokens or longest
    scratch = scratch_bytes(decoder, dtype, tokens)
    return Sizing(weights, per_token, tokens, scratch, memory, utilization)


def _measure(model_dir: Path, dtype: torch.dtype) -> tuple[int, DecoderConfig, int]:
    """Bytes of a model's weights, its sizes, and its context length."""
    config = CheckpointConfig.read(model_dir)
    if (causal := native_layout(config)) is not None:
        longest = config.context("max_position_embeddings")
        return weight_bytes(causal, dtype), causal, longest
    if is_causal(model_dir):
        from vdiff_kserve.models.transformers_model import outline  # seconds

        parameters, decoder, longest = outline(model_dir)
        return parameters * dtype.itemsize, decoder, longest
    spec = find_by_architecture(config, FAMILIES).read_spec(config)
    return weight_bytes(spec.decoder, dtype), spec.decoder, spec.max_model_len


def weight_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Memory of a decoder's parameters; tied ones count once.

    Layers differ by having an MLP or experts only, so one of each is looked at.
    """
    dense = config.num_layers
    if config.moe is not None:
        dense = sum(layer < config.num_layers for layer in config.dense_layers)
    with torch.device("meta"), NoInitialValues():
        decoder = Decoder(replace(config, num_layers=2, dense_layers=frozenset({0})))
    with_mlp, with_experts = (_bytes(layer, dtype) for layer in decoder.layers)
    around = _bytes(decoder, dtype) - with_mlp - with_experts
    return around + dense * with_mlp + (config.num_layers - dense) * with_experts


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Memory of a module's parameters; routers are kept in float32."""
    sizes: dict[nn.Parameter, int] = {}
    for part in module.modules():
        own = torch.float32 if isinstance(part, Router) else dtype
        sizes |= {each: each.numel() * own.itemsize for each in part.parameters(recurse=False)}
    return sum(sizes.values())


def _text(count: int) -> str:
    for unit, size_of_unit in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size_of_unit:
            return f"{count / size_of_unit:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the sizing of a checkpoint. Returns the process's exit code: 1 when nothing fits."""
    parser = argparse.ArgumentParser(
        prog="python -m vdiff_kserve.sizing",
        description="What a checkpoint needs of a GPU's memory.",
    )
    parser.add_argument("--model_dir", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--gpu_memory", type=_size, required=True, help="such as 80GiB")
    parser.add_argument("--apd_model", type=Path, help="folder of the auxiliary model")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max_model_len", type=int, help="tokens of a request (the model's own)")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9)
    arguments = parser.parse_args(with_underscores(argv))
    for name in ("model_dir", "apd_model"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.expanduser().is_dir():
            parser.error(f"--{name} must be a folder that exists, got {str(folder)!r}")
    try:
        sizing = size(
            arguments.model_dir.expanduser(),
            arguments.gpu_memory,
            auxiliary_dir=arguments.apd_model and arguments.apd_model.expanduser(),
            dtype=DTYPES[arguments.dtype],
            request_tokens=arguments.max_model_len,
            utilization=arguments.gpu_memory_utilization,
        )
    except CheckpointError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("\n".join(sizing.lines()) + "\n")
    return 0 if sizing.requests else 1


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
