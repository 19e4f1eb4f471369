"""Kernels of layers: what they compute, in Triton's interpreter, and that compilers for GPUs take
them. On a GPU, `test_gpu.py` runs them."""

import logging

import pytest
import torch

from tests.triton_kernels import compile_for_gpus, needs_triton, run_interpreted
from vdiff_kserve.models import fused

CPU = torch.device("cpu")


@needs_triton
def test_kernels_compute_what_layers_compute() -> None:
    """Also that wrong ones are noticed before they are used."""
    run_interpreted("tests.models.interpreted_kernels")


@needs_triton
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rms_norm_kernel", {"BLOCK": 4096}),
        ("rotate_kernel", {"HEADS": 32, "BLOCK": 128}),
        ("silu_product_kernel", {"BLOCK": fused.PRODUCT_BLOCK}),
    ],
)
def test_compilers_for_gpus_take_the_kernels(name: str, sizes: dict[str, int]) -> None:
    from vdiff_kserve.models import fused_kernels

    kernel = getattr(fused_kernels, name)
    types = dict.fromkeys(("x", "weight", "out", "gate", "up"), "*bf16")
    types |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    compile_for_gpus(kernel, {k: v for k, v in types.items() if k in kernel.arg_names}, sizes)


def test_a_cpu_takes_the_plain_operations() -> None:
    with torch.inference_mode():
        assert not fused.usable(torch.ones(2, 8, dtype=torch.bfloat16))


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
