"""One model over several devices of this machine: a process for each, all in step.

The first rank is the calling process; it starts the others, which load their shard and follow its
engine until it stops. A rank that ends on its own takes the engine with it: what it held is gone.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from vdiff_kserve.config import ServerConfig
from vdiff_kserve.engine import Engine, Lockstep, RoundObserver
from vdiff_kserve.loading import LoadedModel, Rank, load_model
from vdiff_kserve.models import CheckpointError, choose_device, fit_threads

ADDRESS = "127.0.0.1"
COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""How long one rank may wait for another inside a forward pass, loading included."""
PARTING_SECONDS = 10.0
"""How long the program's end waits for a rank to end by itself."""
IDLE_TIMEOUT = timedelta(days=365)
"""How long a rank waits for the next round; a server may be idle for long."""

logger = logging.getLogger("kserve.vdiff.tensor_parallel")


def load_sharded(config: ServerConfig, observer: RoundObserver | None = None) -> LoadedModel:
    """As `load_model`, over `tensor_parallel_size` devices.

    Raises:
        CheckpointError: the checkpoint, or the options with it, cannot be served.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return load_model(config, observer)
    _check_devices(config)
    store = TCPStore(ADDRESS, 0, size, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(
            target=_follow,
            args=(config, index, store.port),
            name=f"vdiff-rank-{index}",
            daemon=True,
        )
        for index in range(1, size)
    ]
    with _without_interrupts():
        for process in others:
            process.start()
    try:
        loaded = load_model(config, observer, _join(config, 0, store))
    except BaseException:
        for process in others:
            process.kill()
        raise
    # Not the engine itself: a daemon thread that is the last to hold a model would free it while
    # the interpreter ends, which aborts the process.
    engine = weakref.ref(loaded.engine)
    threading.Thread(target=_watch, args=(engine, others), name="vdiff-ranks", daemon=True).start()
    atexit.register(_part, engine, others)
    return loaded


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside never hear of Ctrl-C, which a terminal sends to all of
    them: the first rank, which still finishes what runs, ends them."""
    resource_tracker.ensure_running()  # its first start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_first() -> None:
    """End this rank when the first one is gone, in whatever both were."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(0)


def _check_devices(config: ServerConfig) -> None:
    size = config.tensor_parallel_size
    device = choose_device(config.device)
    if ":" in config.device:
        raise CheckpointError(
            f"--tensor_parallel_size {size} takes the first {size} GPUs; leave the number out of "
            f"--device {config.device}"
        )
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise CheckpointError(
            f"--tensor_parallel_size {size} needs as many GPUs; this machine shows "
            f"{torch.cuda.device_count()}"
        )


def _join(config: ServerConfig, index: int, store: TCPStore) -> Rank:
    """Meet the other ranks."""
    size = config.tensor_parallel_size
    device = choose_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        fit_threads(processes=size)
    if dist.is_initialized():  # of a model that was unloaded
        dist.destroy_process_group()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=index,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    mesh = init_device_mesh(device.type, (size,))
    return Rank(mesh, Lockstep(dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)), device)


def _follow(config: ServerConfig, index: int, port: int) -> None:
    """The life of a further rank."""
    threading.Thread(target=_end_with_the_first, name="vdiff-first-rank", daemon=True).start()
    store = TCPStore(ADDRESS, port, config.tensor_parallel_size, is_master=False)
    try:
        loaded = load_model(config, rank=_join(config, index, store))
    except CheckpointError as error:
        sys.exit(f"rank {index}: {error}")
    loaded.engine.follow()
    dist.destroy_process_group()


def _part(engine: weakref.ref[Engine], others: Sequence[BaseProcess]) -> None:
    """At the end of the program, let the other ranks end by themselves before they are killed."""
    if (running := engine()) is not None:
        running.stop()
    for process in others:
        process.join(PARTING_SECONDS)


def _watch(engine: weakref.ref[Engine], others: Sequence[BaseProcess]) -> None:
    """Fail the engine when a rank ends while it runs."""
    running = {process.sentinel: process for process in others}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            held = engine()
            if process.exitcode and held is not None and held.alive:
                logger.critical("%s ended with exit code %s.", process.name, process.exitcode)
                held.fail(f"{process.name} ended with exit code {process.exitcode}")
            del held
