"""The figure of structured output: what a schema costs in forward passes."""

from __future__ import annotations

from benchmarks.constrained import is_valid, measure, parse_arguments, schema_of


def test_answers_with_a_schema_take_at_most_1_3_times_the_passes_of_free_ones() -> None:
    arguments = ["--n", "120", "--decodings", "threshold 0.98"]
    for outcome in measure(parse_arguments(arguments)):
        assert outcome.prompts > 5
        assert outcome.valid == 1
        assert outcome.ratio <= 1.3
        assert 0 < outcome.same_ratio <= 1.3


def test_a_schema_is_made_of_the_right_answers_keys_and_types() -> None:
    schema = schema_of('{"name": "Anna", "age": 3}')
    assert schema["properties"] == {"name": {"type": "string"}, "age": {"type": "integer"}}
    assert schema["required"] == ["name", "age"]


def test_an_answer_is_valid_when_keys_and_types_are_right() -> None:
    answer = '{"name": "Anna", "age": 3}'
    assert is_valid('{"name": "Bob", "age": 7}', answer)
    for text in ('{"name": "Bob"}', '{"name": "Bob", "age": "7"}', "[]", '{"name": "Bob'):
        assert not is_valid(text, answer)
