"""Which family reads which checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vdiff_kserve.models import fast_dllm, llada, qwen
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.spec import ModelSpec

T = TypeVar("T")


@dataclass(frozen=True)
class TensorNames:
    """How a published format names a decoder's parameters.

    Attributes:
        by_published: published tensor name -> name in `Decoder`, `{}` for the layer's number.
    """

    by_published: Mapping[str, str]

    def parameter_name(self, tensor_name: str) -> str | None:
        """The decoder's name of a published tensor; None when the family has no such tensor."""
        parts = tensor_name.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        if layer is None:
            return self.by_published.get(tensor_name)
        pattern = ".".join("{}" if part == layer else part for part in parts)
        name = self.by_published.get(pattern)
        return None if name is None else name.format(layer)

    def published_name(self, parameter_name: str) -> str:
        """The checkpoint's name of a decoder parameter (the inverse of `parameter_name`)."""
        by_parameter = {ours: theirs for theirs, ours in self.by_published.items()}
        parts = parameter_name.split(".")
        layer = next((part for part in parts if part.isdigit()), None)
        pattern = ".".join("{}" if part == layer else part for part in parts)
        return by_parameter[pattern].format(layer)


@dataclass(frozen=True)
class Family:
    """How the published checkpoints of a diffusion family are read."""

    read_spec: Callable[[CheckpointConfig], ModelSpec]
    tensor_names: TensorNames


@dataclass(frozen=True)
class CausalFormat:
    """How the checkpoints of a causal language model (an auxiliary model for APD) are read."""

    read_decoder: Callable[[CheckpointConfig], DecoderConfig]
    tensor_names: TensorNames


_LLADA_NAMES = TensorNames(llada.TENSOR_NAMES)
_QWEN_NAMES = TensorNames(qwen.TENSOR_NAMES)

FAMILIES: Mapping[str, Family] = {
    "LLaDAModelLM": Family(llada.read_spec, _LLADA_NAMES),
    "DreamModel": Family(qwen.read_dream_spec, _QWEN_NAMES),
    "SDARForCausalLM": Family(qwen.read_sdar_spec, _QWEN_NAMES),
    "Fast_dLLM_QwenForCausalLM": Family(fast_dllm.read_spec, _QWEN_NAMES),
}
"""`architectures` in config.json -> diffusion family."""

CAUSAL_FORMATS: Mapping[str, CausalFormat] = {
    "Qwen2ForCausalLM": CausalFormat(qwen.read_qwen2_decoder, _QWEN_NAMES),
    "Qwen3ForCausalLM": CausalFormat(qwen.read_qwen3_decoder, _QWEN_NAMES),
    "LlamaForCausalLM": CausalFormat(qwen.read_llama_decoder, _QWEN_NAMES),
}
"""`architectures` in config.json -> causal format."""


def find_by_architecture(config: CheckpointConfig, known: Mapping[str, T]) -> T:
    """The entry of `known` that a checkpoint's `architectures` names.

    Raises:
        CheckpointError: none of its names is known; the message lists those that are.
    """
    for architecture in config.architectures:
        if architecture in known:
            return known[architecture]
    named = ", ".join(config.architectures) or "nothing"
    raise CheckpointError(
        f"{config.path}: field `architectures` names {named}; served are {', '.join(known)}"
    )
