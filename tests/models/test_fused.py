"""Kernels of layers: what they compute, in Triton's interpreter, and that compilers for GPUs take
them. On a GPU, `test_gpu.py` runs them."""

import logging

import pytest
import torch

from tests.triton_kernels import compile_for_gpus, needs_triton, run_interpreted
from vdiff_kserve.models import fused, fused_experts, split_attention
from vdiff_kserve.models.moe import MoEConfig

CPU = torch.device("cpu")


@needs_triton
def test_kernels_compute_what_layers_compute() -> None:
    """Also that wrong ones are noticed before they are used."""
    run_interpreted("tests.models.interpreted_kernels")


TYPES = dict.fromkeys(("x", "other", "weight", "total", "out", "gate", "up"), "*bf16")
TYPES |= dict.fromkeys(("query_weight", "key_weight", "query", "key", "value"), "*bf16")
TYPES |= dict.fromkeys(("kept_keys", "kept_values"), "*bf16") | {"places": "*i64"}
TYPES |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32", "scale": "fp32"}
TYPES |= dict.fromkeys(("cu_queries", "cu_keys"), "*i32")
TYPES |= dict.fromkeys(("parts", "weights"), "*fp32")


FP8 = {"LARGEST": fused.LARGEST_FP8, "LEAST": fused.LEAST_FP8_SCALE}


@needs_triton
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rms_norm_kernel", {"ADDS": True, "ROUNDS": False, "BLOCK": 4096} | FP8),
        ("heads_kernel", {"NORMS": True, "KEEPS": True, "HEADS": fused.HEADS, "BLOCK": 128}),
        ("silu_product_kernel", {"BLOCK": fused.PRODUCT_BLOCK}),
    ],
)
def test_compilers_for_gpus_take_the_kernels(name: str, sizes: dict[str, int]) -> None:
    from vdiff_kserve.models import fused_kernels

    compile_for_gpus(getattr(fused_kernels, name), TYPES, sizes)


@needs_triton
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rms_norm_kernel", {"ADDS": True, "ROUNDS": True, "BLOCK": 4096}),
        ("round_kernel", {"BLOCK": 4096}),
        ("round_product_kernel", {"BLOCK": fused.LARGEST_ROW}),
    ],
)
def test_compilers_for_gpus_that_have_fp8_take_its_kernels(name: str, sizes: dict) -> None:
    from vdiff_kserve.models import fused_kernels

    types = TYPES | dict.fromkeys(("out", "values"), "*fp8e4nv") | {"scales": "*fp32"}
    warps = fused._warps(sizes["BLOCK"])
    compile_for_gpus(
        getattr(fused_kernels, name), types, sizes | FP8, (89, 90, 100), num_warps=warps
    )


@needs_triton
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "choose_kernel",
            {"SOFTMAX": False, "BIASED": True, "RENORMALIZES": True, "GROUPS": 8, "KEPT": 4}
            | {"CHOSEN": 8, "SLOTS": 8, "BLOCK": 256},
        ),
        ("spread_kernel", {"CHOSEN": 8, "EXPERTS": 256, "BLOCK": 2048}),
        ("join_kernel", {"ADDS": True, "CHOSEN": 8, "BLOCK": fused_experts.JOINED_BLOCK}),
    ],
)
def test_compilers_for_gpus_take_the_kernels_of_experts(name: str, sizes: dict[str, int]) -> None:
    from vdiff_kserve.models import fused_experts_kernels

    types = dict.fromkeys(("x", "rows", "computed", "other", "out"), "*bf16")
    types |= dict.fromkeys(("logits", "bias", "weights"), "*fp32") | {"scaling": "fp32"}
    types |= dict.fromkeys(("experts", "ranks", "places", "counts", "chosen", "ends"), "*i32")
    compile_for_gpus(getattr(fused_experts_kernels, name), types, sizes)


@needs_triton
@pytest.mark.parametrize(
    ("group", "size"),
    [
        (7, 128),
        pytest.param(1, 128, marks=pytest.mark.slow),
        pytest.param(4, 256, marks=pytest.mark.slow),
    ],
)
def test_compilers_for_gpus_take_attention_of_few_queries(group: int, size: int) -> None:
    from vdiff_kserve.models import split_attention_kernels as kernels

    tile = split_attention.tile_of(32 * group)
    sizes = {"GROUP": group, "ROWS": tile, "KEYS": split_attention.KEYS, "SIZE": size}
    options = split_attention.options_of(tile, size)
    compile_for_gpus(kernels.split_attention_kernel, TYPES, sizes, **options)
    compile_for_gpus(
        kernels.join_splits_kernel, TYPES, {"SPLITS": split_attention.MAX_SPLITS, "SIZE": size}
    )


def test_keys_are_split_where_rows_are_few() -> None:
    """132 multiprocessors take two programs each: eight for each of 32 heads, if there are as many
    keys."""
    assert split_attention.splits_of(32, 1024, 132) == 8
    assert split_attention.splits_of(32, 200, 132) == 4
    assert split_attention.splits_of(4 * 32, 8192, 132) == 2
    assert split_attention.splits_of(16 * 32, 8192, 132) == 1
    assert split_attention.splits_of(4, 8192, 132) == split_attention.MAX_SPLITS


def test_a_cpu_takes_the_plain_operations() -> None:
    with torch.inference_mode():
        x = torch.ones(2, 8, dtype=torch.bfloat16)
        assert not fused.usable(x)
        assert not fused_experts.usable(x, MoEConfig(4, 2, 8))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ImportError("No module named 'triton'"), "No module named 'triton'"),
        (RuntimeError("Failed to find C compiler"), "want of Triton: Failed to find C compiler"),
        (None, "wrong numbers"),
    ],
)
def test_layers_run_without_kernels_that_fail(
    fault: Exception | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def agrees(_: torch.device) -> bool:
        if fault is not None:
            raise fault
        return False

    monkeypatch.setattr(fused, "agrees", agrees)
    with caplog.at_level(logging.WARNING):
        assert not fused.works.__wrapped__(CPU)
    assert told in caplog.text
    assert len(caplog.records) == 1
