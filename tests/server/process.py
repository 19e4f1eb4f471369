"""A real server process on ephemeral ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Self

import psutil

START_SECONDS = 120
READY = re.compile(r" is ready at (http\S+)")
LISTENING = re.compile(r"Listening on (\S+) port (\d+)")


class ServerProcess:
    """`python -m vdiff_kserve` with output that can be waited for.

    Attributes:
        lines: what it wrote to stdout and stderr so far.
        cpu_seconds: processor time that it had taken when it was ready.
    """

    def __init__(self, *arguments: str) -> None:
        self.grpc_port = free_port()
        self.lines: list[str] = []
        self._unread: Queue[str] = Queue()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "vdiff_kserve", "--host", "127.0.0.1", "--port", "0",
                "--grpc_port", str(self.grpc_port), *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._unread.put(line)
        self._unread.put("")

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The first match of `pattern` in a line not yet waited for."""
        while True:
            try:
                line = self._unread.get(timeout=START_SECONDS)
            except Empty:
                raise TimeoutError(f"no {pattern.pattern!r} in:\n{self.output}") from None
            if not line:
                raise EOFError(f"the server ended before {pattern.pattern!r}:\n{self.output}")
            if match := pattern.search(line):
                return match

    def wait_for_line(self, word: str) -> str:
        """The next line with `word`."""
        return self.wait_for(re.compile(f".*{word}.*"))[0]

    def wait_until_ready(self) -> Self:
        """Wait for the line that names the URL."""
        self.url = self.wait_for(READY)[1]
        times = psutil.Process(self.process.pid).cpu_times()
        self.cpu_seconds = times.user + times.system
        return self

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
