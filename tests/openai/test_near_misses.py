"""What a misspelled name was meant to be, and which names are none of ours."""

from __future__ import annotations

import pytest

from vdiff_kserve.openai.near_misses import LONGEST, Names, edits

NAMES = Names(
    ("n", "stop", "steps", "seed", "top_p", "top_k", "stream", "max_tokens", "min_tokens")
)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("ab", "", 2), ("abc", "abd", 1), ("abcd", "acbd", 1), ("kitten", "sitting", 3)],
)
def test_edits_are_counted(one: str, other: str, distance: int) -> None:
    assert edits(one, other) == edits(other, one) == distance


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("MaxTokens", "max_tokens"), ("max-tokens", "max_tokens"), ("mxa_tokes", "max_tokens")),
        *(("stops", "stop"), ("step", "steps"), ("sotp", "stop"), ("sead", None), ("see", None)),
        *(("topa", None), ("top_a", None), ("topP", "top_p"), ("N", "n"), ("m", None)),
        *(("steam", "stream"), ("team", None), ("max_length", None), ("x" * LONGEST, None)),
        ("max_tokens" + "_" * LONGEST, None),
    ],
)
def test_the_nearest_name_is_found_where_one_is_near(word: str, meant: str | None) -> None:
    assert NAMES.meant_by(word) == meant
