"""Random numbers that belong to a place, not to a moment.

A number depends on (seed, stream, canvas position, token) only: never on the batch a row runs in,
on the device, or on how many numbers were drawn before. So a seeded request gives the same answer
alone or in a crowd. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as a hash.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Stream = Literal["token", "order", "canvas"]

_STREAM_KEYS: dict[Stream, int] = {
    "token": 0x243F6A88,
    "order": 0x13198A2E,
    "canvas": 0xA4093822,
}
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_FACTOR = 0xBF58476D1CE4E5B9
_SECOND_FACTOR = 0x94D049BB133111EB
_WORD = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_FIRST_FACTOR)
    x = (x ^ _shift_right(x, 27)) * _signed(_SECOND_FACTOR)
    return x ^ _shift_right(x, 31)


def uniform(
    seeds: Tensor, positions: Tensor, stream: Stream, count: int = 1, first: int = 0
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seeds: int64 [n].
        positions: int64 [n], canvas positions.
        stream: what the numbers are for; streams are independent.
        count: numbers per position.
        first: which of a position's numbers to begin with.

    Returns:
        float64 [n, count].
    """
    key = _key(seeds, positions, stream)
    lanes = torch.arange(first + 1, first + count + 1, device=key.device) * _signed(_INCREMENT)
    bits = _shift_right(_mix(key[:, None] + lanes), 12)
    return (bits.double() + 0.5) * 2.0**-52


def token_key(seeds: Tensor, positions: Tensor) -> Tensor:
    """What the numbers of `gumbel` are made of: int64 [n]. The number of token `t` is the hash of
    the key plus `t + 1` increments."""
    return _key(seeds, positions, "token")


def _key(seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    return _mix(_mix(seeds + _STREAM_KEYS[stream]) + positions * _signed(_INCREMENT))


def gumbel_of(uniforms: Tensor) -> Tensor:
    """Standard Gumbel numbers of the same shape, by inversion."""
    return -torch.log(-torch.log(uniforms))


def gumbel(seeds: Tensor, positions: Tensor, count: int, first: int = 0) -> Tensor:
    """Standard Gumbel numbers, one per token from `first` on: float64 [n, count]."""
    return gumbel_of(uniform(seeds, positions, "token", count, first))


def seed_of_draw(seed: int, number: int) -> int:
    """A seed for draw number `number` at the same positions."""
    return _signed(seed + (number + 1) * _INCREMENT)


def random_tokens(seed: int, positions: Tensor, number: int, vocab_size: int) -> Tensor:
    """Tokens from all of the vocabulary alike: int64 [n].

    Args:
        positions: int64 [n], canvas positions.
        number: which of a position's tokens.
    """
    seeds = torch.full_like(positions, _signed(seed))
    numbers = uniform(seeds, positions, "canvas", first=number).squeeze(-1)
    return (numbers * vocab_size).long()
