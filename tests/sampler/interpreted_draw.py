"""Run by `test_draw.py` with `TRITON_INTERPRET=1`, which must be set before Triton is imported."""

import torch

from vdiff_kserve.sampler import draw

if __name__ == "__main__":
    assert draw.agrees(torch.device("cpu"))
