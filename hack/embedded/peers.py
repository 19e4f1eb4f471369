"""Processes that train one model together: one core each is faster than many threads in one."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


class Peers:
    """The processes of a run. Each draws its own batches; gradients are averaged every step."""

    def __init__(self, rank: int, size: int, meeting_point: Path) -> None:
        self.rank = rank
        self.size = size
        if size > 1:
            method = f"file://{meeting_point.resolve()}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def agree(self, share: float, stop: bool) -> tuple[float, bool]:
        """What the first process says: the share of the run behind us and whether to stop."""
        if self.size == 1:
            return share, stop
        said = torch.tensor([share, float(stop)], dtype=torch.float64)
        dist.broadcast(said, src=0)
        return said[0].item(), bool(said[1].item())

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start_peers(target: Callable[..., None], size: int, arguments: tuple[object, ...]) -> None:
    """Start the processes after the first; `target(rank, *arguments)` runs in each."""
    context = mp.get_context("spawn")
    for rank in range(1, size):
        context.Process(target=target, args=(rank, *arguments), daemon=True).start()
