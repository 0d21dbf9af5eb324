"""What a pass costs, by its rows: measured at start-up, corrected by every step while serving."""

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


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
        self._level = 1.0
        self.seconds: NDArray[np.float64] = np.maximum.accumulate(shape)  # [len(KNOTS)]

    def at(self, rows: float) -> float:
        """Seconds of a pass of so many rows; 0 for none."""
        if rows <= 0:
            return 0.0
        i, share = _segment(rows)
        return float(self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1]))

    def observe(self, rows: int, seconds: float) -> None:
        """Pull the curve towards one measured pass; an outlier (a descheduled process) counts as twice the estimate."""
        expected = self.at(rows)
        if expected <= 0.0 or seconds <= 0.0:
            return
        error = min(seconds / expected, 2.0) - 1.0
        self._level *= 1.0 + self._level_rate * error
        i, share = _segment(rows)
        self._shape[i - 1] *= 1.0 + self._shape_rate * (1.0 - share) * error
        self._shape[i] *= 1.0 + self._shape_rate * share * error
        self.seconds = np.maximum.accumulate(self._shape * self._level)


def _segment(rows: float) -> tuple[int, float]:
    """Upper knot of the line that `rows` lies on, and the share of that line before it (more than 1 beyond the end)."""
    i = min(max(bisect_left(KNOTS, rows), 1), len(KNOTS) - 1)
    return i, max((rows - KNOTS[i - 1]) / (KNOTS[i] - KNOTS[i - 1]), 0.0)
