"""What the manifest tests need from the machine: they skip without it, but never in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
CRDS = Path(os.environ.get("VDIFF_CRDS_DIR") or ROOT.parent / "shared/crds")


def missing(what: str) -> NoReturn:
    """End the test: a skip on a developer's machine, a failure in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must not pass unchecked: {what}")
    pytest.skip(what, allow_module_level=True)


def program(name: str, package: str) -> str:
    """The path of a program."""
    return shutil.which(name) or missing(f"{name} is not installed (it comes with {package})")


def kustomizations() -> list[str]:
    """Every folder that `kubectl kustomize` is to render, relative to `manifests/`."""
    return [
        str(file.parent.relative_to(MANIFESTS))
        for file in sorted(MANIFESTS.rglob("kustomization.yaml"))
        if yaml.safe_load(file.read_text(encoding="utf-8"))["kind"] == "Kustomization"
    ]


def deployable(folder: str) -> bool:
    """Whether a folder is for `kubectl apply`; those below `base` are parts of others."""
    return "base" not in Path(folder).parts


@cache
def rendered(folder: str) -> list[dict]:
    """The documents that a kustomization stands for; do not change them."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    else:
        missing("neither kubectl nor kustomize is installed (Debian 12's kubectl is too old)")
    done = subprocess.run(
        [*command, str(MANIFESTS / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def documents(*kinds: str) -> list[tuple[str, dict]]:
    """Every rendered document of these kinds (of all, if none is named), with its folder."""
    return [
        (folder, document)
        for folder in kustomizations()
        for document in rendered(folder)
        if not kinds or document["kind"] in kinds
    ]
