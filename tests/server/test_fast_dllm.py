"""A Fast-dLLM v2 checkpoint, served with `--model_dir` and no other flag."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from openai import BadRequestError, OpenAI

from tests.golden import GOLDEN_DIR
from tests.server.checkpoint import make_tokenizer
from tests.server.process import ServerProcess

QUESTION = [{"role": "user", "content": "In which blocks do you write?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("fast_dllm_v2")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN_DIR / "fast_dllm_v2" / name, folder / name)
    make_tokenizer().save_pretrained(folder)
    with (
        ServerProcess("--model_dir", str(folder)).wait_until_ready() as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_it_streams_what_it_answers(client: OpenAI) -> None:
    """Of a prompt too short for the prefix cache, whose copies may round differently."""
    request = dict(
        model="", prompt=[5, 80, 33, 7, 120], max_tokens=60, logprobs=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage.completion_tokens == 60 == len(whole.choices[0].logprobs.tokens)
    assert len(chunks) >= 4
    cost = whole.vdiff
    assert cost["decoding"]["block_length"] == 8
    assert cost["decoding"]["cache"] == "exact"
    assert cost["passes"]["commit"] == 4
    assert cost["nfe"] == sum(cost["passes"].values()) <= 60


def test_a_prompt_that_was_seen_is_not_computed_again(client: OpenAI) -> None:
    request = dict(model="", messages=QUESTION, max_tokens=8)
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 16


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("block_length", 5, "divide 16"), ("cache", "prefix", "none, exact, dual")],
)
def test_what_does_not_fit_its_blocks_is_refused(
    client: OpenAI, field: str, value: object, allowed: str
) -> None:
    with pytest.raises(BadRequestError, match=allowed) as refused:
        client.completions.create(model="", prompt="a", extra_body={field: value})
    assert refused.value.param == field
