"""The server as it starts with no options: the model inside the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.server.process import ServerProcess

TALE = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client(default_server: ServerProcess) -> Iterator[OpenAI]:
    url = f"{default_server.url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_it_is_ready_soon(default_server: ServerProcess) -> None:
    """In processor time, which does not depend on what else the machine does."""
    assert default_server.cpu_seconds < 15
    assert f"curl {default_server.url}/" in default_server.wait_for_line("curl")


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
