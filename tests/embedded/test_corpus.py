"""The embedded model's corpus, tokenizer and shipped files."""

import json
import random
from collections import defaultdict
from itertools import islice

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from hack.embedded.corpus import TASKS, TrainingStream, draw, held_out_suite
from hack.embedded.tasks import (
    count_answer,
    count_facts,
    difference_answer,
    digit_facts,
    sequence_facts,
    sort_answer,
    sort_facts,
    spelling_facts,
    sum_answer,
)
from hack.embedded.tokenizer import chat_message, chat_prompt
from vdiff_kserve.checkpoint import EMBEDDED


def count_parameters(folder):
    with safe_open(str(folder / "model.safetensors"), framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def test_training_never_draws_a_held_out_prompt():
    suite = {example.prompt for example in held_out_suite(2000)}
    trained = {example.prompt for example in islice(TrainingStream(0, level=1.0), 20000)}
    assert not suite & trained


def test_suite_has_distinct_prompts_of_every_task():
    suite = held_out_suite(1000)
    assert len({example.prompt for example in suite}) == 1000
    assert {example.task for example in suite} == set(TASKS)


def test_suite_and_stream_depend_on_the_seed_only():
    assert held_out_suite(50) == held_out_suite(50)
    first, second = (list(islice(TrainingStream(3), 50)) for _ in range(2))
    assert first == second
    assert first != list(islice(TrainingStream(4), 50))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_many_phrasings(task):
    rng = random.Random(0)
    answers = defaultdict(set)
    openings = set()
    for _ in range(400):
        example = draw(task, rng, 1.0, held_out=False)
        answers[example.answer].add(example.prompt)
        openings.add(" ".join(example.prompt.split()[:2]).lower())
    assert len(openings) >= 6


def test_working_is_right():
    assert sum_answer(17, 25) == "7 + 5 = 12, 1 + 2 + 1 = 4, so 17 + 25 = 42."
    assert sum_answer(2, 3) == "2 + 3 = 5."
    assert difference_answer(42, 15) == "12 - 5 = 7, 4 - 1 - 1 = 2, so 42 - 15 = 27."
    assert difference_answer(15, 42).endswith("42 - 15 = 27 and 15 - 42 = -27.")
    assert sort_answer([5, 9, 2], descending=False) == "2, 5, 9."
    assert sort_answer([5, 9, 2], descending=True) == "9, 5, 2."
    assert count_answer("book", "o") == "bOOk: o appears 2 times."
    assert count_answer("Eve", "x") == "eve: x appears 0 times."
    assert count_answer("Bob", "b") == "BoB: b appears 2 times."


@pytest.mark.parametrize(
    "facts", [digit_facts, sort_facts, spelling_facts, count_facts, sequence_facts]
)
def test_drills_never_end_and_have_results(facts):
    for fact, result in islice(facts(random.Random(0)), 100):
        assert fact.endswith((": ", "= "))
        assert result


@pytest.mark.parametrize(
    "text",
    [
        "What is 17 + 25?",
        "héllo wörld 🎉\n\n  x\t日本語 'don't' . ",
        "  \r\n a",
        "{'k': [1, 2]}",
        "ŝ\x00\x7f",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_chat_template_is_llada_s(tokenizer):
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "hi\n"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert rendered == (
        f"<|startoftext|>{header.format('system')}Be brief.<|eot_id|>"
        f"{header.format('user')}hi<|eot_id|>{header.format('assistant')}"
    )
    assert chat_message("user", "hi") in rendered
    only_user = tokenizer.apply_chat_template(messages[1:], tokenize=False)
    assert only_user == chat_prompt("hi")


def test_shipped_files_keep_their_limits():
    assert 2_000_000 <= count_parameters(EMBEDDED) <= 8_000_000
    assert count_parameters(EMBEDDED / "apd") <= count_parameters(EMBEDDED) / 3
    for file in EMBEDDED.rglob("*"):
        assert file.is_dir() or file.stat().st_size <= 16_000_000, file


def test_config_names_the_tokenizer_s_special_tokens(tokenizer):
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert config["architectures"] == ["LLaDAModelLM"]
    assert config["mask_token_id"] == tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id
    assert config["vocab_size"] == len(tokenizer)
    assert json.loads((EMBEDDED / "apd" / "config.json").read_text())["vocab_size"] == len(
        tokenizer
    )
