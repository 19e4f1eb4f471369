"""What the repository promises about itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import vdiff_kserve
from vdiff_kserve.command_line import kserve_options, plain
from vdiff_kserve.config import SETTINGS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vdiff_kserve"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READ_THROUGH = {
    "model": ("checkpoint_dir", "hub_id"),
    "model_dir": ("checkpoint_dir",),
    "model_id": ("hub_id",),
    "served_model_name": ("served_names",),
}
"""Settings that others read through a property of `ServerConfig`."""


@cache
def package_trees() -> dict[Path, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", each)[0].replace("-", "_") for each in requirements}


DISTRIBUTIONS = {"grpc": "grpcio", "yaml": "pyyaml"}
"""Packages that are installed under another name than they are imported by."""
OF_TORCH = {"triton"}
"""What torch's builds for GPUs bring along, and is imported there only."""


def imported_packages(folder: Path = PACKAGE) -> set[str]:
    """Top-level names of everything foreign that the package's modules in a folder import."""
    names = set()
    for tree in (tree for file, tree in package_trees().items() if file.is_relative_to(folder)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {"vdiff_kserve"}
    return {DISTRIBUTIONS.get(name, name) for name in foreign}


def test_imports_run_one_way_only():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_imported_is_a_declared_dependency():
    declared = requirement_names(project()["dependencies"])
    extras = project()["optional-dependencies"]
    optional = requirement_names(extras["logging"] + extras["ray"] + extras["quantization"])
    found = imported_packages() - declared - OF_TORCH
    assert found == optional == {"asgi_logger", "ray", "torchao"}


def test_only_replicas_need_ray():
    assert "ray" in requirement_names(project()["optional-dependencies"]["ray"])
    assert "ray" in imported_packages(PACKAGE / "distributed")
    for folder in PACKAGE.iterdir():
        if folder.name != "distributed":
            assert "ray" not in imported_packages(folder), folder.name


def test_every_declared_dependency_is_imported():
    declared = requirement_names(project()["dependencies"])
    assert declared - imported_packages() == set()


@cache
def attributes_of_the_configuration() -> set[str]:
    """Attributes of a `config` in the modules that know `ServerConfig`."""
    return {
        node.attr
        for file, tree in package_trees().items()
        if file.name != "config.py" and "vdiff_kserve.config" in file.read_text(encoding="utf-8")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config")
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read_by_the_package(name):
    for attribute in READ_THROUGH.get(name, (name,)):
        assert attribute in attributes_of_the_configuration()


def test_missing_packages_and_unnamed_exceptions_are_never_swallowed():
    for file, tree in package_trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{file}:{node.lineno}: bare except"
                caught = ast.unparse(node.type)
                assert "ImportError" not in caught, f"{file}:{node.lineno}"
                assert "ModuleNotFoundError" not in caught, f"{file}:{node.lineno}"


def test_every_make_command_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, document.name
    assert {"serve", "test"} <= targets


def test_every_option_in_the_readme_exists():
    known = {"help", *SETTINGS, *(alias for each in SETTINGS.values() for alias in each.aliases)}
    known |= {plain(flag) for each in kserve_options(SETTINGS) for flag in each.option_strings}
    named = re.findall(r"(?<![\w-])--([a-z]\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(named) <= known
    assert "model_dir" in named


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_map_names_every_module():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for file in package_trees():
        if file.name != "__init__.py":
            assert f"`{file.name}`" in page, f"{file.relative_to(ROOT)} is not on the map"


def test_the_map_names_no_module_that_does_not_exist():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    folders = [ROOT / name for name in ("vdiff_kserve", "hack", "benchmarks", "tests")]
    names = {file.name for folder in folders for file in folder.rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", page)) <= names


def test_the_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[0] in ("Unreleased", vdiff_kserve.__version__)
