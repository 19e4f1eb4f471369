"""Which family reads which checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vdiff_kserve.models import fast_dllm, llada, llada_moe, qwen, sdar
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.spec import ModelSpec
from vdiff_kserve.models.tensor_names import TensorNames

T = TypeVar("T")


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
_LLADA_MOE = Family(llada_moe.read_llada_moe_spec, llada_moe.LLADA_MOE_TENSORS)

FAMILIES: Mapping[str, Family] = {
    "LLaDAModelLM": Family(llada.read_spec, _LLADA_NAMES),
    "LLaDAMoEModelLM": _LLADA_MOE,
    "LLaDAMoEModel": _LLADA_MOE,
    "LLaDA2MoeModelLM": Family(llada_moe.read_llada2_spec, llada_moe.LLADA2_TENSORS),
    "DreamModel": Family(qwen.read_dream_spec, _QWEN_NAMES),
    "SDARForCausalLM": Family(sdar.read_spec, _QWEN_NAMES),
    "SDARMoeForCausalLM": Family(sdar.read_moe_spec, qwen.MOE_TENSORS),
    "Fast_dLLM_QwenForCausalLM": Family(fast_dllm.read_spec, _QWEN_NAMES),
}
"""`architectures` in config.json -> diffusion family. LLaDA-MoE's checkpoints name one class or the
other; the tensors are the same."""

FAMILY_NAMES: Mapping[str, str] = {
    "llada": "LLaDAModelLM",
    "llada_moe": "LLaDAMoEModelLM",
    "llada2": "LLaDA2MoeModelLM",
    "dream": "DreamModel",
    "sdar": "SDARForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "fast_dllm_v2": "Fast_dLLM_QwenForCausalLM",
}
"""`--diffusion_family` -> the architecture that it stands for."""

DIFFUSION_GEMMA = "DiffusionGemmaForBlockDiffusion"
"""Run by transformers' own layers."""

CAUSAL_FORMATS: Mapping[str, CausalFormat] = {
    "Qwen2ForCausalLM": CausalFormat(qwen.read_qwen2_decoder, _QWEN_NAMES),
    "Qwen3ForCausalLM": CausalFormat(qwen.read_qwen3_decoder, _QWEN_NAMES),
    "LlamaForCausalLM": CausalFormat(qwen.read_llama_decoder, _QWEN_NAMES),
}
"""`architectures` in config.json -> causal format."""


def find_family(config: CheckpointConfig) -> Family:
    """The family that the operator names, else the one of the checkpoint's `architectures`.

    Raises:
        CheckpointError: none is known; the message lists those that are.
    """
    if config.hints.family is None:
        return find_by_architecture(config, FAMILIES)
    return FAMILIES[FAMILY_NAMES[config.hints.family]]


def find_by_architecture(config: CheckpointConfig, known: Mapping[str, T]) -> T:
    """The entry of `known` that a checkpoint's `architectures` names.

    Raises:
        CheckpointError: none of its names is known; the message lists those that are.
    """
    for architecture in config.architectures:
        if architecture in known:
            return known[architecture]
    named = ", ".join(config.architectures) or "nothing"
    served = ", ".join(known)
    if known is FAMILIES:
        names = (*FAMILY_NAMES.values(), DIFFUSION_GEMMA, "transformers' causal models")
        served = ", ".join(names)
    raise CheckpointError(
        f"{config.path}: field `architectures` names {named}; served are {served}"
    )
