"""Small tensors from the host to a device without waiting for the work that is queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, made on the host, on `device`; a GPU gets it in the order of its stream."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
