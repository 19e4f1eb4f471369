"""Settings and a server that tests of all folders share."""

import os
from collections.abc import Iterator

import pytest

from tests.server.process import ServerProcess

# The test models are so small that threads cost more than they bring; server processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def default_server() -> Iterator[ServerProcess]:
    """The server as it starts with no options: the model inside the package, called `llada`."""
    with ServerProcess() as process:
        yield process.wait_until_ready()
