"""The server as the `openai` SDK sees it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.server.process import ServerProcess

MESSAGES = [{"role": "user", "content": "tell me a tale"}]
LONG = {"ignore_eos": True}


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completion(client: OpenAI) -> None:
    answer = client.completions.create(
        model="ref", prompt="the tale", max_tokens=12, extra_body=LONG
    )
    assert answer.object == "text_completion"
    assert answer.model == "ref"
    assert answer.id.startswith("cmpl-")
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"


def test_completion_without_max_tokens_has_sixteen(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the tale", extra_body=LONG)
    assert answer.usage.completion_tokens == 16


def test_chat_without_max_tokens_has_the_servers_default(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=LONG)
    assert answer.usage.completion_tokens == 24


def test_length_is_cut_to_the_room_that_the_prompt_leaves(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[65] * 250, max_tokens=100, extra_body=LONG
    )
    assert answer.usage.completion_tokens == 6


def test_vdiff_tells_cost_and_decoding(client: OpenAI) -> None:
    plain = client.completions.create(
        model="tiny",
        prompt="the tale",
        max_tokens=16,
        extra_body=LONG | {"steps": 4, "block_length": 8, "remasking": "random", "cfg_scale": 0.5},
        seed=3,
    ).vdiff
    assert plain["nfe"] == plain["steps"] == 4
    assert plain["tokens_per_forward"] == 4
    assert plain["decoding"].items() >= {
        "policy": "random", "steps": 4, "block_length": 8, "max_tokens": 16,
        "temperature": 0, "top_p": 1, "cfg_scale": 0.5, "seed": 3,
    }.items()  # fmt: skip
    confident = client.completions.create(
        model="tiny", prompt="the tale", max_tokens=16, extra_body=LONG | {"threshold": 0.01}
    ).vdiff
    assert confident["nfe"] < 16
    assert confident["decoding"]["policy"] == "threshold"
    assert confident["decoding"]["threshold"] == 0.01


@pytest.mark.parametrize("seed", range(6))
def test_streamed_chat_is_the_same_text(client: OpenAI, seed: int) -> None:
    request = dict(
        model="tiny", messages=MESSAGES, max_tokens=40, temperature=1.0, seed=seed,
        extra_body={"block_length": 8},
    )  # fmt: skip
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, last = chunks
    assert "".join(c.choices[0].delta.content for c in texts) == whole.choices[0].message.content
    assert [c.choices[0].delta.role for c in texts] == ["assistant"] + [None] * (len(texts) - 1)
    reasons = [c.choices[0].finish_reason for c in texts]
    assert reasons == [None] * (len(texts) - 1) + [whole.choices[0].finish_reason]
    assert all(c.choices[0].delta.content for c in texts) or not whole.choices[0].message.content
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.vdiff == whole.vdiff
    assert len({c.id for c in chunks}) == 1


def test_the_last_chunk_tells_the_cost(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="the tale", max_tokens=48, stream=True,
        extra_body=LONG | {"steps": 6, "block_length": 8},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].vdiff["nfe"] == 6
    assert all(not hasattr(c, "vdiff") for c in chunks[:-1])


def test_continuous_usage_grows_with_every_chunk(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *texts, last = client.completions.create(
        model="tiny", prompt="x", max_tokens=16, stream=True, stream_options=options,
        extra_body=LONG,
    )  # fmt: skip
    counts = [c.usage.completion_tokens for c in texts]
    assert counts == sorted(set(counts))
    assert last.usage.completion_tokens == counts[-1] == 16


def test_n_answers_have_their_own_seeds(client: OpenAI) -> None:
    request = dict(model="tiny", prompt="the tale", max_tokens=12, temperature=1.0)
    many = client.completions.create(**request, n=3, seed=5, extra_body=LONG)
    alone = [
        client.completions.create(**request, seed=5 + i, extra_body=LONG).choices[0].text
        for i in range(3)
    ]
    assert [c.index for c in many.choices] == [0, 1, 2]
    assert [c.text for c in many.choices] == alone
    assert len(set(alone)) == 3
    assert many.usage.completion_tokens == 36
    one = client.completions.create(model="tiny", prompt="the tale", max_tokens=1)
    assert many.usage.prompt_tokens == one.usage.prompt_tokens
    assert [c["nfe"] for c in many.vdiff["choices"]] == [12, 12, 12]


def test_streamed_n_answers_are_told_apart_by_index(client: OpenAI) -> None:
    request = dict(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=1.0, n=3, seed=5,
        extra_body=LONG,
    )  # fmt: skip
    whole = client.chat.completions.create(**request)
    texts, roles, reasons = ["", "", ""], ["", "", ""], ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
        roles[choice.index] += choice.delta.role or ""
        reasons[choice.index] += choice.finish_reason or ""
    assert texts == [c.message.content for c in whole.choices]
    assert roles == ["assistant"] * 3
    assert reasons == ["length"] * 3


def test_several_prompts_are_answered_in_order(client: OpenAI) -> None:
    prompts = ["the tale", "a hat", "no one"]
    together = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=8, temperature=1.0, seed=1, extra_body=LONG
    )
    alone = [
        client.completions.create(
            model="tiny", prompt=p, max_tokens=8, temperature=1.0, seed=1, extra_body=LONG
        )
        for p in prompts
    ]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


def test_seeds_reproduce(client: OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(
            model="tiny", prompt="go", max_tokens=16, temperature=1, seed=seed, extra_body=LONG
        )
        return answer.choices[0].text

    assert text(7) == text(7)
    assert text(-7) == text(-7)
    assert text(7) != text(8)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_follows_a_stop_string(client: OpenAI, stream: bool) -> None:
    request = dict(model="tiny", prompt="the tale", max_tokens=40, temperature=1, seed=2)
    text = client.completions.create(**request, extra_body=LONG).choices[0].text
    stop = text[10:13]
    answer = client.completions.create(
        **request, stop=["zzz", stop], stream=stream, extra_body=LONG
    )
    if stream:
        chunks = list(answer)
        cut = "".join(c.choices[0].text for c in chunks)
        choice, vdiff = chunks[-1].choices[0], chunks[-1].vdiff
    else:
        cut, choice, vdiff = answer.choices[0].text, answer.choices[0], answer.vdiff
        assert answer.usage.completion_tokens < 40
    assert cut == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    assert vdiff["nfe"] <= 40


def test_a_stop_token_ends_the_answer(client: OpenAI) -> None:
    body = LONG | {"return_token_ids": None}
    text = (
        client.completions.create(model="tiny", prompt="the tale", max_tokens=30, extra_body=body)
        .choices[0]
        .text
    )
    letter = next(c for c in text if c.isascii() and c.isalpha())
    token_id = {chr(33 + i): i for i in range(94)}[letter]
    answer = client.completions.create(
        model="tiny", prompt="the tale", max_tokens=30,
        extra_body=LONG | {"stop_token_ids": [token_id]},
    )  # fmt: skip
    if answer.choices[0].finish_reason == "stop":
        assert answer.choices[0].stop_reason == token_id
        assert letter not in answer.choices[0].text


def test_eight_requests_at_once_are_each_as_alone(server: ServerProcess, client: OpenAI) -> None:
    requests = [
        dict(model="tiny", prompt=f"tale {i}", max_tokens=10 + 3 * i, temperature=i % 2, seed=i)
        for i in range(8)
    ]

    def ask(request: dict) -> tuple[str, str, int]:
        answer = client.completions.create(**request)
        choice = answer.choices[0]
        return choice.text, choice.finish_reason, answer.usage.completion_tokens

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, requests)) == alone


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert [m.id for m in models] == ["tiny", "ref"]
    assert models[0].max_model_len == 256
    assert client.models.retrieve("ref").id == "ref"


def test_the_prefix_of_kserve_serves_the_same(server: ServerProcess) -> None:
    with OpenAI(base_url=f"{server.url}/openai/v1", api_key="none") as client:
        assert client.models.retrieve("tiny").object == "model"
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
        assert answer.usage.completion_tokens <= 4
