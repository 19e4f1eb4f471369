"""Which tensor of a checkpoint is which parameter of a decoder, before memory is taken for any."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch.nn import init
from torch.overrides import TorchFunctionMode

from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.decoder import Decoder, DecoderConfig
from vdiff_kserve.models.safetensors_file import StoredTensor
from vdiff_kserve.models.tensor_names import Place, TensorNames, tensor_shape

MAX_NAMES_IN_ERROR = 8
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.masked_bias)$"
)
"""Names of what older versions of transformers stored though it follows from `config.json`."""


class NoInitialValues(TorchFunctionMode):
    """Parameters are made without values: they come from files. Random numbers for tensors without
    memory would bring torch's compiler along, which takes a second of the server's start."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def match(
    config: DecoderConfig, names: TensorNames, stored: Mapping[str, StoredTensor], folder: Path
) -> tuple[Decoder, dict[str, list[Place]]]:
    """A decoder without memory, and where the rows of every tensor go.

    The work follows the files, whatever `config` claims: of the layers and experts that they lack,
    one more is built than they have, to be told as missing.

    Raises:
        CheckpointError: tensors and configuration do not fit; the message names all mismatches.
    """
    layers, experts = names.count(stored)
    built = replace(config, num_layers=min(config.num_layers, layers + 1))
    with init_empty_weights(include_buffers=True), NoInitialValues():
        decoder = Decoder(built)
    parameters = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    ignored = {name for name in stored if COMPUTED.search(name)}
    if config.tie_embeddings:
        parameters.pop("lm_head.weight", None)
        ignored.add(names.published_name("lm_head.weight"))
    places = names.places(parameters, most_experts=experts + 1)
    problems = _counts(config, layers, experts)
    cut = config.num_layers > layers + 1
    cut |= config.moe is not None and config.moe.num_experts > experts + 1
    problems += _differences(places, stored, ignored, cut)
    if whole := [t for t in places if t in stored and not stored[t].dtype.is_floating_point]:
        problems.append(
            f"{len(whole)} stored as integers, quantized in a way that is not read: {some(whole)}"
        )
    if problems:
        raise CheckpointError(f"{folder}: tensors do not fit config.json. " + ". ".join(problems))
    return decoder, places


def _counts(config: DecoderConfig, layers: int, experts: int) -> list[str]:
    problems = []
    if config.num_layers != layers:
        problems.append(f"It says {config.num_layers} layers, the files have {layers}")
    sparse = config.num_layers > len(config.dense_layers)
    if config.moe is not None and sparse and config.moe.num_experts != experts:
        problems.append(f"It says {config.moe.num_experts} experts, the files have {experts}")
    return problems


def _differences(
    places: Mapping[str, list[Place]],
    stored: Mapping[str, StoredTensor],
    ignored: set[str],
    cut: bool,
) -> list[str]:
    """What is wrong with single tensors; `cut` if `places` may leave out some."""
    misshaped = []
    for name in places.keys() & stored.keys():
        shape, expected = stored[name].shape, tensor_shape(places[name])
        if shape != expected:
            misshaped.append(f"{name} is {list(shape)}, config.json says {list(expected)}")
    return [
        f"{len(found)} {kind}: {some(found)}"
        for kind, found in (
            ("or more missing" if cut else "missing", places.keys() - stored.keys()),
            ("unexpected", stored.keys() - places.keys() - ignored),
            ("of the wrong shape", misshaped),
        )
        if found
    ]


def some(names: Collection[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(sorted(names)[:MAX_NAMES_IN_ERROR])
    return shown if len(names) <= MAX_NAMES_IN_ERROR else f"{shown}, ..."
