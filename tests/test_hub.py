"""Checkpoints on the hub, against a hub on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hack.hub import COMMIT, Hub
from tests.server.checkpoint import make_checkpoint
from tests.server.process import ServerProcess
from vdiff_kserve.checkpoint import find_checkpoint
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.hub import download, stored_shapes
from vdiff_kserve.models import CheckpointError

MODEL_ID = "some/model"
SHAPE = [2, 3]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "modeling_llada.py").write_bytes(b"raise SystemExit")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(MODEL_ID, files) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def refusal(revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        download(MODEL_ID, revision)
    return str(caught.value)


def test_what_is_wanted_is_downloaded_once_and_no_code(hub: Hub, files: dict[str, bytes]) -> None:
    folder = download(MODEL_ID, None)
    assert {path.name for path in folder.iterdir()} == files.keys() - {
        "pytorch_model.bin",
        "modeling_llada.py",
    }
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    hub.ranges.clear()
    assert find_checkpoint(ServerConfig(model_id=MODEL_ID)) == folder
    assert not hub.ranges


def test_a_revision_is_the_one_that_is_asked_for(hub: Hub) -> None:
    hub.revisions.add("v1")
    assert download(MODEL_ID, "v1").name == COMMIT
    assert find_checkpoint(ServerConfig(model_id=MODEL_ID, revision=COMMIT)).name == COMMIT
    assert "some/model at v2 cannot be downloaded" in refusal("v2")
    assert "no such branch, tag or commit" in refusal("v2")


def test_the_description_comes_without_weights_and_their_shapes_from_headers(hub: Hub) -> None:
    folder = download(MODEL_ID, None, weights=False)
    assert (folder / "config.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    stored = stored_shapes(MODEL_ID, None)
    assert stored["model.transformer.ln_f.weight"] == ("F32", (64,))


def test_the_token_of_the_environment_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(MODEL_ID, None)
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "code", "token", "message"),
    [
        (404, "RepoNotFound", None, "it is private and HF_TOKEN is not set"),
        (404, "RepoNotFound", "hf_secret", "HF_TOKEN's account may not read it"),
        (403, "GatedRepo", "hf_secret", "ask for consent"),
        (403, "GatedRepo", None, "set HF_TOKEN to a token of that account"),
        (500, "", None, "500"),
    ],
)
def test_refusals_say_what_would_help(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    token: str | None,
    message: str,
) -> None:
    hub.refusal = status, code
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refusal()
    assert message in said
    assert said.startswith("some/model cannot be downloaded: ")
    assert "hf_secret" not in said


def test_without_network_what_was_downloaded_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(MODEL_ID, None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert download(MODEL_ID, None) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download(MODEL_ID, None) == folder


def test_without_network_the_way_out_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    said = refusal()
    assert "http://127.0.0.1:1 cannot be reached" in said
    assert "--model_dir" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal()


def test_without_network_shapes_cannot_be_read_and_that_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.url = "http://127.0.0.1:1"
    hub.use(monkeypatch, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        stored_shapes(MODEL_ID, None)


def test_a_server_of_an_unreachable_model_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with ServerProcess("--model_id", MODEL_ID) as server:
        assert server.wait() == 1
    assert "error: some/model cannot be downloaded" in server.output
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_a_server_downloads_with_a_progress_bar_and_serves(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(MODEL_ID, files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        with ServerProcess("--model_id", MODEL_ID, "--revision", "main") as server:
            server.wait_until_ready()
    assert "Fetching" in server.output or "Download" in server.output
    assert os.listdir(tmp_path)  # noqa: PTH208
