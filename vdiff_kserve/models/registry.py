"""Which family reads which checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vdiff_kserve.models import llada
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """How one family's published checkpoints are read.

    Attributes:
        read_spec: `config.json` -> `ModelSpec`.
        tensor_names: published tensor name -> name in `Decoder`, `{}` for the layer's number.
    """

    read_spec: Callable[[CheckpointConfig], ModelSpec]
    tensor_names: Mapping[str, str]

    def parameter_name(self, tensor_name: str) -> str | None:
        """The decoder's name of a published tensor; None when the family has no such tensor."""
        parts = tensor_name.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        if layer is None:
            return self.tensor_names.get(tensor_name)
        pattern = ".".join("{}" if part == layer else part for part in parts)
        name = self.tensor_names.get(pattern)
        return None if name is None else name.format(layer)

    def published_name(self, parameter_name: str) -> str:
        """The checkpoint's name of a decoder parameter (the inverse of `parameter_name`)."""
        by_parameter = {ours: theirs for theirs, ours in self.tensor_names.items()}
        parts = parameter_name.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        pattern = ".".join("{}" if part == layer else part for part in parts)
        return by_parameter[pattern].format(layer)


FAMILIES: Mapping[str, Family] = {
    "LLaDAModelLM": Family(llada.read_spec, llada.TENSOR_NAMES),
}
"""`architectures` in config.json -> family."""


def find_family(config: CheckpointConfig) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: no name in `architectures` is served; the message lists those that are.
    """
    for architecture in config.architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    named = ", ".join(config.architectures) or "nothing"
    served = ", ".join(FAMILIES)
    raise CheckpointError(
        f"{config.path}: field `architectures` names {named}; this server serves {served}"
    )
