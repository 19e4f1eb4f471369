"""The OpenAPI document is true: schemathesis asks every operation of it, also nonsense."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import COMMON
from tests.server.process import ServerProcess

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
HANGS_AFTER = 60
"""Seconds; far longer than any request here needs."""


@pytest.fixture(scope="module")
def documented(checkpoint: str) -> Iterator[ServerProcess]:
    arguments = (
        *COMMON, "--model_dir", checkpoint, "--model_name", "tiny", "--max_model_len", "128",
        "--default_max_tokens", "8", "--enable_docs_url", "true", "--enable_grpc", "false",
    )  # fmt: skip
    with ServerProcess(*arguments) as process:
        yield process.wait_until_ready()


def run_schemathesis(server: ServerProcess, folder: Path, *arguments: str) -> str:
    """Its report, when it found nothing."""
    config = folder / "schemathesis.toml"
    config.write_text('[parameters]\nmodel_name = "tiny"\n', encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run",
        f"{server.url}/openapi.json", "--checks", ",".join(CHECKS), "--seed", "1", "--no-color",
        "--phases", "examples,coverage,fuzzing", "--generation-database", "none",
        "--continue-on-failure", "--request-timeout", str(HANGS_AFTER), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_no_operation_breaks_or_hangs(documented: ServerProcess, tmp_path: Path) -> None:
    # /openai/v1 has the handlers of /v1
    arguments = ("--exclude-path-regex", "^/openai", "--max-examples", "3")
    report = run_schemathesis(documented, tmp_path, *arguments)
    operations = operations_of(documented)
    assert len(operations) > 25
    assert f"Tested: {sum(not path.startswith('/openai') for _, path in operations)}" in report
    assert httpx.get(f"{documented.url}/health").status_code == 200
    assert "Traceback" not in documented.output


def test_every_operation_has_an_id_of_its_own(documented: ServerProcess) -> None:
    paths = httpx.get(f"{documented.url}/openapi.json").json()["paths"]
    ids = [each["operationId"] for methods in paths.values() for each in methods.values()]
    assert len(ids) == len(set(ids)) > 25
    assert "Duplicate" not in documented.output


@pytest.mark.slow
def test_no_operation_breaks_or_hangs_in_many_more_examples(
    documented: ServerProcess, tmp_path: Path
) -> None:
    report = run_schemathesis(documented, tmp_path, "--max-examples", "50")
    assert f"Tested: {len(operations_of(documented))}" in report
    assert httpx.get(f"{documented.url}/health").status_code == 200
    assert "Traceback" not in documented.output


def operations_of(server: ServerProcess) -> dict[tuple[str, str], dict[str, Any]]:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    return {(verb, path): op for path, each in paths.items() for verb, op in each.items()}


def test_the_document_tells_what_routes_refuse_in_their_shape(documented: ServerProcess) -> None:
    operations = operations_of(documented)
    for (_, path), operation in operations.items():
        assert "422" not in operation["responses"], path
    chat = operations["post", "/v1/chat/completions"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} == set(chat)
    told = chat["400"]["content"]["application/json"]["schema"]
    assert told == {"$ref": "#/components/schemas/ErrorResponse"}
    predict = operations["post", "/v1/models/{model_name}:predict"]["responses"]
    assert predict["400"]["content"]["application/json"]["schema"]["properties"].keys() == {"error"}
    assert set(operations["get", "/health"]["responses"]) == {"200", "404", "503"}
    assert "403" in operations["post", "/v2/repository/models/{model_name}/load"]["responses"]


def test_of_two_routes_of_one_path_the_document_has_the_one_that_answers(
    documented: ServerProcess,
) -> None:
    listing = operations_of(documented)["get", "/v1/models"]["responses"]["200"]
    schema = listing["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ModelList"}
