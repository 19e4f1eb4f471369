"""The server on a GPU. Skipped without one."""

import pytest
import torch
from openai import OpenAI

from tests.server.process import ServerProcess
from vdiff_kserve import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
QUESTIONS = ["What is 17 + 25?", "What is the capital of France?", "Sort 8, 1, 6, 4."]


def test_the_server_finds_the_gpu_and_answers_as_on_a_cpu() -> None:
    """Whole and streamed, with a draw, and it ends when it is told to."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(device="cpu") as llm:
        outputs = llm.chat(chats, SamplingParams(max_tokens=64))
    expected = [output.outputs[0].text for output in outputs]
    with ServerProcess() as process:
        process.wait_until_ready()
        assert "cuda" in process.output
        client = OpenAI(base_url=f"{process.url}/v1", api_key="none")

        def ask(messages: list[dict], **options: object) -> str:
            answer = client.chat.completions.create(
                model="llada", messages=messages, max_tokens=64, **options
            )
            return answer.choices[0].message.content

        assert [ask(messages) for messages in chats] == expected
        drawn = [ask(chats[0], temperature=1.0, seed=4) for _ in range(2)]
        assert drawn[0] == drawn[1]
        stream = client.chat.completions.create(
            model="llada", messages=chats[0], max_tokens=64, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == expected[0]
        process.terminate()
        assert process.wait() == 0
