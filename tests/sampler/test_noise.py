"""Noise that belongs to a seed, a stream, a position and a token: even, and independent."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.sampler.markov import chi_square, chi_square_limit
from vdiff_kserve.sampler import noise
from vdiff_kserve.sampler.noise import gumbel, uniform


def numbers(seeds: Tensor, positions: Tensor, count: int, stream: noise.Stream = "token") -> Tensor:
    """float64 [seeds, positions, count], on the host."""
    grid = torch.cartesian_prod(seeds, positions).to(TEST_DEVICE)
    flat = uniform(grid[:, 0], grid[:, 1], stream, count).cpu()
    return flat.reshape(len(seeds), len(positions), count)


SMALL = numbers(torch.arange(40), torch.arange(50), 30)


def kolmogorov_smirnov(sample: Tensor) -> float:
    """sqrt(n) times the largest distance from the uniform distribution; above 1.95 one time in a
    thousand."""
    ordered = sample.flatten().sort().values
    n = len(ordered)
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    distance = torch.maximum(ranks / n - ordered, ordered - (ranks - 1) / n).max()
    return float(distance) * n**0.5


@pytest.mark.parametrize("stream", ["token", "order"])
def test_numbers_are_uniform(stream: noise.Stream) -> None:
    sample = numbers(torch.arange(40), torch.arange(50), 30, stream)
    assert sample.min() > 0
    assert sample.max() < 1
    assert kolmogorov_smirnov(sample) < 1.95
    counts = torch.histc(sample, bins=128, min=0, max=1)
    even = torch.full((1, 128), 1 / 128, dtype=torch.float64)
    assert chi_square(counts[None], even) < chi_square_limit(127)


def test_every_seed_and_every_position_is_uniform_in_itself() -> None:
    for sample in (*SMALL, *SMALL.transpose(0, 1), *SMALL.transpose(0, 2)):
        assert kolmogorov_smirnov(sample) < 2.4


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["seeds", "positions", "tokens"])
@pytest.mark.parametrize("lag", [1, 2, 7])
def test_neighbours_are_independent(dimension: int, lag: int) -> None:
    length = SMALL.shape[dimension] - lag
    left, right = SMALL.narrow(dimension, 0, length), SMALL.narrow(dimension, lag, length)
    cells = (left * 12).long() * 12 + (right * 12).long()
    counts = torch.bincount(cells.flatten(), minlength=144).double()
    even = torch.full((1, 144), 1 / 144, dtype=torch.float64)
    assert chi_square(counts[None], even) < chi_square_limit(143)


def test_streams_are_independent() -> None:
    order = numbers(torch.arange(40), torch.arange(50), 30, "order")
    correlation = torch.corrcoef(torch.stack([SMALL.flatten(), order.flatten()]))[0, 1]
    assert abs(correlation) < 4 / SMALL.numel() ** 0.5


def test_seeds_that_differ_in_one_bit_share_nothing() -> None:
    seeds = torch.tensor([0, 1, 2, -1, 1 << 31, 1 << 32, 1 << 62, -(1 << 63)])
    sample = numbers(seeds, torch.arange(20), 50).flatten(1)
    for left, right in itertools.combinations(sample, 2):
        assert not (left == right).any()
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4.5 / left.numel() ** 0.5


def test_number_does_not_depend_on_what_is_drawn_beside_it() -> None:
    seeds, positions = torch.tensor([[3, 3, 9], [7, 8, 7]], device=TEST_DEVICE)
    together = uniform(seeds, positions, "token", 20)
    for i in range(3):
        alone = uniform(seeds[i : i + 1], positions[i : i + 1], "token", 11)
        assert torch.equal(alone[0], together[i, :11])


def test_numbers_stay_below_one_at_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A one would be an infinite Gumbel number."""
    for bits in (0, -1):
        constant = torch.full((1, 4), bits)
        monkeypatch.setattr(noise, "_mix", lambda x, constant=constant: constant)
        sample = uniform(torch.zeros(1).long(), torch.zeros(1).long(), "token", 4)
        assert ((sample > 0) & (sample < 1)).all()
        assert noise.gumbel_of(sample).isfinite().all()


def test_gumbel_numbers_have_the_distribution_of_their_name() -> None:
    places = torch.arange(400, device=TEST_DEVICE)
    sample = gumbel(places, places, 100).cpu()
    assert kolmogorov_smirnov(torch.exp(-torch.exp(-sample))) < 1.95
    assert float(sample.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(sample.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_numbers_are_the_same_for_ever() -> None:
    """A seed that a user noted down gives the same answer with the next version."""
    sample = numbers(torch.tensor([0, 42]), torch.tensor([5]), 2).squeeze(1)
    recorded = torch.tensor(
        [[0.5833485936234164, 0.9795878560758435], [0.5119496652470612, 0.4396317975784014]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(sample, recorded, atol=1e-15, rtol=0)


def test_random_tokens_are_even_and_new_in_every_draw() -> None:
    vocab, positions = 50, torch.arange(4000, device=TEST_DEVICE)
    draws = [noise.random_tokens(7, positions, number, vocab) for number in range(3)]
    for tokens in draws:
        counts = torch.bincount(tokens, minlength=vocab).double()
        assert chi_square(counts, torch.full_like(counts, 1 / vocab)) < chi_square_limit(vocab - 1)
    for one, other in itertools.combinations(draws, 2):
        assert (one == other).double().mean() < 0.05
    assert torch.equal(draws[1], noise.random_tokens(7, positions, 1, vocab))
    assert not torch.equal(draws[0], noise.random_tokens(8, positions, 0, vocab))
    seeds = {noise.seed_of_draw(seed, number) for seed in (-(2**63), 0, 2**62) for number in (0, 9)}
    assert len(seeds) == 6
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
