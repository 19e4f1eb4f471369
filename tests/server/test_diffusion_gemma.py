"""A DiffusionGemma checkpoint, served with `--model_dir` and no other flag."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from openai import BadRequestError, OpenAI

from tests.golden import GOLDEN_DIR
from tests.server.checkpoint import make_tokenizer
from tests.server.process import ServerProcess


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("diffusion_gemma")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN_DIR / "diffusion_gemma" / name, folder / name)
    make_tokenizer().save_pretrained(folder)
    with (
        ServerProcess("--model_dir", str(folder)).wait_until_ready() as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_it_streams_a_chunk_for_every_canvas(client: OpenAI) -> None:
    request = dict(
        model="", prompt=[5, 80, 33, 7, 120], max_tokens=40, seed=3,
        extra_body={"ignore_eos": True, "steps": 30},
    )  # fmt: skip
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert whole.usage.completion_tokens == 40
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole.choices[0].text
    assert len(chunks) == 3
    cost = whole.vdiff
    assert cost["encoder_passes"] == 3
    assert 3 <= cost["nfe"] <= 30
    assert cost["decoding"]["policy"] == "entropy_bound"
    assert cost["decoding"]["temperature"] == 1.0


def test_it_chats(client: OpenAI) -> None:
    question = [{"role": "user", "content": "From noise?"}]
    answer = client.chat.completions.create(model="", messages=question, max_tokens=16)
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 0.9),
        ("cache", "none"),
        ("block_length", 8),
        ("policy", "apd"),
        ("bad_words", ["a"]),
    ],
)
def test_what_does_not_apply_is_refused(client: OpenAI, field: str, value: object) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="", prompt="a", extra_body={field: value})
    assert field in str(refused.value)


def test_a_format_is_refused_with_the_reason(client: OpenAI) -> None:
    wanted = {"structured_outputs": {"choice": ["yes", "no"]}}
    with pytest.raises(BadRequestError, match="whole canvases"):
        client.completions.create(model="", prompt="a", extra_body=wanted)
