"""Passes of the CPU library: the same numbers as layer by layer, for every shape of a batch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from tests.device import needs_cpu_library
from vdiff_kserve import cpu_library
from vdiff_kserve.models import (
    Decoder,
    DecoderConfig,
    ForwardBatch,
    KeyValueStore,
    RowSpan,
    pack_linear_layers,
)
from vdiff_kserve.models import cpu_pass as cpu_pass_module
from vdiff_kserve.models.cpu_pass import CpuPass
from vdiff_kserve.models.decoder import LayerwisePass
from vdiff_kserve.models.moe import MoEConfig

if TYPE_CHECKING:
    from vdiff_kserve.models.sharding import VocabShard

pytestmark = needs_cpu_library

VOCAB = 50
LLADA = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=72,
    intermediate_size=200,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_in_float32=True,
    tie_embeddings=True,
)
DREAM = replace(LLADA, num_kv_heads=2, qkv_bias=True, rope_in_float32=False, tie_embeddings=False)
SDAR = replace(LLADA, num_kv_heads=1, qk_norm=True, attention_block=16)
PARTLY_ROTATED = replace(LLADA, head_dim=48, rotary_dim=20)
SEEN_IN_TURN = replace(LLADA, num_layers=1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def build(config: DecoderConfig) -> Decoder:
    """A packed decoder with random weights, biases and norms."""
    torch.manual_seed(0)
    decoder = Decoder(config).bfloat16()
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 4)
    pack_linear_layers(decoder)
    return decoder


def empty_store(config: DecoderConfig, tokens: int = 600) -> KeyValueStore:
    """A cache whose places all hold something."""
    torch.manual_seed(1)
    shape = config.num_layers, tokens, config.num_kv_heads, config.head_dim
    return KeyValueStore(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())


def canvases(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randint(VOCAB, (length,)) for length in lengths]


SPANS = {
    "whole": [RowSpan.whole(130), RowSpan.whole(7), RowSpan.whole(64)],
    "whole, some wanted": [RowSpan(0, 96, 96, 64, 32), RowSpan(0, 40, 40, 0, 3)],
    "none wanted": [RowSpan(0, 96, 96, 64, 0, 10), RowSpan(0, 40, 40, 0, 0)],
    "kept": [RowSpan(0, 96, 96, 64, 32, 10), RowSpan(0, 48, 48, 32, 16, 200)],
    "cached": [RowSpan(64, 32, 128, 64, 32, 10), RowSpan(0, 16, 150, 0, 16, 200)],
    "all of these": [
        RowSpan.whole(130),
        RowSpan(64, 32, 128, 64, 32, 10),
        RowSpan(0, 96, 96, 64, 32, 300),
    ],
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize(
    "config",
    [LLADA, DREAM, SDAR, PARTLY_ROTATED, SEEN_IN_TURN],
    ids=["llada", "dream", "sdar", "partly rotated", "one layer"],
)
def test_a_pass_gives_what_its_layers_give(config: DecoderConfig, spans: list[RowSpan]) -> None:
    """To the bit, in the wanted hidden states and in all of the cache."""
    decoder, rows = build(config), canvases(*(span.keys for span in spans))
    outputs, stores = [], []
    for kind in (CpuPass, LayerwisePass):
        store = empty_store(config)
        batch = ForwardBatch.pack(rows, spans, store)
        whole = decoder.begin(batch)
        assert isinstance(whole, CpuPass)
        if kind is LayerwisePass:
            whole = LayerwisePass(decoder, batch)
        whole.advance(config.num_layers)
        outputs.append(whole.outputs)
        stores.append(store)
    assert outputs[0].isfinite().all()
    assert outputs[0].equal(outputs[1])
    assert stores[0].keys.equal(stores[1].keys)
    assert stores[0].values.equal(stores[1].values)


def test_a_pass_may_stop_between_layers() -> None:
    decoder = build(LLADA)
    batch = ForwardBatch.pack(canvases(100))
    slices = decoder.begin(batch)
    for layers, left in ((0, 3), (1, 2), (0, 2), (2, 0), (5, 0)):
        slices.advance(layers)
        assert slices.layers_left == left
    assert slices.outputs.equal(decoder(batch))


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    decoder, rows = build(LLADA), [row % (VOCAB - 1) for row in canvases(130, 60, 64)]
    clean = decoder(ForwardBatch.pack(rows)).split([130, 60, 64])
    decoder.embed_tokens.weight[-1] = torch.nan
    rows[1][5] = VOCAB - 1
    first, own, last = decoder(ForwardBatch.pack(rows)).split([130, 60, 64])
    assert first.equal(clean[0])
    assert own.isnan().all(), "all tokens of a row see each other"
    assert last.equal(clean[2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_the_same_in_any_batch_and_with_any_threads(threads: int) -> None:
    decoder, rows = build(LLADA), canvases(130, 57, 97, 96)
    alone = torch.cat([decoder(ForwardBatch.pack([row])) for row in rows])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = decoder(ForwardBatch.pack(rows))
    finally:
        torch.set_num_threads(before)
    assert together.equal(alone)


def begins(decoder: Decoder, *lengths: int) -> type:
    return type(decoder.begin(ForwardBatch.pack(canvases(*lengths))))


def test_other_decoders_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert begins(build(LLADA), 100) is CpuPass
    experts = MoEConfig(
        num_experts=4, experts_per_token=2, expert_size=32, shared_size=0, scoring="softmax"
    )
    plain = Decoder(LLADA).bfloat16()
    for other in (build(LLADA).float(), plain, build(replace(LLADA, moe=experts))):
        assert begins(other, 100) is LayerwisePass
    sharded = build(LLADA)
    sharded.vocab_shard = cast("VocabShard", object())
    assert begins(sharded, 100) is LayerwisePass
    monkeypatch.setattr(cpu_pass_module, "works", lambda: False)
    assert begins(build(LLADA), 100) is LayerwisePass


def test_layers_of_many_weights_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, inner, heads = LLADA.hidden_size, LLADA.intermediate_size, 4 * 32
    weights = 4 * hidden * heads + 3 * hidden * inner
    for largest, kind in ((weights, CpuPass), (weights - 1, LayerwisePass)):
        monkeypatch.setattr(cpu_pass_module, "LARGEST_LAYER", largest)
        assert begins(build(LLADA), 100) is kind


def test_a_few_tokens_of_a_wide_layer_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most threads would have none of them."""
    narrow, wide = build(LLADA), build(replace(LLADA, hidden_size=1024, intermediate_size=1024))
    for threads, tokens, of_wide in (
        (2, 6, LayerwisePass), (2, 7, CpuPass), (16, 48, LayerwisePass), (16, 49, CpuPass)
    ):  # fmt: skip
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert begins(narrow, 1) is begins(narrow, tokens) is CpuPass
        assert begins(wide, tokens) is of_wide


def test_tokens_are_grouped_as_the_library_groups_them() -> None:
    header = Path(cpu_library.__file__).with_name("linear.h").read_text(encoding="utf-8")
    assert f"constexpr int GROUP = {cpu_pass_module.GROUP};" in header


def test_empty_lanes_go_layer_by_layer() -> None:
    decoder, causal = build(LLADA), build(replace(LLADA, attention_block=1))
    assert begins(causal, 100) is LayerwisePass
    last_wanted = ForwardBatch.pack(canvases(100), [RowSpan(0, 100, 100, 99, 1)])
    assert isinstance(causal.begin(last_wanted), LayerwisePass)
    assert begins(build(replace(LLADA, head_dim=24)), 100) is LayerwisePass
    with torch.inference_mode(mode=False):
        assert begins(decoder, 100) is LayerwisePass, "gradients are wanted"


def test_weights_that_move_are_found_again() -> None:
    decoder, batch = build(LLADA), ForwardBatch.pack(canvases(100))
    before = decoder(batch)
    decoder.norm.weight = torch.nn.Parameter(decoder.norm.weight * 2)
    for block in decoder.layers:
        block.mlp_norm.weight = torch.nn.Parameter(torch.zeros_like(block.mlp_norm.weight))
    decoder.bfloat16()
    after = decoder(batch)
    assert not after.equal(before)
    layerwise = LayerwisePass(decoder, batch)
    layerwise.advance(3)
    assert after.equal(layerwise.outputs)


def test_wrong_steps_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_pass_module.agrees()
    right = cpu_pass_module.library()

    class Wrong:
        """Leaves out the last layer."""

        @staticmethod
        def run_layers(layers: Any, count: int, begin: int, end: int, *rest: Any) -> None:
            right.run_layers(layers, count, begin, end - 1, *rest)

    monkeypatch.setattr(cpu_pass_module, "library", lambda: Wrong)
    assert not cpu_pass_module.agrees()
