from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.process import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A server with the embedded model."""
    arguments = ("--model_name", "llada", "--max_num_seqs", "4", "--max_queue", "8")
    with ServerProcess(*arguments) as process:
        yield process.wait_until_ready()
