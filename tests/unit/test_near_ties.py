"""The book of near-ties forgives what the promise forgives, and no more."""

import pytest

from tests.near_ties import NearTies


def compared(ties: NearTies, margin: float, prompt: int = 0, num_tokens: int = 1) -> None:
    ties.compare([prompt], [1] * num_tokens + [2], [1] * num_tokens + [3], lambda *_: margin)


def test_a_wide_margin_fails_at_once() -> None:
    with pytest.raises(AssertionError, match="more than rounding"):
        compared(NearTies(), 1.1e-4)


def test_equal_outputs_need_no_margin() -> None:
    ties = NearTies()
    ties.compare([0], [1, 2], [1, 2], lambda *_: pytest.fail("asked for a margin"))
    ties.close()
    assert ties.num_compared == 2


def test_one_place_in_a_hundred_thousand_tokens_is_forgiven_and_two_are_not() -> None:
    ties = NearTies()
    compared(ties, 5e-5, num_tokens=99_999)
    ties.close()
    compared(ties, 5e-5)
    with pytest.raises(AssertionError, match="2 near-ties in 100002 compared tokens; margins"):
        ties.close()


def test_a_place_that_is_met_again_counts_once() -> None:
    ties = NearTies()
    for _ in range(3):
        compared(ties, 1e-5, num_tokens=99_999)
    ties.close()
    compared(ties, 1e-5, prompt=7, num_tokens=1)
    ties.close()


def test_few_tokens_forgive_nothing() -> None:
    ties = NearTies()
    compared(ties, 1e-6)
    with pytest.raises(AssertionError, match="1 near-ties in 2 compared tokens"):
        ties.close()
