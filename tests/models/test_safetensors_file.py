"""Reading parts of stored tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vdiff_kserve.models import safetensors_file
from vdiff_kserve.models.safetensors_file import TensorReader, read_header


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_part_along_any_dimension(
    dim: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pieces end inside a row."""
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 52)
    whole = torch.arange(6 * 5 * 8, dtype=torch.float32).view(6, 5, 8)
    save_file({"before": torch.zeros(3), "tensor": whole}, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")["tensor"].part(dim, 2, 3)
    expected = whole.narrow(dim, 2, 3).to(dtype)
    target = torch.empty_like(expected, memory_format=torch.contiguous_format)
    assert stored.shape == target.shape
    with TensorReader.open() as reader:
        reader.fill(target, stored)
    assert torch.equal(target, expected)
