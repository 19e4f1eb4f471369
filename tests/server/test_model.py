"""The model's life, without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vdiff_kserve import checkpoint as checkpoints
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.loading import load_model
from vdiff_kserve.model import DiffusionModel
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.observability import logs, metrics
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.protocol import ChatCompletionRequest
from vdiff_kserve.ports import ServerError
from vdiff_kserve.server import (
    check_access_log,
    check_certificate,
    loop_factory,
    warn_of_slashes,
)
from vdiff_kserve.setting import ConfigError

CHAT = ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}], max_tokens=3)


def config(folder: str, **changes: object) -> ServerConfig:
    return ServerConfig(model_name="tiny", model_dir=folder, dtype="float32", **changes)


async def test_it_answers_once_it_is_loaded_and_not_after_it_stopped(checkpoint: str) -> None:
    model = DiffusionModel(config(checkpoint, decoding={"threshold": 0.5, "block_length": 8}))
    assert model.ready
    assert model.engine
    assert not await model.healthy()
    assert not model.load()
    with pytest.raises(RequestError, match="loading"):
        await model.create_chat_completion(CHAT)
    await model.start_engine()
    assert await model.healthy()
    assert model.load()
    assert model.max_model_len == 4096
    answer = await model.create_chat_completion(CHAT)
    assert answer.vdiff.decoding["policy"] == "threshold"
    assert answer.vdiff.decoding["block_length"] == 8
    model.refuse()
    with pytest.raises(RequestError, match="stopping"):
        await model.create_completion(CHAT)
    model.stop()
    model.stop_engine()
    assert not await model.healthy()
    with pytest.raises(RequestError, match="stopped"):
        await model.predict({"instances": ["x"]})


async def test_a_dead_engine_is_told(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiffusionModel(config(checkpoint))
    await model.start_engine()
    assert model.alive
    engine = model._engine
    assert engine is not None

    def die(*_: object) -> None:
        raise SystemError("the loop is broken")

    monkeypatch.setattr(engine._scheduler, "release", die)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with suppress(RequestError):
        await model.create_chat_completion(CHAT)
    engine._thread.join()
    with pytest.raises(RequestError) as caught:
        await model.create_chat_completion(CHAT)
    assert caught.value.status == 503
    assert not model.alive
    assert not await model.healthy()
    assert model.not_ready_reason == "The model's engine has failed."


async def test_a_stuck_engine_is_told(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiffusionModel(config(checkpoint, round_timeout=0.5))
    await model.start_engine()
    engine = model._engine
    assert engine is not None
    go_on = threading.Event()
    engine._runner._decoder.register_forward_pre_hook(lambda *_: go_on.wait(60) and None)
    answer = asyncio.create_task(model.create_chat_completion(CHAT))
    await asyncio.to_thread(wait_until, lambda: not model.alive)
    assert not await model.healthy()
    assert model.not_ready_reason == "The model's engine is stuck."
    assert b'vdiff_engine_stuck{model_name="tiny"} 1.0' in metrics.render()
    with pytest.raises(RequestError) as caught:
        await model.create_chat_completion(CHAT)
    assert caught.value.status == 503
    go_on.set()
    await answer
    await asyncio.to_thread(wait_until, lambda: model.alive)
    assert b'vdiff_engine_stuck{model_name="tiny"} 0.0' in metrics.render()
    model.stop()


async def test_a_failed_load_is_raised(tmp_path: Path) -> None:
    model = DiffusionModel(config(str(tmp_path)))
    with pytest.raises(CheckpointError):
        await model.start_engine()
    assert not await model.healthy()


def test_the_checkpoint_is_a_folder_or_embedded(tmp_path: Path) -> None:
    assert checkpoints.find_checkpoint(ServerConfig()) == checkpoints.EMBEDDED
    assert checkpoints.find_checkpoint(config(str(tmp_path))) == tmp_path


def access(method: str, path: str, status: int) -> logging.LogRecord:
    arguments = ("127.0.0.1:1", method, path, "1.1", status)
    return logging.LogRecord(
        "uvicorn.access", 20, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "logged"),
    [
        ("GET", "/health", 200, False),
        ("GET", "/metrics?x=1", 200, False),
        ("GET", "/v2/health/live", 200, False),
        ("GET", "/v2/models/tiny/ready", 200, False),
        ("GET", "/v1/models/tiny", 200, False),
        ("GET", "/health", 503, True),
        ("POST", "/v1/completions", 200, True),
        ("GET", "/v1/models", 200, True),
    ],
)
def test_only_probes_that_succeed_are_not_logged(
    method: str, path: str, status: int, logged: bool
) -> None:
    assert logs.QuietProbes().filter(access(method, path, status)) is logged


def test_other_records_pass() -> None:
    assert logs.QuietProbes().filter(logging.LogRecord("x", 20, "", 0, "text", None, None))


def test_a_cache_too_small_for_the_context_is_told(
    checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kserve.vdiff.model"):
        for memory in ("1GiB", "1KiB"):
            load_model(ServerConfig(model_dir=checkpoint, kv_cache_memory=memory)).engine.stop()
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("The key-value cache has room for 1 tokens: longer requests")


def test_a_logging_configuration_of_the_user_is_used(tmp_path: Path) -> None:
    """That of the guide, in a process of its own: it takes the place of every logger's settings."""
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^    version: 1\n(?:    .*\n)+", page, re.MULTILINE)
    file = tmp_path / "log.yaml"
    file.write_text(textwrap.dedent(example), encoding="utf-8")
    code = (
        "import logging, sys\n"
        "from vdiff_kserve.observability import logs\n"
        "logs.configure('warning', sys.argv[1])\n"
        "logging.getLogger('kserve.vdiff.model').info('loaded')\n"
        "access = logging.getLogger('uvicorn.access')\n"
        "for path in '/v1/models', '/health':\n"
        "    access.info('%s - \"%s %s HTTP/%s\" %d', 'me', 'GET', path, '1.1', 200)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, cwd=tmp_path, env=env)
    lines = [json.loads(line) for line in (tmp_path / "vdiff.log").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["loaded", 'me - "GET /v1/models HTTP/1.1" 200']


@pytest.mark.parametrize(
    ("name", "text"),
    [("log.json", None), ("log.json", "{"), ("log.json", '{"version": 7}'), ("log.yaml", "a: [")],
)
def test_a_logging_configuration_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"--log_config_file .*{name} cannot be used"):
        logs.configure("info", str(file))


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    check_certificate(None, None)
    empty = tmp_path / "tls.crt"
    empty.touch()
    with pytest.raises(ServerError, match="--ssl_keyfile needs --ssl_certfile"):
        check_certificate(None, str(empty))
    with pytest.raises(ServerError, match="--ssl_keyfile must be a file that exists, got"):
        check_certificate(str(empty), str(tmp_path / "tls.key"))
    with pytest.raises(ServerError, match=r"--ssl_certfile .*tls\.crt and its key cannot be used"):
        check_certificate(str(empty), str(empty))


def test_an_access_log_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_access_log("%(s)s")
    monkeypatch.setitem(sys.modules, "asgi_logger", None)
    check_access_log(None)
    with pytest.raises(ServerError, match="--access_log_format needs the package asgi-logger"):
        check_access_log("%(s)s")


@pytest.mark.parametrize(
    ("line_format", "reason"),
    [
        ("%(s", "incomplete format key"),
        ("%(h)d", "a real number is required"),
        ("%s", "each % must have a name"),
        ("100% %(s)s", "each % must have a name"),
    ],
)
def test_an_access_log_that_cannot_be_written_is_refused(line_format: str, reason: str) -> None:
    check_access_log("%(h)s %(s)d %({X-Request-Id}o)s 100%%")
    with pytest.raises(ServerError, match=f"--access_log_format .* cannot be used: .*{reason}"):
        check_access_log(line_format)


def test_a_name_that_no_path_can_hold_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kserve.vdiff.server"):
        warn_of_slashes(("org/model", "model"))
        assert not caplog.records
        warn_of_slashes(("org/model",))
    (told,) = [record.message for record in caplog.records]
    assert "the slash of org/model" in told
    assert "--served_model_name" in told


@pytest.mark.parametrize(
    ("name", "has_uvloop", "package"),
    [
        ("auto", True, "uvloop"),
        ("uvloop", True, "uvloop"),
        ("asyncio", True, "asyncio"),
        ("auto", False, "asyncio"),
    ],
)
def test_the_event_loop_is_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, has_uvloop: bool, package: str
) -> None:
    if not has_uvloop:
        monkeypatch.setattr("vdiff_kserve.server.find_spec", lambda _: None)
    with asyncio.Runner(loop_factory=loop_factory(name)) as runner:
        assert type(runner.get_loop()).__module__.partition(".")[0] == package


def test_an_event_loop_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdiff_kserve.server.find_spec", lambda _: None)
    with pytest.raises(ServerError, match="--event-loop uvloop needs the package uvloop"):
        loop_factory("uvloop")
