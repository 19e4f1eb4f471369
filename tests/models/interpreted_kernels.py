"""Run by `test_fused.py` with `TRITON_INTERPRET=1`, which must be set before Triton is imported."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from vdiff_kserve.models import fused
from vdiff_kserve.models.layers import RMSNorm, rotary_angles, rotate

TOLERANCE = {
    torch.float16: dict(atol=1e-3, rtol=1e-3),
    # The interpreter cuts numbers off where a GPU rounds them.
    torch.bfloat16: dict(atol=0.02, rtol=0.02),
}
SHAPES = [(5, 24, 24), (4, 64, 32), (28, 128, 128), (1, 8, 8)]


@torch.inference_mode()
def compare(heads: int, size: int, rotary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(heads)
    x, other = torch.randn((2, 3, heads, size), generator=generator).to(dtype)
    norm = RMSNorm(size, 1e-5).to(dtype)
    norm.weight.copy_(torch.randn(size, generator=generator))

    def check(got: Tensor, plain: Tensor) -> None:
        torch.testing.assert_close(got, plain, **TOLERANCE[dtype])

    check(fused.rms_norm(x, norm.weight, norm.eps), norm(x))
    check(fused.silu_product(x, other), F.silu(x) * other)
    for precision in (torch.float32, dtype):
        angles = rotary_angles(torch.tensor([0, 17, 900]), rotary, 1e4)
        cos, sin = (angle.to(precision) for angle in angles)
        check(fused.rotate(x, cos, sin), rotate(x, cos, sin))


def check_what_is_checked_before_use() -> None:
    cpu, product = torch.device("cpu"), fused.silu_product
    assert fused.agrees(cpu)
    fused.silu_product = lambda gate, up: gate * up
    assert not fused.agrees(cpu)
    fused.silu_product = product


if __name__ == "__main__":
    for shape, dtype in itertools.product(SHAPES, TOLERANCE):
        compare(*shape, dtype)
    check_what_is_checked_before_use()
