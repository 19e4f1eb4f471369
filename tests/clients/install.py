"""Client programs in environments of their own."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "clients"
VERSIONS = HERE / "clients.toml"


def python_with(client: str) -> Path:
    """The interpreter of an environment that has the client in its tested version.

    It is made when it is missing, or when the version changed. What this environment has already,
    torch before all, is not installed again; a version that does not fit the client is shadowed.
    """
    requires = tomllib.loads(VERSIONS.read_text(encoding="utf-8"))[client]["requires"]
    folder = FOLDER / client
    python = folder / "bin" / "python"
    wanted = _stamp(requires, sys.version)
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        inside = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(_run(inside).strip())
        (packages / "parent.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        _run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *requires])
        stamp.write_text(wanted, encoding="utf-8")
    return python


def node_modules() -> Path:
    """A folder with the Node client of the locked version, and the script that uses it."""
    source = HERE / "node"
    folder = FOLDER / "node"
    wanted = _stamp([(source / "package-lock.json").read_text(encoding="utf-8")])
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        _run(["npm", "ci", "--no-audit", "--no-fund"], folder)
        stamp.write_text(wanted, encoding="utf-8")
    for script in source.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


def _stamp(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
