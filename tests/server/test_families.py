"""A checkpoint of every natively written family, served with `--model_dir` and no other flag."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.golden import GOLDEN_DIR
from tests.models.folders import write_config
from tests.models.test_attention import use_packed
from tests.models.test_expert_formats import EXPERTS, SIZES, save
from tests.models.test_reuse_graphs import run_again
from tests.server.checkpoint import make_tokenizer
from tests.server.process import ServerProcess
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.loading import load_model
from vdiff_kserve.models import Decoder, ReuseGraphs

MESSAGES = [{"role": "user", "content": "Which family are you of?"}]
DEFAULTS: dict[str, dict[str, Any]] = {
    "llada": {"policy": "threshold", "threshold": 0.98, "cache": "none", "block_length": 32},
    "llada_moe": {"policy": "threshold", "threshold": 0.98, "cache": "none", "block_length": 32},
    "llada2": {"policy": "dynamic", "threshold": 0.95, "cache": "exact", "block_length": 32},
    "dream": {"policy": "threshold", "threshold": 0.9, "cache": "prefix", "block_length": 32},
    "sdar": {"policy": "dynamic", "threshold": 0.95, "cache": "exact", "block_length": 4},
    "sdar_moe": {"policy": "dynamic", "threshold": 0.95, "cache": "exact", "block_length": 8},
}


def make_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A golden checkpoint with a tokenizer, and fields of its `config.json` changed or (None) left
    out."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN_DIR / family / "model.safetensors", folder)
    fields = json.loads((GOLDEN_DIR / family / "config.json").read_text(encoding="utf-8"))
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    make_tokenizer().save_pretrained(folder)
    return folder


def make_sdar_moe(folder: Path) -> Path:
    """A random checkpoint in the format of SDAR with experts, of which there is no golden one."""
    folder.mkdir()
    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(**SIZES | EXPERTS | {"vocab_size": len(tokenizer)})
    save(Qwen3MoeForCausalLM, config, folder)
    fields = config.to_dict() | {
        "architectures": ["SDARMoeForCausalLM"],
        "block_size": 8,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "num_experts": config.num_experts,
        "rope_theta": 1e4,
    }
    fields.pop("rope_parameters", None)
    write_config(folder, fields)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def client_of(*arguments: str) -> Iterator[OpenAI]:
    with (
        ServerProcess(*arguments).wait_until_ready() as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: OpenAI, **fields: Any) -> Any:
    (model,) = client.models.list().data
    return client.chat.completions.create(
        model=model.id, messages=MESSAGES, max_tokens=40, **fields
    )


SLOW = ("llada", "dream")
"""Families whose golden checkpoints other tests of the server serve."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in DEFAULTS],
)
def test_golden_family_is_served_without_a_flag(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    folder = make_sdar_moe(folder) if family == "sdar_moe" else make_folder(folder, family)
    with client_of("--model_dir", str(folder)) as client:
        whole = ask(client)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
        assert text == whole.choices[0].message.content
        cost = whole.vdiff
        used = {name: cost["decoding"][name] for name in DEFAULTS[family]}
        assert used == DEFAULTS[family]
        assert 0 < cost["nfe"] < 40 + cost["decoding"]["block_length"]
        steps = ask(client, extra_body={"profile": "exact", "steps": 10})
        assert steps.vdiff["nfe"] <= 20 < cost["nfe"]
        if DEFAULTS[family]["cache"] == "exact":
            with pytest.raises(BadRequestError, match="block length that the model was trained"):
                ask(client, extra_body={"block_length": 16})
            again = ask(client)
            assert again.usage.prompt_tokens_details.cached_tokens >= 32
            assert again.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.slow
def test_a_checkpoint_that_names_a_causal_class_is_served_as_its_family(tmp_path: Path) -> None:
    """Open-dCoder's form: Qwen2's class, no mask in `config.json` but in the tokenizer."""
    own = make_folder(tmp_path / "dream", "dream")
    other = make_folder(
        tmp_path / "coder", "dream", architectures=["Qwen2ForCausalLM"], mask_token_id=None
    )
    with (
        client_of("--model_dir", str(own)) as as_published,
        client_of("--model_dir", str(other), "--diffusion_family", "dream") as as_told,
    ):
        expected = ask(as_published, temperature=0.7, seed=3)
        told = ask(as_told, temperature=0.7, seed=3)
    assert told.choices[0].message.content == expected.choices[0].message.content
    assert told.vdiff["nfe"] == expected.vdiff["nfe"]


@pytest.mark.parametrize(
    ("name", "decoding", "expected"),
    [("sdar-b32", {"block_length": 8}, 8), ("sdar-b16", {}, 16), ("sdar", {}, 4)],
)
def test_block_size_is_that_of_the_model(
    tmp_path: Path, name: str, decoding: dict[str, int], expected: int
) -> None:
    """`--block_size`, else the folder's name, where `config.json` leaves it out."""
    folder = make_folder(tmp_path / name, "sdar", block_size=None)
    loaded = load_model(ServerConfig(model_dir=str(folder), decoding=decoding))
    loaded.engine.stop()
    assert loaded.spec.block_length == expected
    assert loaded.limits.decoding.block_length == expected


@pytest.mark.parametrize(
    ("name", "policy", "said"),
    [
        ("LLaDA2.1-mini", "edit", "LLaDA2.1 by its name: it edits by default; --policy dynamic"),
        ("mini", "dynamic", "LLaDA2.0 by its name: it does not edit by default; --policy edit"),
    ],
)
def test_the_log_tells_which_llada2_a_checkpoint_is_taken_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, policy: str, said: str
) -> None:
    folder = make_folder(tmp_path / name, "llada2")
    with caplog.at_level(logging.INFO, "kserve.vdiff.model"):
        loaded = load_model(ServerConfig(model_dir=str(folder)))
    loaded.engine.stop()
    assert said in caplog.text
    assert loaded.limits.decoding.policy == policy


def test_family_and_mask_are_those_that_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "coder", "dream", architectures=["Qwen2ForCausalLM"])
    told = ServerConfig(model_dir=str(folder), diffusion_family="dream", mask_token_id=7)
    loaded = load_model(told)
    loaded.engine.stop()
    assert loaded.spec.family == "dream"
    assert loaded.spec.mask_token_id == 7


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2"])
def test_a_warm_up_on_a_gpu_captures_cached_passes_of_all_sizes(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_packed(monkeypatch)
    made: list[ReuseGraphs] = []

    def for_model(decoder: Decoder, longest: int) -> ReuseGraphs:
        made.append(ReuseGraphs(decoder, longest, run_again))
        return made[-1]

    monkeypatch.setattr(ReuseGraphs, "for_model", for_model)
    folder = make_folder(tmp_path / family, family)
    loaded = load_model(ServerConfig(model_dir=str(folder), max_num_seqs=11))
    loaded.warm_up()
    (graphs,) = made
    before = {shape.rows for shape in graphs._captured if shape.is_cached}
    assert before <= {1, 2}
    replace(loaded, device="cuda:0").warm_up()
    loaded.engine.stop()
    block = loaded.spec.block_length
    captured = [shape for shape in graphs._captured if shape.is_cached]
    twice = {24} if loaded.spec.block_causal else set()  # a block and the one before it are two
    assert {s.rows for s in captured if s.outputs == block} == {1, 2, 4, 8, 16} | twice
    assert not graphs.failed
