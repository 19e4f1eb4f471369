from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.distributed.replicas import ReplicatedServer
from tests.server.checkpoint import make_checkpoint
from tests.server.conftest import COMMON
from vdiff_kserve import LLM

TINY = ("--model_name", "tiny", "--max_model_len", "256", "--profile", "exact")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def arguments(checkpoint: str) -> tuple[str, ...]:
    """What every server here is started with."""
    batch = ("--max_num_seqs", "10", "--max_queue", "256", "--replica_cpus", "0.5")
    return (*COMMON, "--model_dir", checkpoint, *TINY, *batch, "--enable_grpc", "false")


@pytest.fixture(scope="session")
def ray_token() -> None:
    """A token for clusters that tests start. Ray reads it once in a process and keeps it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="module")
def server(arguments: tuple[str, ...]) -> Iterator[ReplicatedServer]:
    """Two replicas, and the flag that lets requests restart them."""
    with ReplicatedServer(*arguments, "--replicas", "2", "--enable_restart", "true") as process:
        process.wait_until_ready()
        process.wait_for_replicas(2)
        yield process


@pytest.fixture(scope="session")
def one_engine(checkpoint: str) -> Iterator[LLM]:
    """The same model in this process."""
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "profile": "exact"}
    with LLM(checkpoint, max_num_seqs=10, **options) as llm:
        yield llm
