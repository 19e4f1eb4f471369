"""`hack/download_model.py` against a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.download_model import INCLUDED
from tests.hack.hub import COMMIT, Hub
from tests.server.process import free_port
from tests.waiting import wait_until
from vdiff_kserve import hub as served

ROOT = Path(__file__).parents[2]
MODEL_ID = "some/model"
WEIGHTS = "model-00001-of-00001.safetensors"
SIZE = 24 << 20


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "config.json": b'{"model_type": "llada"}',
        "tokenizer.json": b"{}",
        WEIGHTS: os.urandom(SIZE),
        "pytorch_model.bin": b"not wanted",
        "modeling_llada.py": b"raise SystemExit",
    }
    with Hub(MODEL_ID, files) as hub:
        yield hub


def start(hub: Hub, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = ["--model-id", MODEL_ID, "--model_dir", str(folder), *options]
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "hack/download_model.py"), *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(hub: Hub, folder: Path, *options: str) -> tuple[int, str]:
    process = start(hub, folder, *options)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_it_brings_what_the_server_reads_and_no_code(hub, tmp_path):
    code, output = run(hub, tmp_path / "model")
    assert code == 0, output
    wanted = {name: hub.files[name] for name in ("config.json", "tokenizer.json", WEIGHTS)}
    assert files_in(tmp_path / "model") == wanted
    assert COMMIT in output.splitlines()[-1]


def test_a_finished_folder_is_not_downloaded_again(hub, tmp_path):
    run(hub, tmp_path / "model")
    hub.ranges.clear()
    assert run(hub, tmp_path / "model")[0] == 0
    assert hub.ranges == {}


def test_patterns_choose_the_files(hub, tmp_path):
    code, output = run(hub, tmp_path / "model", "--include", "*.json", "--exclude", "tok*")
    assert code == 0, output
    assert set(files_in(tmp_path / "model")) == {"config.json"}


def test_a_killed_run_goes_on_where_it_stopped(hub, tmp_path):
    folder = tmp_path / "model"
    hub.stall_after = SIZE // 2
    process = start(hub, folder, "--log_seconds", "0.1")
    assert process.stdout is not None
    progress = f"of {SIZE / 1e9:.2f} GB ("
    assert any(progress in line for line in process.stdout), "it ended, or told no progress"
    wait_until(lambda: any(part.stat().st_size >= SIZE // 4 for part in folder.rglob("*.part")))
    process.kill()
    process.communicate()
    hub.stall_after = None
    hub.ranges.clear()

    code, output = run(hub, folder)
    assert code == 0, output
    assert hub.ranges[WEIGHTS][0] >= SIZE // 4
    assert files_in(folder)[WEIGHTS] == hub.files[WEIGHTS]


def test_a_file_damaged_on_the_disk_is_brought_again(hub, tmp_path):
    folder = tmp_path / "model"
    run(hub, folder)
    damaged = bytearray(hub.files[WEIGHTS])
    damaged[1000] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    code, output = run(hub, folder)
    assert code == 0, output
    assert f"damaged, downloading again: {WEIGHTS}" in output
    assert files_in(folder)[WEIGHTS] == hub.files[WEIGHTS]


def test_files_that_stay_damaged_are_an_error(hub, tmp_path):
    hub.broken.add("config.json")
    code, output = run(hub, tmp_path / "model")
    assert code == 1
    assert "error: differ from the hub's: config.json" in output


def test_a_model_that_does_not_exist_is_an_error(hub, tmp_path):
    hub.model_id = "another/model"
    code, output = run(hub, tmp_path / "model")
    assert code == 1
    assert "error:" in output


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(hub, tmp_path):
    hub.url = f"http://127.0.0.1:{free_port()}"
    code, output = run(hub, tmp_path / "model")
    assert code == 1
    assert len(output.splitlines()) == 1, output
    assert f"error: {MODEL_ID}: {hub.url} cannot be reached" in output


def test_nothing_to_download_is_an_error(hub, tmp_path):
    code, output = run(hub, tmp_path / "model", "--include", "*.gguf")
    assert code == 1
    assert "no file like *.gguf" in output


def test_the_server_downloads_the_same_files():
    assert set(INCLUDED) == {*served.DESCRIPTION, *served.WEIGHTS}
