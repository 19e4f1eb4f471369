"""The seam: KServe's OpenAI extension loads over this project's types."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import kserve
import pytest

from vdiff_kserve.openai import kserve_types, protocol

KSERVE = Path(kserve.__file__).parent
UNUSED = {KSERVE / "protocol/rest/openai/endpoints.py"}


def imported_names() -> set[str]:
    """Every name that KServe's sources import from the module that the seam stands for."""
    names = set()
    for path in KSERVE.rglob("*.py"):
        if path.is_relative_to(KSERVE / "protocol/rest/openai/types"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            is_relative = node.level == 1 and path.parent.name == "openai"
            if node.module == kserve_types.MODULE or (is_relative and node.module == "types"):
                names |= {alias.name for alias in node.names}
    return names


def exported_names() -> set[str]:
    source = (KSERVE / "protocol/rest/openai/types/__init__.py").read_text(encoding="utf-8")
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(names)


def test_every_name_that_kserve_imports_is_present() -> None:
    assert imported_names()
    assert imported_names() <= kserve_types.NAMES.keys()


def test_the_names_are_those_of_kserves_own_module() -> None:
    assert exported_names() <= kserve_types.NAMES.keys()


def test_kserve_uses_the_types_of_this_project() -> None:
    from kserve.protocol.rest.openai import ChatCompletionRequest, OpenAIGenerativeModel
    from kserve.protocol.rest.openai.errors import create_error_response

    assert ChatCompletionRequest is protocol.ChatCompletionRequest
    assert OpenAIGenerativeModel.__abstractmethods__ >= {"create_completion"}
    assert isinstance(create_error_response("no"), protocol.ErrorResponse)
    assert importlib.util.find_spec(kserve_types.MODULE) is not None


def test_installing_again_changes_nothing() -> None:
    assert kserve_types.install() is sys.modules[kserve_types.MODULE]


def test_a_module_that_came_first_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kserve_types.MODULE, sys)
    with pytest.raises(RuntimeError, match="before kserve"):
        kserve_types.install()


def test_nothing_named_vllm_is_imported() -> None:
    """Nor by any test that ran before this one."""
    importlib.import_module("vdiff_kserve.server")
    importlib.import_module("kserve.protocol.rest.openai.dataplane")
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
    assert "kserve.protocol.rest.openai.endpoints" not in sys.modules
