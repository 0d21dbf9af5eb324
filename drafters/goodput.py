"""The default length policy: draft what is worth its cost, which may be nothing.

Every step it maximises expected committed tokens per second over the whole batch,

    sum over requests of (1 + expected accepted)  /  (verification + diffusion pass + search + overhead) seconds,

from two things that are measured while serving: how often a draft token of a given confidence is accepted, and what
a pass of so many rows costs (`drafters.costs`). The decision has two parts. `choose_sources` runs BEFORE drafting and
says which requests are worth a diffusion pass; `choose_lengths` runs after it, when the drafts and their confidences
are known, and says how much of each is worth verifying. A useless drafter or a full batch ends at no draft at all.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drafters.costs import KNOTS, CostCurve
from transformer.compiled import compiled

Floats = NDArray[np.float64]

_KNOT_ROWS = np.asarray(KNOTS, dtype=np.float64)
PRIOR_STRENGTH = 8.0  # observations that a prior counts for: estimates start as means and become moving averages
HYSTERESIS = 0.02  # a draft must promise this much more than none: the estimates are noisy, plain decoding is not
MAX_SWEEPS = 3


@compiled
def _seconds(rows: float, knots: Floats, seconds: Floats) -> float:
    """`CostCurve.at`, for the loops below."""
    if rows <= 0.0:
        return 0.0
    i = 1
    while i < len(knots) - 1 and knots[i] < rows:
        i += 1
    share = max((rows - knots[i - 1]) / (knots[i] - knots[i - 1]), 0.0)
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


@compiled
def _best_lengths(
    accepted: Floats,
    caps: NDArray[np.int64],
    base_rows: float,
    base_seconds: float,
    knots: Floats,
    verify: Floats,
    margin: float,
) -> tuple[NDArray[np.int64], float, float]:
    """Lengths that maximise tokens per second: coordinate ascent over requests, Dinkelbach's method for the ratio.

    accepted: [requests, 1 + longest] expected accepted tokens by length; 0 at length 0.
    Returns the lengths, the expected tokens and the seconds of the step.
    """
    count = accepted.shape[0]
    lengths = np.zeros(count, dtype=np.int64)
    rows = base_rows
    tokens = float(count)
    total = base_seconds + _seconds(rows, knots, verify)
    rate = tokens / total
    for _ in range(MAX_SWEEPS):
        changed = False
        for i in range(count):
            others = rows - lengths[i]
            floor = _seconds(others, knots, verify)
            best, best_value = 0, 0.0
            for length in range(1, caps[i] + 1):
                cost = _seconds(others + length, knots, verify) - floor
                value = accepted[i, length] - rate * cost * (1.0 + margin) - margin
                if value > best_value:
                    best, best_value = length, value
            if best != lengths[i]:
                tokens += accepted[i, best] - accepted[i, lengths[i]]
                rows = others + best
                lengths[i] = best
                changed = True
        total = base_seconds + _seconds(rows, knots, verify)
        rate = tokens / total
        if not changed:
            break
    return lengths, tokens, total


@compiled
def _best_sources(
    copied: Floats,
    diffused: Floats,
    caps: NDArray[np.int64],
    draft_rows: Floats,
    base_rows: float,
    overhead: float,
    search_seconds: float,
    knots: Floats,
    verify: Floats,
    draft: Floats,
    margin: float,
) -> NDArray[np.bool_]:
    """Which requests should have a diffusion pass: start with all, drop those that gain least, keep the best rate.

    copied, diffused: [requests, 1 + longest] expected accepted tokens by length, without and with a diffusion pass.
    draft_rows: [requests] rows that each adds to the pass.
    """
    count = copied.shape[0]
    _, tokens, total = _best_lengths(copied, caps, base_rows, overhead, knots, verify, margin)
    best_rate = tokens / total * (1.0 + margin)
    chosen = np.zeros(count, dtype=np.bool_)
    gains = np.empty(count)
    for i in range(count):
        gains[i] = (diffused[i, : caps[i] + 1].max() - copied[i, : caps[i] + 1].max()) / (1.0 + draft_rows[i])
    order = np.argsort(-gains)
    size = count
    mixed = copied.copy()
    while size > 0:
        mixed[:] = copied
        pass_rows = 0.0
        for at in range(size):
            i = order[at]
            mixed[i] = diffused[i]
            pass_rows += draft_rows[i]
        seconds = overhead + _seconds(pass_rows, knots, draft) + search_seconds * size
        _, tokens, total = _best_lengths(mixed, caps, base_rows, seconds, knots, verify, margin)
        if tokens / total > best_rate:
            best_rate = tokens / total
            chosen[:] = False
            for at in range(size):
                chosen[order[at]] = True
        size //= 2
    return chosen


@dataclass(slots=True)
class StepCosts:
    """Everything the policy knows about seconds."""

    verify: CostCurve  # of a pass with drafts: requests of unequal rows, which costs more than their number says
    plain: CostCurve  # of a pass without any
    draft: CostCurve
    search_seconds: float = 1e-4  # per request
    overhead_seconds: float = 2e-4  # of a step, whatever it drafts

    def observe_overheads(self, searches: int, search: float, overhead: float, rate: float = 0.05) -> None:
        if searches:
            self.search_seconds += rate * (search / searches - self.search_seconds)
        self.overhead_seconds += rate * (overhead - self.overhead_seconds)


class Calibration:
    """From a draft token's raw confidence to how often such tokens are accepted, learned from what was verified.

    Piecewise linear between knots; one table for each class of temperatures, since acceptance falls with it.
    """

    KNOTS = 21  # confidences 0, 0.05, ..., 1

    def __init__(self, prior_scale: float = 0.9, rate: float = 0.03) -> None:
        """prior_scale: acceptance over confidence before anything was verified. rate: least weight of a draft token."""
        self._confidences: Floats = np.linspace(0.0, 1.0, self.KNOTS)
        self._rates: Floats = np.tile(self._confidences * prior_scale, (len(TEMPERATURES) + 1, 1))
        self._seen: Floats = np.full(self._rates.shape, PRIOR_STRENGTH)
        self._rate = rate

    def estimate(self, confidences: NDArray[np.floating], heat: int) -> Floats:
        """Acceptance of each token, given that all before it are accepted. heat: from `temperature_class`."""
        return np.asarray(np.interp(confidences, self._confidences, self._rates[heat]))

    def accepted_by_length(self, confidences: Floats, heat: int, factor: float, accepted: Floats) -> None:
        """Fill `accepted` `[1 + longest]` with the expected accepted tokens of a draft of 0, 1, ... tokens.

        factor: of the request, on each token's acceptance. Beyond the draft's last token the value stays.
        """
        _accumulate_accepted(confidences, self._rates[heat], factor, accepted)

    def observe(self, confidences: NDArray[np.floating], num_accepted: int, heat: int) -> None:
        """Take in one verified draft: its first `num_accepted` tokens were right, the next one (if any) was not."""
        rates, seen = self._rates[heat], self._seen[heat]
        for position, confidence in enumerate(confidences[: num_accepted + 1].tolist()):
            place = confidence * (self.KNOTS - 1)
            i = min(int(place), self.KNOTS - 2)
            share = place - i
            for knot, weight in ((i, 1.0 - share), (i + 1, share)):
                seen[knot] += weight
                rate = max(self._rate, 1.0 / seen[knot])
                rates[knot] += rate * weight * (float(position < num_accepted) - rates[knot])


@dataclass(slots=True)
class Agreement:
    """How one request's acceptance compares with the service's estimates, shrunk towards 1 and forgetting."""

    accepted: float = 0.0
    expected: float = 0.0
    PRIOR = 6.0  # tokens
    MEMORY = 0.93  # per step

    @property
    def factor(self) -> float:
        return (self.accepted + self.PRIOR) / (self.expected + self.PRIOR)

    def observe(self, accepted: float, expected: float) -> None:
        self.accepted = self.MEMORY * self.accepted + accepted
        self.expected = self.MEMORY * self.expected + expected

    def forget(self) -> None:
        """A step without a draft: drift back to the prior, so that a request can come back from no drafts."""
        self.accepted *= self.MEMORY
        self.expected *= self.MEMORY


@compiled
def _accumulate_accepted(confidences: Floats, rates: Floats, factor: float, accepted: Floats) -> None:
    """`Calibration.accepted_by_length`, compiled: it runs for every request in every step."""
    survival, total = 1.0, 0.0
    accepted[0] = 0.0
    last = len(rates) - 1
    for position in range(len(accepted) - 1):
        if position < len(confidences):
            place = min(max(confidences[position], 0.0), 1.0) * last
            knot = min(int(place), last - 1)
            rate = rates[knot] + (place - knot) * (rates[knot + 1] - rates[knot])
            survival *= min(rate * factor, 0.99)
            total += survival
        accepted[position + 1] = total


def expected_accepted(rates: Floats) -> Floats:
    """`[..., 1 + longest]` expected accepted tokens by draft length, from `[..., longest]` conditional acceptance."""
    survival = np.cumprod(rates, axis=-1)
    expected = np.zeros((*rates.shape[:-1], rates.shape[-1] + 1))
    np.cumsum(survival, axis=-1, out=expected[..., 1:])
    return expected


def choose_sources(
    copied: Floats, diffused: Floats, caps: NDArray[np.int64], draft_rows: Floats, base_rows: int, costs: StepCosts
) -> NDArray[np.bool_]:
    """Before drafting: which requests of the batch are worth a diffusion pass (shapes as in `_best_sources`)."""
    chosen: NDArray[np.bool_] = _best_sources(
        copied,
        diffused,
        caps,
        draft_rows,
        float(base_rows),
        costs.overhead_seconds,
        costs.search_seconds,
        _KNOT_ROWS,
        costs.verify.seconds,
        costs.draft.seconds,
        HYSTERESIS,
    )
    return chosen


def choose_lengths(
    accepted: Floats, caps: NDArray[np.int64], base_rows: int, spent_seconds: float, costs: StepCosts
) -> NDArray[np.int64]:
    """After drafting: how many tokens of each draft to verify, with `spent_seconds` on drafting already paid."""
    lengths: NDArray[np.int64]
    lengths, tokens, seconds = _best_lengths(
        accepted,
        caps,
        float(base_rows),
        costs.overhead_seconds + spent_seconds,
        _KNOT_ROWS,
        costs.verify.seconds,
        HYSTERESIS,
    )
    without_drafts = len(lengths) / (costs.overhead_seconds + spent_seconds + costs.plain.at(base_rows))
    if tokens / seconds < without_drafts * (1.0 + HYSTERESIS):
        lengths[:] = 0
    return lengths


TEMPERATURES = (0.0, 0.6, 0.9)  # upper edges of the classes; the last class is everything hotter


def temperature_class(temperature: float) -> int:
    """Estimates of acceptance are kept apart by this."""
    return bisect_left(TEMPERATURES, temperature)


class DiffusionForecast:
    """What a diffusion pass would bring, known before paying for it.

    Mean acceptance by position of past diffusion drafts, kept apart by the request's temperature and by how much the
    free draft promised at that step: where the text is being copied, the pass adds nothing.
    """

    PROMISES = (0.4, 0.9, 1.8, 4.0)  # expected accepted tokens of the free draft, upper edges

    def __init__(self, longest: int, prior: float = 0.6, rate: float = 0.04) -> None:
        self._rates: Floats = np.full((len(TEMPERATURES) + 1, len(self.PROMISES) + 1, longest), prior)
        self._since_probe = np.zeros(self._rates.shape[:2], dtype=np.int64)
        self._probe_interval = np.full(self._rates.shape[:2], FIRST_PROBE_INTERVAL, dtype=np.int64)
        self._seen = np.full(self._rates.shape[:2], PRIOR_STRENGTH)
        self._rate = rate

    def classes(self, heat: int, promise: float) -> tuple[int, int]:
        """heat: from `temperature_class`. promise: expected accepted tokens of the free draft."""
        return heat, bisect_left(self.PROMISES, promise)

    def rates(self, where: tuple[int, int]) -> Floats:
        """`[longest]` acceptance of each position, given that all before it are accepted."""
        return np.asarray(self._rates[where])

    def observe(self, where: tuple[int, int], rates: Floats) -> None:
        """Take in the calibrated confidences of a drafted path, before it was cut to the length worth verifying."""
        size = min(len(rates), self._rates.shape[-1])
        stored = self._rates[where]
        self._seen[where] += 1.0
        stored[:size] += max(self._rate, 1.0 / self._seen[where]) * (rates[:size] - stored[:size])

    def is_probe_due(self, where: tuple[int, int], chosen: bool) -> bool:
        """Whether a pass should be tried although it was not chosen; tried ever more rarely while it stays unchosen."""
        if chosen:
            self._since_probe[where] = 0
            self._probe_interval[where] = FIRST_PROBE_INTERVAL
            return False
        self._since_probe[where] += 1
        if self._since_probe[where] < self._probe_interval[where]:
            return False
        self._since_probe[where] = 0
        self._probe_interval[where] = min(2 * self._probe_interval[where], LAST_PROBE_INTERVAL)
        return True


FIRST_PROBE_INTERVAL = 32  # steps of requests of one class
LAST_PROBE_INTERVAL = 2048


@dataclass(slots=True)
class GoodputState:
    """What the policy remembers of one request."""

    copy: Agreement = field(default_factory=Agreement)
    diffusion: Agreement = field(default_factory=Agreement)
