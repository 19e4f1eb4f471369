"""From a configuration to an engine that runs: checkpoint, tokenizer, auxiliary model, limits."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from vdiff_kserve.checkpoint import EMBEDDED_AUXILIARY, auxiliary_checkpoint, find_checkpoint
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    GenerationRequest,
    Grammars,
    Lockstep,
    RoundObserver,
    measured_token_budget,
)
from vdiff_kserve.models import (
    SPREADS,
    CheckpointError,
    Decoder,
    Hints,
    LanguageModel,
    ModelSpec,
    bound_kernel_caches,
    check_folder,
    check_same_vocabulary,
    choose_device,
    choose_dtype,
    fit_threads,
    load_causal_decoder,
    load_served_model,
    load_tokenizer,
    read_chat_template,
    with_end_of_turn,
)
from vdiff_kserve.openai.decoding import ModelTraits, resolve
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.limits import ServingLimits
from vdiff_kserve.openai.structured import load_grammars
from vdiff_kserve.openai.tool_parsers import ParserName
from vdiff_kserve.sampler import DecodingParams
from vdiff_kserve.setting import parse_size

logger = logging.getLogger("kserve.vdiff.model")

WARM_UP_TOKENS = 4
WARM_UP_DECODING = DecodingParams(
    policy="low_confidence", steps=8, cache="dual", logits_eos_inf=True
)
"""Of a block in a few steps, so that many rows are all at one at some time."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer.

    Attributes:
        engine: started, not yet warm.
        spec: what the checkpoint says of itself.
        limits: what the configuration makes of it.
        dtype, device: where and in what it runs, in words.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    spec: ModelSpec
    limits: ServingLimits
    dtype: str
    device: str

    @property
    def grammars(self) -> Grammars | None:
        """What compiles the grammars of requests."""
        return self.engine.grammars

    def warm_up(self) -> None:
        """Run every part of the engine once.

        On a GPU those are also cached passes over a block, whatever requests do by default, of all
        numbers of rows that are captured: a round that first compiled and captured one would make
        its requests wait.

        Raises:
            EngineError: it does not work.
        """
        room = self.limits.max_model_len - 1
        request = GenerationRequest(
            prompt_ids=(self.spec.eos_token_id,),
            max_tokens=min(WARM_UP_TOKENS, room),
            decoding=self.limits.decoding,
            request_id="warm-up",
        )
        self.engine.generate([request])
        if not self.device.startswith("cuda") or self.spec.mask_token_id is None:
            return
        block = min(self.spec.block_length, room)
        decoding = replace(WARM_UP_DECODING, block_length=self.spec.block_length)
        if self.spec.block_causal:
            decoding = replace(decoding, cache="exact")
            if self.spec.sub_blocks:
                decoding = self.limits.decoding
            cached = replace(request, max_tokens=min(2 * block, room), decoding=decoding)
        else:
            before = (self.spec.eos_token_id,) * max(1, min(block, room - block))
            cached = replace(request, prompt_ids=before, max_tokens=block, decoding=decoding)
        sizes = self.engine.captured_sizes
        for rows in tqdm(sizes or [1], desc="Capturing", unit="pass", disable=not sizes):
            self.engine.generate([cached] * rows)


@dataclass(frozen=True)
class Rank:
    """This process among those that share one model."""

    mesh: DeviceMesh
    lockstep: Lockstep
    device: torch.device


def load_model(
    config: ServerConfig, observer: RoundObserver | None = None, rank: Rank | None = None
) -> LoadedModel:
    """Load the configured checkpoint and start an engine around it.

    Args:
        rank: where the model is shared, this process's place; a further rank's engine is not
            started: it `follow`s.

    Raises:
        CheckpointError: the checkpoint, or the options with it, cannot be served.
    """
    started = time.perf_counter()
    bound_kernel_caches()
    if rank is None:
        fit_threads()
    folder = find_checkpoint(config)
    _check_configuration(config, folder)
    spread = config.device_map if config.device_map in SPREADS else None
    device = choose_device(_device_name(config)) if rank is None else rank.device
    dtype = choose_dtype(config.dtype, device)
    tokenizer = configured_tokenizer(config, folder)
    mesh = None if rank is None else rank.mesh
    hints = replace(_hints(config, folder), tokenizer_mask_token_id=tokenizer.mask_token_id)
    model, spec = load_served_model(folder, device, dtype, mesh, hints, config.quantization, spread)
    spec = with_end_of_turn(spec, tokenizer)
    if spec.mask_token_id is None:
        _refuse_options_of_masks(config)
    auxiliary = _load_auxiliary(config, folder, tokenizer, device, dtype)
    limits = _limits(config, spec, tokenizer, has_auxiliary=auxiliary is not None)
    lockstep = None if rank is None else rank.lockstep
    engine_config = _engine_config(config, model, limits, observer, lockstep)
    grammars = load_grammars(spec, tokenizer, limits)
    limited = replace(spec, max_model_len=limits.max_model_len)
    engine = Engine(model, limited, engine_config, auxiliary, grammars)
    if lockstep is None or lockstep.leads:
        engine.start()
    loaded = LoadedModel(
        engine, tokenizer, spec, limits, str(dtype).removeprefix("torch."), str(device)
    )
    logger.info(
        "Loaded %s (%s, %s on %s, context %d) in %.1f s.",
        folder, spec.family, loaded.dtype, loaded.device, limits.max_model_len,
        time.perf_counter() - started,
    )  # fmt: skip
    if (lacking := sum(i >= limits.vocab_size for i in tokenizer.get_vocab().values())) > 0:
        logger.warning(
            "The tokenizer has %d tokens that the model lacks, whose last is %d; prompts that need "
            "them are refused.",
            lacking, limits.vocab_size - 1,
        )  # fmt: skip
    if spec.family == "llada2":
        edits = spec.profiles["quality"]["policy"] == "edit"
        logger.info(
            "Taken for LLaDA%s by its name: it %s by default; --policy %s chooses the other.",
            *(("2.1", "edits", "dynamic") if edits else ("2.0", "does not edit", "edit")),
        )
    logger.info(
        "The key-value cache fits %d requests of %d tokens; whole passes take at most %d tokens "
        "of a round.",
        engine.kv_tokens_total // limits.max_model_len, limits.max_model_len,
        engine.config.max_num_batched_tokens,
    )  # fmt: skip
    if engine.kv_tokens_total < limits.max_model_len:
        logger.warning(
            "The key-value cache has room for %d tokens: longer requests that use a cache are "
            "refused. More memory is --kv_cache_memory's to give.",
            engine.kv_tokens_total,
        )
    return loaded


def check_before_loading(config: ServerConfig) -> None:
    """Refuse what no weights are needed to refuse, before a server listens for it: the chat
    template, the device, a folder's kind and files, decoding options that do not fit the model.

    Replicas may run where other devices and folders are; what is downloaded or converted is not
    there yet.

    Raises:
        CheckpointError: it cannot be served.
    """
    if config.chat_template is not None:
        read_chat_template(Path(config.chat_template))
    if config.replicas is not None:
        return
    choose_device(_device_name(config))
    if config.hub_id is not None or config.dcp_path is not None:
        return
    _check_configuration(config, find_checkpoint(config))


def _check_configuration(config: ServerConfig, folder: Path) -> None:
    """Refuse a checkpoint, or options with it, for which its weights need not be read."""
    hints = _hints(config, folder)
    spec = check_folder(folder, hints, trust_code=config.trust_remote_code)
    if spec is not None:
        _longest(config, spec)
        _decoding(config, spec, auxiliary_checkpoint(config, folder) is not None)


def _device_name(config: ServerConfig) -> str:
    return config.device if config.device_map in SPREADS else config.device_map or config.device


def _refuse_options_of_masks(config: ServerConfig) -> None:
    for name in ("apd_model", "mask_token_id"):
        if getattr(config, name) is not None:
            raise CheckpointError(
                f"--{name} is for diffusion models with a mask token; this model, autoregressive "
                "or denoised from random tokens, has none"
            )


def _hints(config: ServerConfig, folder: Path) -> Hints:
    """What the configuration knows of a checkpoint; the tokenizer may know its mask."""
    return Hints(
        family=config.diffusion_family,
        mask_token_id=config.mask_token_id,
        block_length=config.decoding.get("block_length"),
        name=config.hub_id or folder.name,
    )


def _engine_config(
    config: ServerConfig,
    model: LanguageModel,
    limits: ServingLimits,
    observer: RoundObserver | None,
    lockstep: Lockstep | None,
) -> EngineConfig:
    budget = config.max_num_batched_tokens
    if budget is None:
        budget = measured_token_budget(model, limits.max_model_len)
        budget = budget if lockstep is None else lockstep.least(budget)
    return EngineConfig(
        max_num_seqs=config.max_num_seqs,
        max_queue=config.max_queue,
        max_num_batched_tokens=budget,
        kv_cache_memory=parse_size(config.kv_cache_memory) if config.kv_cache_memory else None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cpu_memory_utilization=config.cpu_memory_utilization / config.tensor_parallel_size,
        enable_prefix_caching=config.enable_prefix_caching,
        enforce_eager=config.enforce_eager or config.device_map in SPREADS,
        round_timeout=config.round_timeout,
        observer=observer,
        lockstep=lockstep,
    )


def configured_tokenizer(config: ServerConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, with the chat template that the configuration names.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    return load_tokenizer(folder, config.chat_template, trust_code=config.trust_remote_code)


def _load_auxiliary(
    config: ServerConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder | None:
    """The model that checks what APD proposes; None when there is none."""
    own = auxiliary_checkpoint(config, folder)
    if own is None:
        return None
    if own != folder / EMBEDDED_AUXILIARY:
        check_same_vocabulary(load_tokenizer(own), tokenizer)
    return load_causal_decoder(own, device, dtype)


def _limits(
    config: ServerConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, has_auxiliary: bool
) -> ServingLimits:
    longest = _longest(config, spec)
    decoding, profiles, traits = _decoding(config, spec, has_auxiliary)
    return ServingLimits(
        max_model_len=longest,
        default_max_tokens=config.default_max_tokens,
        max_choices=config.max_queue + config.max_num_seqs,
        vocab_size=spec.decoder.vocab_size,
        decoding=decoding,
        profiles=profiles,
        traits=traits,
        request_timeout=config.request_timeout,
        max_schema_bytes=config.max_schema_bytes,
        grammar_timeout=config.grammar_timeout,
        auto_tool_choice=config.enable_auto_tool_choice,
        tool_call_parser=cast("ParserName", config.tool_call_parser),
        tools_in_prompt=config.tools_in_prompt,
        template_takes_tools=re.search(r"\btools\b", str(tokenizer.chat_template)) is not None,
    )


def _longest(config: ServerConfig, spec: ModelSpec) -> int:
    longest = config.max_model_len or spec.max_model_len
    if longest > spec.max_model_len:
        raise CheckpointError(
            f"--max_model_len is {longest}, but the checkpoint's context is {spec.max_model_len}"
        )
    return longest


def _decoding(
    config: ServerConfig, spec: ModelSpec, has_auxiliary: bool
) -> tuple[DecodingParams, dict[str, DecodingParams], ModelTraits]:
    """The defaults of requests, the profiles, and what the model can."""
    traits = ModelTraits(
        block_causal=spec.block_causal,
        block_length=spec.block_length,
        has_auxiliary=has_auxiliary,
        allows_apd=config.enable_apd,
        sub_blocks=spec.sub_blocks,
        autoregressive=spec.autoregressive,
        cacheable=spec.cacheable,
        renoises=spec.renoising is not None,
    )
    profiles = {
        name: DecodingParams(**({"block_length": spec.block_length} | dict(changes)))
        for name, changes in spec.profiles.items()
    }
    try:
        decoding = resolve(config.decoding, profiles[config.profile], profiles, traits)
    except RequestError as error:
        raise CheckpointError(f"the decoding options do not fit the model: {error}") from error
    return decoding, profiles, traits
