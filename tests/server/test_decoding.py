"""Decoding chosen per request, on a real server with Dream's format and an auxiliary model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.golden import GOLDEN_DIR
from tests.server.checkpoint import make_tokenizer
from tests.server.process import ServerProcess
from vdiff_kserve.config import parse_args
from vdiff_kserve.decoding import POLICIES
from vdiff_kserve.loading import load_model
from vdiff_kserve.models import CheckpointError


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Golden Dream weights and their auxiliary model, each with the same tokenizer."""
    model, auxiliary = tmp_path / "dream", tmp_path / "auxiliary"
    for source, folder in ((GOLDEN_DIR / "apd", model), (GOLDEN_DIR / "apd" / "ar", auxiliary)):
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, folder / name)
        make_tokenizer().save_pretrained(folder)
    return model, auxiliary


def flags(model: Path, *more: str) -> tuple[str, ...]:
    return (
        *("--model_dir", str(model), "--dtype", "float32", "--device", "cpu"),
        *("--max_model_len", "128", *more),
    )


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model, auxiliary = folders(tmp_path_factory.mktemp("apd"))
    arguments = flags(model, "--apd_model", str(auxiliary), "--threshold", "0.3")
    with (
        ServerProcess(*arguments).wait_until_ready() as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"prompt": "ten tin", "max_tokens": 24, "seed": 3, "ignore_eos": True} | fields
    return http.post("/v1/completions", json=body)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_and_reports_itself(http: httpx.Client, policy: str) -> None:
    answer = complete(http, policy=policy, block_length=8).json()
    assert answer["usage"]["completion_tokens"] == 24
    info = answer["vdiff"]
    assert info["decoding"]["policy"] == policy
    passes = info["passes"]
    assert info["nfe"] == passes["refresh"] + passes["reuse"] + passes["commit"]
    assert passes["auxiliary"] == (info["nfe"] if policy == "apd" else 0)


@pytest.mark.parametrize(("cache", "reuses"), [("none", False), ("prefix", True), ("dual", True)])
def test_a_cache_turns_refreshes_into_reuses(http: httpx.Client, cache: str, reuses: bool) -> None:
    info = complete(http, policy="low_confidence", cache=cache, block_length=8).json()["vdiff"]
    assert info["decoding"]["cache"] == cache
    assert info["passes"]["refresh"] == (3 if reuses else 24)
    assert info["nfe"] == 24


def test_the_servers_flags_are_the_default_and_the_request_wins(http: httpx.Client) -> None:
    decoding = complete(http).json()["vdiff"]["decoding"]
    assert (decoding["policy"], decoding["threshold"]) == ("threshold", 0.3)
    assert complete(http, threshold=0.7).json()["vdiff"]["decoding"]["threshold"] == 0.7
    assert complete(http, profile="exact").json()["vdiff"]["decoding"]["policy"] == "entropy"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"factor": 1, "policy": "low_confidence"}, "factor"),
        ({"block_length": 0}, "block_length"),
        ({"cache": "exact"}, "cache"),
        ({"threshold": 1.5}, "threshold"),
        ({"policy": "greedy"}, "policy"),
        ({"apd": True, "steps": 3}, "steps"),
    ],
)
def test_contradictions_are_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = complete(http, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_apd_and_confidence_write_the_same_text_alone_and_together(http: httpx.Client) -> None:
    fields = {"policy": "apd", "temperature": 0.8, "n": 3}
    together = [choice["text"] for choice in complete(http, **fields).json()["choices"]]
    alone = [
        complete(http, **(fields | {"n": 1, "seed": 3 + i})).json()["choices"][0]["text"]
        for i in range(3)
    ]
    assert together == alone


@pytest.mark.slow
def test_without_apd_it_is_refused(tmp_path: Path) -> None:
    model, _ = folders(tmp_path)
    arguments = flags(model, "--disable_apd")
    with (
        ServerProcess(*arguments).wait_until_ready() as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        answer = complete(client, apd=True)
        assert answer.status_code == 400
        assert "--disable_apd" in answer.json()["error"]["message"]
        assert complete(client).status_code == 200


def test_an_auxiliary_model_with_another_vocabulary_ends_the_start(tmp_path: Path) -> None:
    model, auxiliary = folders(tmp_path)
    other = make_tokenizer()
    text = other.backend_tokenizer.to_str().replace('"A":', '"swap":').replace('"B":', '"A":')
    (auxiliary / "tokenizer.json").write_text(text.replace('"swap":', '"B":'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        load_model(parse_args(list(flags(model, "--apd_model", str(auxiliary)))))
