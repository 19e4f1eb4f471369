"""A causal language model as transformers implements it, over the engine's rows and cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan
from vdiff_kserve.models.causal_attention import NAME, AttentionCalls, attending
from vdiff_kserve.models.checkpoint_config import MAX_CONTEXT, CheckpointConfig, CheckpointError
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.language_model import ForwardPass
from vdiff_kserve.models.loader import list_tensors
from vdiff_kserve.models.matching import COMPUTED, NoInitialValues
from vdiff_kserve.models.safetensors_file import StoredTensor
from vdiff_kserve.models.tensor_names import NUMBER

CACHED_LAYERS = {"full_attention", "sliding_attention"}
LAYER_FIELDS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
WIDTH_FIELDS = {"hidden_size", "n_embd", "d_model", "vocab_size"}
SIZE_ENDINGS = ("intermediate_size", "head_dim", "num_attention_heads", "n_head", "experts")
SPECULATION = re.compile(r"(^|\.)mtp(_layers|_block)?\.")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PROBE_LENGTHS = (13, 9)
PROBE_CONTINUES = 5
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be from transformers' own, see `relative_difference`."""
CHUNKS = 8
"""Parts in which a pass over a long text can run, so that it leaves room for other rows."""

logger = logging.getLogger("kserve.vdiff.model")


NOT_EXCHANGED = (ValueError, TypeError, RuntimeError, LookupError)
"""What models raise that cannot do with other attention than their own."""


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


@dataclass
class WholePass:
    """A forward pass with a single stage."""

    model: Callable[[ForwardBatch], Tensor]
    batch: ForwardBatch
    layers_left: int = 1
    _outputs: Tensor | None = None

    def advance(self, layers: int) -> None:
        """Run it, unless `layers` is 0."""
        if layers and self.layers_left:
            self._outputs = self.model(self.batch)
            self.layers_left = 0

    @property
    def outputs(self) -> Tensor:
        """[outputs, vocab]"""
        assert self._outputs is not None, "the pass is not complete"
        return self._outputs


class ChunkedPass:
    """A causal model's pass over one row, a chunk of its tokens after the other: each leaves its
    keys and values for the next. A row without a cache runs in one piece, with the last chunk.

    Attributes:
        layers_left: chunks still to run.
    """

    def __init__(self, model: Callable[[ForwardBatch], Tensor], batch: ForwardBatch) -> None:
        (self._span,) = batch.spans
        self._model, self._batch = model, batch
        self._outputs: Tensor | None = None
        self.layers_left = CHUNKS

    def advance(self, layers: int) -> None:
        """Run the next `layers` chunks, or as many as are left."""
        for _ in range(min(layers, self.layers_left)):
            done = CHUNKS - self.layers_left
            self.layers_left -= 1
            if self._span.cache_offset is not None:
                self._run(done)
            elif not self.layers_left:
                self._outputs = self._model(self._batch)

    def _run(self, number: int) -> None:
        whole = self._span
        first_wanted = whole.output_start - whole.start
        ends = [first_wanted * (i + 1) // CHUNKS for i in range(CHUNKS - 1)] + [whole.queries]
        begin, end = ends[number - 1] if number else 0, ends[number]
        if begin == end:
            return
        start, keys = whole.start + begin, whole.start + end
        wanted = (whole.output_start, whole.outputs) if not self.layers_left else (keys - 1, 1)
        span = RowSpan(start, end - begin, keys, *wanted, whole.cache_offset)
        ids = self._batch.input_ids[begin:end]
        outputs = self._model(ForwardBatch(ids, (span,), self._batch.store))
        if not self.layers_left:
            self._outputs = outputs

    @property
    def outputs(self) -> Tensor:
        """[outputs, ...]"""
        assert self._outputs is not None, "the pass is not complete"
        return self._outputs


def from_folder(
    model_class: Any, folder: Path, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """What transformers' own `model_class` makes of a folder, in eval mode without gradients.

    No code of the checkpoint is run.

    Raises:
        CheckpointError: the folder is not sound, transformers cannot load it, or its tensors do not
            fit its config.
    """
    _check_sizes(CheckpointConfig.read(folder), list_tensors(folder))
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error!r}") from error
    unread = {key for key in report["unexpected_keys"] if not _is_of_no_use(key, model.config)}
    found = report | {"unexpected_keys": unread}
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    wrong = {name: found[name] for name in kinds if found[name]}
    if wrong:
        found = "; ".join(f"{name}: {sorted(map(str, keys))[:8]}" for name, keys in wrong.items())
        raise CheckpointError(f"{folder}: tensors do not fit config.json. {found}")
    return model.requires_grad_(False).eval()


def _is_of_no_use(name: str, config: Any) -> bool:
    """Whether a tensor without a place in transformers' model is one that published checkpoints
    have beside their weights: what follows from the configuration, or heads that predict further
    tokens for speculation. transformers itself knows those of some models by name, and drops any
    other tensor with a warning; here any other is taken for a sign of a wrong `config.json`."""
    if COMPUTED.search(name) or SPECULATION.search(name):
        return True
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    layer = LAYER.search(name)
    return layer is not None and layers <= int(layer[1]) < layers + further


def _check_sizes(config: CheckpointConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse what transformers would take memory for, to find then that it does not fit.

    Raises:
        CheckpointError: a size that the files contradict.
    """
    layers = max((int(i) for name in stored for i in NUMBER.findall(name)), default=0) + 1
    sides = {side for tensor in stored.values() for side in tensor.shape}
    longest = max(sides, default=0)
    for part in (config, config.part("text_config")):
        for field, value in part.integers_by_name().items():
            if field in LAYER_FIELDS and not 0 < value <= layers:
                raise part.error(field, f"says {value} layers, the files have {layers} at most")
            if field in WIDTH_FIELDS and value not in sides:
                raise part.error(field, f"says {value}, and no tensor has a side of that")
            if field.endswith(SIZE_ENDINGS) and value > longest:
                raise part.error(field, f"says {value}, the longest side of a tensor is {longest}")
            if abs(value) > MAX_CONTEXT:
                raise part.error(field, f"{value} is no size of a model")


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
        torch.randint(text.vocab_size, (length,), generator=generator).to(model.device)
        for length in PROBE_LENGTHS
    ]
    alone = _alone(model, rows)
    try:
        model.set_attn_implementation(NAME)
        _, calls = _run(model, ForwardBatch.pack(rows, device=model.device))
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
    """The logits of each row as transformers computes them."""
    try:
        logits = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
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
