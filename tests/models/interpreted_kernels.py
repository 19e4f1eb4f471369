"""Run by `test_fused.py` with `TRITON_INTERPRET=1`, which must be set before Triton is imported."""

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.tiny import tiny_decoder
from tests.models.test_attention import mixed_rows, plain_kernel, store_for
from tests.models.test_reuse_graphs import PLACES, graphs_of, reuse_rows
from tests.triton_kernels import let_loops_begin_at_numbers_from_memory
from vdiff_kserve.models import (
    Decoder,
    ForwardBatch,
    KeyValueStore,
    RowSpan,
    fused,
    fused_experts,
    split_attention,
)
from vdiff_kserve.models import attention as packed_attention
from vdiff_kserve.models import decoder as decoder_module
from vdiff_kserve.models.attention import VarlenCall, sequences_of
from vdiff_kserve.models.layers import RMSNorm, rotary_angles, rotate
from vdiff_kserve.models.moe import Experts, MoEConfig, Router, SparseMLP

CPU = torch.device("cpu")
TOLERANCE = {
    torch.float16: dict(atol=1e-3, rtol=1e-3),
    # The interpreter cuts numbers off where a GPU rounds them.
    torch.bfloat16: dict(atol=0.02, rtol=0.02),
}
SHAPES = [(5, 24, 24), (9, 40, 32), (1, 8, 8)]


def compare(heads: int, size: int, rotary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(heads)
    x, other = torch.randn((2, 3, heads, size), generator=generator).to(dtype)
    norm, key_norm = (RMSNorm(size, 1e-5).to(dtype) for _ in "qk")
    for each in (norm, key_norm):
        each.weight.copy_(torch.randn(size, generator=generator))

    def check(got: Tensor, plain: Tensor) -> None:
        torch.testing.assert_close(got, plain, **TOLERANCE[dtype])

    check(fused.rms_norm(x, norm.weight, norm.eps), norm(x))
    total, normed = fused.add_rms_norm(x, other, norm.weight, norm.eps)
    check(total, x + other)
    check(normed, norm(x + other))
    pair = torch.cat((x, other), dim=-1).flatten(1)
    for gate, up in ((x.flatten(1), other.flatten(1)), pair.chunk(2, dim=-1)):
        check(fused.silu_product(gate, up), F.silu(gate) * up)
    for precision in (torch.float32, dtype):
        angles = rotary_angles(torch.tensor([0, 17, 900]), rotary, 1e4)
        cos, sin = (angle.to(precision) for angle in angles)
        check(fused.rotate(x, cos, sin), rotate(x, cos, sin))
        # Norms only where rounding twice as the interpreter does leaves something to compare.
        with_norms = {False, dtype == torch.float16}
        for kv_heads, normed in itertools.product({1, heads - 1} - {0}, with_norms):
            keys, values = torch.zeros((2, 7, kv_heads, size), dtype=dtype)
            kept = fused.Kept(keys, values, torch.tensor([5, 0, 6]))
            joined = torch.cat((x, other[:, :kv_heads], x[:, -kv_heads:]), dim=1)
            norms = fused.HeadNorms(norm.weight, key_norm.weight, 1e-5) if normed else None
            query, key, value = fused.heads(joined, kv_heads, cos, sin, norms, kept)
            own, theirs = x, other[:, :kv_heads]
            if normed:
                own, theirs = norm(own), key_norm(theirs)
            check(query, rotate(own, cos, sin))
            check(key, rotate(theirs, cos, sin))
            check(value, x[:, -kv_heads:])
            assert torch.equal(keys[kept.places], key)
            assert torch.equal(values[kept.places], value)
            assert not keys[1:5].any(), "written elsewhere"


def compare_rounding() -> None:
    """The numbers that are stored in fp8, before that: the interpreter rounds some to fp8 wrongly,
    and as a GPU stores them, `fused.rounding_agrees` checks."""
    fused.FP8 = torch.float32
    generator = torch.Generator().manual_seed(5)
    x, other = torch.randn((2, 6, 80), generator=generator).half()
    x *= torch.tensor([1, 100, 0.01, 0, 1, 1])[:, None].half()
    x[4, 3] = torch.nan
    weight = torch.randn(80, generator=generator).half()
    gate, up = torch.cat((x, other), dim=-1).chunk(2, dim=-1)
    summed = F.rms_norm(x + other, (80,), None, 1e-5) * weight
    total, *normed_sum = fused.round_norm(x, other, weight, 1e-5)
    torch.testing.assert_close(total, x + other, equal_nan=True)
    same, *normed = fused.round_norm(x, None, weight, 1e-5)
    assert same is x
    for (values, scales), plain in (
        (fused.round_rows(x), x),
        (normed_sum, summed),
        (normed, F.rms_norm(x, (80,), None, 1e-5) * weight),
        (fused.round_product(gate, up), F.silu(x) * other),
    ):
        good = plain.isfinite().all(dim=1)
        largest = plain.float().abs().amax(dim=1)
        torch.testing.assert_close(scales[good, 0], (largest / 448).clamp(min=1e-12)[good])
        torch.testing.assert_close(
            values * scales, plain.float(), atol=1e-4, rtol=2e-3, equal_nan=True
        )
        assert not (values.abs() > 448).any()
    fused.FP8 = torch.float8_e4m3fn


def compare_splits() -> None:
    """Rows of a captured pass with idle places, whose keys are spread over a layer of the cache, in
    float16: the interpreter multiplies no bfloat16. One has no keys."""
    generator = torch.Generator().manual_seed(1)
    counts, starts, lengths = [5, 1, 8, 3], [2, 90, 300, 429], [70, 1, 129, 0]
    cu_queries, cu_keys = sequences_of(counts, starts, lengths)
    idle = [cu_queries + cu_queries[-1:] * 2, cu_keys + cu_keys[-1:] * 2]
    bounds = torch.tensor(idle, dtype=torch.int32)
    call = VarlenCall(bounds[0], bounds[1], 8, 8000)
    for group, kv_heads, size, splits in ((1, 2, 16, 1), (3, 2, 24, 3), (9, 1, 16, 8)):
        store = torch.randn((440, 2, kv_heads, size), generator=generator).half()
        query = torch.randn((20, kv_heads * group, size), generator=generator).half()
        key, value = store.unbind(1)
        expected = plain_kernel(query, key, value, call, causal=False)[:17]
        got = split_attention.attend(query, key, value, call, splits)[:17]
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


Rows = tuple[list[Tensor], list[RowSpan], int]
CASES: list[tuple[Rows, bool]] = [
    ((*reuse_rows(2, random.Random(0)), PLACES), True),
    (mixed_rows(random.Random(4)), False),  # a row without a cache, and a block of one with it
    (mixed_rows(random.Random(8)), False),  # rows with a cache: a block of one, and a whole one
]


def run(decoder: Decoder, rows: Rows, is_captured: bool) -> list[Tensor]:
    """Hidden states, and the keys and values of all rows after the pass."""
    canvases, spans, places = rows
    store = store_for(decoder, places)
    store = KeyValueStore(store.keys.half(), store.values.half())
    if is_captured:
        states = graphs_of(decoder).run(canvases, spans, store)
    else:
        states = decoder(ForwardBatch.pack(canvases, spans, store))
    return [states, store.keys[:, :-1], store.values[:, :-1]]


def compare_decoders() -> None:
    """Passes whose layers are joined and take the kernels, with those that do not."""
    experts = MoEConfig(num_experts=4, experts_per_token=2, expert_size=16, shared_size=16)
    for changes in ({"qkv_bias": True}, {"qk_norm": True, "rotary_dim": 4, "moe": experts}):
        decoder = tiny_decoder(rope_in_float32=False, **changes)
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        for module in decoder.half().modules():
            if isinstance(module, Router):
                module.float()
        kept = []
        for is_fused in (False, True):
            if is_fused:
                decoder.join_layers()
                fused.usable = lambda x: x.is_contiguous() and x.dtype == torch.float16
            kept.append([state for case in CASES for state in run(decoder, *case)])
        fused.usable = lambda _: False
        for got, want in zip(*reversed(kept), strict=True):
            torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def compare_experts() -> None:
    """All of a layer in float16, on a CPU one expert after the other: groups of experts or none,
    experts of which some are held, more of them than a power of 2."""
    generator = torch.Generator().manual_seed(3)
    grouped = MoEConfig(
        8, 3, 16, "sigmoid", choice_bias=True, num_groups=4, groups_kept=2, shared_size=8
    )
    for config, first, held in (
        (grouped, 0, 8),
        (MoEConfig(12, 2, 16, renormalize=True), 0, 12),
        (MoEConfig(12, 5, 16, scaling=2.5), 3, 6),
    ):
        layer = SparseMLP(40, config)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        layer.half().router.float()
        layer.experts.hold(first, held)
        x = torch.randn((9, 40), generator=generator).half()
        x[4] = x[2]
        expected = layer(x)
        fused_experts.usable = lambda *_: True
        layer.experts.multiply = one_by_one(layer.experts)
        got = layer(x)
        fused_experts.usable = lambda *_: False
        torch.testing.assert_close(got, expected, atol=4e-3, rtol=4e-3)


def one_by_one(experts: Experts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As a GPU's kernel multiplies, which leaves anything for experts that are not held."""

    def multiply(x: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        counts = torch.bincount(chosen, minlength=len(ends))
        assert torch.equal(counts.cumsum(0).int(), ends)
        made = experts._one_by_one(x, chosen.long())
        return made.masked_fill((chosen >= experts.num_held)[:, None], torch.nan)

    return multiply


def choose_among_no_numbers() -> None:
    """Scores of one token are no numbers: the others' experts are as without it."""
    config = MoEConfig(16, 4, 8, "sigmoid", num_groups=4, groups_kept=2)
    logits = torch.randn((3, 16), generator=torch.Generator().manual_seed(0))
    without = fused_experts.spread(torch.zeros(3, 8).half(), logits, None, config)
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    copies = fused_experts.spread(torch.zeros(3, 8).half(), logits, None, config)
    assert torch.equal(copies.experts[0], without.experts[0])
    assert ((copies.experts >= 0) & (copies.experts < 16)).all()
    assert 5 not in copies.experts[2]
    assert sorted(copies.places.flatten().tolist()) == list(range(12))


def check_what_is_checked_before_use() -> None:
    assert fused.agrees(CPU)
    product = fused.silu_product
    fused.silu_product = lambda gate, up: gate * up
    assert not fused.agrees(CPU)
    fused.silu_product = product
    assert split_attention.agrees(CPU, torch.float16, 16, 2)
    attend = split_attention.attend
    split_attention.attend = lambda query, *_: query
    assert not split_attention.agrees(CPU, torch.float16, 16, 2)
    split_attention.attend = attend
    grouped = MoEConfig(16, 3, 8, "sigmoid", True, 2.5, True, num_groups=4, groups_kept=2)
    for config in (grouped, MoEConfig(12, 5, 8), MoEConfig(5, 1, 8)):
        assert fused_experts.agrees(CPU, config)
    join = fused_experts.join
    fused_experts.join = lambda *arguments: join(*arguments[:-1], None)
    assert not fused_experts.agrees(CPU, grouped)
    fused_experts.join = join


if __name__ == "__main__":
    let_loops_begin_at_numbers_from_memory()
    with torch.inference_mode():
        for shape, dtype in itertools.product(SHAPES, TOLERANCE):
            compare(*shape, dtype)
        compare_rounding()
        compare_splits()
        compare_experts()
        choose_among_no_numbers()
        check_what_is_checked_before_use()
        decoder_module.has_kernel = lambda *_: True
        packed_attention.run_kernel = plain_kernel
        compare_decoders()
