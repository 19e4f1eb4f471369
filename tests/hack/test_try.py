"""The curl tour runs to its end against a real server, and stops at the first failure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.manifests.tools import program
from tests.server.process import ServerProcess, free_port

SCRIPT = Path(__file__).parents[2] / "hack/try.sh"


@pytest.fixture
def url(default_server: ServerProcess) -> str:
    return default_server.url


def tour(*arguments: str) -> subprocess.CompletedProcess[str]:
    program("curl", "curl")
    command = [program("bash", "bash"), str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("given", [(), ("llada",)])
def test_the_tour_shows_every_protocol(url, given):
    done = tour(url, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = done.stdout.split("\n== ")[1:]
    assert len(sections) == 9
    assert '"chat.completion"' in sections[2]
    assert "data: [DONE]" in sections[3]
    assert '"object":"response"' in sections[4]
    assert " Paris." in sections[5]
    assert '"predictions"' in sections[6]
    assert '"outputs"' in sections[7]
    assert 'vdiff_requests_running{model_name="llada"}' in sections[8]


def test_it_stops_at_once_where_nothing_listens():
    url = f"http://127.0.0.1:{free_port()}"
    done = tour(url)
    assert done.returncode != 0
    assert f"no server answers at {url}; start one with make serve" in done.stderr
    assert done.stdout.count("\n== ") == 1


def test_it_fails_for_a_model_that_is_not_served(url):
    done = tour(url, "another")
    assert done.returncode != 0
    assert "another" in done.stdout


def test_help_says_how_to_call_it():
    assert "hack/try.sh [URL] [MODEL]" in tour("--help").stdout
