"""Draws, compared with exact distributions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.unit.verifiers.distributions import exact_probabilities
from verifiers.base import SamplingRules
from verifiers.draws import NO_TOKEN, draw, draw_rows, most_probable

NUM_DRAWS = 200_000
MIN_P_VALUE = 1e-4  # the inputs are fixed: a failure is a defect, never chance

seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**31)


@given(st.lists(st.tuples(seeds, positions), min_size=1, max_size=20))
def test_a_draw_depends_on_its_weights_seed_and_position_alone(keys: list[tuple[int, int]]) -> None:
    weights = torch.rand(len(keys), 50, generator=torch.Generator().manual_seed(0))
    together = draw(weights, [seed for seed, _ in keys], [position for _, position in keys]).tolist()
    alone = [int(draw(weights[i : i + 1], [seed], [position])) for i, (seed, position) in enumerate(keys)]
    assert together == alone


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), seeds, positions)
def test_a_token_of_weight_zero_is_never_drawn(weights: list[float], seed: int, position: int) -> None:
    token = int(draw(torch.tensor([weights]), [seed], [position]))
    assert weights[token] > 0 if any(weights) else token == NO_TOKEN


@given(seeds, positions, st.integers(0, 49))
def test_other_tokens_weights_matter_only_where_they_win(seed: int, position: int, changed: int) -> None:
    """A draw does not depend on order or sum of the other weights. So drafters can guess with the same noise."""
    weights = torch.rand(1, 50, generator=torch.Generator().manual_seed(1))
    before = int(draw(weights, [seed], [position]))
    weights[0, changed] = 0
    after = int(draw(weights, [seed], [position]))
    assert after == before or before == changed


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
@pytest.mark.parametrize("varied", ["positions", "seeds"])
def test_draws_follow_the_exact_distribution(rules: SamplingRules, varied: str) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = exact_probabilities(logits[0].double().numpy(), rules)
    seeds, positions = [11] * NUM_DRAWS, range(NUM_DRAWS)
    if varied == "seeds":
        seeds, positions = list(positions), range(11, 12)
    seeded = [replace(rules, seed=seed) for seed in seeds]
    drawn = draw_rows(logits, [0] * NUM_DRAWS, seeded, [*positions] * (NUM_DRAWS // len(positions)))
    counts = np.bincount(drawn, minlength=40)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected[kept] * NUM_DRAWS).pvalue > MIN_P_VALUE
    wrong = exact_probabilities(logits[0].double().numpy(), SamplingRules(0, temperature=rules.temperature * 1.05))
    assert stats.chisquare(counts, wrong * NUM_DRAWS).pvalue < 1e-10  # the test detects a wrong distribution


def test_a_row_draws_the_same_among_any_others_and_never_what_is_banned() -> None:
    logits = torch.randn((12, 90), generator=torch.Generator().manual_seed(5))
    logits[:, ::2] = -torch.inf
    kinds = (
        SamplingRules(3),
        SamplingRules(4, temperature=0.01),
        SamplingRules(5, top_k=7),
        SamplingRules(6, min_p=0.2),
    )
    rows, rules = [11, 3, 3, 0, 7, 8], [kinds[i] for i in (0, 1, 2, 3, 0, 2)]
    together = draw_rows(logits, rows, rules, range(40, 46))
    alone = [
        draw_rows(logits, [row], [rule], [40 + i])[0] for i, (row, rule) in enumerate(zip(rows, rules, strict=True))
    ]
    assert together == alone
    assert all(token % 2 == 1 for token in together)
    assert together[1] == int(logits[3].argmax())


def test_a_row_with_nan_or_infinity_has_no_most_probable_token() -> None:
    logits = torch.randn((9, 300), generator=torch.Generator().manual_seed(1))
    logits[1, 5], logits[2, 0], logits[3, -1] = torch.nan, torch.nan, torch.nan
    logits[4, 7], logits[5] = torch.inf, -torch.inf
    logits[6, [9, 200]] = 50.0  # the first among equals
    logits[7, 30:] = -torch.inf
    expected = [int(logits[0].argmax()), *[NO_TOKEN] * 5, 9, int(logits[7].argmax()), int(logits[8].argmax())]
    assert most_probable(logits) == expected
    assert most_probable(torch.cat([logits, logits], 1)[:, :300]) == expected
    assert most_probable(logits.double()) == expected  # as on a GPU
