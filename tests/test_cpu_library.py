"""The library of kernels for CPUs: when it is compiled, where it stays, and what hinders it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vdiff_kserve import cpu_library


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes what it was asked into its output, and the calls one per line."""
    program, calls = tmp_path / "g++", tmp_path / "calls"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done\necho "$@" > "$last"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setattr(cpu_library, "COMPILER", str(program))
    return calls


def test_it_is_compiled_once_and_again_when_it_changes(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "of mine"
    library = cpu_library.compile_into(folder)
    assert list(folder.iterdir()) == [library]
    *compiled, linked = compiler.read_text(encoding="utf-8").splitlines()
    assert len(compiled) == len(cpu_library.sources())
    assert all(line.startswith("-std=c++17") and "-fopenmp" in line for line in compiled)
    assert linked.startswith("-shared")
    assert "-fopenmp" not in linked, "torch's threads are to be used"

    assert cpu_library.compile_into(folder) == library
    assert len(compiler.read_text(encoding="utf-8").splitlines()) == len(compiled) + 1

    monkeypatch.setattr(cpu_library, "OPTIONS", ("-O1", *cpu_library.OPTIONS))
    assert cpu_library.compile_into(folder) != library


@pytest.mark.parametrize("changed", ["x.cpp", "y.h"])
def test_its_name_tells_all_that_it_is_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    for name in ("x.cpp", "y.h"):
        (tmp_path / name).write_text("int x;", encoding="utf-8")
    before = cpu_library.library_name()
    (tmp_path / changed).write_text("int y;", encoding="utf-8")
    assert cpu_library.library_name() != before


def test_one_that_an_image_ships_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.cpp").write_text("int x;", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no compiler"):
        cpu_library.find_or_compile()
    shipped = tmp_path / cpu_library.library_name()
    shipped.touch()
    assert cpu_library.find_or_compile() == shipped


def compiler_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Path:
    """A compiler of these shell commands, and a folder for what it makes."""
    program, folder = tmp_path / "g++", tmp_path / "cache"
    program.write_text("\n".join(("#!/bin/sh", *lines)), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(cpu_library, "COMPILER", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vdiff_kserve"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any number: kernels are then missing, which stops nothing."""

    def fail(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cpu_library, "FOLDER", Path(__file__).parent)
    monkeypatch.setattr(cpu_library, "runs_here", lambda: True)
    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(FileNotFoundError, match="XDG_CACHE_HOME"):
        cpu_library.find_or_compile()


def test_a_compiler_that_refuses_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    complaint = "x.cpp: In function:\nx.cpp:1: error: no such thing\nmore of it"
    folder = compiler_that(tmp_path, monkeypatch, f"echo '{complaint}' >&2", "exit 3")
    with pytest.raises(cpu_library.CompileError, match=r"status 3: x.cpp:1: error: no such thing"):
        cpu_library.compile_into(folder)
    assert list(folder.iterdir()) == []


@pytest.fixture
def not_asked_for_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The library of other sources, on a processor that has its instructions."""
    (tmp_path / "x.cpp").write_text("int x;", encoding="utf-8")
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu_library, "runs_here", lambda: True)
    cached = cpu_library.library, cpu_library.is_available
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("not_asked_for_yet")
def test_a_slow_compiler_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    began = tmp_path / "began"
    folder = compiler_that(tmp_path, monkeypatch, f"echo >> {began}", "exec sleep 600")
    monkeypatch.setattr(cpu_library, "COMPILE_LIMIT_S", 1)
    cpu_library.begin()
    wait_until(began.exists)
    with caplog.at_level("INFO"):
        assert not any(cpu_library.kernels_work(lambda: True, "Wrong") for _ in range(3))
    waiting, refusal = caplog.messages
    assert waiting.startswith("Waiting for kernels")
    assert f"{tmp_path}/g++ takes more than 1 seconds" in refusal
    assert began.read_text(encoding="utf-8") == "\n"
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("not_asked_for_yet")
def test_the_log_tells_once_what_is_lost_without_a_library_and_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    assert not any(cpu_library.kernels_work(lambda: True, "Wrong") for _ in range(3))
    (warning,) = caplog.messages
    assert warning == (
        "Without kernels for this CPU, bfloat16 takes about twice as long: there is no compiler "
        "g++. They are compiled at the next start if there is g++ 11 or later, and a place for "
        "them in $XDG_CACHE_HOME or ~/.cache."
    )


def test_the_command_compiles_into_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vdiff_kserve.cpu_library"]
    without = subprocess.run(
        [*command, str(tmp_path)], env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert (without.returncode, without.stdout) == (1, "")
    assert without.stderr == "error: there is no compiler g++\n"


def test_flags_are_those_of_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nflags\t\t: fpu avx2 amx_bf16\nbugs : x\nprocessor : 1\nflags\t\t: fpu\n"
    monkeypatch.setattr(cpu_library.Path, "is_file", lambda self: True)
    monkeypatch.setattr(cpu_library.Path, "read_text", lambda self, **_: text)
    assert cpu_library.cpu_flags() >= {"fpu", "avx2", "amx_bf16"}
    assert not cpu_library.runs_here()
    monkeypatch.setattr(cpu_library.Path, "is_file", lambda self: False)
    assert cpu_library.cpu_flags() == set()
