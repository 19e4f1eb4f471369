"""From a checkpoint folder to a decoder on its device.

Weights are read from safetensors only, tensor by tensor, straight to the target device and dtype;
nothing from a checkpoint is ever executed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError, Hints
from vdiff_kserve.models.decoder import Decoder, DecoderConfig
from vdiff_kserve.models.joined_linear import JoinedLinear, gains_from_joining
from vdiff_kserve.models.matching import match, some
from vdiff_kserve.models.moe import Experts, Router
from vdiff_kserve.models.packed_linear import can_pack, pack_linear_layer, packed
from vdiff_kserve.models.pickled_weights import pickle_files
from vdiff_kserve.models.placement import compute_on, free_memory, place_modules
from vdiff_kserve.models.quantization import (
    check_quantization,
    prepare_quantization,
    quantize_experts,
    quantize_linear_layer,
)
from vdiff_kserve.models.registry import (
    CAUSAL_FORMATS,
    find_by_architecture,
    find_family,
)
from vdiff_kserve.models.safetensors_file import (
    StoredTensor,
    TensorReader,
    read_header,
    returnable,
)
from vdiff_kserve.models.sharding import Part, WholeExperts, shard
from vdiff_kserve.models.spec import ModelSpec
from vdiff_kserve.models.tensor_names import Place, TensorNames

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_decoder(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
    hints: Hints | None = None,
    quantization: str | None = None,
    spread: str | None = None,
) -> tuple[Decoder, ModelSpec]:
    """Read a diffusion model's checkpoint folder in its published format.

    Args:
        mesh: ranks that share the model, of which this one reads its part only; None reads all.
        hints: what is known of it beside its `config.json`.
        quantization: of the blocks' linear layers, one of QUANTIZATIONS; None keeps `dtype`.
        spread: how weights that `device`, the first GPU, has no room for are kept elsewhere, one of
            SPREADS; None keeps all of them there.

    Returns:
        the decoder in eval mode without gradients, and what is known about the model.

    Raises:
        CheckpointError: anything wrong with the folder, in one message.
    """
    config = CheckpointConfig.read(Path(folder), hints)
    family = find_family(config)
    spec = family.read_spec(config)
    decoder = _load(
        Path(folder), spec.decoder, family.tensor_names, device, dtype, mesh, quantization, spread
    )
    return decoder, spec


def load_causal_decoder(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
    quantization: str | None = None,
) -> Decoder:
    """Read a causal language model, as `load_decoder` does.

    Raises:
        CheckpointError: anything wrong with the folder, in one message.
    """
    config = CheckpointConfig.read(Path(folder))
    causal_format = find_by_architecture(config, CAUSAL_FORMATS)
    decoder_config = causal_format.read_decoder(config)
    names = causal_format.tensor_names
    return _load(Path(folder), decoder_config, names, device, dtype, mesh, quantization)


def _load(
    folder: Path,
    config: DecoderConfig,
    tensor_names: TensorNames,
    device: torch.device | str,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    quantization: str | None = None,
    spread: str | None = None,
) -> Decoder:
    """Build a decoder without memory and fill it tensor by tensor, with a progress bar in bytes.

    Host memory stays at the model (when `device` is the CPU) plus its largest linear layer: plain
    weights are read into the same memory one after the other, and packed or quantized from there. A
    layer's experts are packed as soon as the last of them is there.
    """
    stored = list_tensors(folder)
    decoder, places = match(config, tensor_names, stored, folder)
    slices = {} if mesh is None else shard(decoder, mesh)
    device = torch.device(device)
    devices: dict[str, torch.device] = {}
    if spread is not None:
        device = torch.device("cuda:0") if device.type == "cuda" else device
        devices = place_modules(decoder, spread, dtype, free_memory())
    packs = can_pack(device, dtype)
    to_pack = _packed_weights(decoder) if packs else set()
    quantized = set()
    if quantization is not None:
        check_quantization(quantization, decoder, device, dtype)
        quantized = prepare_quantization(decoder, quantization)
        to_pack -= quantized
    if quantization in (None, "fp8") and gains_from_joining(device):
        _join_layers(decoder, devices, device, dtype)
    largest = max((decoder.get_parameter(name).numel() for name in to_pack | quantized), default=0)
    on_cpu = device.type == "cpu"
    plain = (
        returnable(largest, dtype) if on_cpu else torch.empty(largest, dtype=dtype, device=device)
    )
    parts = _reading_order(stored, places, slices, to_pack | quantized)
    total = sum(place.size for place, _ in parts) * dtype.itemsize
    unread = Counter(place.parameter for place, _ in parts)
    quiet = mesh is not None and mesh.get_local_rank() > 0
    name = f"Loading {folder.name}"
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=quiet)
    with bar as progress, TensorReader.open() as reader:
        for place, part in parts:
            if place.parameter in to_pack | quantized:
                weight = plain[: place.size].view(place.shape)
                reader.fill(weight, part)
                _require_finite(weight, place, part)
                if quantization is not None and place.parameter in quantized:
                    quantize_linear_layer(decoder, place.parameter, weight, quantization)
                else:
                    pack_linear_layer(decoder, place.parameter, weight)
            else:
                home = _home(place.parameter, devices, device)
                weight = _materialize(decoder, place.parameter, home, dtype)
                reader.fill(weight[place.index], part)
                _require_finite(weight[place.index], place, part)
            unread[place.parameter] -= 1
            if (packs or quantization is not None) and not unread[place.parameter]:
                _finish_experts(decoder, place.parameter, unread, quantization)
            progress.update(place.size * dtype.itemsize)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
        if packs and isinstance(decoder.lm_head, nn.Linear):
            setattr(decoder, "lm_head", packed(decoder.lm_head))  # noqa: B010  another class
    decoder.requires_grad_(False).eval()
    compute_on(decoder, devices, device)
    return decoder


def _join_layers(
    decoder: Decoder, devices: Mapping[str, torch.device], device: torch.device, dtype: torch.dtype
) -> None:
    """Give layers of one input memory side by side, where their weights stay on `device`. Files are
    then read into its parts."""
    for name, module in decoder.named_modules():
        if isinstance(module, JoinedLinear) and _home(f"{name}.", devices, device) == device:
            module.join(device, dtype)


def _home(
    parameter: str, devices: Mapping[str, torch.device], default: torch.device
) -> torch.device:
    """Where a parameter is kept: as the part of the decoder that it belongs to."""
    parts = (device for name, device in devices.items() if parameter.startswith(f"{name}."))
    return next(parts, default)


def _packed_weights(decoder: Decoder) -> set[str]:
    """Weights that are stored packed; a tied head's stays plain as the embedding's until last."""
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    tied = {"lm_head"} if decoder.config.tie_embeddings else set()
    return {f"{name}.weight" for name in linear - tied}


def _reading_order(
    stored: dict[str, StoredTensor],
    places: dict[str, list[Place]],
    slices: Mapping[str, Part],
    packed: set[str],
) -> list[tuple[Place, StoredTensor]]:
    """What is read, and where it goes: weights to pack or quantize last, after their layers'
    biases; files in order."""
    parts = []
    for name, own in places.items():
        for place in own:
            part = stored[name].rows(place.first_row, place.shape)
            kept = slices.get(place.parameter)
            if isinstance(kept, WholeExperts):
                if (moved := place.among_experts(kept.first, kept.count)) is not None:
                    parts.append((moved, part))
            elif kept is not None:
                part = part.part(kept.dim, kept.start, kept.length)
                parts.append((place.part(kept.dim, kept.length), part))
            else:
                parts.append((place, part))
    return sorted(
        parts, key=lambda part: (part[0].parameter in packed, part[1].file, part[1].offset)
    )


def _materialize(
    decoder: Decoder, name: str, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Memory for a parameter, if it has none yet."""
    path, _, own = name.rpartition(".")
    module = decoder.get_submodule(path)
    parameter = decoder.get_parameter(name)
    if not parameter.is_meta:
        return parameter.data
    if isinstance(module, Router):
        dtype = torch.float32
    if isinstance(module, Experts) and can_pack(torch.device(device), dtype):
        memory = returnable(parameter.numel(), dtype).view(parameter.shape)
    else:
        memory = torch.empty(parameter.shape, dtype=dtype, device=device)
    setattr(module, own, nn.Parameter(memory, requires_grad=False))
    return memory


def _require_finite(weight: torch.Tensor, place: Place, part: StoredTensor) -> None:
    """One pass over the weight without memory of its own: NaN passes through, infinity shows."""
    if weight.numel() and not all(bound.isfinite() for bound in torch.aminmax(weight)):
        name = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{part.file}: {place.parameter} has values that are not finite in {name}"
        )


def _finish_experts(
    decoder: Decoder, parameter: str, unread: Counter[str], quantization: str | None
) -> None:
    """Pack or quantize the experts that `parameter` belongs to, once all of them are read."""
    path = parameter.rpartition(".")[0]
    module = decoder.get_submodule(path)
    if isinstance(module, Experts) and not any(
        unread[f"{path}.{name}"] for name, _ in module.named_parameters()
    ):
        if quantization is None:
            module.pack()
        else:
            quantize_experts(module, quantization)


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Names and shapes of a folder's tensors, from the files' headers only.

    Raises:
        CheckpointError: no safetensors file, a shard of the index is missing, or a file is cut off.
    """
    files = weight_files(folder)
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files.

    Raises:
        CheckpointError: there is none, or a shard of the index is missing.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if pickle_files(folder):
        raise CheckpointError(
            f"{folder} holds its weights as Python pickles, which can run code when opened, so "
            "they are not served. Convert them first: python -m vdiff_kserve.convert "
            f"--pickle_path {folder} --output NEW_FOLDER"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{_others(folder)}")


def _others(folder: Path) -> str:
    """What there is in place of weights under the right name."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    if names:
        return f", but {', '.join(names[:3])}: rename a single file, several need their index"
    return ", but GGUF, which is not read" if any(folder.glob("*.gguf")) else ""


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {some(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index} names shards that are not there: {some(missing)}")
    return [index.parent / name for name in names]
