"""Weights of linear layers and experts in fewer bits.

Linear layers in fp8 also round their activations, and multiply in fp8 where a GPU can. Otherwise
weights are rounded through torchao, and activations keep their number type.

The token embedding, the norms, the routers and the language-model head stay as they are.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.decoder import Decoder
from vdiff_kserve.models.fp8 import CAPABILITY as FP8_CAPABILITY
from vdiff_kserve.models.fp8 import MULTIPLE, Fp8Linear, use_fp8
from vdiff_kserve.models.moe import GROUPED_DTYPES, Experts

QUANTIZATIONS = ("int8", "fp8", "int4")
INT4_GROUPS = (128, 64, 32)
"""How many weights of a row share a scale, the largest that divides the row."""
INT4_CAPABILITY = (8, 0)
logger = logging.getLogger("kserve.vdiff.engine")


def prepare_quantization(decoder: Decoder, kind: str) -> set[str]:
    """Make the blocks' linear layers ready for quantized weights.

    Returns:
        names of the weights that are to be quantized.
    """
    if kind == "fp8" and (left := use_fp8(decoder.layers)):
        logger.warning(
            "%d linear layers are not in fp8, such as layers.%s: sizes must be multiples of %d",
            len(left),
            left[0],
            MULTIPLE,
        )
    return _weights(decoder, Fp8Linear if kind == "fp8" else nn.Linear)


def _weights(decoder: Decoder, layer: type[nn.Module]) -> set[str]:
    """Names of the weights of such layers in the blocks."""
    return {
        f"layers.{name}.weight"
        for name, module in decoder.layers.named_modules()
        if isinstance(module, layer)
    }


def check_quantization(
    kind: str, decoder: Decoder, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse what the package, the model or the hardware cannot do.

    Raises:
        CheckpointError: with the reason.
    """
    reason = _missing(kind, decoder, device, dtype)
    if reason:
        raise CheckpointError(f"--quantization {kind} {reason}")


def _missing(kind: str, decoder: Decoder, device: torch.device, dtype: torch.dtype) -> str:
    moe = decoder.config.moe
    if (kind != "fp8" or moe is not None) and find_spec("torchao") is None:
        return "needs the package torchao: pip install 'vdiff-kserve[quantization]'"
    if kind == "int4":
        rows = {decoder.get_parameter(name).shape[1] for name in _weights(decoder, nn.Linear)}
        rows |= set() if moe is None else {decoder.config.hidden_size, moe.expert_size}
        if odd := [row for row in rows if _group(row) is None]:
            return (
                f"needs rows of a multiple of {INT4_GROUPS[-1]} weights, the model has {min(odd)}"
            )
    if device.type == "cpu":
        return ""
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if kind == "fp8" and capability < FP8_CAPABILITY:
        return f"needs a GPU of compute capability 8.9, such as an L4 or H100; {name} has less"
    if kind == "int4" and capability < INT4_CAPABILITY:
        return f"needs a GPU of compute capability 8.0, such as an A100; {name} has less"
    if kind == "int4" and moe is not None:
        return "is for dense models on a GPU: experts are rounded to int8 or fp8"
    if kind == "int4" and dtype is not torch.bfloat16:
        return "needs --dtype bfloat16 on a GPU"
    return ""


def quantize_linear_layer(decoder: Decoder, parameter: str, weight: Tensor, kind: str) -> None:
    """Give the layer whose weight is called `parameter` the value `weight`, quantized."""
    layer = decoder.get_submodule(parameter.rpartition(".")[0])
    if isinstance(layer, Fp8Linear):
        layer.fill(weight)
    else:
        assert isinstance(layer, nn.Linear), f"{parameter} is of no linear layer"
        _quantize(layer, weight, kind)


def quantize_experts(experts: Experts, kind: str, *, stacked: bool | None = None) -> None:
    """Round the weights of a layer's experts, one after the other.

    Args:
        stacked: whether they are computed together; None does so where the hardware can.
    """

    def rounded(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        _quantize(layer, weight, kind)
        return layer.weight.data

    if stacked is None:
        weight = experts.down_proj
        stacked = weight.is_cuda and weight.dtype in GROUPED_DTYPES
    experts.round(rounded, stacked=stacked)


def _quantize(layer: nn.Linear, weight: Tensor, kind: str) -> None:
    from torchao.quantization import quantize_

    layer.weight = nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao about its own deprecations
        quantize_(layer, _config(kind, weight), filter_fn=lambda module, _: module is layer)


def _config(kind: str, weight: Tensor) -> Any:
    from torchao import quantization as torchao
    from torchao.quantization.granularity import PerGroup

    if kind == "int8":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "fp8":
        return torchao.Float8WeightOnlyConfig(set_inductor_config=False)
    group = _group(weight.shape[1])
    assert group is not None
    if weight.is_cuda:
        return torchao.Int4WeightOnlyConfig(
            group_size=group,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    # On a CPU torchao keeps the four bits in bytes: the accuracy of int4, the memory of int8.
    return torchao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009  that PyTorch's stubs lack
        granularity=PerGroup(group),
    )


def _group(row: int) -> int | None:
    return next((size for size in INT4_GROUPS if row % size == 0), None)
