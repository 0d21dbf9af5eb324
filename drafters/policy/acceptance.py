"""Acceptance rates of draft tokens, learned from every verified draft."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from drafters.base import Draft
from drafters.policy.learning import PRIOR_WEIGHT, RATE
from transformer.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TEMPERATURES = (0.0, 0.6, 0.9)  # upper edges of the temperature classes; the last class is everything hotter
NUM_CLASSES = len(TEMPERATURES) + 1
KNOTS = 21  # confidences 0, 0.05, ..., 1; acceptance is a straight line between them


def temperature_class(temperature: float) -> int:
    """Return the class of a temperature: acceptance falls with it, so estimates are kept apart by class."""
    return bisect_left(TEMPERATURES, temperature)


class RequestFactor:
    """A request's acceptance over what is expected of its drafts: near 1 at first, moving, and forgetting."""

    __slots__ = ("_accepted", "_expected")

    def __init__(self) -> None:
        self._accepted = self._expected = 0.0

    @property
    def value(self) -> float:
        return (self._accepted + PRIOR_WEIGHT) / (self._expected + PRIOR_WEIGHT)

    def observe(self, accepted: float, expected: float) -> None:
        """Take in one step's draft; without one (0, 0) the factor drifts back to 1, so that the request can recover."""
        self._accepted = (1.0 - RATE) * self._accepted + accepted
        self._expected = (1.0 - RATE) * self._expected + expected


class Acceptance:
    """Probability that a draft token is accepted once all before it are: by source, temperature class and confidence.

    Two tables, for tokens that the causal model chose and for those that the path search chose, since each knows its
    own confidence only. A request's factor multiplies its tokens' rates.
    """

    def __init__(self) -> None:
        self._rates: Floats = np.tile(np.linspace(0.0, 1.0, KNOTS), (2, NUM_CLASSES, 1))  # [sources, classes, knots]
        self._seen: Floats = np.full(self._rates.shape, PRIOR_WEIGHT)

    def survival(self, drafts: Sequence[Draft], classes: Sequence[int], factors: Sequence[float]) -> list[list[float]]:
        """Return for each draft `[tokens]` the probability that the token and all before it are accepted.

        classes: from `temperature_class`, one per draft, as the requests' `factors`.
        """
        confidences, sizes = _packed(drafts, classes)
        survival = np.empty_like(confidences)
        _survive(confidences, sizes, self._rates, np.array(factors, np.float64), survival)
        flat, ends = survival.tolist(), list(accumulate(len(draft.confidences) for draft in drafts))
        return [flat[end - len(draft.confidences) : end] for draft, end in zip(drafts, ends, strict=True)]

    def observe(self, drafts: Sequence[Draft], classes: Sequence[int], num_accepted: Sequence[int]) -> list[float]:
        """Take in verified drafts: their first `num_accepted` tokens were right, the next one (if any) was not.

        Returns how many of each draft's tokens were expected to be accepted, whatever its request's factor.
        """
        confidences, sizes = _packed(drafts, classes)
        expected = np.zeros(len(drafts))
        _learn(confidences, sizes, np.array(num_accepted, np.int64), self._rates, self._seen, expected)
        found: list[float] = expected.tolist()
        return found


def _packed(drafts: Sequence[Draft], classes: Sequence[int]) -> tuple[Floats, Ints]:
    """Return the confidences of all drafts in a row, and `[drafts, 3]` length, tokens that the search chose, class."""
    sizes = [(len(draft.confidences), draft.num_searched, where) for draft, where in zip(drafts, classes, strict=True)]
    confidences = [confidence for draft in drafts for confidence in draft.confidences]
    return np.array(confidences, np.float64), np.array(sizes, np.int64).reshape(-1, 3)


@compiled
def _place(confidence: float) -> tuple[int, float]:
    """Return the knot at or below a confidence, and the share of the way to the next one."""
    place = min(max(confidence, 0.0), 1.0) * (KNOTS - 1)
    knot = min(int(place), KNOTS - 2)
    return knot, place - knot


@compiled
def _rate(confidence: float, table: Floats) -> float:
    """Return the acceptance of a confidence, on the line between two knots."""
    knot, share = _place(confidence)
    return float(table[knot] + share * (table[knot + 1] - table[knot]))


@compiled
def _survive(confidences: Floats, sizes: Ints, rates: Floats, factors: Floats, survival: Floats) -> None:
    start = 0
    for draft in range(len(sizes)):
        length, searched, where = sizes[draft]
        alive = 1.0
        for position in range(length):
            rate = _rate(confidences[start + position], rates[1 if position < searched else 0, where])
            alive *= min(rate * factors[draft], 1.0)
            survival[start + position] = alive
        start += length


@compiled
def _learn(confidences: Floats, sizes: Ints, num_accepted: Ints, rates: Floats, seen: Floats, expected: Floats) -> None:
    start = 0
    for draft in range(len(sizes)):
        length, searched, where = sizes[draft]
        alive = 1.0
        for position in range(length):
            alive *= _rate(confidences[start + position], rates[1 if position < searched else 0, where])
            expected[draft] += alive
        for position in range(min(num_accepted[draft] + 1, length)):
            source = 1 if position < searched else 0
            knot, share = _place(confidences[start + position])
            right = 1.0 if position < num_accepted[draft] else 0.0
            for side in range(2):
                weight = share if side else 1.0 - share
                seen[source, where, knot + side] += weight
                rate = max(RATE, 1.0 / seen[source, where, knot + side])
                rates[source, where, knot + side] += rate * weight * (right - rates[source, where, knot + side])
        start += length
