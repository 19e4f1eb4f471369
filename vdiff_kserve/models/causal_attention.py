"""Attention of transformers' causal models over the engine's packed rows.

transformers' models hand their attention to a function that is chosen by name. The one here writes
keys and values into the engine's store and lets each row see itself only, so that one pass over
rows laid end to end serves many requests at any stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vdiff_kserve.models.batch import ForwardBatch, RowSpan
from vdiff_kserve.models.layers import attend

NAME = "vdiff_rows"
"""The name by which transformers' models are told to use this attention."""


@dataclass
class AttentionCalls:
    """A pass that is running, and what its attention layers said of themselves.

    Attributes:
        reads_only: whether the rows' tokens see each other and what the store has before them, and
            leave nothing there (DiffusionGemma's canvas); else they see all to their left.
        shapes: (heads of keys and values, dimensions of a key, of a value) of each layer so far.
        windows: how many tokens each sees, itself included; None is all.
    """

    batch: ForwardBatch
    reads_only: bool = False
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


_CALLS: ContextVar[AttentionCalls] = ContextVar("vdiff_attention_calls")


@contextmanager
def attending(batch: ForwardBatch, *, reads_only: bool = False) -> Iterator[AttentionCalls]:
    """Within it, attention runs over the rows of `batch`."""
    calls = AttentionCalls(batch, reads_only)
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def attend_rows(
    module: nn.Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each row of the running pass.

    Args:
        query: [1, heads, tokens, dimensions], rows end to end; `key` and `value` alike, with heads
            of their own.
        scaling: of the scores; None is one over the root of the dimensions.
        sliding_window: how many tokens each sees, itself included; None is all.
        softcap: scores are bent below it (Gemma 2).
        s_aux: [heads], a score that takes attention away from all tokens (gpt-oss).

    Returns:
        [1, tokens, heads, dimensions of a value]
    """
    calls = _CALLS.get()
    batch, layer = calls.batch, len(calls.shapes)
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    calls.shapes.append((key.shape[1], key.shape[2], value.shape[2]))
    calls.windows.append(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if calls.reads_only:
        rows = _Rows(query, key, value, batch, layer)
        canvases = [_attend_canvas(rows, span, scale, sliding_window) for span in batch.spans]
        return torch.cat(canvases)[None], None
    _keep(key, value, batch, layer)
    longest = max(span.keys for span in batch.spans)
    windowed = sliding_window is not None and sliding_window < longest
    store = batch.store
    uneven = key.shape[2] != value.shape[2] or (
        store is not None and store.keys.shape[2:] != key.shape[1:]
    )
    if windowed or uneven or softcap is not None or s_aux is not None:
        window = sliding_window if windowed else None
        rows = _Rows(query, key, value, batch, layer)
        attended = [
            _attend_row(*rows.take(span), scale, window, softcap, s_aux) for span in batch.spans
        ]
        return torch.cat(attended)[None], None
    ratio = scale * math.sqrt(query.shape[-1])
    query = query if ratio == 1 else query * ratio
    cached = None if store is None else (store.keys[layer], store.values[layer])
    flat = attend(query, key, value, batch.groups, cached, block=1)
    return flat.unflatten(-1, (query.shape[1], -1))[None], None


AttentionInterface.register(NAME, attend_rows)


def _keep(key: Tensor, value: Tensor, batch: ForwardBatch, layer: int) -> None:
    """Write the new keys and values to the store. Where layers differ in shape, it has room for the
    widest, and each lays its heads end to end there."""
    if batch.store is None or batch.cache_places is None:
        return
    places, tokens = batch.cache_places, batch.cached_tokens
    for stored, fresh in ((batch.store.keys[layer], key), (batch.store.values[layer], value)):
        kept = fresh if tokens is None else fresh[tokens]
        if stored.shape[1:] == fresh.shape[1:]:
            stored[places] = kept
        else:
            stored[places, 0, : kept[0].numel()] = kept.flatten(1)


class _Rows:
    """Takes the rows of a pass apart, one after the other."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, layer: int
    ) -> None:
        self._query, self._key, self._value = query, key, value
        self._store, self._layer = batch.store, layer
        self._start = 0

    def fresh(self, span: RowSpan) -> tuple[Tensor, Tensor, Tensor]:
        """The next row's queries, keys and values of this pass, [tokens, heads, dimensions]."""
        here = slice(self._start, self._start + span.queries)
        self._start += span.queries
        return self._query[here], self._key[here], self._value[here]

    def stored(self, span: RowSpan, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row's tokens from `first` to `end`."""
        assert self._store is not None
        assert span.cache_offset is not None
        places = slice(span.cache_offset + first, span.cache_offset + end)
        key, value = (
            stored[self._layer, places]
            if stored.shape[2:] == fresh.shape[1:]
            else stored[self._layer, places, 0, : fresh[0].numel()].unflatten(-1, fresh.shape[1:])
            for stored, fresh in (
                (self._store.keys, self._key),
                (self._store.values, self._value),
            )
        )
        return key, value

    def take(self, span: RowSpan) -> tuple[Tensor, Tensor, Tensor]:
        """The next row's queries, and all keys and values that it may see."""
        query, key, value = self.fresh(span)
        if span.cache_offset is None:
            return query, key, value
        return query, *self.stored(span, 0, span.keys)


def _attend_canvas(rows: _Rows, span: RowSpan, scale: float, window: int | None) -> Tensor:
    """One row's canvas: it sees all of itself, and what lies before it; in a layer with a window
    the last `window` - 1 tokens of that."""
    query, key, value = rows.fresh(span)
    first = 0 if window is None else max(0, span.start - window + 1)
    if span.start > first:
        before = rows.stored(span, first, span.start)
        key, value = (torch.cat(each) for each in zip(before, (key, value), strict=True))
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
    return attended[0].transpose(0, 1)


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """One row's attention: [queries, heads, dimensions of a value]. The queries are the last of
    the keys."""
    keys, queries = len(key), len(query)
    first = 0 if window is None else max(0, keys - queries - window + 1)
    q, k, v = (t.transpose(0, 1) for t in (query, key[first:], value[first:]))
    mask = _mask(queries, keys - first, window, query.device)
    if softcap is None and s_aux is None:
        gqa = q.shape[0] != k.shape[0]
        attended = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=gqa
        )[0]
        return attended.transpose(0, 1)
    repeats = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = (q @ k.transpose(1, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype)[:, None, None].expand(-1, queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[1]].to(q.dtype)
    return (weights @ v).transpose(0, 1)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [queries, keys], what the last `queries` of `keys` tokens see; None is all."""
    if queries == 1:
        return None
    places = torch.arange(keys, device=device)
    behind = places[keys - queries :, None] - places
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)
