"""What a step costs: measured at start-up by rows and requests, corrected by every step while serving."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from drafters.base import StepRecord
from drafters.policy.learning import PRIOR_WEIGHT, RATE, moved

Floats = NDArray[np.float64]
StepKind = Literal["plain", "drafted", "pass"]

GUESSED_ROW_SHARE = 0.05  # of one row's pass, for each further row, where only one size was measured
BEYOND = 1 << 20  # rows: the curve goes on to here as its last line does


class StepSeconds:
    """Predicts a step's seconds: the start-up curve times a moving ratio of observed to predicted, one for each kind.

    `plain`: verification passes without drafts. `drafted`: those with drafts. `pass`: passes of the diffusion model. A
    further request costs more than a further row, since it brings a context to read. So a pass is taken to cost what
    its requests do without drafts, and what its further rows add in a pass of few requests.
    """

    def __init__(
        self,
        verify: Mapping[int, float],
        passes: Mapping[int, float],
        plain: Mapping[int, float] | None = None,
    ) -> None:
        """Start from seconds by rows, of the target with few requests and of the drafter.

        plain: the target's seconds without drafts, by requests; None: as by rows.
        """
        self._by_rows, self._by_requests, self._passes = _curve(verify), _curve(plain or verify), _curve(passes)
        self._ratio: dict[StepKind, float] = {"plain": 1.0, "drafted": 1.0, "pass": 1.0}
        self._age: dict[StepKind, int] = {"plain": 0, "drafted": 0, "pass": 0}  # steps since one of the kind
        self.search = 1e-4  # of lattice and path search, per request
        self.overhead = 2e-4  # of a step beside its passes: free drafts, the policy, the commit

    def plain(self, num_requests: int, num_rows: int | None = None) -> float:
        """Return the seconds of a verification pass without drafts. num_rows: its prompt rows included."""
        rows = np.array([num_rows or num_requests], np.float64)
        return float(self._verify(num_requests, rows)[0]) * self._ratio["plain"]

    def drafted(self, num_requests: int, rows: Floats) -> Floats:
        """Return the seconds of verification passes of so many `rows` in all, drafts among them."""
        return self._verify(num_requests, rows) * self._ratio["drafted"]

    def diffusion(self, rows: Floats) -> Floats:
        """Return the seconds of diffusion passes of so many `rows`; 0 for none."""
        seconds: Floats = np.interp(rows, *self._passes) * self._ratio["pass"]
        return np.where(rows > 0, seconds, 0.0)

    def row(self, num_requests: int) -> float:
        """Return the seconds that one more row costs in a drafted pass of so many requests."""
        few, more = self._verify(num_requests, np.array([num_requests, num_requests + 8.0]))
        return float(more - few) / 8 * self._ratio["drafted"]

    def observe(self, step: StepRecord) -> None:
        """Learn from a step. Prompt rows need no logits and long attention, so steps with some teach nothing here."""
        num_requests, drafting = len(step.outcomes), step.drafting
        if num_requests and not step.num_prefill_rows:
            kind: StepKind = "drafted" if any(outcome.draft.tokens for outcome in step.outcomes) else "plain"
            rows = np.array([step.num_rows], np.float64)
            self._correct(kind, step.verify_seconds, float(self._verify(num_requests, rows)[0]))
        if drafting.num_diffusion_rows:
            predicted = float(np.interp(drafting.num_diffusion_rows, *self._passes))
            self._correct("pass", drafting.pass_seconds, predicted)
        if drafting.num_searches:
            self.search = moved(self.search, drafting.search_seconds / drafting.num_searches)
        self.overhead = moved(self.overhead, drafting.draft_seconds - drafting.pass_seconds + step.commit_seconds)
        for each in self._age:
            self._age[each] += 1

    def _verify(self, num_requests: int, rows: Floats) -> Floats:
        at = np.append(rows, num_requests)
        by_rows = np.interp(at, *self._by_rows)
        seconds: Floats = float(np.interp(num_requests, *self._by_requests)) + by_rows[:-1] - by_rows[-1]
        return np.maximum(seconds, 1e-9)

    def _correct(self, kind: StepKind, seconds: float, predicted: float) -> None:
        """Pull a kind's ratio towards one step; the longer none was seen, the more."""
        if seconds <= 0.0 or predicted <= 0.0:
            return
        rate = RATE * min(max(self._age[kind], 1), PRIOR_WEIGHT)
        self._ratio[kind] = moved(self._ratio[kind], seconds / predicted, rate)
        self._age[kind] = 0


def _curve(measured: Mapping[int, float]) -> tuple[Floats, Floats]:
    """Return rows and seconds, never falling, that go on beyond the largest measured size."""
    rows = sorted(measured)
    seconds = np.maximum.accumulate([measured[size] for size in rows])
    slope = GUESSED_ROW_SHARE * seconds[0]
    if len(rows) > 1:
        slope = (seconds[-1] - seconds[0]) / (rows[-1] - rows[0])
    return np.array([*rows, BEYOND], np.float64), np.append(seconds, seconds[-1] + slope * (BEYOND - rows[-1]))
