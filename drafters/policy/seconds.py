"""Seconds of a step: measured at start-up by rows and requests, corrected by every step while serving."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from drafters.base import StepRecord
from drafters.policy.learning import RATE, STALE_STEPS, moved

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StepKind = Literal["plain", "drafted", "pass"]

FIRST_GUESS = {1: 3e-3, 64: 2e-2}  # seconds by rows until they are measured; where one size was, the guess is scaled
MAX_ROWS = 1 << 14  # of a pass; a larger one is taken to cost as much


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

    def plain(self, num_requests: int, num_rows: int) -> float:
        """Return the seconds of a verification pass without drafts. num_rows: its prompt rows included."""
        return self._verified(num_requests, num_rows) * self._ratio["plain"]

    def drafted(self, num_requests: int, num_rows: int, max_drafted: int) -> Floats:
        """Return `[1 + max_drafted]` seconds of verification passes with 0, 1, ... draft tokens beside `num_rows`."""
        rows = np.minimum(np.arange(num_rows, num_rows + max_drafted + 1), MAX_ROWS)
        seconds: Floats = (self._by_rows[rows] + self._verified(num_requests, 0)) * self._ratio["drafted"]
        return seconds

    def diffusion(self, rows: Ints) -> Floats:
        """Return the seconds of diffusion passes of so many `rows`; 0 for none."""
        seconds: Floats = self._passes[np.minimum(rows, MAX_ROWS)] * self._ratio["pass"]
        return seconds

    def row(self, num_requests: int, num_rows: int) -> float:
        """Return the seconds of one more row in a drafted pass: the mean over the next eight."""
        first = min(num_rows, MAX_ROWS - 8)
        return float(self._by_rows[first + 8] - self._by_rows[first]) / 8 * self._ratio["drafted"]

    def observe(self, step: StepRecord) -> None:
        """Learn from a step. Prompt rows need no logits and long attention, so steps with some teach nothing here."""
        num_requests, drafting = len(step.outcomes), step.drafting
        if num_requests and not step.num_prefill_rows:
            kind: StepKind = "drafted" if any(outcome.draft.tokens for outcome in step.outcomes) else "plain"
            self._correct(kind, step.verify_seconds, self._verified(num_requests, step.num_rows))
        if drafting.num_diffusion_rows:
            predicted = float(self._passes[min(drafting.num_diffusion_rows, MAX_ROWS)])
            self._correct("pass", drafting.pass_seconds, predicted)
        if drafting.num_searches:
            self.search = moved(self.search, drafting.search_seconds / drafting.num_searches)
        self.overhead = moved(self.overhead, drafting.draft_seconds - drafting.pass_seconds + step.commit_seconds)
        for each in self._age:
            self._age[each] += 1

    def _verified(self, num_requests: int, num_rows: int) -> float:
        """Return the seconds of a verification pass by the start-up curves alone."""
        requests, rows = min(num_requests, MAX_ROWS), min(num_rows, MAX_ROWS)
        return float(self._by_requests[requests] + self._by_rows[rows] - self._by_rows[requests])

    def _correct(self, kind: StepKind, seconds: float, predicted: float) -> None:
        """Pull a kind's ratio towards one step; the longer none was seen, the more."""
        if seconds > 0.0:
            rate = RATE * min(max(self._age[kind], 1), STALE_STEPS)
            self._ratio[kind] = moved(self._ratio[kind], seconds / predicted, rate)
            self._age[kind] = 0


def _curve(measured: Mapping[int, float]) -> Floats:
    """Return `[MAX_ROWS + 1]` seconds by rows: lines between the measured sizes, never falling; 0 for none."""
    if len(measured) == 1:
        ((size, known),) = measured.items()
        guess: Floats = _curve(FIRST_GUESS)
        return guess * float(known / guess[size])
    sizes = sorted(measured)
    seconds = np.maximum.accumulate([max(measured[size], 1e-9) for size in sizes])
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    beyond = seconds[-1] + slope * (MAX_ROWS - sizes[-1])
    curve: Floats = np.interp(np.arange(MAX_ROWS + 1), [*sizes, MAX_ROWS], [*seconds, beyond])
    curve[0] = 0.0
    return curve
