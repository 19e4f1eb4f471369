"""Tokenizers: end-of-turn tokens, and auxiliary models with another vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden import GOLDEN_DIR
from tests.server.checkpoint import make_tokenizer
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.models import (
    CheckpointError,
    check_same_vocabulary,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)


def test_the_end_of_turn_token_is_what_the_tokenizer_says() -> None:
    _, spec = load_decoder(GOLDEN_DIR / "llada")
    assert spec.eot_token_id is None
    tokenizer = make_tokenizer()
    completed = with_end_of_turn(spec, tokenizer)
    assert completed.eot_token_id == tokenizer.get_vocab()["<|eot_id|>"]
    assert completed.end_token_ids == (spec.eos_token_id, completed.eot_token_id)


def test_a_tokenizer_without_one_leaves_the_spec_alone() -> None:
    _, spec = load_decoder(GOLDEN_DIR / "llada")
    spec = replace(spec, eot_token="<|nothing|>")
    assert with_end_of_turn(spec, make_tokenizer()) == spec


def test_a_token_that_the_model_lacks_ends_no_turn() -> None:
    _, spec = load_decoder(GOLDEN_DIR / "llada")
    spec = replace(spec, decoder=replace(spec.decoder, vocab_size=315))
    assert with_end_of_turn(spec, make_tokenizer()) == spec


def test_what_diffucoder_fills_its_canvas_with_ends_an_answer() -> None:
    _, spec = load_decoder(GOLDEN_DIR / "dream")
    spec = replace(spec, decoder=replace(spec.decoder, vocab_size=1000))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|dlm_pad|>"])
    filler = tokenizer.get_vocab()["<|dlm_pad|>"]
    assert filler in with_end_of_turn(spec, tokenizer).end_token_ids
    assert filler not in with_end_of_turn(spec, make_tokenizer()).end_token_ids


def test_the_same_vocabulary_is_accepted_also_with_more_tokens() -> None:
    larger = make_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    check_same_vocabulary(make_tokenizer(), larger)


def test_another_vocabulary_is_refused_with_examples() -> None:
    tokenizer, other = make_tokenizer(), make_tokenizer()
    moved = {token: (i + 1) % 320 for token, i in other.get_vocab().items()}
    other.get_vocab = lambda: moved  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="320 shared token ids 320 differ"):
        check_same_vocabulary(other, tokenizer)


def test_a_folder_without_or_with_a_broken_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (tmp_path / "tokenizer.json").write_text(pointer, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a pointer: run `git lfs pull`"):
        load_tokenizer(tmp_path)


def test_a_chat_template_itself_is_not_the_name_of_its_file() -> None:
    with pytest.raises(CheckpointError, match="must be given as a file"):
        load_tokenizer(EMBEDDED, "{{ messages[0]['content'] }}" * 20)
