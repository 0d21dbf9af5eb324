"""The noise, and what is drawn with it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.unit.verifiers.distributions import exact_probabilities
from verifiers.base import SamplingRules
from verifiers.distribution import token_weights
from verifiers.draws import draw, uniforms

NUM_DRAWS = 200_000
SMALLEST_P_VALUE = 1e-4  # the inputs are fixed, so this either holds for good or is a defect


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_numbers_of_one_seed_are_uniform_over_positions(seed: int) -> None:
    numbers = uniforms([seed] * NUM_DRAWS, range(NUM_DRAWS))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert stats.kstest(numbers, "uniform").pvalue > SMALLEST_P_VALUE
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / NUM_DRAWS**0.5


def test_numbers_of_neighbouring_seeds_are_uniform_and_independent() -> None:
    at_five = uniforms(range(NUM_DRAWS), [5] * NUM_DRAWS)
    at_six = uniforms(range(NUM_DRAWS), [6] * NUM_DRAWS)
    assert stats.kstest(at_five, "uniform").pvalue > SMALLEST_P_VALUE
    assert abs(np.corrcoef(at_five[:-1], at_five[1:])[0, 1]) < 5 / NUM_DRAWS**0.5
    assert abs(np.corrcoef(at_five, at_six)[0, 1]) < 5 / NUM_DRAWS**0.5
    assert abs(np.corrcoef(at_five[1:], at_six[:-1])[0, 1]) < 5 / NUM_DRAWS**0.5  # (seed + 1, i) against (seed, i + 1)


def test_pairs_of_numbers_fill_the_square_evenly() -> None:
    numbers = uniforms([7] * NUM_DRAWS, range(NUM_DRAWS)).reshape(-1, 2)
    cells = np.histogram2d(numbers[:, 0], numbers[:, 1], bins=20, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > SMALLEST_P_VALUE


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_number_depends_on_its_seed_and_position_alone(keys: list[tuple[int, int]]) -> None:
    together = uniforms([seed for seed, _ in keys], [position for _, position in keys])
    assert together.tolist() == [float(uniforms([seed], [position])[0]) for seed, position in keys]


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).filter(lambda weights: sum(weights) > 1e-30),
    st.sampled_from([0.0, 0.5, 1 - 2.0**-52]),
)
def test_token_of_no_weight_is_never_drawn(weights: list[float], number: float) -> None:
    token = int(draw(torch.tensor([weights]), np.array([number])))
    assert weights[token] > 0


@pytest.mark.parametrize(
    "rules",
    [
        SamplingRules(0),
        SamplingRules(0, temperature=0.5),
        SamplingRules(0, temperature=1.7),
        SamplingRules(0, top_k=5),
        SamplingRules(0, top_p=0.7),
        SamplingRules(0, min_p=0.1),
        SamplingRules(0, temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_exact_distribution(rules: SamplingRules) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = exact_probabilities(logits[0].double().numpy(), rules)
    numbers = uniforms([11] * NUM_DRAWS, range(NUM_DRAWS))
    drawn = draw(token_weights(logits, [rules]).expand(NUM_DRAWS, -1), numbers)
    counts = np.bincount(drawn.numpy(), minlength=40)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected[kept] * NUM_DRAWS).pvalue > SMALLEST_P_VALUE
    wrong = exact_probabilities(logits[0].double().numpy(), SamplingRules(0, temperature=rules.temperature * 1.05))
    assert stats.chisquare(counts, wrong * NUM_DRAWS).pvalue < 1e-10  # the test can tell
