"""How likely draft tokens are accepted, learned from every verified draft."""

from bisect import bisect_left
from collections.abc import Sequence

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

    def survival(self, drafts: Sequence[Draft], classes: Sequence[int], factors: Sequence[float]) -> Floats:
        """Return `[drafts, longest]` the probability that each token and all before it are accepted; 0 behind the last.

        classes: from `temperature_class`, one per draft, as the requests' `factors`.
        """
        confidences, sizes = _packed(drafts, classes)
        survival = np.zeros_like(confidences)
        _survive(confidences, sizes, self._rates, np.array(factors, np.float64), survival)
        return survival

    def observe(self, drafts: Sequence[Draft], classes: Sequence[int], num_accepted: Sequence[int]) -> None:
        """Take in verified drafts: their first `num_accepted` tokens were right, the next one (if any) was not."""
        confidences, sizes = _packed(drafts, classes)
        _learn(confidences, sizes, np.array(num_accepted, np.int64), self._rates, self._seen)


def _packed(drafts: Sequence[Draft], classes: Sequence[int]) -> tuple[Floats, Ints]:
    """Return `[drafts, longest]` confidences, and `[drafts, 3]` length, tokens that the search chose, class."""
    sizes = [(len(draft.tokens), draft.num_searched, where) for draft, where in zip(drafts, classes, strict=True)]
    confidences = np.zeros((len(drafts), max((size[0] for size in sizes), default=0)))
    for row, draft in zip(confidences, drafts, strict=True):
        row[: len(draft.tokens)] = draft.confidences
    return confidences, np.array(sizes, np.int64).reshape(-1, 3)


@compiled
def _place(confidence: float) -> tuple[int, float]:
    """Return the knot at or below a confidence, and the share of the way to the next one."""
    place = min(max(confidence, 0.0), 1.0) * (KNOTS - 1)
    knot = min(int(place), KNOTS - 2)
    return knot, place - knot


@compiled
def _survive(confidences: Floats, sizes: Ints, rates: Floats, factors: Floats, survival: Floats) -> None:
    for draft in range(len(sizes)):
        length, searched, where = sizes[draft]
        alive = 1.0
        for position in range(length):
            table = rates[1 if position < searched else 0, where]
            knot, share = _place(confidences[draft, position])
            rate = table[knot] + share * (table[knot + 1] - table[knot])
            alive *= min(rate * factors[draft], 1.0)
            survival[draft, position] = alive


@compiled
def _learn(confidences: Floats, sizes: Ints, num_accepted: Ints, rates: Floats, seen: Floats) -> None:
    for draft in range(len(sizes)):
        length, searched, where = sizes[draft]
        for position in range(min(num_accepted[draft] + 1, length)):
            source = 1 if position < searched else 0
            knot, share = _place(confidences[draft, position])
            right = 1.0 if position < num_accepted[draft] else 0.0
            for side in range(2):
                weight = share if side else 1.0 - share
                seen[source, where, knot + side] += weight
                rate = max(RATE, 1.0 / seen[source, where, knot + side])
                rates[source, where, knot + side] += rate * weight * (right - rates[source, where, knot + side])
