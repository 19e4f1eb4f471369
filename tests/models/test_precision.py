"""What `auto` means on which hardware."""

import pytest
import torch

from vdiff_kserve.models import CheckpointError, choose_device, choose_dtype, precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (set(), torch.float32),
        ({"avx512f", "avx2"}, torch.float32),
        ({"avx2", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
    ],
)
def test_auto_dtype_on_a_cpu_follows_its_instructions(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    assert choose_dtype("auto", CPU) == expected


def test_auto_dtype_on_a_gpu_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_flags", set)
    assert choose_dtype("auto", GPU) == torch.bfloat16


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("half", torch.float16),
        ("float32", torch.float32),
        ("float", torch.float32),
    ],
)
def test_named_dtype_is_taken_as_it_is(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert choose_dtype(name, device) == dtype


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_device_is_the_gpu_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto").type == expected
    assert choose_device("cpu") == CPU


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"no device cuda:97: PyTorch .* sees "):
        choose_device("cuda:97")
