"""What only diffusion offers, over HTTP: holes, scores, predictions, steps."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

LONG = {"ignore_eos": True}
MESSAGES = [{"role": "user", "content": "tell me a tale"}]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_hole_between_prompt_and_suffix_is_filled(client: OpenAI, cache: str) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the ", suffix=" tale", max_tokens=9, logprobs=2,
        extra_body=LONG | {"cache": cache, "infill_lengths": [2, 5, 9]},
    )  # fmt: skip
    (choice,) = answer.choices
    told = len(choice.logprobs.tokens)
    assert told == answer.usage.completion_tokens
    assert told in (2, 5, 9)
    assert choice.finish_reason == ("length" if told == 9 else "stop")
    assert answer.vdiff["decoding"]["infill_lengths"] == [2, 5, 9]
    assert answer.vdiff["nfe"] > 9


def test_a_hole_of_one_length_streams_the_text_that_it_gets(client: OpenAI) -> None:
    request: dict[str, Any] = dict(
        model="tiny", prompt="the ", suffix=" tale", max_tokens=8,
        extra_body=LONG | {"infill_lengths": [8]},
    )  # fmt: skip
    whole = client.completions.create(**request).choices[0]
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    assert len(chunks) > 1
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "length"


def test_marked_holes_come_back_with_the_whole_text(client: OpenAI) -> None:
    request: dict[str, Any] = dict(
        model="tiny", prompt="<|mask:3|>the<|mask:2|> tale", extra_body=LONG | {"infill": True}
    )
    answer = client.completions.create(**request)
    first, second = answer.choices[0].holes
    assert answer.choices[0].text == f"{first}the{second} tale"
    assert answer.usage.completion_tokens == 5
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].holes == [first, second]


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_the_route_of_editors_has_both_of_its_shapes(http: httpx.Client, prefix: str) -> None:
    body = {"model": "tiny", "prompt": "the ", "suffix": " tale", "max_tokens": 3, "random_seed": 5}
    answer = http.post(f"{prefix}/fim/completions", json=body).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"]["content"] == choice["text"]
    assert answer["vdiff"]["decoding"]["seed"] == 5
    with http.stream("POST", f"{prefix}/fim/completions", json=body | {"stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in lines[:-1]]
    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert told == choice["text"] == "".join(c["choices"][0]["text"] for c in chunks)


@pytest.mark.parametrize("likelihood", [None, "pseudo", {"method": "monte_carlo", "samples": 9}])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_are_scored_in_the_lists_that_evaluations_read(
    client: OpenAI, likelihood: Any, max_tokens: int
) -> None:
    prompts = [[65, 66, 67, 68], [65, 66], [65]]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0,
        seed=1234, extra_body={} if likelihood is None else {"likelihood": likelihood},
    )  # fmt: skip
    assert [c.index for c in answer.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(prompt) + max_tokens
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        assert told.text_offset[0] == 0
        for logprob, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            assert logprob <= 0
            assert logprob in top.values()
        assert choice.text.startswith("".join(told.tokens[: len(prompt)]))
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 3 * max_tokens


def test_scores_do_not_depend_on_what_else_is_asked(client: OpenAI) -> None:
    def told(*prompts: str) -> list[list[float]]:
        answer = client.completions.create(
            model="tiny", prompt=list(prompts), max_tokens=0, echo=True, logprobs=0
        )
        return [c.logprobs.token_logprobs[1:] for c in answer.choices]

    alone, together = told("the tale"), told("another", "the tale", "of hats")
    assert together[1] == pytest.approx(alone[0], abs=1e-4)


def test_steps_come_as_chunks_that_the_sdk_takes_for_nothing(client: OpenAI) -> None:
    request: dict[str, Any] = dict(model="tiny", messages=MESSAGES, max_tokens=12)
    own = LONG | {"threshold": 0.02, "block_length": 6}
    whole = client.chat.completions.create(**request, extra_body=own)
    own["stream_canvas"] = True
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=own))
    steps = [c for c in chunks if "step" in (getattr(c, "vdiff", None) or {})]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert all(c.choices[0].delta.content is None for c in steps)
    assert all(c.choices[0].delta.role is None for c in steps)
    views = [c.vdiff for c in steps]
    assert [v["step"] for v in views] == list(range(1, whole.vdiff["nfe"] + 1))
    written = [p for v in views for p in v["positions"]]
    assert sorted(written) == list(range(12))
    assert [v["masks"] for v in views] == [
        12 - sum(len(v["positions"]) for v in views[: i + 1]) for i in range(len(views))
    ]
    assert all(0 <= c <= 1 for v in views for c in v["confidence"])
    texts = dict(zip(written, (t for v in views for t in v["text"]), strict=True))
    assert len("".join(texts[p] for p in range(12))) >= len(text) - 12


def test_the_sdks_stream_helper_reads_over_steps(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, max_tokens=12, extra_body={"stream_canvas": True}
    ) as stream:
        final = stream.get_final_completion()
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    assert final.choices[0].message.content == plain.choices[0].message.content


def test_the_sdks_stream_helper_reads_over_the_steps_of_several_answers(client: OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="tiny", messages=MESSAGES, max_tokens=12, n=3, temperature=1.0, seed=3
    )
    whole = client.chat.completions.create(**asked, extra_body=LONG)
    with client.chat.completions.stream(
        **asked, extra_body=LONG | {"stream_canvas": True}
    ) as stream:
        told = stream.until_done().current_completion_snapshot
    assert [c.message.content for c in told.choices] == [c.message.content for c in whole.choices]


def test_without_being_asked_for_no_step_is_told(client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=8, stream=True)
    assert all("step" not in (getattr(c, "vdiff", None) or {}) for c in stream)


def test_a_prediction_is_accounted_for(client: OpenAI) -> None:
    request: dict[str, Any] = dict(
        model="tiny", messages=MESSAGES, max_tokens=16, extra_body=LONG | {"threshold": 0.5}
    )
    plain = client.chat.completions.create(**request)
    content = plain.choices[0].message.content
    predicted = client.chat.completions.create(
        **request, prediction={"type": "content", "content": content}
    )
    details = predicted.usage.completion_tokens_details
    assert details.accepted_prediction_tokens >= 0
    assert predicted.usage.completion_tokens == 16
    assert plain.usage.completion_tokens_details is None


def test_tokens_that_are_pinned_stand(client: OpenAI) -> None:
    arguments = {"diffusion_seed_canvas": [80, 81, 82], "diffusion_pinned": [0, 2]}
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=5,
        extra_body=LONG | {"vllm_xargs": arguments, "return_token_ids": True},
    )  # fmt: skip
    ids = answer.choices[0].token_ids
    assert (ids[0], ids[2], len(ids)) == (80, 82, 5)


def test_a_score_ends_with_its_time(client: OpenAI) -> None:
    with pytest.raises(Exception, match="time was over"):
        client.completions.create(
            model="tiny", prompt=[65] * 250, max_tokens=0, echo=True, logprobs=0,
            extra_body={"timeout": 0.01},
        )  # fmt: skip


def test_a_prediction_of_something_else_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="prediction"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, prediction={"type": "other", "content": "x"}
        )


def test_a_stream_tells_what_p2_takes_back(client: OpenAI) -> None:
    body = {"policy": "p2", "steps": 12, "block_length": 32, "stream_canvas": True}
    chunks = list(
        client.completions.create(
            model="tiny", prompt="the tale", max_tokens=32, stream=True, extra_body=body
        )
    )
    views = [c.vdiff for c in chunks if "step" in (c.vdiff or {})]
    written: set[int] = set()
    for view in views:
        assert written >= set(view["masked_again"])
        written = (written - set(view["masked_again"])) | set(view["positions"])
        assert len(written) == 32 - view["masks"]
    assert len(views) <= 12
    assert any(view["masked_again"] for view in views), "nothing was taken back: says nothing"


def test_p2_and_a_grammar_contradict(client: OpenAI) -> None:
    body = {"policy": "p2", "structured_outputs": {"choice": ["yes", "no"]}}
    with pytest.raises(BadRequestError, match="policy p2 takes back what it wrote"):
        client.completions.create(model="tiny", prompt="Well?", max_tokens=8, extra_body=body)
