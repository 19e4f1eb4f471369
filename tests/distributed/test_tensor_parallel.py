"""One model over two processes writes what one process writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.process import ServerProcess, free_port
from tests.waiting import wait_until
from vdiff_kserve import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
LOGITS = "tests/models/test_golden_logits.py"
GENERATIONS = "tests/engine/test_golden_generate.py"
FAMILIES = ("llada", "dream", "apd", "llada_moe", "llada2", "sdar", "fast_dllm_v2")
PROMPTS = ["What is 17 + 25?", "sort 5 2 9", "the capital of France is", "hello"]


def on_two_ranks(*pytest_args: str) -> list[str]:
    """Run tests in two processes that share every model; what each printed."""
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.distributed.ranks", "-x", "-q"]
    ranks = [
        subprocess.Popen(
            [*command, "-p", "no:cacheprovider", *pytest_args],
            cwd=ROOT,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def assert_passed(printed: list[str]) -> None:
    for rank in printed:
        assert re.search(r"^\d+ passed", rank, re.MULTILINE), rank
        assert "failed" not in rank, rank


def test_golden_logits_of_every_family_on_two_ranks() -> None:
    assert_passed(on_two_ranks(LOGITS))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_generations_of_a_family_on_two_ranks(family: str) -> None:
    assert_passed(on_two_ranks(GENERATIONS, "-k", f"golden_{family}"))


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"temperature": 0.9, "seed": 11, "policy": "low_confidence", "cache": "dual"},
        {"temperature": 0.9, "seed": 11, "top_p": 0.8, "cfg_scale": 0.5, "logits_eos_inf": True},
        {"policy": "entropy_bound", "logprobs": 2, "repetition_penalty": 1.2},
        {"policy": "apd"},
    ],
    ids=lambda decoding: "-".join(decoding) or "default",
)
def test_a_shared_model_writes_the_same(decoding: dict[str, object], models) -> None:
    params = SamplingParams(max_tokens=24, **decoding)
    alone, shared = (model.generate(PROMPTS, params, use_tqdm=False) for model in models)
    for one, two in zip(alone, shared, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        assert one.outputs[0].nfe == two.outputs[0].nfe


@pytest.fixture(scope="module")
def models():
    """The embedded model in this process, and over two."""
    alone = LLM(dtype="float32")
    shared = LLM(dtype="float32", tensor_parallel_size=2)
    yield alone, shared
    shared.shutdown()
    alone.shutdown()


PROGRAM = """
from vdiff_kserve import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(dtype="float32", tensor_parallel_size=2)
    llm.generate("hello", SamplingParams(max_tokens=4))
"""


def test_a_program_that_does_not_shut_its_model_down_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "exit code" not in ended.stderr
    assert "Traceback" not in ended.stderr


def ranks_of(pid: int) -> list[psutil.Process]:
    """The further ranks of the process."""
    children = psutil.Process(pid).children()
    return [each for each in children if "multiprocessing.spawn" in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A model over two processes behind HTTP."""
    command = ("--model_name", "m", "--tensor_parallel_size", "2", "--dtype", "float32")
    with ServerProcess(*command) as process:
        yield process.wait_until_ready()


def test_a_rank_that_hangs_makes_the_server_unhealthy_until_it_goes_on(
    server: ServerProcess,
) -> None:
    """The first rank then waits for it inside a forward pass, as it waits for a GPU that hangs."""
    body = {"prompt": "hello", "max_tokens": 4}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        first = client.post("/v1/completions", json=body).raise_for_status()
        (rank,) = ranks_of(server.process.pid)
        rank.suspend()
        with ThreadPoolExecutor() as pool:
            second = pool.submit(client.post, "/v1/completions", json=body)
            wait_until(lambda: client.get("/v2/health/live").status_code != 200, seconds=60)
            assert client.get("/v2/health/ready").status_code != 200
            rank.resume()
            assert second.result().json()["choices"] == first.json()["choices"]
        wait_until(lambda: client.get("/v2/health/live").status_code == 200)


def test_ctrl_c_is_for_the_first_rank_alone(server: ServerProcess) -> None:
    """A terminal sends it to all: the others still have running requests to finish."""
    (rank,) = ranks_of(server.process.pid)
    rank.send_signal(signal.SIGINT)
    body = {"prompt": "hello", "max_tokens": 4}
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    assert rank.is_running()


@pytest.mark.slow
def test_no_rank_outlives_the_first() -> None:
    with ServerProcess("--tensor_parallel_size", "2", "--dtype", "float32") as process:
        wait_until(lambda: bool(ranks_of(process.process.pid)), seconds=60)
        (rank,) = ranks_of(process.process.pid)
        process.process.kill()
        process.wait()
        psutil.wait_procs([rank], timeout=60)
        assert not rank.is_running()


def test_a_rank_that_dies_makes_the_server_unhealthy(server: ServerProcess) -> None:
    """So that the kubelet restarts the pod; until then requests are told, not left hanging. The
    last test of the server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/v2/health/live").status_code == 200
        (rank,) = ranks_of(server.process.pid)
        rank.send_signal(signal.SIGKILL)
        wait_until(lambda: client.get("/v2/health/live").status_code != 200, seconds=60)
        refused = client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4})
        assert refused.status_code in (500, 503)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ("--tensor_parallel_size", "3"),
            "--tensor_parallel_size 3 does not divide",
            marks=pytest.mark.slow,  # ranks start before it is told
        ),
        (("--tensor_parallel_size", "0"), "--tensor_parallel_size"),
    ],
)
def test_a_size_that_does_not_fit_is_told_without_a_traceback(
    options: tuple[str, ...], message: str
) -> None:
    started = subprocess.run(
        [sys.executable, "-m", "vdiff_kserve", "--model_name", "m", "--port", "0", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert started.returncode in (1, 2)
    assert message in started.stderr.splitlines()[-1]
    assert "Traceback" not in started.stderr
