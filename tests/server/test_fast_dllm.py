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
    model = client.models.list().data[0].id
    request = dict(model=model, messages=QUESTION, max_tokens=60, logprobs=True)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    assert len(chunks) > 4
    cost = whole.vdiff
    assert cost["decoding"]["block_length"] == 8
    assert cost["decoding"]["cache"] == "exact"
    assert cost["passes"]["commit"] >= 60 // 16 - 1
    assert cost["nfe"] == sum(cost["passes"].values()) <= 60 + 4


def test_a_prompt_that_was_seen_is_not_computed_again(client: OpenAI) -> None:
    model = client.models.list().data[0].id
    request = dict(model=model, messages=QUESTION, max_tokens=8)
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert second.choices[0].message.content == first.choices[0].message.content


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
