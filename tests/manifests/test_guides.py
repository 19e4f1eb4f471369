"""The guides: commands are run, or marked with what they need and checked as far as they can be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.manifests.containerfile import parse
from tests.manifests.tools import ROOT, deployable, kustomizations, program
from tests.server.process import ServerProcess
from vdiff_kserve.command_line import kserve_options, plain
from vdiff_kserve.config import ALL_SETTINGS, parse_args
from vdiff_kserve.vllm_options import HINTS

PAGES = (
    "api", "checkpoints", "deployment", "getting-started", "infilling", "kserve", "likelihood",
    "migration-from-vllm", "openshift-ai", "operations", "prediction", "scaling", "security",
    "structured", "troubleshooting",
)  # fmt: skip
NOT_RUN = {
    "cluster": r"need a cluster",
    "image": r"podman",
    "install": r"",
    "network": r"",
    "render": r"",
    "server": r"",
    "slurm": r"needs a cluster with Slurm",
}
"""What the word after `sh` says a block needs, and what its page must say then."""
FOREIGN = {
    "base_model", "check", "dcp", "dry_run", "dtype", "gpu_memory", "include", "limit",
    "max_worker_port", "min_worker_port", "model_args", "node_manager_port",
    "object_manager_port", "only", "parts", "prefix", "seconds",
    "shard_size", "streams", "tasks", "upgrade", "verify",
}  # fmt: skip
"""Options of other programs that the texts name."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    needs: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = text_of(page)
        for found in re.finditer(r"^```(\w*) ?(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(page, line, found[1], found[2], found[3])


BLOCKS = list(blocks())


def of(language: str, *needs: str) -> pytest.MarkDecorator:
    chosen = [each for each in BLOCKS if each.language == language and each.needs in needs]
    assert chosen
    return pytest.mark.parametrize("block", chosen, ids=str)


def run(command: list[str], server: ServerProcess, text: str) -> None:
    text = text.replace("http://localhost:8080", server.url)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, text],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@of("sh", "")
def test_a_command_without_a_mark_runs(block, default_server):
    program("curl", "curl")
    # curl by itself takes an error for an answer
    run(["bash", "-euo", "pipefail", "-c"], default_server, block.text.replace("curl ", "curl -f "))


@of("python", "")
def test_python_code_runs(block, default_server):
    run([sys.executable, "-c"], default_server, block.text)


def test_python_code_without_a_server_runs():
    snippets = [
        textwrap.dedent(found[0])
        for text in (text_of("python"), (ROOT / "README.md").read_text(encoding="utf-8"))
        for found in re.finditer(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", text, re.MULTILINE)
        if "LLM" in found[0]
    ]
    assert len(snippets) == 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for answer in ("17 + 25 = 42", " Wednesday [' hunters']", " Paris."):
        assert answer in done.stdout


@of("sh", "render")
def test_rendering_needs_no_cluster(block):
    for line in block.text.splitlines():
        program("kubectl", "Kubernetes")
        assert not subprocess.run(
            line.split(), cwd=ROOT, capture_output=True, check=False
        ).returncode


@of("sh", *NOT_RUN, "")
def test_bash_can_read_it(block):
    done = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_a_block_needs_is_told():
    for block in BLOCKS:
        assert block.language in ("sh", "python"), block
        if block.needs:
            told = re.sub(r"\s+", " ", text_of(block.page))
            assert re.search(NOT_RUN[block.needs], told), f"{block}: {block.needs}"


@of("sh", "cluster", "render")
def test_folders_that_are_applied_exist(block):
    known = {f"manifests/{each}" for each in kustomizations() if deployable(each)}
    named = re.findall(r"(?:-k|kustomize) (\S+)", block.text)
    assert set(named) <= known


@of("sh", "image")
def test_build_arguments_exist(block):
    arguments, stages = parse(ROOT / "Containerfile")
    known = {*arguments, *(name for stage in stages for name in stage.pairs("ARG"))}
    assert set(re.findall(r"--build-arg (\w+)=", block.text)) <= known


@of("sh", "server")
def test_a_server_s_command_line_is_right(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llada-8b").mkdir()
    for line in block.text.splitlines():
        python, dash_m, package, *arguments = shlex.split(line)
        assert (python, dash_m, package) == ("python", "-m", "vdiff_kserve")
        parse_args(arguments, {})


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page):
    known = {alias for each in ALL_SETTINGS.values() for alias in (*each.aliases, each.negation)}
    kserve = {plain(flag) for each in kserve_options(ALL_SETTINGS) for flag in each.option_strings}
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    named = {plain(flag) for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)}
    assert named - FOREIGN - {*ALL_SETTINGS, *known, *kserve, *HINTS} == set()


def test_files_that_the_texts_name_exist():
    named = {
        path
        for page in PAGES
        for path in re.findall(r"\b((?:manifests|hack|requirements)/[\w./-]*\w)", text_of(page))
    }
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists() or (ROOT / path.removesuffix("/")).exists(), path


def test_inferenceservices_are_all_told_of():
    text = text_of("kserve")
    for folder in kustomizations():
        if folder.startswith("inferenceservices/") and not folder.endswith("embedded-cpu"):
            assert f"`{Path(folder).name}`" in text, folder


def test_every_alert_has_its_line_in_operations():
    rules = (ROOT / "manifests/monitoring/prometheusrule.yaml").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(Vdiff\w+)` \|", text_of("operations"), re.MULTILINE))
    assert told == set(re.findall(r"alert: (\w+)", rules))


def test_every_page_is_linked_from_another():
    pages = sorted((ROOT / "docs").glob("*.md"))
    texts = {page.name: page.read_text(encoding="utf-8") for page in [*pages, ROOT / "README.md"]}
    for page in pages:
        others = (text for name, text in texts.items() if name != page.name)
        assert any(re.search(rf"\((?:docs/)?{page.name}[)#]", text) for text in others), page.name


def test_headings_that_links_name_exist():
    for page in sorted((ROOT / "docs").glob("*.md")):
        for target, heading in re.findall(
            r"\]\(([\w.-]*)#([\w-]+)\)", page.read_text(encoding="utf-8")
        ):
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in titles}
            assert heading in slugs, f"{page.name}: {target}#{heading}"
