"""Packed attention takes the same rows apart as the per-row reference; the kernel needs a GPU."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.device import pack
from tests.engine.tiny import CONFIG, tiny_decoder
from vdiff_kserve.models import Decoder, KeyValueStore, RowSpan, cpu_pass, split_attention
from vdiff_kserve.models import attention as packed_attention
from vdiff_kserve.models import decoder as decoder_module
from vdiff_kserve.models.attention import (
    PackedRows,
    VarlenCall,
    has_kernel,
    pack_rows,
    run_kernel,
    sequences_of,
)
from vdiff_kserve.models.split_attention import LONGEST

CPU = torch.device("cpu")
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, causal: bool
) -> Tensor:
    """What the kernel is documented to do, sequence by sequence."""
    output = torch.full_like(query, torch.nan)
    assert len(call.cu_queries) == len(call.cu_keys)
    assert call.max_queries > 1, "the kernel takes another path at 1"
    assert call.cu_keys.dtype == call.cu_queries.dtype == torch.int32
    bounds = zip(
        itertools.pairwise(call.cu_queries.tolist()),
        itertools.pairwise(call.cu_keys.tolist()),
        strict=True,
    )
    for (q_start, q_end), (k_start, k_end) in bounds:
        assert 0 <= q_end - q_start <= call.max_queries
        if q_end == q_start:
            continue
        assert 0 <= k_start <= k_end <= len(key)
        assert k_end - k_start <= call.max_keys
        if k_end == k_start:
            output[q_start:q_end] = 0
            continue
        mask = None
        if causal:
            queries, keys = q_end - q_start, k_end - k_start
            every = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = every.tril(keys - queries)
        q, k, v = (
            each.transpose(0, 1)[None]
            for each in (query[q_start:q_end], key[k_start:k_end], value[k_start:k_end])
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        output[q_start:q_end] = attended[0].transpose(0, 1)
    return output


def store_for(decoder: Decoder, places: int, seed: int = 0) -> KeyValueStore:
    config = decoder.config
    shape = (config.num_layers, places, config.num_kv_heads, config.head_dim)
    keys, values = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))
    return KeyValueStore(keys.to(decoder.device), values.to(decoder.device))


def use_packed(
    monkeypatch: pytest.MonkeyPatch, *, for_few_queries: bool = True
) -> list[VarlenCall]:
    """Let the decoder pack rows as on a GPU, with the plain kernel; returns the calls it makes.

    Args:
        for_few_queries: whether there is the kernel that also takes keys in any order.
    """
    calls: list[VarlenCall] = []

    def kernel(*args: object) -> Tensor:
        calls.append(args[3])
        return plain_kernel(*args)

    monkeypatch.setattr(cpu_pass, "can_run", lambda *_: False)
    monkeypatch.setattr(decoder_module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(packed_attention, "run_kernel", kernel)
    longest = LONGEST if for_few_queries else 0
    monkeypatch.setattr(split_attention, "usable", lambda *_: for_few_queries)
    monkeypatch.setattr(split_attention, "takes", lambda queries, *_: queries <= longest)
    return calls


def mixed_rows(rng: random.Random) -> tuple[list[Tensor], list[RowSpan], int]:
    """Rows with and without a cache, whole and in part, in the order of their places."""
    canvases, spans, place = [], [], 0
    for i in range(rng.randint(1, 7)):
        length = rng.randint(9, 30)
        canvases.append(torch.tensor(rng.choices(range(CONFIG.vocab_size), k=length)))
        cached = i >= rng.randint(0, 3)
        start = rng.randint(0, length - 8) if cached and rng.random() < 0.7 else 0
        end = rng.randint(start + 4, length) if start else length
        first = rng.randint(start, end - 2)
        outputs = rng.randint(1, end - first)
        if not cached and any(span.cache_offset is not None for span in spans):
            cached = True
        if cached:
            place += rng.randint(0, 5)
        offset = place if cached else None
        spans.append(RowSpan(start, end - start, length, first, outputs, offset))
        place += length if cached else 0
    return canvases, spans, place + 3


@pytest.mark.parametrize("seed", range(20))
@torch.inference_mode()
def test_packed_rows_equal_rows_one_by_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    canvases, spans, places = mixed_rows(random.Random(seed))
    expected = decoder(pack(canvases, spans, store_for(decoder, places)))
    calls = use_packed(monkeypatch)
    batch = pack(canvases, spans, store_for(decoder, places))
    assert batch.packed(None, False) is not None
    torch.testing.assert_close(decoder(batch), expected, **TOLERANCE)
    kinds = len({span.cache_offset is None for span in spans})
    assert len(calls) == kinds * decoder.config.num_layers


@pytest.mark.parametrize("queries", [4, 8, 12])
@torch.inference_mode()
def test_causal_rows_take_the_causal_kernel(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(attention_block=1)
    canvas = torch.arange(12)
    span = RowSpan(12 - queries, queries, 12, 12 - queries, queries, cache_offset=2)
    expected = decoder(pack([canvas], [span], store_for(decoder, 16)))
    calls = use_packed(monkeypatch)
    packed = decoder(pack([canvas], [span], store_for(decoder, 16)))
    torch.testing.assert_close(packed, expected, **TOLERANCE)
    assert len(calls) == decoder.config.num_layers


@pytest.mark.parametrize("for_few_queries", [False, True])
@pytest.mark.parametrize(("start", "masked_calls"), [(8, 0), (4, 1), (0, 1)])
@torch.inference_mode()
def test_passes_over_several_blocks_of_a_block_causal_model(
    start: int, masked_calls: int, for_few_queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel knows no block mask: a pass of one block needs none, others go row by row. The
    kernel for few queries takes each block by itself. Only one block is wanted of the last
    layer."""
    decoder = tiny_decoder(attention_block=4)
    canvas = torch.arange(12)
    span = RowSpan(start, 12 - start, 12, 8, 4, cache_offset=0)
    expected = decoder(pack([canvas], [span], store_for(decoder, 12)))
    calls = use_packed(monkeypatch, for_few_queries=for_few_queries)
    packed = decoder(pack([canvas], [span], store_for(decoder, 12)))
    torch.testing.assert_close(packed, expected, **TOLERANCE)
    assert len(calls) == decoder.config.num_layers - (0 if for_few_queries else masked_calls)


@pytest.mark.parametrize("seed", range(10))
@torch.inference_mode()
def test_packed_block_causal_rows_equal_rows_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which a pass computes the last positions that a row has so far, and wants the last of
    those."""
    decoder, rng = tiny_decoder(attention_block=4), random.Random(seed)
    canvases, spans, place = [], [], 0
    for i in range(rng.randint(1, 6)):
        length = rng.randint(5, 30)
        cached = i >= rng.randint(0, 3) or any(span.cache_offset is not None for span in spans)
        start = rng.randint(0, length - 1) // 4 * 4 if cached else 0
        outputs = rng.randint(1, length - start)
        offset = place + rng.randint(0, 3) if cached else None
        canvases.append(torch.tensor(rng.choices(range(CONFIG.vocab_size), k=length)))
        spans.append(RowSpan(start, length - start, length, length - outputs, outputs, offset))
        place = offset + length if cached else place
    stores = [store_for(decoder, place + 3) for _ in range(2)]
    expected = decoder(pack(canvases, spans, stores[0]))
    calls = use_packed(monkeypatch)
    torch.testing.assert_close(decoder(pack(canvases, spans, stores[1])), expected, **TOLERANCE)
    torch.testing.assert_close(stores[1].keys, stores[0].keys, **TOLERANCE)
    kinds = len({span.cache_offset is None for span in spans})
    assert len(calls) == kinds * decoder.config.num_layers


def test_rows_that_no_call_can_take_are_left_to_the_reference() -> None:
    def packed(keys: list[int], offsets: list[int | None]) -> PackedRows | None:
        return pack_rows([[(4, each)] for each in keys], [4] * len(keys), keys, offsets, CPU)

    assert packed([8, 8], [0, 8]).is_ordered
    assert not packed([8, 8], [8, 0]).is_ordered
    assert not packed([8, 8], [0, 4]).is_ordered, "overlapping places"
    assert packed([8, 4], [0, None]) is None, "no place behind one"
    assert packed([8], [None]) is None, "keys that are nowhere"


def test_the_places_between_rows_belong_to_sequences_without_queries() -> None:
    cu_queries, cu_keys = sequences_of([3, 2], [5, 20], [10, 4])
    assert cu_queries == [0, 0, 3, 3, 5]
    assert cu_keys == [0, 5, 15, 20, 24]


def test_the_kernel_is_for_gpus_and_their_number_types() -> None:
    assert not has_kernel(CPU, torch.bfloat16, 64)
    assert not has_kernel(torch.device("cuda"), torch.float32, 64)
    assert not has_kernel(torch.device("cuda"), torch.bfloat16, 260)
    assert not has_kernel(torch.device("cuda"), torch.bfloat16, 20)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"is_causal", "return_aux"}, {"is_causal": True}),
        ({"window_size", "seqused_k"}, {"window_size": (-1, 0)}),
        ({"window_size", "enable_gqa"}, {"window_size": (-1, 0), "enable_gqa": True}),
    ],
    ids=["torch 2.10", "between", "torch 2.12"],
)
def test_each_torch_is_told_what_its_kernel_knows(
    known: set[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "_parameters", lambda _: known)
    assert packed_attention._options.__wrapped__(grouped=True, causal=True) == expected
    assert packed_attention._options.__wrapped__(grouped=False, causal=False) == {}


@pytest.mark.parametrize(("causal", "taken"), [(False, True), (True, False)])
def test_few_queries_that_see_all_keys_have_a_kernel_of_their_own(
    causal: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = torch.randn(3, 6, 2, 8)
    bounds = torch.tensor([[0, 0, 6], [0, 0, 6]], dtype=torch.int32)
    call = VarlenCall(bounds[0], bounds[1], 6, 6)
    calls: list[str] = []

    def kernel(name: str) -> Callable[..., Tensor]:
        def attend(*_: object, **__: object) -> Tensor:
            calls.append(name)
            return query

        return attend

    assert not split_attention.usable(query, key, value, call), "a CPU has none"
    monkeypatch.setattr(split_attention, "usable", lambda *_: True)
    monkeypatch.setattr(split_attention, "attend", kernel("split"))
    monkeypatch.setattr(packed_attention, "_kernel", lambda: kernel("long"))
    monkeypatch.setattr(packed_attention, "_options", lambda *_: {})
    run_kernel(query, key, value, call, causal)
    assert calls == ["split" if taken else "long"]


def test_this_torch_knows_the_keywords_that_it_is_given() -> None:
    """Also the positional ones, by their names."""
    known = packed_attention._parameters(packed_attention._kernel())
    positional = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}
    assert positional | set(packed_attention._options(True, True)) <= known


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.inference_mode()
def test_this_torch_takes_the_calls(
    kv_heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and types of tensors on a GPU that have no numbers; keys are a layer of the cache."""
    monkeypatch.setattr(split_attention, "usable", lambda *_: False)
    with FakeTensorMode():
        store = torch.empty(3, 200, kv_heads, 64, device="cuda", dtype=torch.bfloat16)
        query = torch.empty(40, 4, 64, device="cuda", dtype=torch.bfloat16)
        bounds = torch.empty(2, 9, device="cuda", dtype=torch.int32).unbind()
        keys = store.select(0, 1)
        attended = run_kernel(query, keys, keys, VarlenCall(*bounds, 32, 96), causal)
    assert attended.shape == query.shape
    assert (attended.dtype, attended.device.type) == (query.dtype, "cuda")
