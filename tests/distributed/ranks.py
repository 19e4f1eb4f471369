"""A pytest plugin for one of several processes that run the same tests with one model between them.

Every model that a test loads is the process's shard; the processes meet in its forward passes.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from vdiff_kserve import models


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    models.load_decoder = partial(models.load_decoder, mesh=mesh)


def pytest_unconfigure(config: pytest.Config) -> None:
    dist.destroy_process_group()
