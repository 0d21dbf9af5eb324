"""Temperature, top-k, top-p and min-p, compared with the slow definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.verifiers.distributions import exact_probabilities
from verifiers.base import SamplingRules
from verifiers.distribution import token_weights

MIN_PROBABILITY = 1e-30  # weights are float32: less probable tokens may get weight 0

any_rules = st.builds(
    SamplingRules,
    seed=st.just(0),
    temperature=st.floats(0.05, 2.0),
    top_k=st.sampled_from([0, 1, 2, 20, 127, 128, 129, 299, 300, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


def random_logits(rows: int, scale: float, seed: int) -> torch.Tensor:
    return torch.randn(rows, 300, generator=torch.Generator().manual_seed(seed)) * scale


@given(st.lists(any_rules, min_size=1, max_size=6), st.sampled_from([0.1, 1.0, 5.0]), st.integers(0, 1000))
def test_rows_equal_the_slow_definition(rules: list[SamplingRules], scale: float, seed: int) -> None:
    logits = random_logits(len(rules), scale, seed)
    weights = token_weights(logits, rules).double().numpy()
    for row, rule in enumerate(rules):
        expected = exact_probabilities(logits[row].double().numpy(), rule)
        found = weights[row] / weights[row].sum()
        # At the edge of top-p and min-p, rounding may keep or drop a token; only its weight may differ.
        differing = (found > MIN_PROBABILITY) != (expected > MIN_PROBABILITY)
        assert differing.sum() <= 1
        np.testing.assert_allclose(found, expected, atol=1e-5 + np.maximum(found, expected)[differing].sum())


@given(st.lists(any_rules, min_size=2, max_size=6), st.integers(0, 1000))
def test_row_does_not_depend_on_its_neighbours(rules: list[SamplingRules], seed: int) -> None:
    logits = random_logits(len(rules), 1.0, seed)
    together = token_weights(logits, rules)
    for row, rule in enumerate(rules):
        assert torch.equal(together[row], token_weights(logits[row : row + 1], [rule])[0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-5])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(4, 3.0, 0) * 1000
    weights = token_weights(logits, [SamplingRules(0, temperature=temperature)] * 4)
    assert torch.equal(weights.argmax(-1), logits.argmax(-1))
    assert torch.equal(weights.sum(-1), torch.ones(4))


def test_banned_tokens_keep_no_weight() -> None:
    logits = random_logits(1, 1.0, 0)
    logits[0, 5:] = float("-inf")
    weights = token_weights(logits, [SamplingRules(0, top_k=50, top_p=0.99)])
    assert (weights[0, :5] > 0).sum() >= 4
    assert not weights[0, 5:].any()
