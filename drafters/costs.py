"""What a pass costs, by its rows: measured at start-up, corrected by every step while serving."""

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import compiled

Floats = NDArray[np.float64]

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_OUTLIER = 2.0  # a process that was descheduled counts as so many times the estimate, whatever it took
SHARED = 0.3  # of a change of level: a busier machine slows plain passes and others alike, unequal rows only the others
KNOT_ROWS = np.asarray(KNOTS, dtype=np.float64)


@compiled
def seconds_at(rows: float, knots: Floats, seconds: Floats) -> float:
    """Seconds of a pass of so many rows, on the straight lines between the knots; 0 for none."""
    if rows <= 0.0:
        return 0.0
    i = 1
    while i < len(knots) - 1 and knots[i] < rows:
        i += 1
    share = max((rows - knots[i - 1]) / (knots[i] - knots[i - 1]), 0.0)
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


class CostCurve:
    """Seconds of a pass as a function of its rows: piecewise linear between `KNOTS`, never falling.

    The curve's shape (relative cost by rows) moves slowly, since a single noisy step must not bend it; its level moves
    quickly, since a busier machine slows every pass alike.
    """

    def __init__(self, measured: Mapping[int, float], shape_rate: float = 0.02, level_rate: float = 0.1) -> None:
        """Start from `measured` seconds by rows (at least one entry); the rest is filled in along straight lines."""
        rows = sorted(measured)
        shape = np.interp(KNOTS, rows, [measured[r] for r in rows])
        slope = max((measured[rows[-1]] - measured[rows[0]]) / max(rows[-1] - rows[0], 1), 0.0)
        for i, knot in enumerate(KNOTS):
            if knot > rows[-1]:
                shape[i] = measured[rows[-1]] + slope * (knot - rows[-1])
        self._shape: NDArray[np.float64] = shape
        self._shape_rate, self._level_rate = shape_rate, level_rate
        self.level = 1.0  # how slow passes are just now, against when they were measured
        self._rising: NDArray[np.float64] = np.maximum.accumulate(shape)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """By knot: [len(KNOTS)]."""
        return self._rising * self.level

    def at(self, rows: float) -> float:
        """Seconds of a pass of so many rows; 0 for none."""
        return float(seconds_at(float(rows), KNOT_ROWS, self.seconds))

    def observe(self, rows: int, seconds: float) -> None:
        """Pull the curve towards one measured pass; an outlier counts as `MOST_OUTLIER` estimates."""
        expected = self.at(rows)
        if expected <= 0.0 or seconds <= 0.0:
            return
        error = min(seconds / expected, MOST_OUTLIER) - 1.0
        self.level *= 1.0 + self._level_rate * error
        i, share = _segment(rows)
        self._shape[i - 1] *= 1.0 + self._shape_rate * (1.0 - share) * error
        self._shape[i] *= 1.0 + self._shape_rate * share * error
        self._rising = np.maximum.accumulate(self._shape)


def _segment(rows: float) -> tuple[int, float]:
    """Upper knot of the line that `rows` lies on, and the share of that line before it (more than 1 beyond the end)."""
    i = min(max(bisect_left(KNOTS, rows), 1), len(KNOTS) - 1)
    return i, max((rows - KNOTS[i - 1]) / (KNOTS[i] - KNOTS[i - 1]), 0.0)


class StepCosts:
    """Everything the policy knows about seconds."""

    def __init__(self, verify_seconds: Mapping[int, float], draft_seconds: Mapping[int, float]) -> None:
        """From seconds of a pass by its rows, of the target and of the drafter."""
        self.verify = CostCurve(verify_seconds)  # with drafts: unequal rows cost more
        self.plain = CostCurve(verify_seconds)  # of a pass without any
        self.draft = CostCurve(draft_seconds)
        self.search_seconds = 1e-4  # per request
        self.overhead_seconds = 2e-4  # of a step, whatever it drafts

    def observe_pass(self, rows: int, seconds: float, *, has_drafts: bool) -> None:
        """Correct the curve of such target passes, and the other one in part: it may not be seen for a while."""
        seen, other = (self.verify, self.plain) if has_drafts else (self.plain, self.verify)
        before = seen.level
        seen.observe(rows, seconds)
        other.level *= (seen.level / before) ** SHARED

    def observe_overheads(self, searches: int, search: float, overhead: float, rate: float = 0.05) -> None:
        """Learn what comes on top of the passes; an outlier, such as the first of all, counts as in `CostCurve`."""
        if searches:
            seconds = min(search / searches, MOST_OUTLIER * self.search_seconds)
            self.search_seconds += rate * (seconds - self.search_seconds)
        self.overhead_seconds += rate * (min(overhead, MOST_OUTLIER * self.overhead_seconds) - self.overhead_seconds)
