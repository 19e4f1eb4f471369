"""The likeliest token and its probability in one pass over a CPU's logits.

torch's operations widen the logits to float32, look for the largest, and sum exponentials, each
through memory. Where the kernel of `cpu_library` cannot be had, or does not find what it should,
those operations run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vdiff_kserve.cpu_library import addresses, kernels_work, library

NO_TOKEN = -1


def usable(logits: Tensor) -> bool:
    """Whether `find` takes these logits."""
    return (
        logits.device.type == "cpu"
        and logits.dtype == torch.bfloat16
        and logits.is_contiguous()
        and works()
    )


def find(
    logits: Tensor, mask_token: int | None, end_token: int, suppressed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The arg max of every position but for the mask token, and its softmax.

    Args:
        logits: bfloat16 [positions, vocab]; overwritten.
        suppressed: bool [positions], where `end_token` has no probability; None is nowhere.

    Returns:
        int64 [positions] and float64 [positions].
    """
    positions, vocab = logits.shape
    token = torch.empty(positions, dtype=torch.int64)
    confidence = torch.empty(positions, dtype=torch.float64)
    library().likeliest(
        logits.data_ptr(),
        NO_TOKEN if mask_token is None else mask_token,
        NO_TOKEN if suppressed is None else end_token,
        *addresses(suppressed, token, confidence),
        positions,
        vocab,
        torch.get_num_threads(),
    )
    return token, confidence


@cache
def works() -> bool:
    """Whether the kernel can be had and finds what it should."""
    return kernels_work(agrees, "Tokens are chosen without a kernel for this CPU")


def agrees() -> bool:
    """Whether the kernel finds what the plain operations find in random logits."""
    logits = torch.randn((6, 523), generator=torch.Generator().manual_seed(0)).bfloat16()
    mask_token, end_token = (int(token) for token in logits[:2].argmax(dim=-1))
    suppressed = torch.tensor([False, True, False, True, False, True])
    wide = logits.double()
    wide[suppressed, end_token] = -torch.inf
    open_to_choice = wide.clone()
    open_to_choice[:, mask_token] = -torch.inf
    expected = open_to_choice.argmax(dim=-1, keepdim=True)
    token, confidence = find(logits, mask_token, end_token, suppressed)
    probability = wide.softmax(dim=-1).gather(-1, expected)
    return torch.equal(token[:, None], expected) and torch.allclose(
        confidence[:, None], probability, rtol=1e-3
    )
