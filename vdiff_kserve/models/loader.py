"""From a checkpoint folder to a decoder on its device.

Weights are read from safetensors only, tensor by tensor, straight to the target device and dtype;
nothing from a checkpoint is ever executed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.decoder import Decoder, DecoderConfig
from vdiff_kserve.models.packed_linear import can_pack, pack_linear_layer, pack_linear_layers
from vdiff_kserve.models.registry import (
    CAUSAL_FORMATS,
    FAMILIES,
    TensorNames,
    find_by_architecture,
)
from vdiff_kserve.models.safetensors_file import (
    StoredTensor,
    TensorReader,
    read_header,
    returnable,
)
from vdiff_kserve.models.sharding import shard
from vdiff_kserve.models.spec import ModelSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_NAMES_IN_ERROR = 8


def load_decoder(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
) -> tuple[Decoder, ModelSpec]:
    """Read a diffusion model's checkpoint folder in its published format.

    Args:
        mesh: ranks that share the model, of which this one reads its part only; None reads all.

    Returns:
        the decoder in eval mode without gradients, and what is known about the model.

    Raises:
        CheckpointError: anything wrong with the folder, in one message.
    """
    config = CheckpointConfig.read(Path(folder))
    family = find_by_architecture(config, FAMILIES)
    spec = family.read_spec(config)
    return _load(Path(folder), spec.decoder, family.tensor_names, device, dtype, mesh), spec


def load_causal_decoder(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Read a causal language model (the auxiliary model of APD), as `load_decoder` does.

    Raises:
        CheckpointError: anything wrong with the folder, in one message.
    """
    config = CheckpointConfig.read(Path(folder))
    causal_format = find_by_architecture(config, CAUSAL_FORMATS)
    decoder_config = causal_format.read_decoder(config)
    return _load(Path(folder), decoder_config, causal_format.tensor_names, device, dtype)


def _load(
    folder: Path,
    config: DecoderConfig,
    tensor_names: TensorNames,
    device: torch.device | str,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
) -> Decoder:
    """Build a decoder without memory and fill it tensor by tensor, with a progress bar in bytes.

    Host memory stays at the model (when `device` is the CPU) plus its largest linear layer: plain
    weights are read into the same memory one after the other, and packed from there.
    """
    with init_empty_weights(include_buffers=False):
        decoder = Decoder(config)
    stored = list_tensors(folder)
    assign = _match(decoder, tensor_names, stored, folder)
    parts = {} if mesh is None else shard(decoder, mesh)
    packed = _packed_weights(decoder) if can_pack(torch.device(device), dtype) else set()
    largest = max((decoder.get_parameter(name).numel() for name in packed), default=0)
    plain = returnable(largest, dtype)
    total = sum(decoder.get_parameter(name).numel() for name in assign.values()) * dtype.itemsize
    quiet = mesh is not None and mesh.get_local_rank() > 0
    name = f"Loading {folder.name}"
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=quiet)
    with bar as progress, TensorReader.open() as reader:
        for tensor_name in _reading_order(stored, assign, packed):
            parameter, tensor = assign[tensor_name], stored[tensor_name]
            if part := parts.get(parameter):
                tensor = tensor.part(part.dim, part.start, part.length)
            shape = decoder.get_parameter(parameter).shape
            if parameter in packed:
                weight = plain[: shape.numel()].view(shape)
                reader.fill(weight, tensor)
                pack_linear_layer(decoder, parameter, weight)
            else:
                weight = torch.empty(shape, dtype=dtype, device=device)
                reader.fill(weight, tensor)
                _set_parameter(decoder, parameter, weight)
            progress.update(shape.numel() * dtype.itemsize)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
        if packed:
            pack_linear_layers(decoder)
    return decoder.requires_grad_(False).eval()


def _packed_weights(decoder: Decoder) -> set[str]:
    """Weights that are stored packed; a tied head's stays plain as the embedding's until last."""
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    tied = {"lm_head"} if decoder.config.tie_embeddings else set()
    return {f"{name}.weight" for name in linear - tied}


def _reading_order(
    stored: dict[str, StoredTensor], assign: dict[str, str], packed: set[str]
) -> list[str]:
    """Weights to pack come last, when their layers' biases are there; files from front to back."""
    return sorted(
        assign,
        key=lambda name: (assign[name] in packed, stored[name].file, stored[name].offset),
    )


def _set_parameter(decoder: Decoder, name: str, value: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    setattr(decoder.get_submodule(path), own, nn.Parameter(value, requires_grad=False))


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Names and shapes of a folder's tensors, from the files' headers only.

    Raises:
        CheckpointError: no safetensors file, a shard of the index is missing, or a file is cut off.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        files = _indexed_files(index)
    elif (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    elif any(path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds its weights as Python pickles, which can run code when opened, so "
            "they are not read. Convert them first: load the model with transformers and call "
            "`model.save_pretrained(folder, safe_serialization=True)`."
        )
    else:
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {_some(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index} names shards that are not there: {_some(missing)}")
    return [index.parent / name for name in names]


def _match(
    decoder: Decoder, names: TensorNames, stored: dict[str, StoredTensor], folder: Path
) -> dict[str, str]:
    """Published name -> parameter for every parameter, or one error that names all mismatches."""
    wanted = dict(decoder.named_parameters())
    if decoder.config.tie_embeddings:
        wanted.pop("lm_head.weight", None)
    assign, unexpected, misshaped = {}, [], []
    for name, tensor in stored.items():
        parameter = names.parameter_name(name)
        if decoder.config.tie_embeddings and parameter == "lm_head.weight":
            continue
        if parameter is None or parameter not in wanted:
            unexpected.append(name)
            continue
        expected = tuple(wanted[parameter].shape)
        if tensor.shape != expected:
            misshaped.append(f"{name} is {list(tensor.shape)}, config.json says {list(expected)}")
        assign[name] = parameter
    missing = [names.published_name(name) for name in wanted.keys() - set(assign.values())]
    problems = [
        f"{len(found)} {kind}: {_some(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshaped),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{folder}: tensors do not fit config.json. " + ". ".join(problems))
    return assign


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:MAX_NAMES_IN_ERROR])
    return shown if len(names) <= MAX_NAMES_IN_ERROR else f"{shown}, ..."
