"""How fast a checkpoint is loaded: `python -m benchmarks.loading`.

Writes a random checkpoint in LLaDA's format, in shards, and loads it from the warm page cache, in
turns with reading the same bytes and doing nothing with them. Prints both rates, the best of some.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tests.models.folders import CONFIG, tensors_of, write_shards
from vdiff_kserve.models import choose_device, choose_dtype, load_decoder

BYTES_PER_LAYER = 12 * 2048 * 2048 * 2
CHUNK_BYTES = 1 << 24


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="in bfloat16, about")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def write_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """Returns the bytes of its files."""
    layers = max(1, round(gigabytes * 1e9 / BYTES_PER_LAYER))
    config = CONFIG | {
        "d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "n_layers": layers,
        "mlp_hidden_size": 5504, "embedding_size": 8192, "vocab_size": 8192,
    }  # fmt: skip
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(config).items()}
    write_shards(folder, config, tensors, shards)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_all(folder: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def main() -> None:
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder, arguments.gigabytes, arguments.shards)
        read = load = float("inf")
        for _ in range(arguments.repeat + 1):
            started = time.perf_counter()
            read_all(folder)
            read = min(read, time.perf_counter() - started)
            started = time.perf_counter()
            load_decoder(folder, device, dtype)
            load = min(load, time.perf_counter() - started)
    rates = f"read alone {size / read / 1e9:.2f} GB/s, loaded {size / load / 1e9:.2f} GB/s"
    where = f"{torch.get_num_threads()} threads, {device}, {arguments.dtype}"
    print(f"{size / 1e9:.2f} GB, {where}: {rates} ({load:.2f} s)")


if __name__ == "__main__":
    main()
