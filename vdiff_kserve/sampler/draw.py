"""Tokens drawn by one GPU kernel.

Written as operations of torch, drawing goes through the scores some twenty-five times in 64 bits: a
round of many rows takes as long for that as for its forward pass. Where Triton cannot be had, or
draws other tokens than it should, those operations run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vdiff_kserve.gpu import kernels_work
from vdiff_kserve.sampler.noise import gumbel, token_key

BLOCK = 4096
"""Tokens of one program."""
NO_TOKEN = -1


def usable(logits: Tensor) -> bool:
    """Whether `draw` takes these logits."""
    return (
        logits.is_cuda
        and logits.dtype == torch.float32
        and logits.is_contiguous()
        and logits.device.index == torch.cuda.current_device()
        and works(logits.device)
    )


def draw(
    logits: Tensor,
    places: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    mask_token: int | None,
) -> Tensor:
    """The arg max of `logits / temperature + gumbel`, but for the mask token: int64 [n].

    Args:
        logits: float32 [all positions, vocab].
        places: int64 [n], which of them are drawn.
        temperature: float64 [n].
        seeds, positions: int64 [n] each, what the noise depends on.
    """
    from vdiff_kserve.sampler.draw_kernel import draw_kernel

    vocab = logits.shape[-1]
    parts = -(-vocab // BLOCK)
    best = temperature.new_empty(len(places), parts)
    token = places.new_empty(len(places), parts)
    draw_kernel[(len(places), parts)](
        logits,
        places,
        temperature,
        token_key(seeds, positions),
        best,
        token,
        vocab,
        NO_TOKEN if mask_token is None else mask_token,
        parts,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return token.gather(-1, best.argmax(dim=-1, keepdim=True)).squeeze(-1)


@cache
def works(device: torch.device) -> bool:
    """Whether the kernel compiles for this GPU and draws what it should."""
    return kernels_work(lambda: agrees(device), "Tokens are drawn without kernels")


def agrees(device: torch.device) -> bool:
    """Whether the kernel draws the tokens of the plain operations from random logits."""
    logits = torch.randn((6, 3 * BLOCK - 5), generator=torch.Generator().manual_seed(0)).to(device)
    places, positions = torch.tensor([[5, 0, 3], [7, 900, 7]]).to(device)
    mask_token = 2 * BLOCK
    seeds = torch.tensor([1, -(2**62), 3], device=device)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    scores = logits[places].double() / temperature[:, None]
    scores += gumbel(seeds, positions, logits.shape[-1])
    scores[:, mask_token] = -torch.inf
    drawn = draw(logits, places, temperature, seeds, positions, mask_token)
    return torch.equal(drawn, scores.argmax(dim=-1))
