"""A checkpoint that cannot be served ends the server with one message and exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.server.checkpoint import make_checkpoint
from tests.server.process import ServerProcess
from vdiff_kserve.config import ServerConfig, parse_args
from vdiff_kserve.loading import check_before_loading
from vdiff_kserve.models import CheckpointError

WEIGHTS = "model.safetensors"
NORM = "model.transformer.ln_f.weight"


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def change_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return spoil


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (change_weights(lambda t: t.pop(NORM)), f"1 missing: {NORM}"),
    "unexpected": (change_weights(lambda t: t.update(x=torch.ones(1))), "1 unexpected: x"),
    "mis-shaped": (
        change_weights(lambda t: t.update({NORM: torch.ones(3)})),
        f"{NORM} is [3], config.json says [64]",
    ),
    "not finite": (change_weights(lambda t: t[NORM].fill_(torch.nan)), "not finite"),
    "cut off": (cut, "damaged or cut off"),
    "pickled": (pickle, "python -m vdiff_kserve.convert --pickle_path"),
    "wrong field": (change_config(lambda c: c.update(n_heads="four")), "field `n_heads`"),
    "no size": (change_config(lambda c: c.update(n_layers=10**9)), "must be at most 1048576"),
    "too many layers": (
        change_config(lambda c: c.update(n_layers=10**6)),
        "It says 1000000 layers, the files have 3",
    ),
    "missing field": (change_config(lambda c: c.pop("d_model")), "field `d_model`"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}
FAST = ("not finite",)
"""The others' messages are tested without a server; here they take seconds each."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_a_bad_checkpoint_is_one_message_and_exit_code_1(tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    spoil(make_checkpoint(tmp_path))
    with ServerProcess("--model_dir", str(tmp_path), "--dtype", "float32") as server:
        assert server.wait() == 1
    errors = [line for line in server.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert server.lines[-1].startswith(errors[0])
    assert "Traceback" not in server.output


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "BERT": (
        change_config(lambda c: c.update(architectures=["BertModel"])),
        "field `architectures` names BertModel; served are LLaDAModelLM",
    ),
    "damaged": (
        damage_config,
        "config.json is not valid JSON",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "has neither model.safetensors nor model.safetensors.index.json. ",
    ),
    "an empty folder": (
        empty,
        "is empty: it has no config.json",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_folder_is_told_before_its_missing_tokenizer(
    tmp_path: Path, kind: str
) -> None:
    spoil, message = KINDS[kind]
    (make_checkpoint(tmp_path) / "tokenizer.json").unlink()
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        check_before_loading(ServerConfig(model_dir=str(tmp_path)))
    assert message in str(refusal.value)
    assert ("has no tokenizer.json" in str(refusal.value)) is (kind == "no weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache", "exact"), "the decoding options do not fit the model: "),
        (("--policy", "entropy", "--threshold", "0.9"), "do not fit the model: "),
        (("--device", "cuda:97"), "there is no device cuda:97"),
        (("--chat_template", "/nope"), "the chat template /nope cannot be read"),
        (("--max_model_len", "100000"), "--max_model_len is 100000"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(
    options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        check_before_loading(parse_args(options, {}))
    assert message in str(refusal.value)


def test_what_is_refused_early_is_refused_before_the_server_listens() -> None:
    with ServerProcess("--chat_template", "/nope") as server:
        assert server.wait() == 1
    assert server.output.startswith("error: the chat template /nope cannot be read: ")
    assert len(server.lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:97"), "there is no device cuda:97"),
        (("--chat_template", "/no/such.jinja"), "/no/such.jinja cannot be read"),
        (("--max_model_len", "100000"), "--max_model_len is 100000"),
    ],
)
def test_an_option_that_does_not_fit_is_too(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    folder = str(make_checkpoint(tmp_path))
    with ServerProcess("--model_dir", folder, *options) as server:
        assert server.wait() == 1
    assert f"error: {message}" in server.output or message in server.output
    assert "Traceback" not in server.output
