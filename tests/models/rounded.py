"""Decoders whose layers are in fp8, as a loaded one's are."""

from __future__ import annotations

from vdiff_kserve.models import Decoder
from vdiff_kserve.models.quantization import prepare_quantization, quantize_linear_layer


def in_fp8(decoder: Decoder) -> Decoder:
    """The same decoder, changed."""
    weights = {name: parameter.data for name, parameter in decoder.named_parameters()}
    for name in prepare_quantization(decoder, "fp8"):
        quantize_linear_layer(decoder, name, weights[name], "fp8")
    return decoder
