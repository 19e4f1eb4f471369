"""The image: what its recipe says, and its own steps replayed on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vdiff_kserve
from tests.manifests.containerfile import Stage, parse
from tests.manifests.tools import ROOT, documents, missing
from tests.server.process import READY, free_port

ARGUMENTS, (BUILD, FINAL) = parse(ROOT / "Containerfile")
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
CPU_BYTES = 2_000_000_000
BASE_IMAGE_BYTES = 350_000_000
"""More than ubi-minimal with Python 3.11."""
RANDOM_USER = 1_234_567_890
PINNED = re.compile(r"([A-Za-z0-9._-]+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


def pinned(lock: Path) -> dict[str, Version]:
    text = lock.read_text(encoding="utf-8")
    return {name: Version(version) for name, version, _ in PINNED.findall(text)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_names_versions_and_hashes_only(lock):
    text = lock.read_text(encoding="utf-8")
    header, body = re.fullmatch(r"((?:#.*\n)+)(.*)", text, re.DOTALL).groups()
    assert f"-o requirements/{lock.name}" in header
    assert PINNED.sub("", body) == ""
    assert "://" not in text


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_a_lock_satisfies_the_project(variant):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = pinned(ROOT / f"requirements/{variant}.txt")
    for text in project["dependencies"]:
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        again = f"{text}: run the command in the head of requirements/{variant}.txt again"
        assert version is not None, again
        assert version in requirement.specifier, again
    assert any(name.startswith("nvidia-") for name in locked) == (variant == "cuda")


def test_the_build_lock_satisfies_the_project():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    locked = pinned(ROOT / "requirements/build.txt")
    for text in build["requires"]:
        requirement = Requirement(text)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier


def test_both_images_are_ubi_9_and_the_last_has_no_compiler():
    assert ARGUMENTS["BUILD_IMAGE"].split("/")[1:] == ["ubi9", "python-311:latest"]
    assert ARGUMENTS["BASE_IMAGE"].split("/")[1:] == ["ubi9", "ubi-minimal:latest"]
    assert (BUILD.base, FINAL.base) == ("${BUILD_IMAGE}", "${BASE_IMAGE}")
    installed = re.findall(r"microdnf install (.*?) &&", " ".join(FINAL.all("RUN")))
    packages = [[word for word in each.split() if word[0] != "-"] for each in installed]
    assert packages == [["python3.11", "${EXTRA_PACKAGES}"]]
    assert FINAL.pairs("ARG")["EXTRA_PACKAGES"] == ""
    copied = [text.split() for text in FINAL.all("COPY")]
    assert copied[0] == ["--from=build", "/opt/vdiff", "/opt/vdiff"]


def test_every_file_that_is_copied_exists_and_is_not_ignored():
    shown = {
        line[1:]
        for line in (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for stage in (BUILD, FINAL):
        for text in stage.all("COPY"):
            *sources, _ = text.split()
            if not sources[0].startswith("--from"):
                assert all((ROOT / source).exists() for source in sources), text
                assert set(sources) <= shown


def test_it_runs_as_any_user_of_group_0():
    assert FINAL.last("USER") == "1001:0"
    cache = FINAL.pairs("ENV")["HOME"]
    run = " ".join(FINAL.all("RUN"))
    assert f"chgrp -R 0 {cache}" in run
    assert f"chmod -R g=u {cache}" in run
    assert FINAL.pairs("ENV")["HF_HOME"].startswith(cache)


def test_it_starts_the_server_and_asks_it_for_its_health():
    assert FINAL.exec_form("ENTRYPOINT") == ["python", "-m", "vdiff_kserve"]
    assert FINAL.last("EXPOSE") == "8080"
    assert "http://127.0.0.1:8080/health" in FINAL.last("HEALTHCHECK")
    compile(re.search(r'"-c", "(.*)"\]', FINAL.last("HEALTHCHECK"))[1], "check", "exec")


def test_it_says_what_it_is():
    labels = FINAL.pairs("LABEL")
    for name in ("title", "description", "version", "revision", "licenses"):
        assert labels[f"org.opencontainers.image.{name}"]
    assert FINAL.pairs("ARG")["VERSION"] == vdiff_kserve.__version__


def test_the_download_job_runs_a_file_of_the_image():
    copied = {text.split()[1]: text.split()[0] for text in BUILD.all("COPY")}
    for _, job in documents("Job"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"][0] == "python"
        assert copied[container["command"][1]] == "hack/download_model.py"


def image_python() -> str:
    """The image's own Python where there is one: other users may not reach this test's."""
    python = Path("/usr/bin/python3.11")
    check = [str(python), "-c", "import ensurepip, venv"]
    if python.exists() and not subprocess.run(check, check=False).returncode:
        return str(python)
    return sys.executable


class Replay:
    """The build stage's steps, with the image's folders below one of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "opt/vdiff"

    def build(self, stage: Stage, variant: str) -> None:
        (self.root / "src").mkdir()
        (self.root / "opt").mkdir()
        for instruction, text in stage.steps:
            if instruction == "COPY":
                self._copy(*text.split())
            if instruction == "RUN":
                self._run(text, variant)

    def _copy(self, *paths: str) -> None:
        *sources, target = paths
        for source in sources:
            found = ROOT / source
            place = self._local(target)
            if target == "./":
                place /= found.name
            if found.is_dir():
                shutil.copytree(found, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(found, place)

    def _local(self, path: str) -> Path:
        return self.root / path[1:] if path.startswith("/") else self.root / "src" / path

    def _run(self, text: str, variant: str) -> None:
        command = text.replace("/opt/", f"{self.root}/opt/")
        command = command.replace("/usr/bin/python3.11", image_python())
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.root / "src",
            env=os.environ
            | {"VARIANT": variant, "TORCH_INDEX": os.environ.get("VDIFF_TORCH_INDEX", "")},
            capture_output=True,
            text=True,
            check=False,
        )
        if "No matching distribution found for torch==" in done.stderr:
            missing("pip finds no CPU wheel of torch (set VDIFF_TORCH_INDEX)")
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    if sys.version_info[:2] != (3, 11):
        missing("the locks are for Python 3.11")
    with tempfile.TemporaryDirectory(prefix="vdiff-image-") as name:
        root = Path(name)
        root.chmod(0o755)
        replay = Replay(root)
        replay.build(BUILD, "cpu")
        yield replay


def size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


@pytest.mark.slow
def test_the_cpu_variant_is_within_its_budget(replay):
    assert size(replay.package) + BASE_IMAGE_BYTES < CPU_BYTES


@pytest.mark.slow
def test_an_arbitrary_user_starts_it_from_a_package_that_cannot_be_written(replay):
    cache = replay.root / "cache"
    cache.mkdir()
    cache.chmod(0o775)
    as_root = os.getuid() == 0
    if as_root:
        os.chown(cache, 0, 0)
    subprocess.run(["chmod", "-R", "a-w", str(replay.package)], check=True)
    settings = FINAL.pairs("ENV") | {
        "PATH": f"{replay.package}/bin:/usr/bin:/bin",
        "HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "OMP_NUM_THREADS": "1",
    }
    user = {"user": RANDOM_USER, "group": 0, "extra_groups": []} if as_root else {}
    port = free_port()
    process = subprocess.Popen(
        [
            str(replay.package / "bin/python"), *FINAL.exec_form("ENTRYPOINT")[1:],
            "--host", "127.0.0.1", "--port", str(port), "--enable_grpc", "false",
            "--model_name", "tiny",
        ],
        cwd=cache, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **user,
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if READY.search(line):
                break
        assert process.poll() is None, "".join(lines)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/health").status_code == 200
            answer = client.post("/v1/completions", json={"prompt": "2 + 2 =", "max_tokens": 8})
            assert answer.status_code == 200, answer.text
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0
