"""The server as it starts with no options: the model inside the package."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.server.process import ServerProcess

TALE = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with (
        ServerProcess().wait_until_ready() as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_it_is_ready_soon() -> None:
    """In processor time, which does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with ServerProcess().wait_until_ready() as server:
        assert "curl http://127.0.0.1:" in server.wait_for_line("curl")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15


def test_it_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="llada", messages=TALE, max_tokens=64)
    assert answer.choices[0].message.content.isprintable()
    assert answer.usage.completion_tokens <= 64


def test_a_stream_has_a_chunk_for_every_block_and_the_same_text(client: OpenAI) -> None:
    request = dict(
        model="llada", messages=TALE, max_tokens=64, temperature=0,
        extra_body={"block_length": 16, "steps": 8},
    )  # fmt: skip
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(c.choices[0].delta.content for c in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) >= -(-whole.usage.completion_tokens // 16)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
