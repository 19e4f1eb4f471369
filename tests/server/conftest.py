from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.server.checkpoint import make_checkpoint
from tests.server.process import ServerProcess

COMMON = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A read-only folder behind a link, as a volume of a pod may be."""
    place = tmp_path_factory.mktemp("checkpoint")
    folder, link = place / "volume", place / "mnt-models"
    folder.mkdir()
    make_checkpoint(folder)
    link.symlink_to(folder)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    yield str(link)
    folder.chmod(0o755)


@pytest.fixture(scope="session")
def server(checkpoint: str) -> Iterator[ServerProcess]:
    """A server that many tests share: model `tiny`, also called `ref`, with a context of 256."""
    arguments = (
        *COMMON,
        *("--model_dir", checkpoint, "--model_name", "tiny", "--served_model_name", "ref"),
        *("--max_model_len", "256", "--max_num_seqs", "4", "--max_queue", "16"),
        *("--default_max_tokens", "24", "--profile", "exact"),
        "--no_tools_in_prompt",
    )
    with ServerProcess(*arguments) as process:
        yield process.wait_until_ready()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """One keep-alive connection."""
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits) as client:
        yield client
