"""A causal language model as transformers implements it, over the engine's rows and cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan
from vdiff_kserve.models.causal_attention import NAME, AttentionCalls, attending
from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.chunked_pass import CHUNKS, ChunkedPass, WholePass
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.language_model import ForwardPass
from vdiff_kserve.models.matching import NoInitialValues
from vdiff_kserve.models.transformers_folder import from_folder

CACHED_LAYERS = {"full_attention", "sliding_attention"}
PROBE_LENGTHS = (13, 9)
PROBE_CONTINUES = 5
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be from transformers' own, see `relative_difference`."""
NOT_EXCHANGED = (ValueError, TypeError, RuntimeError, LookupError)
"""What models raise that cannot do with other attention than their own."""

logger = logging.getLogger("kserve.vdiff.model")


class NotCacheableError(Exception):
    """A model that the engine's attention and cache cannot run; the message says why."""


class TransformersModel:
    """Runs rows through a model of transformers.

    What `__call__` returns are the logits themselves, since models treat them in ways of their own
    (scaling, soft caps): [outputs, vocab].
    """

    def __init__(self, model: PreTrainedModel, config: DecoderConfig) -> None:
        self._model = model
        self.config = config

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def vocab_shard(self) -> None:
        """The vocabulary is whole."""
        return None

    @property
    def stages(self) -> int:
        """A pass runs in one piece."""
        return 1

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Logits of the wanted tokens, [outputs, vocab], of rows that see all of themselves.

        Each row runs alone and from its beginning, in transformers' own way.
        """
        ids = batch.input_ids.split([span.queries for span in batch.spans])
        logits = []
        for row, span in zip(ids, batch.spans, strict=True):
            assert span.start == 0, "there is no cache"
            whole = self._model(input_ids=row[None], use_cache=False).logits[0]
            logits.append(whole[span.output_start : span.output_start + span.outputs])
        return torch.cat(logits)

    def begin(self, batch: ForwardBatch) -> ForwardPass:
        """A pass that runs in one piece."""
        return WholePass(self, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the pass returned."""
        return hidden

    own_logits = logits


class CachedTransformersModel(TransformersModel):
    """Runs all rows of a batch in one pass, over the engine's attention and cache."""

    @property
    def stages(self) -> int:
        """A pass may stop between chunks of its tokens."""
        return CHUNKS

    def begin(self, batch: ForwardBatch) -> ChunkedPass:
        """A pass of which no chunk has run."""
        return ChunkedPass(self, batch)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Logits of the wanted tokens: [outputs, vocab]."""
        return _run(self._model, batch)[0]


def load_transformers_model(
    folder: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[TransformersModel, int, bool]:
    """Read a checkpoint with transformers' class for it.

    Returns:
        the model, its context length, and whether it has a cache: if that gives what transformers
        computes without one.

    Raises:
        CheckpointError: the folder is not sound, or transformers does not know the architecture.
    """
    model = from_folder(AutoModelForCausalLM, folder, device, dtype)
    longest = _context(model.config.get_text_config())
    if longest is None:
        raise CheckpointError(f"{folder}/config.json does not tell the model's context length")
    own_attention = model.config._attn_implementation
    try:
        return CachedTransformersModel(model, _probe(model)), longest, True
    except NotCacheableError as reason:
        logger.warning(
            "%s is served without a cache, each token for a pass over all before it: %s.",
            type(model).__name__, reason,
        )  # fmt: skip
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(own_attention)
        return TransformersModel(model, _sizes(model)), longest, False


def outline(folder: Path) -> tuple[int, DecoderConfig, int]:
    """What a checkpoint's model is like, from `config.json` alone and without memory for it.

    Returns:
        its parameters, tied ones once, its sizes with the shape of its cache, and its context
        length.

    Raises:
        CheckpointError: transformers does not know the model, or it is served without a cache.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"), NoInitialValues():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.bfloat16,  # of which experts are multiplied without looking at numbers
                trust_remote_code=False,
            ).eval()
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot build it: {error!r}") from error
    parameters = sum(each.numel() for each in model.parameters())
    longest = _context(config.get_text_config())
    if longest is None:
        raise CheckpointError(f"{folder}/config.json does not tell the model's context length")
    model.config.pad_token_id = None  # some look for it among the tokens, which have no values
    try:
        _refuse_other_states(config.get_text_config())
        model.set_attn_implementation(NAME)
        _, calls = _run(model, ForwardBatch.pack([torch.zeros(1).long()], device=model.device))
    except (NotCacheableError, *NOT_EXCHANGED):
        calls = None
    if calls is None or not calls.shapes:
        raise CheckpointError(
            f"{folder}: how much a token keeps cannot be told of {type(model).__name__}; its "
            f"weights are {parameters:,} numbers"
        )
    return parameters, _sizes(model, *cache_shape(calls)), longest


@torch.inference_mode()
def _run(model: PreTrainedModel, batch: ForwardBatch) -> tuple[Tensor, AttentionCalls]:
    """Logits of the wanted tokens, and what the attention layers were."""
    wanted = batch.output_tokens
    with attending(batch) as calls:
        logits = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            **({} if wanted is None else {"logits_to_keep": wanted}),
        ).logits[0]
    if wanted is not None and len(logits) == len(batch.input_ids) != len(wanted):
        logits = logits[wanted]
    return logits, calls


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> DecoderConfig:
    """The model's sizes, once rows packed together, cached and continued give what it computes
    alone.

    Raises:
        NotCacheableError: they do not.
    """
    text = model.config.get_text_config()
    _refuse_other_states(text)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(text.vocab_size, (length,), generator=generator) for length in PROBE_LENGTHS
    ]
    alone = _alone(model, rows)
    together = ForwardBatch.pack(rows, device=model.device)
    try:
        model.set_attn_implementation(NAME)
        _, calls = _run(model, together)
    except NOT_EXCHANGED as error:
        raise NotCacheableError(f"its attention cannot be exchanged ({error})") from error
    if not calls.shapes:
        raise NotCacheableError("its attention cannot be exchanged")
    if _slides(text) and not any(calls.windows):
        raise NotCacheableError("its layers do not tell their sliding window")
    config = _sizes(model, *cache_shape(calls))
    difference = _difference(model, config, rows, alone)
    if not difference <= TOLERANCE[model.dtype]:
        raise NotCacheableError(
            "it keeps more than keys and values between tokens (batched and cached, its logits "
            f"differ by {difference:.1e} of the largest)"
        )
    return config


def _refuse_other_states(text: Any) -> None:
    other = set(getattr(text, "layer_types", None) or ()) - CACHED_LAYERS
    if other:
        raise NotCacheableError(f"it has layers of type {', '.join(sorted(other))}")
    if "dynamic" in _rotary_types(text):
        raise NotCacheableError("its rotary positions depend on the length of the text")


def cache_shape(calls: AttentionCalls) -> tuple[int, int, int]:
    """Layers, heads and dimensions of a cache for the attention layers of a pass. Where these
    differ, a token's keys (or values) are one head as wide as the widest layer's together."""
    if len(set(calls.shapes)) == 1 and calls.shapes[0][1] == calls.shapes[0][2]:
        return len(calls.shapes), *calls.shapes[0][:2]
    widest = max(heads * max(key, value) for heads, key, value in calls.shapes)
    return len(calls.shapes), 1, widest


def _sizes(
    model: PreTrainedModel, num_layers: int = 1, num_kv_heads: int = 1, head_dim: int = 1
) -> DecoderConfig:
    """What is known of a model, and the shape of its cache."""
    text = model.config.get_text_config()
    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_layers=num_layers,
        num_heads=getattr(text, "num_attention_heads", 1),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=getattr(text, "rms_norm_eps", 0.0),
        rope_theta=0.0,
        rope_in_float32=False,
        tie_embeddings=bool(model.config.tie_word_embeddings),
        attention_block=1,
    )


def _alone(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """The logits of each row, which is on the host, as transformers computes them."""
    try:
        logits = [
            model(input_ids=row[None].to(model.device), use_cache=False).logits[0] for row in rows
        ]
    except Exception as error:
        raise CheckpointError(f"transformers cannot run the model: {error!r}") from error
    if any(bool(each.isnan().any()) or not each.any() for each in logits):
        raise CheckpointError("the model's logits are NaN or 0: is its config.json damaged?")
    return logits


def _context(text: Any) -> int | None:
    """Most tokens of a text; None when the configuration does not tell. Where longer texts have
    other rotary positions (longrope), those that share a batch could not: only short ones are
    served."""
    longest = getattr(text, "max_position_embeddings", None)
    if "longrope" in _rotary_types(text):
        longest = getattr(text, "original_max_position_embeddings", None) or (
            text.rope_parameters.get("original_max_position_embeddings", longest)
        )
    return longest if isinstance(longest, int) and longest > 0 else None


def _rotary_types(text: Any) -> set[str]:
    given = getattr(text, "rope_parameters", None) or {}
    by_layer = [each for each in given.values() if isinstance(each, dict)] or [given]
    return {str(each.get("rope_type", "default")) for each in by_layer}


def _slides(text: Any) -> bool:
    types = getattr(text, "layer_types", None)
    if types is not None:
        return "sliding_attention" in types
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)


def _difference(
    model: PreTrainedModel, config: DecoderConfig, rows: list[Tensor], alone: list[Tensor]
) -> float:
    """How far the logits of rows batched, and of their last tokens continued from the cache one by
    one, are from those of each row alone."""
    shape = (config.num_layers, sum(PROBE_LENGTHS), config.num_kv_heads, config.head_dim)
    keys, values = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    store = KeyValueStore(keys, values)
    parts: list[list[Tensor]] = [[] for _ in rows]
    for step in range(PROBE_CONTINUES + 1):
        spans, offset = [], 0
        for row in rows:
            end = len(row) - PROBE_CONTINUES + step
            start = 0 if step == 0 else end - 1
            spans.append(RowSpan(start, end - start, end, start, end - start, offset))
            offset += len(row)
        logits, _ = _run(model, ForwardBatch.pack(rows, spans, store, model.device))
        for part, piece in zip(parts, logits.split([span.queries for span in spans]), strict=True):
            part.append(piece)
    read = torch.cat([part[0] for part in parts])
    continued = torch.cat([piece for part in parts for piece in part[1:]])
    firsts = [len(row) - PROBE_CONTINUES for row in rows]
    expected = [
        torch.cat([each[:n] for each, n in zip(alone, firsts, strict=True)]),
        torch.cat([each[n:] for each, n in zip(alone, firsts, strict=True)]),
    ]
    return max(
        relative_difference(found, own)
        for found, own in zip((read, continued), expected, strict=True)
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The median over positions of the largest difference of their logits, relative to the largest
    logit. The median, since in low precision a router's choice may flip here and there.

    Args:
        found: [positions, vocab], as `expected`.
    """
    found, expected = found.float(), expected.float()
    differences = (found - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)
    return float(differences.median())
