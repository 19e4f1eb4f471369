"""Answers that follow a grammar match it and end, whatever model, policy and cache there are."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher

from tests.engine.random_schemas import random_schema
from tests.engine.tiny import tiny_auxiliary, tiny_decoder
from tests.waiting import wait_until
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import (
    Engine,
    EngineConfig,
    EngineError,
    GenerationRequest,
    GenerationResult,
    GrammarError,
    Grammars,
)
from vdiff_kserve.engine.grammar import KEPT_GRAMMARS
from vdiff_kserve.models import Decoder, ModelSpec, load_decoder, load_tokenizer, with_end_of_turn
from vdiff_kserve.sampler import Constraints, DecodingParams

TOKENIZER = load_tokenizer(EMBEDDED)
VOCAB = 2304
EOS, EOT, MASK = (
    TOKENIZER.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>")
)
ROOM = 100
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
POLICIES: list[dict[str, Any]] = [
    {"policy": "low_confidence"},
    {"policy": "low_confidence", "steps": 12},
    {"policy": "random", "seed": 3},
    {"policy": "maskgit_plus", "steps": 10},
    {"policy": "topk_margin"},
    {"policy": "entropy", "alg_temp": 0.5},
    {"policy": "threshold", "threshold": 0.1},
    {"policy": "factor"},
    {"policy": "entropy_bound", "entropy_bound": 5.0},
    {"policy": "local", "threshold": 0.2, "neighbour_threshold": 0.05},
    {"policy": "credit"},
    {"policy": "edit", "threshold": 0.1, "edit_threshold": 0.1},
    {"policy": "apd", "apd_threshold": 0.01},
    {"policy": "threshold", "temperature": 1.0},
    {"policy": "threshold", "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 5},
    {"policy": "threshold", "cfg_scale": 0.5},
    {"policy": "threshold", "confidence_eos_eot_inf": True, "logits_eos_inf": True},
]


def json_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def text_of(result: GenerationResult) -> str:
    return TOKENIZER.decode(result.token_ids)


def spec_of(decoder: Decoder, **changes: Any) -> ModelSpec:
    return ModelSpec("tiny", decoder.config, MASK, EOS, EOT, 512, 8, **changes)


@contextmanager
def engine_of(
    decoder: Decoder, spec: ModelSpec, auxiliary: Decoder | None = None
) -> Iterator[Engine]:
    grammars = Grammars(TOKENIZER, VOCAB, spec.end_token_ids, spec.max_model_len)
    engine = Engine(decoder, spec, EngineConfig(), auxiliary, grammars)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def random_model() -> Iterator[Engine]:
    """Random weights, with an auxiliary model: nothing it writes matches but by the grammar."""
    decoder = tiny_decoder(vocab_size=VOCAB)
    auxiliary = tiny_decoder(1, vocab_size=VOCAB, num_layers=1, attention_block=1)
    with engine_of(decoder, spec_of(decoder), auxiliary) as engine:
        yield engine


@pytest.fixture(scope="module")
def block_causal() -> Iterator[Engine]:
    decoder = tiny_decoder(vocab_size=VOCAB, attention_block=8)
    with engine_of(decoder, spec_of(decoder)) as engine:
        yield engine


@pytest.fixture(scope="module")
def sub_blocks() -> Iterator[Engine]:
    decoder = tiny_decoder(vocab_size=VOCAB, attention_block=16)
    spec = replace(spec_of(decoder, shifted_logits=True, sub_blocks=True), block_length=16)
    with engine_of(decoder, spec) as engine:
        yield engine


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    decoder, spec = load_decoder(EMBEDDED, torch.device("cpu"), torch.float32)
    with engine_of(decoder, with_end_of_turn(spec, TOKENIZER)) as engine:
        yield engine


def request_of(
    grammar: str, prompt: str = "Give me JSON.", max_tokens: int = ROOM, **decoding: Any
) -> GenerationRequest:
    params = DecodingParams(**({"block_length": 8, "policy": "threshold"} | decoding))
    return GenerationRequest(ids(prompt), max_tokens, params, (EOS, EOT), grammar=grammar)


def assert_valid(result: GenerationResult, schema: dict[str, Any]) -> None:
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(text_of(result)), schema)


def assert_schemas_are_followed(
    engine: Engine, numbers: range, room: int = ROOM, **decoding: Any
) -> None:
    assert engine.grammars is not None
    schemas = [random_schema(number) for number in numbers]
    texts = [json_grammar(schema) for schema in schemas]
    shortest = [len(engine.grammars.compile(text).shortest) for text in texts]
    requests = [
        request_of(text, max_tokens=max(room, least + 30), **decoding)
        for text, least in zip(texts, shortest, strict=True)
    ]
    for schema, result in zip(schemas, engine.generate(requests), strict=True):
        assert_valid(result, schema)


@pytest.mark.parametrize("decoding", POLICIES, ids=str)
def test_every_policy_follows_random_schemas(
    random_model: Engine, decoding: dict[str, Any]
) -> None:
    assert_schemas_are_followed(random_model, range(3), **decoding)


def test_a_policy_that_takes_tokens_back_is_refused(random_model: Engine) -> None:
    with pytest.raises(GrammarError, match="policy p2 takes back what it wrote"):
        random_model.generate([request_of(json_grammar(random_schema(0)), policy="p2")])


@pytest.mark.parametrize("decoding", POLICIES, ids=str)
@pytest.mark.parametrize("cache", ["none", "exact"])
def test_block_causal_models_follow_random_schemas(
    block_causal: Engine, decoding: dict[str, Any], cache: str
) -> None:
    assert_schemas_are_followed(block_causal, range(3, 5), cache=cache, **decoding)


@pytest.mark.parametrize("kind", ["sub_blocks", "autoregressive"])
def test_models_with_first_tokens_follow_random_schemas_with_and_without_cache(kind: str) -> None:
    """Forced tokens fill whole blocks without a pass: the next one computes what was left out."""
    block = 8 if kind == "sub_blocks" else 1
    decoder = tiny_decoder(vocab_size=VOCAB, attention_block=block)
    spec = spec_of(decoder, shifted_logits=True, **{kind: True})
    spec = replace(spec, block_length=block, mask_token_id=MASK if block > 1 else None)
    schemas = [random_schema(number) for number in range(6)]
    texts = {}
    with engine_of(decoder, spec) as engine:
        for cache in ("none", "exact", "dual"):
            requests = [
                request_of(json_grammar(each), block_length=min(4, block), cache=cache)
                for each in schemas
            ]
            results = engine.generate(requests)
            texts[cache] = [text_of(result) for result in results]
            for schema, result in zip(schemas, results, strict=True):
                assert_valid(result, schema)
    assert texts["exact"] == texts["none"]


@pytest.mark.parametrize(
    ("model", "cache"),
    [
        ("random_model", "none"), ("random_model", "dual"), ("block_causal", "none"),
        ("block_causal", "exact"), ("sub_blocks", "exact"), ("sub_blocks", "dual"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["low_confidence", "threshold"])
def test_blocks_that_are_forced_as_a_whole_are_passed_over(
    model: str, cache: str, policy: str, request: pytest.FixtureRequest
) -> None:
    names = ["the_first_of_all_the_names", "x", "the_third_is_even_a_little_longer_than_that"]
    schema = {
        "type": "object",
        "properties": {name: {"enum": [1, 2, "three"]} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    engine = request.getfixturevalue(model)
    asked = request_of(json_grammar(schema), max_tokens=140, cache=cache, policy=policy)
    plainly = request_of(json_grammar(schema), max_tokens=140, policy=policy)
    cached, plain = engine.generate([asked, plainly])
    assert_valid(cached, schema)
    assert cached.stats.nfe <= 20
    if cache == "exact":
        assert cached.token_ids == plain.token_ids


@pytest.mark.parametrize("cache", [{"cache": "prefix"}, {"cache": "dual", "vicinity": 3}], ids=str)
def test_every_cache_follows_random_schemas(random_model: Engine, cache: dict[str, Any]) -> None:
    assert_schemas_are_followed(random_model, range(5, 12), threshold=0.1, **cache)


def test_apd_with_and_without_a_window_follows_random_schemas(random_model: Engine) -> None:
    for window in (None, 4):
        assert_schemas_are_followed(random_model, range(12, 16), policy="apd", apd_window=window)


def test_the_embedded_model_follows_random_schemas(embedded: Engine) -> None:
    assert_schemas_are_followed(embedded, range(8), block_length=32)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["embedded", "random_model"])
def test_500_random_schemas_are_followed(model: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(model)
    for start in range(0, 500, 100):
        assert_schemas_are_followed(engine, range(start, start + 100), room=0, block_length=32)


@pytest.mark.parametrize("number", range(25))
def test_the_shortest_canvas_is_enough(random_model: Engine, number: int) -> None:
    """Where only the shortest text fits, it is what comes out; and with a little more room too."""
    schema = random_schema(number)
    assert random_model.grammars is not None
    shortest = len(random_model.grammars.compile(json_grammar(schema)).shortest)
    requests = [
        request_of(json_grammar(schema), max_tokens=room) for room in (shortest, shortest + 2)
    ]
    for result in random_model.generate(requests):
        assert_valid(result, schema)


def test_a_canvas_that_is_too_short_is_refused(random_model: Engine) -> None:
    with pytest.raises(GrammarError, match="tokens, and the answer may have 8"):
        random_model.generate([request_of(json_grammar(PERSON), max_tokens=8)])


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (LLMatcher.grammar_from_regex(r"[0-9]{4}-[a-f]+"), r"[0-9]{4}-[a-f]+"),
        (LLMatcher.grammar_from_regex(r"\w+@\w+\.com\n"), r"\w+@\w+\.com\n"),
        (LLMatcher.grammar_from_lark('start: "left" | "right" | "up, or"'), "left|right|up, or"),
        (LLMatcher.grammar_from_lark('start: "SELECT " c ("," c)* " FROM t"\nc: /[a-d]{2}/'),
         r"SELECT [a-d]{2}(,[a-d]{2})* FROM t"),
    ],
)  # fmt: skip
def test_regular_expressions_choices_and_grammars_are_followed(
    random_model: Engine, grammar: str, pattern: str
) -> None:
    for result in random_model.generate([request_of(grammar, max_tokens=n) for n in (16, 40)]):
        assert result.finish_reason == "stop"
        assert re.fullmatch(pattern, text_of(result)), text_of(result)


def test_a_text_without_alternatives_costs_no_pass(random_model: Engine) -> None:
    (result,) = random_model.generate([request_of(json_grammar({"const": {"a": [1, "b"]}}))])
    assert json.loads(text_of(result)) == {"a": [1, "b"]}
    assert result.stats.nfe == 0
    assert result.finish_reason == "stop"


def test_forced_tokens_cost_no_pass(random_model: Engine) -> None:
    """One token per pass, and all names and signs for free."""
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in ("first", "second", "third")},
        "required": ["first", "second", "third"],
        "additionalProperties": False,
    }
    (result,) = random_model.generate([request_of(json_grammar(schema), policy="low_confidence")])
    assert_valid(result, schema)
    assert result.stats.nfe < result.stats.completion_tokens / 3


def test_what_the_model_knows_is_filled_in_as_it_would_without_a_grammar(embedded: Engine) -> None:
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Extract name and age as JSON: Anna is 34 years old."}],
        tokenize=False,
    )
    constrained = request_of(json_grammar(PERSON), prompt, block_length=32)
    free = GenerationRequest(
        constrained.prompt_ids, ROOM, constrained.decoding, constrained.end_token_ids
    )
    ours, theirs = embedded.generate([constrained, free])
    assert json.loads(text_of(ours)) == {"name": "Anna", "age": 34}
    assert text_of(theirs) == text_of(ours)
    assert ours.stats.nfe <= theirs.stats.nfe


def test_rows_with_and_without_a_grammar_do_not_disturb_each_other(random_model: Engine) -> None:
    grammars = [json_grammar(PERSON), LLMatcher.grammar_from_regex("[a-z ]{20,60}"), None]
    requests = [
        GenerationRequest(
            ids("Hello"), 64, DecodingParams(block_length=8, policy="threshold"), grammar=grammar
        )
        for grammar in grammars
    ]
    alone = [random_model.generate([request])[0] for request in requests]
    together = random_model.generate(requests)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_an_end_token_may_end_a_text_that_could_go_on(embedded: Engine) -> None:
    grammar = LLMatcher.grammar_from_regex(r"[A-Za-z. ]+")
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False
    )
    (result,) = embedded.generate([request_of(grammar, prompt, block_length=32)])
    assert result.finish_reason == "stop"
    assert "Paris" in text_of(result)
    assert result.stats.completion_tokens < ROOM


def test_a_row_can_be_looked_at_while_the_engine_moves_it_on(random_model: Engine) -> None:
    """Requests that arrive count the rows that are done, on another thread than the engine's."""
    assert random_model.grammars is not None
    regex = LLMatcher.grammar_from_regex("[a-z]{200}")
    cursor = random_model.grammars.start(regex, 250)
    looked = threading.Event()

    def work() -> None:
        while not looked.is_set():
            cursor.allowed(VOCAB)

    with ThreadPoolExecutor(1) as engine:
        working = engine.submit(work)
        try:
            assert not any(cursor.complete for _ in range(20_000))
        finally:
            looked.set()
        working.result()
    cursor.take_ending(250)
    assert cursor.complete


def test_the_grammar_goes_before_what_else_is_asked(random_model: Engine) -> None:
    """Bans that leave the grammar nothing do not end in a text that does not match."""
    request = request_of(json_grammar(PERSON))
    asked = Constraints(allowed_token_ids=ids("z"), min_tokens=100, end_token_ids=(EOS, EOT))
    params = DecodingParams(block_length=8, policy="threshold", constraints=asked)
    banned = GenerationRequest(
        request.prompt_ids, ROOM, params, (EOS, EOT), grammar=request.grammar
    )
    (result,) = random_model.generate([banned])
    assert_valid(result, PERSON)


@pytest.mark.parametrize("shortest", [0, 1])
def test_a_text_that_the_bans_leave_nothing_ends_where_it_may(
    random_model: Engine, shortest: int
) -> None:
    grammar = LLMatcher.grammar_from_regex(f"[a-z]{{{shortest},3}}")
    asked = Constraints(allowed_token_ids=ids("Q"))
    params = DecodingParams(block_length=8, policy="threshold", constraints=asked)
    (result,) = random_model.generate(
        [GenerationRequest(ids("x"), 9, params, (EOS, EOT), grammar=grammar)]
    )
    assert result.finish_reason == "stop"
    assert re.fullmatch(f"[a-z]{{{shortest},3}}", text_of(result))


def test_log_probabilities_are_told_of_every_token(random_model: Engine) -> None:
    events: list[Any] = []
    request = request_of(json_grammar(PERSON), top_logprobs=2)
    random_model._queue([request], [events.append])
    wait_until(lambda: bool(events) and events[-1].finish_reason is not None)
    tokens = [t for e in events for t in e.token_ids] + [
        e.end_token_id for e in events if e.end_token_id is not None
    ]
    told = [each.token_id for event in events for each in event.logprobs]
    assert told == tokens
    first = events[0].logprobs[0]
    assert (first.logprob, first.rank) == (0.0, 1)  # written without asking the model


def test_a_request_with_a_grammar_can_be_pickled(random_model: Engine) -> None:
    request = pickle.loads(pickle.dumps(request_of(json_grammar(PERSON))))
    assert_valid(random_model.generate([request])[0], PERSON)


def test_an_engine_without_a_tokenizer_refuses_grammars() -> None:
    decoder = tiny_decoder()
    engine = Engine(decoder, spec_of(decoder), EngineConfig(), tiny_auxiliary())
    engine.start()
    try:
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.generate([request_of(json_grammar(PERSON))])
    finally:
        engine.stop()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"enum": []},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "string", "pattern": "("},
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "required": ["n"],
         "properties": {"n": {"$ref": "#/$defs/n"}}}}},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_and_impossible_schemas_are_refused(
    random_model: Engine, schema: dict[str, Any]
) -> None:
    with pytest.raises(GrammarError):
        random_model.generate([request_of(json_grammar(schema))])


def test_grammars_that_were_not_used_for_long_are_forgotten() -> None:
    grammars = Grammars(TOKENIZER, VOCAB, (EOS,), ROOM)
    texts = [LLMatcher.grammar_from_regex(f"[ab]{number}") for number in range(KEPT_GRAMMARS + 1)]
    first, *others = [grammars.compile(text) for text in texts[:-1]]
    assert grammars.compile(texts[0]) is first
    grammars.compile(texts[-1])
    assert grammars.compile(texts[0]) is first
    assert grammars.compile(texts[2]) is others[1]
    assert grammars.compile(texts[1]) is not others[0]
