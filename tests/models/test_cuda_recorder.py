"""What captures may ask of torch's pools of memory and of cuBLAS's workspaces. A model of their
rules stands for a GPU; the tests marked `gpu` capture for real."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from vdiff_kserve.models.reuse_graphs import CudaRecorder


class Graph:
    """A captured graph, and the pools in which its libraries' workspaces lie."""

    def __init__(self) -> None:
        self.workspaces: list[int | None] = []

    def replay(self) -> None: ...


class Captures:
    """torch's rules: a pool whose graphs are all gone takes no further one; a library's workspace
    comes from the pool of the capture that first wants it, and is kept until it is cleared."""

    def __init__(self) -> None:
        self.workspace: list[int | None] = []
        self.underway: tuple[Graph, int] | None = None
        self._graphs: dict[int, weakref.WeakSet[Graph]] = {}

    @contextmanager
    def capture(self, graph: Graph, pool: int, stream: object, **_: str) -> Iterator[None]:
        if pool in self._graphs and not self._graphs[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self._graphs.setdefault(pool, weakref.WeakSet()).add(graph)
        self.underway = graph, pool
        try:
            yield
        finally:
            self.underway = None

    def run(self) -> Tensor:
        """A pass that multiplies matrices."""
        graph, pool = self.underway or (None, None)
        if not self.workspace:
            self.workspace.append(pool)
        if graph is not None:
            assert not gc.isenabled(), "what is destroyed now breaks the capture off"
            graph.workspaces += self.workspace
        return torch.zeros(1)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made, pools = Captures(), count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Mock(device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "set_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", made.capture)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", made.workspace.clear, raising=False
    )
    return made


def test_passes_are_captured_again_after_all_are_gone(captures: Captures) -> None:
    record = CudaRecorder(torch.device("cpu"))
    for _ in range(3):
        _, replay = record(captures.run)
        del replay


def test_a_first_capture_that_was_broken_off_is_tried_again(captures: Captures) -> None:
    record = CudaRecorder(torch.device("cpu"))

    def lacks_memory() -> Tensor:
        if captures.underway:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return captures.run()

    with pytest.raises(torch.OutOfMemoryError):
        record(lacks_memory)
    record(captures.run)
    assert gc.isenabled()


def test_workspaces_of_a_graph_lie_in_its_own_pool(captures: Captures) -> None:
    """Not where the pass before the capture, or another one, left them: with that graph, torch
    would free them."""
    record = CudaRecorder(torch.device("cpu"))
    replays = [record(captures.run)[1] for _ in range(2)]
    graphs = [replay.__self__ for replay in replays]
    assert [graph.workspaces for graph in graphs] == [[0], [0]]
    assert not captures.workspace, "the next pass would use memory of the pool"
