"""The noise of sampled tokens passes tests of randomness along seeds, positions and tokens."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from transformer.compiled import compiled
from transformer.noise import gumbel, noise_keys, uniform

COUNT = 100_000
MIN_P_VALUE = 1e-4  # the inputs are fixed: a failure is a defect, never chance


@compiled
def all_noise(keys: Any, tokens: Any, drawn: Any, noise: Any) -> None:
    for row in range(len(keys)):
        for column in range(len(tokens)):
            drawn[row, column] = uniform(keys[row], tokens[column])
            noise[row, column] = gumbel(keys[row], tokens[column])


def draw_all(seeds: range, positions: range, tokens: range) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return uniform numbers and Gumbel noise of every seed, position and token; the token varies fastest."""
    pairs = [(seed, position) for seed in seeds for position in positions]
    words = np.array([seed for seed, _ in pairs], np.uint64)
    keys = noise_keys(words, np.array([position for _, position in pairs], np.int64))
    drawn, noise = np.empty((len(keys), len(tokens))), np.empty((len(keys), len(tokens)))
    all_noise(keys, np.array(tokens, np.int64), drawn, noise)
    return drawn.ravel(), noise.ravel()


@pytest.mark.parametrize(
    "which",
    [
        (range(1), range(COUNT), range(1)),
        (range(COUNT), range(5, 6), range(3, 4)),
        (range(2**64 - 1, 2**64), range(7, 8), range(COUNT)),
        (range(2**63, 2**63 + 10), range(100), range(COUNT // 1000)),
    ],
)
def test_numbers_are_uniform_and_independent(which: tuple[range, range, range]) -> None:
    drawn, _ = draw_all(*which)
    assert 0.0 < drawn.min() < drawn.max() < 1.0
    assert stats.kstest(drawn, "uniform").pvalue > MIN_P_VALUE
    for distance in (1, 2, 100):
        assert abs(np.corrcoef(drawn[:-distance], drawn[distance:])[0, 1]) < 5 / COUNT**0.5
    cells = np.histogram2d(drawn[::2], drawn[1::2], bins=20, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > MIN_P_VALUE


def test_neighbours_in_seed_position_and_token_do_not_share_numbers() -> None:
    near, _ = draw_all(range(50), range(50), range(50))
    assert len(np.unique(near)) == len(near)


def test_gumbel_noise_follows_its_distribution() -> None:
    _, noise = draw_all(range(1, 2), range(COUNT), range(1))
    assert stats.kstest(noise, "gumbel_r").pvalue > MIN_P_VALUE
