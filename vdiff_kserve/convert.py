"""`python -m vdiff_kserve.convert`: a training run's checkpoint as a folder that can be served.

    python -m vdiff_kserve.convert --dcp_path DIR --base_model DIR_OR_ID --output DIR
    python -m vdiff_kserve.convert --pickle_path DIR --output DIR

Reads a PyTorch Distributed Checkpoint as NeMo-RL writes it, with or without the optimizer's state.
The base model says which tensors there are, and gives configuration and tokenizer. The second form
is for a folder whose weights are Python pickles (`.bin`, `.pt`). One tensor at a time is in memory.
A run that was stopped goes on with the file where it stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vdiff_kserve import hub
from vdiff_kserve.converted_folder import (
    Layout,
    Source,
    bytes_of,
    checksums,
    copy_description,
    sha256,
    split,
    verify,
    write_index,
    write_shard,
    write_text,
)
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.distributed_checkpoint import (
    METADATA_FILE,
    DistributedCheckpoint,
    read_metadata,
)
from vdiff_kserve.models.loader import INDEX_FILE, list_tensors
from vdiff_kserve.models.pickled_weights import PickledWeights, pickle_files
from vdiff_kserve.models.precision import DTYPES
from vdiff_kserve.models.safetensors_file import DTYPES as STORED_DTYPES
from vdiff_kserve.setting import parse_size, with_underscores

RECORD_FILE = "conversion.json"
CHECKSUM_FILE = "SHA256SUMS"
LOCK_FILE = ".conversion.lock"
SHARD_SIZE = "4GB"
TIED_HEADS = ("lm_head.weight", "model.transformer.ff_out.weight")
"""Weights that a model with tied embeddings may store or leave out."""


@dataclass(frozen=True)
class Conversion:
    """What is to be converted, and how.

    Attributes:
        source: the DCP directory, or the folder with pickles.
        base_model: folder or hub id of the model that was trained; None stands for a folder with
            pickles that is whole by itself.
        dtype: of the weights: `base` is the base model's own, `keep` what the directory holds,
            else a name such as bfloat16.
        prefix: of the weights' names in the directory; None finds it.
        shard_bytes: most bytes of tensors in one file, unless one tensor alone has more.
    """

    source: Path
    base_model: str | None
    revision: str | None = None
    dtype: str = "base"
    prefix: str | None = None
    shard_bytes: int = 4 * 10**9

    @property
    def fingerprint(self) -> str:
        """Changes when the source or what is made of it does.

        Raises:
            CheckpointError: `source` is no DCP directory.
        """
        if self.base_model is None:
            files = pickle_files(self.source)
        else:
            read_metadata(self.source / METADATA_FILE)
            files = [self.source / METADATA_FILE, *sorted(self.source.glob("*.distcp"))]
        facts = [
            str(self.source.resolve()),
            [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            self.base_model,
            self.revision,
            self.dtype,
            self.prefix,
            self.shard_bytes,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def convert(conversion: Conversion, output: Path) -> None:
    """Fill `output`, or the rest of it when an earlier run was stopped.

    The index is written last: a folder that has it is complete.

    Raises:
        CheckpointError: the two checkpoints do not fit, something is damaged, or `output` holds
            something else.
    """
    source = _open(conversion)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if is_complete(conversion, output):
            return
        done = _resume(conversion, output)
        base = _base_folder(conversion)
        wanted = _base_tensors(conversion, base, source)
        optional = _optional(base)
        prefix = _find_prefix(conversion, source, wanted.keys() - optional)
        layout = _layout(conversion, source, prefix, wanted, optional)
        shards = split(layout, conversion.shard_bytes)
        total = sum(bytes_of(layout, name) for name in layout)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"Converting to {output.name}")
        with bar as progress:
            for file, names in shards.items():
                if file in done:
                    progress.update(sum(bytes_of(layout, name) for name in names))
                    continue
                part = {name: layout[name] for name in names}
                done[file] = write_shard(output / file, part, source, prefix, progress)
                write_text(output / CHECKSUM_FILE, checksums(done))
        copy_description(base, output)
        verify(output, layout, shards)
        write_index(output, layout, shards)


def _open(conversion: Conversion) -> Source:
    if conversion.base_model is None:
        return PickledWeights(conversion.source)
    return DistributedCheckpoint(conversion.source)


def is_complete(conversion: Conversion, output: Path) -> bool:
    """Whether `output` already holds what `conversion` makes."""
    return _recorded(output) == conversion.fingerprint and (output / INDEX_FILE).is_file()


def verify_checksums(output: Path) -> list[str]:
    """Names of the folder's weight files that differ from their checksums."""
    lines = (output / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    return [name for digest, name in pairs if sha256(output / name) != digest]


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Servers that share a cache convert once; the others wait."""
    with (output / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recorded(output: Path) -> str | None:
    try:
        return json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{output / RECORD_FILE} is damaged; remove {output}") from error


def _resume(conversion: Conversion, output: Path) -> dict[str, str]:
    """Checksums of the files that an earlier run finished; others are not touched."""
    recorded = _recorded(output)
    if recorded is None:
        if any(path.name != LOCK_FILE for path in output.iterdir()):
            raise CheckpointError(f"{output} is not empty; name a new or an empty folder")
        record = {
            "fingerprint": conversion.fingerprint,
            "source": str(conversion.source),
            "base_model": conversion.base_model,
            "revision": conversion.revision,
            "dtype": conversion.dtype,
        }
        write_text(output / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        return {}
    if recorded != conversion.fingerprint:
        raise CheckpointError(
            f"{output} holds the conversion of another checkpoint, base model or dtype; "
            "name another folder or remove it"
        )
    if not (output / CHECKSUM_FILE).is_file():
        return {}
    lines = (output / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
    known = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    return {name: d for name, d in known.items() if sha256(output / name) == d}


def _base_folder(conversion: Conversion) -> Path:
    if conversion.base_model is None:
        return conversion.source
    if Path(conversion.base_model).is_dir():
        return Path(conversion.base_model)
    return hub.download(conversion.base_model, conversion.revision, weights=False)


def _base_tensors(conversion: Conversion, folder: Path, source: Source) -> Layout:
    """What the base model holds; of one on the hub only the files' headers are read."""
    if conversion.base_model is None:
        return dict(source.tensors)
    if Path(conversion.base_model).is_dir() or next(folder.glob("*.safetensors"), None):
        return {name: (t.dtype, t.shape) for name, t in list_tensors(folder).items()}
    stored = hub.stored_shapes(conversion.base_model, conversion.revision)
    return {name: (STORED_DTYPES[dtype], shape) for name, (dtype, shape) in stored.items()}


def _optional(base: Path) -> set[str]:
    """Tensors of the base model that the checkpoint may lack."""
    config = CheckpointConfig.read(base)
    tied = config.get("tie_word_embeddings") or config.get("weight_tying")
    return set(TIED_HEADS) if tied else set()


def _find_prefix(conversion: Conversion, source: Source, wanted: set[str]) -> str:
    """What stands before the base model's names: nothing, `model.`, `model.model.` ..."""
    if conversion.prefix is not None or conversion.base_model is None:
        return conversion.prefix or ""
    probe = min(wanted)
    prefixes = [
        name.removesuffix(probe)
        for name in source.tensors
        if name == probe or name.endswith(f".{probe}")
    ]
    whole = [p for p in prefixes if all(p + name in source.tensors for name in wanted)]
    if len(whole) > 1:
        found = ", ".join(repr(p) for p in sorted(whole))
        raise CheckpointError(
            f"{conversion.source} holds the model under several prefixes, {found}: name one by "
            "--prefix"
        )
    if not whole and not prefixes:
        some = ", ".join(sorted(source.tensors)[:3])
        raise CheckpointError(
            f"{conversion.source} does not hold {probe} of {conversion.base_model} under any "
            f"prefix; it has {some}, ..."
        )
    return whole[0] if whole else min(prefixes, key=len)


def _layout(
    conversion: Conversion,
    source: Source,
    prefix: str,
    base: Layout,
    optional: set[str],
) -> Layout:
    """What will be written, in order; every tensor of the base model must be there and fit.

    Raises:
        CheckpointError: some are missing or of another shape; the message names them.
    """
    layout: Layout = {}
    problems = []
    for name, (base_dtype, base_shape) in base.items():
        entry = source.tensors.get(prefix + name)
        if entry is None:
            if name not in optional:
                problems.append(f"{prefix + name} is missing")
            continue
        dtype, shape = entry
        if shape != base_shape:
            problems.append(f"{prefix + name} is {list(shape)}, the base's {list(base_shape)}")
        if conversion.dtype != "keep":
            dtype = base_dtype if conversion.dtype == "base" else DTYPES[conversion.dtype]
        layout[name] = dtype, shape
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{conversion.source} does not fit {conversion.base_model}: "
            + "; ".join(problems[:8])
            + more
        )
    return layout


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vdiff_kserve.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dcp_path", type=Path, help="the DCP directory")
    source.add_argument("--pickle_path", type=Path, help="folder with weights as pickles")
    parser.add_argument("--base_model", help="with --dcp_path: folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a base model on the hub")
    parser.add_argument("--output", required=True, type=Path, help="folder to fill")
    parser.add_argument(
        "--dtype",
        default="base",
        choices=("base", "keep", *DTYPES),
        help="number type of the weights: the base model's, the checkpoint's own, or this "
        "(%(default)s)",
    )
    parser.add_argument("--prefix", help="of the weights' names in the checkpoint (found)")
    parser.add_argument(
        "--shard_size", default=SHARD_SIZE, help="most bytes in one file (%(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="compare the checksums at the end")
    arguments = parser.parse_args(with_underscores(argv))
    if (arguments.dcp_path is None) != (arguments.base_model is None):
        parser.error("--dcp_path and --base_model need each other")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Convert and say where it is. Returns the process's exit code."""
    arguments = parse_arguments(argv)
    try:
        conversion = Conversion(
            arguments.dcp_path or arguments.pickle_path,
            arguments.base_model,
            arguments.revision,
            arguments.dtype,
            arguments.prefix,
            parse_size(arguments.shard_size),
        )
        convert(conversion, arguments.output)
        if arguments.verify and (damaged := verify_checksums(arguments.output)):
            raise CheckpointError(f"differ from their checksums: {', '.join(damaged)}")
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.output} can be served: --model_dir {arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
