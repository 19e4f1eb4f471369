"""The native decoder computes what the reference implementations compute."""

import pytest
import torch

from tests.device import TEST_DEVICE, pack
from tests.golden import GOLDEN_DIR, GoldenCase, golden_cases
from tests.models.plain_kernels import use_plain_kernels
from vdiff_kserve.models import (
    Hints,
    KeyValueStore,
    RowSpan,
    load_causal_decoder,
    load_decoder,
    loader,
)

DENSE = {"atol": 5e-4, "rtol": 1e-4}
MOE = {"atol": 2e-3, "rtol": 1e-3}


def visible_rows(case: GoldenCase) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The rows without padding, and the mask of the tokens that are not padding."""
    input_ids = case.tensor("input_ids")
    mask = case.tensor("attention_mask").bool() if case.has("attention_mask") else input_ids >= 0
    return [ids[visible] for ids, visible in zip(input_ids, mask, strict=True)], mask


@pytest.mark.parametrize(
    "case",
    [
        case
        for family in ("llada", "dream", "sdar", "fast_dllm_v2", "llada_moe", "llada2")
        for case in golden_cases(family, "logits")
    ],
    ids=lambda case: f"{case.family}-{case.name}",
)
@pytest.mark.parametrize("joined", [False, True])
@torch.inference_mode()
def test_golden_logits(case: GoldenCase, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers are computed on a CPU, and as on a GPU: those of one input joined, the operations
    between products as its kernels have them."""
    if joined:
        monkeypatch.setattr(loader, "can_pack", lambda *_: False)
        monkeypatch.setattr(loader, "gains_from_joining", lambda _: True)
        use_plain_kernels(monkeypatch)
    decoder, _ = load_decoder(
        case.folder, TEST_DEVICE, hints=Hints(block_length=case.params.get("block_length"))
    )
    assert decoder.layers[0].attention.is_joined == (joined or TEST_DEVICE.type == "cuda")
    if case.params["attention_mask"] == "full bidirectional":
        for layer in decoder.layers:
            layer.attention.attention_block = None
    rows, mask = visible_rows(case)
    logits = decoder.logits(decoder(pack(rows))).cpu()
    tolerance = DENSE if decoder.config.moe is None else MOE
    torch.testing.assert_close(logits, case.tensor("logits")[mask], **tolerance)


@pytest.mark.parametrize("case", golden_cases("apd", "logits"), ids=lambda case: case.name)
@torch.inference_mode()
def test_golden_apd_logits(case: GoldenCase) -> None:
    """Of both models: the diffusion model and the causal one that checks it."""
    if case.name.startswith("ar_"):
        decoder = load_causal_decoder(GOLDEN_DIR / "apd" / "ar", TEST_DEVICE)
    else:
        decoder, _ = load_decoder(case.folder, TEST_DEVICE)
    logits = decoder.logits(decoder(pack(list(case.tensor("input_ids"))))).cpu()
    torch.testing.assert_close(logits, case.tensor("logits").flatten(0, 1), **DENSE)


def longest_case(family: str, prefix: str = "") -> GoldenCase:
    cases = golden_cases(family, "logits", prefix)
    return max(cases, key=lambda case: case.tensor("input_ids").shape[1])


@torch.inference_mode()
def test_golden_llada_wanted_outputs_equal_the_whole() -> None:
    case = longest_case("llada")
    decoder, _ = load_decoder(case.folder, TEST_DEVICE)
    row = case.tensor("input_ids")[0]
    whole = decoder(pack([row, row[:7]]))
    spans = [RowSpan(0, len(row), len(row), 2, 3), RowSpan(0, 7, 7, 0, 4)]
    some = decoder(pack([row, row[:7]], spans))
    expected = torch.cat([whole[2:5], whole[len(row) : len(row) + 4]])
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_golden_reuse_of_an_unchanged_canvas_equals_the_whole(family: str) -> None:
    """Cached and uncached rows share a pass; a window of a canvas sees the rest in the cache."""
    case = longest_case(family)
    decoder, _ = load_decoder(case.folder, TEST_DEVICE)
    row = case.tensor("input_ids")[0]
    length, config = len(row), decoder.config
    shape = (config.num_layers, 2 * length + 3, config.num_kv_heads, config.head_dim)
    store = KeyValueStore(*(torch.zeros(shape, device=TEST_DEVICE) for _ in "kv"))
    rows = [row, row[:5], row.flip(0)]
    refresh = [
        RowSpan(0, length, length, 0, length, cache_offset=0),
        RowSpan.whole(5),
        RowSpan(0, length, length, 0, length, cache_offset=length + 3),
    ]
    whole = decoder(pack(rows, refresh, store)).split([length, 5, length])
    reuse = [
        RowSpan(4, 6, length, 5, 3, cache_offset=0),
        RowSpan.whole(5),
        RowSpan(2, 8, length, 2, 8, cache_offset=length + 3),
    ]
    parts = decoder(pack(rows, reuse, store)).split([3, 5, 8])
    torch.testing.assert_close(parts[0], whole[0][5:8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[2], whole[2][2:10], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_golden_apd_causal_continuation_equals_the_whole() -> None:
    case = longest_case("apd", "ar_logits")
    decoder = load_causal_decoder(GOLDEN_DIR / "apd" / "ar", TEST_DEVICE)
    row = case.tensor("input_ids")[0]
    length, config = len(row), decoder.config
    shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    store = KeyValueStore(*(torch.zeros(shape, device=TEST_DEVICE) for _ in "kv"))
    pieces = [RowSpan(0, 4, 4, 0, 4, 0), RowSpan(4, 3, 7, 4, 3, 0)]
    pieces.append(RowSpan(7, length - 7, length, 7, length - 7, 0))
    hidden = torch.cat([decoder(pack([row], [piece], store)) for piece in pieces])
    torch.testing.assert_close(hidden, decoder(pack([row])), atol=1e-5, rtol=1e-5)
