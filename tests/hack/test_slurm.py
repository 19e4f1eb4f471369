"""The Slurm scripts: what they would submit, and a real job on a cluster of one node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.hack.slurm import Slurm
from vdiff_kserve.config import parse_args

FOLDER = Path(__file__).parents[2] / "hack/slurm"
SERVE, CONNECT = str(FOLDER / "serve.sh"), str(FOLDER / "connect.sh")


def dry_run(*options: str) -> str:
    done = subprocess.run(
        ["bash", SERVE, "--dry-run", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def server_options(job: str) -> list[str]:
    return job.splitlines()[-1].partition("-m vdiff_kserve ")[2].split()


def test_a_dry_run_prints_a_job_that_bash_and_the_server_read(tmp_path):
    job = dry_run("--model", str(tmp_path), "--", "--max_num_seqs", "4")
    assert subprocess.run(["bash", "-n"], input=job, text=True, check=False).returncode == 0
    config = parse_args(server_options(job), {})
    assert config.checkpoint_dir == tmp_path
    assert (config.model_name, config.port, config.max_num_seqs) == ("llada", 0, 4)


def test_options_become_sbatch_s():
    job = dry_run(
        "--account", "a", "--partition", "p", "--gpus", "2", "--cpus", "3", "--memory", "9G",
        "--time", "01:00:00", "--name", "dream",
    )  # fmt: skip
    directives = set(re.findall(r"^#SBATCH (.*)$", job, re.MULTILINE))
    assert directives >= {
        "--account=a", "--partition=p", "--gres=gpu:2", "--cpus-per-task=3", "--mem=9G",
        "--time=01:00:00", "--job-name=dream",
    }  # fmt: skip


def test_nothing_is_asked_for_that_was_not_given():
    job = dry_run("--gpus", "0")
    for absent in ("--account", "--partition", "--gres", "--model "):
        assert absent not in job


def test_values_with_spaces_stay_whole():
    job = dry_run("--python", "/my env/bin/python", "--model", "a model")
    assert r"/my\ env/bin/python" in job
    assert r"--model a\ model" in job


@pytest.mark.parametrize(
    ("image", "runner"),
    [
        ("/images/vdiff.sif", "exec apptainer exec --nv /images/vdiff.sif python"),
        ("registry#vdiff:cuda", "exec srun --container-image=registry#vdiff:cuda python"),
    ],
)
def test_a_container_image_runs_the_server(image, runner):
    assert runner in dry_run("--container", image)


def test_a_training_run_is_served_with_its_base_model(tmp_path):
    run, base, cache = (tmp_path / name for name in ("run", "base", "cache"))
    run.mkdir()
    base.mkdir()
    paths = ("--dcp", str(run), "--base-model", str(base), "--cache", str(cache))
    config = parse_args(server_options(dry_run(*paths)), {})
    assert (config.dcp_path, config.base_model) == (str(run), str(base))
    assert config.cache_dir == str(cache)
    mounts = f"{run}:{run}:ro,{base}:{base}:ro,{cache}:{cache}"
    assert rf"--container-mounts={mounts} ".replace(",", r"\,") in dry_run(
        *paths, "--container", "i"
    )
    bound = f"--bind {run}:{run}:ro --bind {base}:{base}:ro --bind {cache}:{cache} "
    assert bound in dry_run(*paths, "--container", "i.sif")
    assert not cache.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--dcp", "x"),
        ("--base-model", "x"),
        ("--model", "x", "--dcp", "y", "--base-model", "z"),
        ("--gpu", "1"),
        ("--gpus", "one"),
        ("--model",),
        ("--name", "a b"),
        ("--port", "x"),
    ],
)
def test_wrong_options_are_refused(wrong):
    done = subprocess.run(
        ["bash", SERVE, "--dry-run", *wrong], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "serve.sh:" in done.stderr


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="vdiff-slurm-") as name,  # a socket's path is short
        Slurm(Path(name)) as slurm,
    ):
        slurm.env["VDIFF_SLURM_DIR"] = str(Path(name) / "jobs")
        slurm.env["WAIT_SECONDS"] = "120"
        yield slurm


LOCAL = ("--gpus", "0", "--cpus", "1", "--memory", "1G", "--time", "00:10:00")


@pytest.mark.slow
def test_a_job_serves_and_connect_says_how_to_reach_it(slurm):
    submitted = slurm.run("bash", SERVE, *LOCAL, "--python", sys.executable, "--name", "tiny")
    assert submitted.returncode == 0, submitted.stderr
    number = submitted.stdout.strip()

    found = slurm.run("bash", CONNECT)
    assert found.returncode == 0, found.stderr
    port = re.search(r"is ready on \S+, port (\d+)", found.stdout)[1]
    assert re.search(rf"ssh -N -L 8080:\S+:{port} root@\S+", found.stdout)
    assert f"scancel {number}" in found.stdout
    models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30).json()
    assert models["data"][0]["id"] == "tiny"
    assert slurm.run("scancel", number).returncode == 0


@pytest.mark.slow
def test_connect_tells_of_a_job_that_failed(slurm):
    submitted = slurm.run(
        "bash", SERVE, *LOCAL, "--python", sys.executable, "--model", "/no/such folder"
    )
    assert submitted.returncode == 0, submitted.stderr
    found = slurm.run("bash", CONNECT, submitted.stdout.strip())
    assert found.returncode == 1
    assert "has ended" in found.stderr
    assert "/no/such folder" in found.stderr


@pytest.mark.parametrize(
    "line",
    [
        "tiny is ready at http://127.0.0.1:8123",
        '{"logger": "kserve.vdiff", "message": "tiny is ready at http://127.0.0.1:8123"}',
    ],
)
def test_connect_reads_either_form_of_the_log(tmp_path, line):
    (tmp_path / "7.log").write_text(f"node a17\n{line}\nmore\n", encoding="utf-8")
    environment = {"VDIFF_SLURM_DIR": str(tmp_path), "USER": "me", "LOGIN_HOST": "login"}
    done = subprocess.run(
        ["bash", CONNECT, "7"],
        env=os.environ | environment | {"WAIT_SECONDS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ssh -N -L 8080:a17:8123 me@login" in done.stdout, done.stderr


def test_connect_needs_a_job(tmp_path):
    done = subprocess.run(
        ["bash", CONNECT],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "start one with serve.sh" in done.stderr
