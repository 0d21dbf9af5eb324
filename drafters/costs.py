"""What a pass costs, by its rows: measured at start-up, corrected by every step while serving."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import compiled

Floats = NDArray[np.float64]

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MAX_OUTLIER = 2.0  # a process that was descheduled counts as so many times the estimate, whatever it took
SHARED_BY_PLAIN = 0.5  # of a change of level: what slows plain passes (a busier machine) slows drafts' rows, too
SHARED_BY_DRAFTED = 0.1  # but drafts' rows may cost more by themselves: plain passes must not look dearer for it
MAX_STRETCH = 4.0  # times the level of plain passes, either way: where rows cost nothing, nothing else would bound it
MAX_EXTRA = 2.0  # plain passes
EXTRA_RATE = 0.1
GUESSED_ROW_SHARE = 0.05  # of a pass of one row, for each further one, until more is known
KNOT_ROWS = np.asarray(KNOTS, dtype=np.float64)


def seconds_on_lines(rows: float, knots: Floats | Sequence[int], seconds: Floats | Sequence[float]) -> float:
    """Seconds of a pass of so many rows, on the straight lines between the knots; 0 for none."""
    if rows <= 0.0:
        return 0.0
    i = 1
    while i < len(knots) - 1 and knots[i] < rows:
        i += 1
    share = max((rows - knots[i - 1]) / (knots[i] - knots[i - 1]), 0.0)
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


seconds_at = compiled(seconds_on_lines)


class CostCurve:
    """Seconds of a pass as a function of its rows: piecewise linear between `KNOTS`, never falling.

    The curve's shape (relative cost by rows) moves slowly, since a single noisy step must not bend it; its level moves
    quickly, since a busier machine slows every pass alike.
    """

    def __init__(self, measured: Mapping[int, float], shape_rate: float = 0.02, level_rate: float = 0.1) -> None:
        """Start from `measured` seconds by rows (at least one entry); the rest is filled in along straight lines."""
        rows = sorted(measured)
        shape: list[float] = np.interp(KNOTS, rows, [measured[r] for r in rows]).tolist()
        slope = max((measured[rows[-1]] - measured[rows[0]]) / max(rows[-1] - rows[0], 1), 0.0)
        if len(rows) == 1:  # there was no time for more: rows must not look free
            slope = GUESSED_ROW_SHARE * measured[rows[0]]
        for i, knot in enumerate(KNOTS):
            if knot > rows[-1]:
                shape[i] = measured[rows[-1]] + slope * (knot - rows[-1])
        self._shape = shape
        self._shape_rate, self._level_rate = shape_rate, level_rate
        self.level = 1.0  # how slow passes are just now, against when they were measured
        self._rising = list(accumulate(shape, max))

    @property
    def seconds(self) -> NDArray[np.float64]:
        """By knot: [len(KNOTS)]."""
        return np.array(self._rising) * self.level

    def at(self, rows: float) -> float:
        """Seconds of a pass of so many rows; 0 for none."""
        return self.level * seconds_on_lines(rows, KNOTS, self._rising)

    def observe(self, rows: int, seconds: float, expected: float | None = None) -> float:
        """Pull the curve towards one measured pass; an outlier counts as `MAX_OUTLIER` estimates.

        expected: what it was estimated to take, where that is not the curve alone. Returns how far off that was, as a
        share of it.
        """
        expected = self.at(rows) if expected is None else expected
        if expected <= 0.0 or seconds <= 0.0:
            return 0.0
        error = min(seconds / expected, MAX_OUTLIER) - 1.0
        self.level *= 1.0 + self._level_rate * error
        i, share = _segment(rows)
        self._shape[i - 1] *= 1.0 + self._shape_rate * (1.0 - share) * error
        self._shape[i] *= 1.0 + self._shape_rate * share * error
        self._rising = list(accumulate(self._shape, max))
        return error


def _segment(rows: float) -> tuple[int, float]:
    """Upper knot of the line that `rows` lies on, and the share of that line before it (more than 1 beyond the end)."""
    i = min(max(bisect_left(KNOTS, rows), 1), len(KNOTS) - 1)
    return i, max((rows - KNOTS[i - 1]) / (KNOTS[i] - KNOTS[i - 1]), 0.0)


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """What one step of one batch costs, by what is drafted in it. Seconds; `verify` and `draft` by knot."""

    base_rows: int  # of the verification pass without drafts
    plain_seconds: float  # of that pass
    verify: Floats  # of the pass with drafts
    draft: Floats
    search_seconds: float  # per request
    overhead_seconds: float

    def verify_at(self, rows: float) -> float:
        """Of a pass of so many rows, drafts among them."""
        return float(seconds_at(float(rows), KNOT_ROWS, self.verify))

    def draft_at(self, rows: float) -> float:
        """Of a diffusion pass of so many rows."""
        return float(seconds_at(float(rows), KNOT_ROWS, self.draft))


class StepCosts:
    """Everything the policy knows about seconds.

    A row more costs less than a request more, which has a context to be read. So a pass with drafts is taken to cost
    what a plain one of the same requests does, on top of it what the rows make out in a pass of few requests, and what
    drafts cost by themselves: rows of unequal numbers, draws.
    """

    def __init__(
        self,
        verify_seconds: Mapping[int, float],
        draft_seconds: Mapping[int, float],
        plain_seconds: Mapping[int, float] | None = None,
    ) -> None:
        """From seconds of a pass by its rows, of the target with few requests, and of the drafter.

        plain_seconds: of the target's passes without drafts, by requests; None: as by rows.
        """
        self.verify = CostCurve(verify_seconds)
        self.plain = CostCurve(plain_seconds or verify_seconds)
        self.draft = CostCurve(draft_seconds)
        self.extra_share = 0.0  # of a plain pass: what one with any drafts takes longer, however few they are
        self.search_seconds = 1e-4  # per request
        self.overhead_seconds = 2e-4  # of a step, whatever it drafts

    def of_batch(self, num_requests: int, num_prefill_rows: int = 0) -> BatchCosts:
        """What a step costs with so many requests that have a row each, and prompt rows beside them."""
        rows = num_requests + num_prefill_rows
        verify = self._with_drafts(num_requests)
        plain = float(seconds_at(float(rows), KNOT_ROWS, verify)) if num_prefill_rows else self.plain.at(rows)
        return BatchCosts(rows, plain, verify, self.draft.seconds, self.search_seconds, self.overhead_seconds)

    def observe_plain(self, num_requests: int, seconds: float) -> None:
        """Correct the curve of plain passes, and the other one in part: it may not be seen for a while."""
        before = self.plain.level
        self.plain.observe(num_requests, seconds)
        self.verify.level *= (self.plain.level / before) ** SHARED_BY_PLAIN

    def observe_drafted(self, rows: int, num_requests: int, seconds: float) -> None:
        """The same after a pass with drafts, mostly put down to these. rows: of drafts and requests together."""
        expected = self.drafted_seconds(rows, num_requests)
        before = self.verify.level
        error = self.verify.observe(rows, seconds, expected)
        self.extra_share = min(max(self.extra_share + EXTRA_RATE * error, 0.0), MAX_EXTRA)
        self.plain.level *= (self.verify.level / before) ** SHARED_BY_DRAFTED
        lowest, highest = self.plain.level / MAX_STRETCH, self.plain.level * MAX_STRETCH
        self.verify.level = min(max(self.verify.level, lowest), highest)

    def drafted_seconds(self, rows: float, num_requests: int) -> float:
        """Of a pass of so many requests with drafts, `rows` in all."""
        return max(self._beside_rows(num_requests) + self.verify.at(rows), 1e-9)

    def _with_drafts(self, num_requests: int) -> Floats:
        """`[KNOTS]` seconds of a pass of so many requests with drafts."""
        return np.maximum(self._beside_rows(num_requests) + self.verify.seconds, 1e-9)

    def _beside_rows(self, num_requests: int) -> float:
        """What a pass of so many requests with drafts takes longer than its rows do in a pass of few requests."""
        return self.plain.at(num_requests) * (1.0 + self.extra_share) - self.verify.at(num_requests)

    def observe_overheads(self, searches: int, search: float, overhead: float, rate: float = 0.05) -> None:
        """Learn what comes on top of the passes; an outlier, such as the first of all, counts as in `CostCurve`."""
        if searches:
            seconds = min(search / searches, MAX_OUTLIER * self.search_seconds)
            self.search_seconds += rate * (seconds - self.search_seconds)
        self.overhead_seconds += rate * (min(overhead, MAX_OUTLIER * self.overhead_seconds) - self.overhead_seconds)
