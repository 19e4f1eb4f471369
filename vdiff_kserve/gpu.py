"""What models, sampler and engine need of a GPU: copies that do not wait, kernels that work."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("kserve.vdiff.engine")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, made on the host, on `device`, without waiting for the work that is queued there; a
    GPU gets it in the order of its stream."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def raise_if_lost(device: torch.device) -> None:
    """Raise what a GPU answers to everything that this process still asks of it, if so: after an
    illegal access for example, while a want of memory is over at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels_work(agrees: Callable[[], bool], otherwise: str) -> bool:
    """Whether kernels of Triton can be used; if not, the log says why.

    Args:
        agrees: runs them and compares what they compute.
        otherwise: what happens without them.
    """
    try:
        correct = agrees()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises
        logger.warning("%s, for want of Triton: %s", otherwise, error)
        return False
    if not correct:
        logger.warning("%s: on this GPU they compute wrong numbers.", otherwise)
    return correct


def power_of_2(count: int) -> int:
    """The least power of 2 that is no less than `count`, as the sizes of Triton's blocks are."""
    return 1 << (count - 1).bit_length()
