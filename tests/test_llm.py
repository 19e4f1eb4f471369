"""The Python API: the server's answers without a server."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import vdiff_kserve
from vdiff_kserve import LLM, AsyncLLM, SamplingParams
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.openai.errors import RequestError
from vdiff_kserve.setting import ConfigError

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", device="cpu", max_num_seqs=4, max_queue=8) as llm:
        yield llm


def test_chat_answers(llm: LLM) -> None:
    (output,) = llm.chat(CAPITAL, SamplingParams(max_tokens=32))
    assert output.finished
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
    assert llm._model.tokenizer.decode(output.outputs[0].token_ids) == output.outputs[0].text
    assert 0 < output.outputs[0].nfe <= 32


def test_more_prompts_than_places_come_back_in_order(llm: LLM) -> None:
    prompts = [f"word {i}" for i in range(40)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=4, seed=1), use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    alone = llm.generate(prompts[7], SamplingParams(max_tokens=4, seed=1), use_tqdm=False)
    assert alone[0].outputs[0].token_ids == outputs[7].outputs[0].token_ids


def test_more_lengths_of_holes_than_places_are_tried(llm: LLM) -> None:
    """Each prompt takes as many places as it has lengths to try."""
    prompts = [{"prompt": f"Day {i}: Monday, Tuesday,", "suffix": ", Thursday"} for i in range(4)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=8), use_tqdm=False)
    assert [output.prompt for output in outputs] == [each["prompt"] for each in prompts]
    assert all(output.finished for output in outputs)


def test_several_threads_share_the_places(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, stop=["e", " "])
    prompts = [f"word {i}" for i in range(20)]
    with ThreadPoolExecutor(3) as threads:
        found = threads.map(lambda _: llm.generate(prompts, params, use_tqdm=False), range(3))
        texts = [[output.outputs[0].text for output in outputs] for outputs in found]
    assert texts[0] == texts[1] == texts[2]


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True),
        SamplingParams(max_tokens=5, ignore_eos=True, n=2, temperature=1.0, seed=3),
    ]
    first, second = llm.generate(["a", {"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
    assert [len(answer.token_ids) for answer in first.outputs] == [3]
    assert [len(answer.token_ids) for answer in second.outputs] == [5, 5]
    assert second.prompt is None
    assert second.prompt_token_ids == [5, 6]


def test_holes_are_filled(llm: LLM) -> None:
    text = "Cats are small<|mask:1|> with soft fur and sharp<|mask:1|>. They see well in the dark."
    prompts = [
        {"prompt": "Monday, Tuesday,", "suffix": ", Thursday, Friday", "infill_lengths": [1, 3]},
        {"prompt": text, "infill": True},
    ]
    between, whole = llm.generate(prompts, SamplingParams(max_tokens=12), use_tqdm=False)
    assert between.prompt == "Monday, Tuesday,"
    assert between.outputs[0].text == " Wednesday"
    assert between.outputs[0].holes is None
    assert whole.outputs[0].holes == [" hunters", " claws"]
    assert whole.outputs[0].text.startswith("Cats are small hunters with soft fur and sharp claws.")
    ids = llm._model.tokenizer.encode("Monday, Tuesday,", add_special_tokens=False)
    tokens = {"prompt_token_ids": ids, "suffix": ", Thursday, Friday", "infill_lengths": [1]}
    (given,) = llm.generate(tokens, SamplingParams(max_tokens=12), use_tqdm=False)
    assert given.outputs[0].text == " Wednesday"
    with pytest.raises(RequestError, match="infill_lengths needs a suffix"):
        llm.generate({"prompt": "a", "infill_lengths": [1]}, use_tqdm=False)


def test_log_probabilities_have_an_entry_per_token_and_for_the_end(llm: LLM) -> None:
    (chat,) = llm.chat(CAPITAL, SamplingParams(max_tokens=32, logprobs=2), use_tqdm=False)
    answer = chat.outputs[0]
    assert answer.finish_reason == "stop"
    assert len(answer.logprobs) == len(answer.token_ids) + 1
    for token, told in zip(answer.token_ids, answer.logprobs, strict=False):
        assert token in told
        assert 2 <= len(told) <= 3
        assert all(each.logprob <= 0 for each in told.values())
        assert told[token].rank == 1, "the likeliest token is committed at temperature 0"
        assert told[token].decoded_token == llm._model.tokenizer.decode([token])
    (text,) = llm.generate("a", SamplingParams(max_tokens=2, logprobs=0), use_tqdm=False)
    assert [len(told) for told in text.outputs[0].logprobs] == [1] * len(text.outputs[0].logprobs)
    (plain,) = llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
    assert plain.outputs[0].logprobs is None


def test_progress_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    assert "2/2" in capsys.readouterr().err


def test_wrong_fields_and_values_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"max_toknes .*; did you mean 'max_tokens'"):
        SamplingParams(max_toknes=3)
    with pytest.raises(RequestError, match=r"stream_canvas is not .* shapes a server's response"):
        SamplingParams(stream_canvas=True)
    with pytest.raises(RequestError, match=r" logprobs: .* 20, got 30"):
        SamplingParams(logprobs=30)
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("a", SamplingParams(temperature=-1))
    with pytest.raises(ValueError, match="2 prompts need as many"):
        llm.generate(["a", "b"], [SamplingParams()])
    for params in ({"max_tokens": 3}, [{"max_tokens": 3}]):
        with pytest.raises(TypeError, match="must be SamplingParams"):
            llm.generate("a", params)
    both = {"prompt": "a", "prompt_token_ids": [5]}
    words = {"prompt_token_ids": ["a"]}
    for prompt in (None, 5, [5], [["a"]], {"text": "a"}, {"suffix": "a"}, both, words):
        with pytest.raises(TypeError, match="prompt_token_ids"):
            llm.generate(prompt)
    with pytest.raises(RequestError, match=r"prompt"):
        llm.generate({"prompt_token_ids": [-1]})
    with pytest.raises(RequestError, match=r"messages\.0\.role"):
        llm.chat([{"content": "hi"}])
    assert llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_a_chat_may_say_how_its_template_is_used(llm: LLM) -> None:
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    params = SamplingParams(max_tokens=32)
    (output,) = llm.chat(begun, params, use_tqdm=False, **goes_on)
    assert output.finished
    assert llm.get_tokenizer().decode(output.prompt_token_ids).endswith("The capital of France is")
    with pytest.raises(TypeError, match=r"chat_template_kwargs, .*, not 'tool'"):
        llm.chat(CAPITAL, params, use_tqdm=False, tool=1)
    with pytest.raises(TypeError, match="a list of messages"):
        llm.chat("hello", params)


async def test_it_works_where_an_event_loop_runs(llm: LLM) -> None:
    (output,) = llm.chat(CAPITAL, SamplingParams(max_tokens=32), use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."


def test_a_model_that_nobody_holds_ends_and_gives_its_memory_back() -> None:
    before = set(threading.enumerate())
    llm = LLM(dtype="float32", device="cpu")
    llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
    weights = weakref.ref(llm._model._engine)
    own = [each for each in threading.enumerate() if each not in before]
    assert own
    del llm
    gc.collect()
    for thread in own:
        thread.join(20)
    assert not any(thread.is_alive() for thread in own)
    gc.collect()
    assert weights() is None


def test_after_its_end_a_model_says_so() -> None:
    with LLM(dtype="float32", device="cpu") as llm:
        pass
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("a", use_tqdm=False)


def test_wrong_options_are_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        LLM(max_num_seq=3)
    with pytest.raises(TypeError, match="'port' is not an option"):
        LLM(port=80)
    with pytest.raises(TypeError, match="'seed' is not an option: requests carry their own seed"):
        LLM(seed=1)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(max_num_seqs=0)
    with pytest.raises(AttributeError, match="nothing"):
        _ = vdiff_kserve.nothing


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_model_len": 10**6}, "--max_model_len is 1000000, but the checkpoint's context is"),
        ({"cache": "exact"}, "cache must be one of none, prefix, dual"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_weights_are_read(
    options: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vdiff_kserve.loading.load_served_model")
    with pytest.raises(CheckpointError, match=told):
        LLM(**options)


async def test_async_outputs_grow_and_leaving_frees_the_row() -> None:
    llm = AsyncLLM(dtype="float32", device="cpu")
    try:
        lengths = [
            len(output.outputs[0].text) async for output in llm.chat(CAPITAL, SamplingParams())
        ]
        assert lengths == sorted(lengths)
        assert lengths[-1] == len("The capital of France is Paris.")
        stream = llm.generate("a", SamplingParams(max_tokens=200, ignore_eos=True, block_length=8))
        await anext(stream)
        await stream.aclose()
        while llm._engine.num_running:  # noqa: ASYNC110  of another thread, which needs the GIL
            await asyncio.sleep(0.01)
        assert llm._engine.kv_tokens_used == 0
    finally:
        llm.shutdown()


def test_answers_match_a_schema(llm: LLM) -> None:
    prompt = "Extract name and age as JSON: Anna is 34 years old."
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
              "additionalProperties": False}  # fmt: skip
    params = SamplingParams(max_tokens=32, structured_outputs={"json": schema})
    (output,) = llm.chat([{"role": "user", "content": prompt}], params, use_tqdm=False)
    assert output.outputs[0].text == '{"name": "Anna"}'
    assert output.outputs[0].finish_reason == "stop"
    with pytest.raises(RequestError, match="structured_outputs"):
        llm.chat(CAPITAL, SamplingParams(structured_outputs={"regex": "("}), use_tqdm=False)
