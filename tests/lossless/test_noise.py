"""The counter-based generator: the right law, and no dependence between what must be independent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from lossless.chi_square import ALPHA
from scipy.stats import chi2_contingency, kstest

from engine.speculation.noise import CounterDraws, GumbelNoise, uniform

CPU = torch.device("cpu")
SEEDS = [0, 1, 2, 3, 1 << 32, (1 << 64) - 1, 12345, -1 << 62]


def gumbels(seeds: list[int], positions: list[int], vocab: int) -> np.ndarray:
    """float64 [len(seeds), vocab]"""
    return GumbelNoise(vocab, CPU)(seeds, positions).numpy()


def as_uniform(noise: np.ndarray) -> np.ndarray:
    return np.exp(-np.exp(-noise))


def independent(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of an 8 x 8 table of two uniforms."""
    table, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=8, range=[[0, 1], [0, 1]])
    return float(chi2_contingency(table).pvalue)


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_gumbel_over_the_vocabulary_and_over_positions(seed: int):
    assert kstest(gumbels([seed], [17], 20_000)[0], "gumbel_r").pvalue > ALPHA
    over_positions = gumbels([seed] * 5000, list(range(5000)), 4)
    for token in range(4):
        assert kstest(over_positions[:, token], "gumbel_r").pvalue > ALPHA


def test_noise_is_gumbel_over_consecutive_seeds():
    noise = gumbels(list(range(5000)), [0] * 5000, 4)
    for token in range(4):
        assert kstest(noise[:, token], "gumbel_r").pvalue > ALPHA


def test_noise_of_neighbours_is_independent():
    count, vocab = 5000, 8
    at = as_uniform(gumbels([42] * count, list(range(count)), vocab))
    of = as_uniform(gumbels(list(range(count)), [7] * count, vocab))
    for lag in (1, 2, 16):
        assert independent(at[lag:], at[:-lag]) > ALPHA  # positions
        assert independent(of[lag:], of[:-lag]) > ALPHA  # seeds
    assert independent(at[:, 1:], at[:, :-1]) > ALPHA  # tokens
    assert independent(of[:, 1:], of[:, :-1]) > ALPHA
    assert independent(at[1:, :-1], at[:-1, 1:]) > ALPHA  # the next position, the token before


def test_noise_is_the_same_in_any_batch_and_prefix_of_the_vocabulary():
    noise = gumbels([5, 6, 5], [1, 2, 3], 16)
    assert np.array_equal(noise[1:2], gumbels([6], [2], 16))
    assert np.array_equal(noise[:, :4], gumbels([5, 6, 5], [1, 2, 3], 4))
    assert np.isfinite(gumbels(SEEDS, list(range(8)), 10_000)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_are_uniform(seed: int):
    draws = np.array([uniform(seed, i) for i in range(10_000)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert kstest(draws, "uniform").pvalue > ALPHA
    for lag in (1, 2, 3):
        assert independent(draws[lag:], draws[:-lag]) > ALPHA


def test_uniforms_of_consecutive_seeds_are_uniform_and_independent():
    draws = np.array([[uniform(seed, i) for i in range(3)] for seed in range(5000)])
    for i, j in itertools.combinations(range(3), 2):
        assert independent(draws[:, i], draws[:, j]) > ALPHA
    for i in range(3):
        assert kstest(draws[:, i], "uniform").pvalue > ALPHA
        assert independent(draws[1:, i], draws[:-1, i]) > ALPHA


def test_the_two_streams_of_a_seed_are_independent():
    draws = np.array([uniform(3, i) for i in range(5000)])
    noise = as_uniform(gumbels([3] * 5000, list(range(5000)), 1))[:, 0]
    assert independent(draws, noise) > ALPHA


def test_the_check_sees_dependence_and_another_law():
    draws = np.array([uniform(3, i) for i in range(5000)])
    assert independent(draws, np.sqrt(draws)) < ALPHA
    assert kstest(draws * 0.97, "uniform").pvalue < ALPHA


class _Owner:
    def __init__(self, seed: int) -> None:
        self.seed, self.draws = seed, 0


def test_draws_advance_the_counter_of_their_owner_alone():
    a, b, source = _Owner(1), _Owner(2), CounterDraws()
    law = torch.full((3, 4), 0.25, dtype=torch.float64)
    source.categorical(law, [a, a, b])  # type: ignore[list-item]
    source.bernoulli(torch.tensor([0.5]), [a])  # type: ignore[list-item]
    assert (a.draws, b.draws) == (3, 1)


def test_categorical_never_takes_a_token_of_probability_zero():
    law = torch.tensor([0.0, 1.0 / 3, 0.0, 2.0 / 3, 0.0])
    for dtype in (torch.float32, torch.float64):
        owners = [_Owner(i) for i in range(3000)]
        tokens = CounterDraws().categorical(law.to(dtype).expand(3000, 5), owners)  # type: ignore[arg-type]
        assert set(tokens.tolist()) == {1, 3}


def test_bernoulli_is_sure_at_zero_and_one():
    owners = [_Owner(i) for i in range(3000)]
    source = CounterDraws()
    assert source.bernoulli(torch.ones(3000), owners).all()  # type: ignore[arg-type]
    assert not source.bernoulli(torch.zeros(3000), owners).any()  # type: ignore[arg-type]
