"""Holes in requests: what they become, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.openai.engine import MASK, TOKENIZER, ScriptedEngine, limits, service
from tests.openai.test_service import chat, completion
from vdiff_kserve.openai.decoding import ModelTraits
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.openai.infilling import automatic_lengths, holes_of
from vdiff_kserve.openai.protocol import CompletionRequest

BLOCK_CAUSAL = ModelTraits(block_causal=True, block_length=4, has_auxiliary=False)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("shortest", [1, 3])
@pytest.mark.parametrize("longest", [1, 2, 12, 13, 64, 4096])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_automatic_lengths_reach_from_the_shortest_to_the_longest(
    shortest: int, longest: int, count: int
) -> None:
    shortest = min(shortest, longest)
    lengths = automatic_lengths(shortest, longest, count)
    assert len(lengths) <= count
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest
    assert lengths[0] == (shortest if count > 1 else longest)


def test_marked_holes_become_masks_between_the_texts() -> None:
    prompt, infilling = holes_of(
        "ab<|mask:2|>cd<|mask:1|>", TOKENIZER, 50, add_special_tokens=False
    )
    assert prompt == ids("ab")
    assert infilling.candidates == ((-1, -1, *ids("cd"), -1),)
    assert infilling.texts == ("ab", "cd", "")
    assert infilling.given_tokens == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no hole", "1 to 64 holes, .* but has 0[.]"),
        ("a<|mask:1|>b" * 65, "1 to 64 holes, .* but has 65[.]"),
        ("a<|mask:0|>b", "0 tokens"),
        ("a<|mask:1|><|mask:2|>b", "without text between"),
        ("a<|mask:999999999|>b", "maximum context length"),
        ("a<|mask:45|>bcdefgh", "maximum context length"),
    ],
)
def test_holes_that_cannot_be_are_refused(text: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        holes_of(text, TOKENIZER, 50, add_special_tokens=False)


async def test_a_suffix_asks_the_engine_for_every_length_at_once() -> None:
    engine = ScriptedEngine(["a"], ["bc"], ["def"])
    answer = await service(engine).respond(
        completion(prompt="xy", suffix="zz!", max_tokens=3, logprobs=None)
    )
    suffix = ids("zz!")
    assert [r.given for r in engine.requests] == [(-1,) * n + suffix for n in (1, 2, 3)]
    assert all(r.infills and r.judged and r.prompt_ids == ids("xy") for r in engine.requests)
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == len(ids("xy")) + len(suffix)
    assert answer.vdiff.decoding["infill_lengths"] == [1, 2, 3]


async def test_no_hole_is_shorter_than_the_answer_must_be() -> None:
    engine = ScriptedEngine(["abc"], ["abcd"])
    await service(engine).respond(completion(suffix="z", max_tokens=4, min_tokens=3))
    assert [r.given.count(-1) for r in engine.requests] == [3, 4]
    with pytest.raises(RequestError, match=r"lengths in \[3, 4\]"):
        await service(ScriptedEngine()).respond(
            completion(suffix="z", max_tokens=4, min_tokens=3, infill_lengths=[2])
        )


async def test_one_length_is_not_judged() -> None:
    engine = ScriptedEngine(["a", "bc"])
    await service(engine).respond(completion(suffix="z", max_tokens=9, infill_lengths=[3, 3]))
    (asked,) = engine.requests
    assert (asked.judged, asked.max_tokens) == (False, 4)


async def test_what_looks_like_a_hole_stays_text_without_infill() -> None:
    engine = ScriptedEngine(["a"])
    await service(engine).respond(completion(prompt="a<|mask:2|>b"))
    assert engine.requests[0].prompt_ids == ids("a<|mask:2|>b")
    assert engine.requests[0].given == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"infill_lengths": [2]}, "infill_lengths"),
        ({"suffix": "z", "infill": True}, "infill"),
        ({"suffix": "z", "infill_lengths": [0]}, "infill_lengths"),
        ({"suffix": "z", "infill_lengths": [17]}, "infill_lengths"),
        ({"suffix": "z", "infill_lengths": []}, "infill_lengths"),
        ({"suffix": "z", "infill_lengths": list(range(1, 16)), "n": 3}, "infill_lengths"),
        ({"suffix": "z", "prediction": {"content": "x"}}, "prediction"),
        ({"suffix": "z", "stream": True, "stream_canvas": True}, "stream_canvas"),
        ({"suffix": "z", "echo": True, "logprobs": 1, "max_tokens": 0}, "max_tokens"),
        ({"infill": True, "prompt": [1, 2]}, "prompt"),
        ({"infill": True, "prompt": "a<|mask:1|>", "echo": True}, "echo"),
        ({"infill": True, "prompt": "a<|mask:1|>", "logprobs": 0}, "logprobs"),
    ],
)
async def test_what_cannot_go_together_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await service(ScriptedEngine(), max_choices=32).respond(
            completion(**{"temperature": 1} | fields)
        )
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize(("field", "value"), [("suffix", "z"), ("infill", True)])
async def test_models_that_see_only_what_is_left_of_a_block_say_so(field: str, value: Any) -> None:
    request = completion(prompt="a<|mask:1|>b", **{field: value})
    with pytest.raises(RequestError, match="see only themselves") as caught:
        await service(ScriptedEngine(), traits=BLOCK_CAUSAL).respond(request)
    assert caught.value.param == field


async def test_an_empty_suffix_asks_for_nothing() -> None:
    engine = ScriptedEngine(["a"])
    await service(engine).respond(completion(suffix=""))
    assert not engine.requests[0].infills


async def test_an_echo_goes_before_the_answer() -> None:
    answer = await service(ScriptedEngine(["lo"])).respond(completion(prompt="hel", echo=True))
    assert answer.choices[0].text == "hello"
    assert answer.usage.completion_tokens == len(ids("lo"))
    nothing = await service(ScriptedEngine()).respond(
        completion(prompt=["hel", "x"], echo=True, max_tokens=0)
    )
    assert [c.text for c in nothing.choices] == ["hel", "x"]
    assert nothing.choices[0].finish_reason == "length"
    assert nothing.vdiff.nfe == 0


async def test_a_chat_echoes_the_message_that_it_continues() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hel"}]
    request = chat(
        messages=messages, echo=True, continue_final_message=True, add_generation_prompt=False
    )
    answer = await service(ScriptedEngine(["lo"])).respond(request)
    assert answer.choices[0].message.content == "hello"
    answer = await service(ScriptedEngine(["lo"])).respond(chat(echo=True))
    assert answer.choices[0].message.content == "lo"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(3)),
        ({"truncate_prompt_tokens": 100}, slice(None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 95}, slice(-5, None)),
    ],
)
async def test_a_prompt_is_cut_to_so_many_tokens(fields: dict[str, Any], kept: slice) -> None:
    engine = ScriptedEngine(["a"])
    await service(engine).respond(completion(prompt=list(range(10)), **fields))
    assert engine.requests[0].prompt_ids == tuple(range(10))[kept]


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "most"),
    [
        ({"max_tokens": 60}, 40, 60),
        ({"max_tokens": 5, "max_completion_tokens": 70}, 30, 70),
        ({}, 60, 40),
        ({"default": 80}, 50, 50),
    ],
)
async def test_a_prompt_cut_by_itself_leaves_room_for_the_answer(
    fields: dict[str, Any], prompt_tokens: int, most: int
) -> None:
    """For as much as is asked for; where nothing is, for no more than half of the context."""
    engine = ScriptedEngine(["a"])
    serving = service(engine, default_max_tokens=fields.pop("default", 40))
    messages = [{"role": "user", "content": "x" * 200}]
    await serving.respond(chat(messages=messages, truncate_prompt_tokens=-1, **fields))
    (asked,) = engine.requests
    assert (len(asked.prompt_ids), asked.max_tokens) == (prompt_tokens, most)


@pytest.mark.parametrize("value", [0, 101])
async def test_a_cut_that_makes_no_sense_is_refused(value: int) -> None:
    with pytest.raises(RequestError, match="truncate_prompt_tokens"):
        await service(ScriptedEngine()).respond(completion(truncate_prompt_tokens=value))


async def test_a_prediction_becomes_a_draft_and_is_accounted_for() -> None:
    engine = ScriptedEngine(["ab"])
    content = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    answer = await service(engine).respond(chat(prediction={"content": content}, max_tokens=2))
    assert engine.requests[0].draft == ids("abcd")[:2]
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == 0
    assert details.rejected_prediction_tokens == len(ids("abcd"))


async def test_vllms_arguments_seed_and_pin_the_canvas() -> None:
    engine = ScriptedEngine(["ab"])
    arguments = {
        "diffusion_seed_canvas": [5, MASK, 7], "diffusion_pinned": [2], "diffusion_max_steps": 4,
    }  # fmt: skip
    await service(engine).respond(completion(max_tokens=6, vllm_xargs=arguments))
    (asked,) = engine.requests
    assert asked.draft == (5, -1, -1)
    assert asked.given == (-1, -1, 7, -1, -1, -1)
    assert asked.decoding.steps == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"diffusion_read_only": True},
        {"diffusion_seed_canvas": "x"},
        {"diffusion_seed_canvas": [99999]},
        {"diffusion_pinned": [0]},
        {"diffusion_seed_canvas": [5], "diffusion_pinned": [1]},
        {"diffusion_seed_canvas": [MASK], "diffusion_pinned": [0]},
        {"diffusion_seed_canvas": [5, 5], "diffusion_pinned": [0, 1]},
        {"diffusion_max_steps": 0},
        {"diffusion_max_steps": True},
    ],
)
async def test_wrong_canvas_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="vllm_xargs") as caught:
        await service(ScriptedEngine()).respond(completion(max_tokens=2, vllm_xargs=arguments))
    assert caught.value.status == 400


def test_a_likelihood_may_be_named_alone() -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "likelihood": "pseudo"})
    assert request.likelihood.method == "pseudo"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"likelihood": "chain"}, "likelihood"),
        ({"likelihood": "chain", "echo": True}, "likelihood"),
        ({"likelihood": {"method": "monte_carlo", "samples": 0}}, "likelihood.samples"),
        ({"likelihood": {"samples": 9}}, "likelihood.samples"),
        ({"likelihood": {"method": "pseudo", "samples": 9}}, "likelihood.samples"),
        ({"likelihood": {"methode": "pseudo"}}, "likelihood.methode"),
        ({"likelihood": {"window": 3}}, "likelihood"),
        ({"likelihood": {"context": 9}}, "likelihood.context"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_wrong_likelihoods_are_refused(fields: dict[str, Any], param: str) -> None:
    told = {"echo": True, "logprobs": 1} if param.startswith("likelihood.") else {}
    with pytest.raises(RequestError) as caught:
        await service(ScriptedEngine()).respond(completion(prompt="abcde", **told, **fields))
    assert caught.value.param == param


async def test_causal_models_know_the_chain_rule_only() -> None:
    traits = ModelTraits(True, 1, False, autoregressive=True)
    request = completion(prompt="abc", echo=True, logprobs=1, likelihood="pseudo")
    with pytest.raises(RequestError, match="causal"):
        await service(ScriptedEngine(), traits=traits).respond(request)
    assert limits(traits=traits).traits.autoregressive


@pytest.mark.parametrize("field", ["suffix", "prediction"])
async def test_texts_that_cannot_fit_are_refused_before_they_are_tokenized(field: str) -> None:
    text = "x" * 10_000
    value = {"content": text} if field == "prediction" else text
    with pytest.raises(RequestError, match="10000 characters"):
        await service(ScriptedEngine()).respond(completion(**{field: value}))
