"""What is learned while serving of how drafts fare: acceptance by confidence, by request, and of passes to come."""

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import compiled

Floats = NDArray[np.float64]

PRIOR_STRENGTH = 8.0  # observations that a prior counts for: estimates start as means and become moving averages
PRIORS = (1.0, 0.9, 0.8, 0.6)  # of acceptance by class of temperatures, before anything was seen
TEMPERATURES = (0.0, 0.6, 0.9)  # upper edges of the classes; the last class is everything hotter


def temperature_class(temperature: float) -> int:
    """Estimates of acceptance are kept apart by this."""
    return bisect_left(TEMPERATURES, temperature)


class Calibration:
    """From a draft token's raw confidence to how often such tokens are accepted, learned from what was verified.

    Piecewise linear between knots; one table for each class of temperatures, since acceptance falls with it.
    """

    KNOTS = 21  # confidences 0, 0.05, ..., 1

    def __init__(self, prior_scale: float = 0.9, rate: float = 0.03) -> None:
        """prior_scale: acceptance over confidence before anything was verified, of greedy requests.

        rate: least weight of a draft token.
        """
        self._rates: Floats = np.outer(PRIORS, np.linspace(0.0, prior_scale, self.KNOTS))
        self._seen: Floats = np.full(self._rates.shape, PRIOR_STRENGTH)
        self._rate = rate

    def estimate(self, confidences: Floats, heat: int) -> Floats:
        """Acceptance of each token, given that all before it are accepted. heat: from `temperature_class`."""
        estimates = np.empty(len(confidences))
        _estimate(confidences, self._rates[heat], estimates)
        return estimates

    def accumulate(
        self, confidences: Floats, heat: int, factor: float, accepted: Floats, first: int = 0, survival: float = 1.0
    ) -> float:
        """Fill `accepted[first:]` with the expected accepted tokens of drafts of `first`, `first + 1`, ... tokens.

        accepted: [1 + longest]; beyond the draft's last token the value stays. factor: of the request, on each token's
        acceptance. survival: probability that all tokens before `first` are accepted. Returns it after the last token.
        """
        return float(_accumulate_accepted(confidences, self._rates[heat], factor, accepted, first, survival))

    def observe(self, confidences: Floats, num_accepted: int, heat: int) -> None:
        """Take in one verified draft: its first `num_accepted` tokens were right, the next one (if any) was not."""
        _observe_draft(confidences, num_accepted, self._rate, self._rates[heat], self._seen[heat])


@compiled
def _rate_at(confidence: float, rates: Floats) -> float:
    """On the lines between the knots."""
    place = min(max(confidence, 0.0), 1.0) * (len(rates) - 1)
    knot = min(int(place), len(rates) - 2)
    return float(rates[knot] + (place - knot) * (rates[knot + 1] - rates[knot]))


@compiled
def _estimate(confidences: Floats, rates: Floats, estimates: Floats) -> None:
    """`Calibration.estimate` in one class of temperatures."""
    for index in range(len(confidences)):
        estimates[index] = _rate_at(confidences[index], rates)


@compiled
def _observe_draft(confidences: Floats, num_accepted: int, least_rate: float, rates: Floats, seen: Floats) -> None:
    """`Calibration.observe` in one class of temperatures."""
    last = len(rates) - 1
    for position in range(min(num_accepted + 1, len(confidences))):
        place = confidences[position] * last
        lower = min(int(place), last - 1)
        share = place - lower
        for side in range(2):
            knot, weight = lower + side, share if side else 1.0 - share
            seen[knot] += weight
            rate = max(least_rate, 1.0 / seen[knot])
            rates[knot] += rate * weight * ((1.0 if position < num_accepted else 0.0) - rates[knot])


@compiled
def _accumulate_accepted(
    confidences: Floats, rates: Floats, factor: float, accepted: Floats, first: int, survival: float
) -> float:
    """`Calibration.accumulate`, compiled: it runs for every request in every step."""
    total = accepted[first] if first > 0 else 0.0
    accepted[first] = total
    for position in range(first, len(accepted) - 1):
        if position - first < len(confidences):
            survival *= min(_rate_at(confidences[position - first], rates) * factor, 0.99)
            total += survival
        accepted[position + 1] = total
    return survival


@dataclass(slots=True)
class Agreement:
    """How acceptance (of a request, of a kind of draft) compares with its estimates; shrunk towards 1, forgetting."""

    accepted: float = 0.0
    expected: float = 0.0
    memory: float = 0.93  # per step
    PRIOR = 6.0  # tokens

    @property
    def factor(self) -> float:
        return (self.accepted + self.PRIOR) / (self.expected + self.PRIOR)

    def observe(self, accepted: float, expected: float) -> None:
        self.accepted = self.memory * self.accepted + accepted
        self.expected = self.memory * self.expected + expected

    def forget(self) -> None:
        """A step without a draft: drift back to the prior, so that a request can come back from no drafts."""
        self.accepted *= self.memory
        self.expected *= self.memory


class DiffusionForecast:
    """What a diffusion pass would add to the free draft, known before paying for it.

    The mean of what past passes added, by draft length, kept apart by the request's temperature and by how much the
    free draft promised at that step: where the text is being copied, a pass adds nothing.
    """

    PROMISES = (0.4, 0.9, 1.8, 4.0)  # expected accepted tokens of the free draft, upper edges

    def __init__(self, longest: int, prior: float = 0.6, rate: float = 0.04) -> None:
        """longest: tokens of a draft. prior: acceptance of each token of a path, given that all before it are accepted.

        Before anything is known, a path is taken to be of that kind, and the free draft to be what it promises.
        """
        shape = (len(TEMPERATURES) + 1, len(self.PROMISES) + 1)
        accepted = np.concatenate([[0.0], np.cumsum(prior ** np.arange(1, longest + 1))])
        promised = np.array([0.0, *self.PROMISES])[:, None]
        self._gains: Floats = np.tile(np.maximum(accepted - promised, 0.0), (shape[0], 1, 1))  # [..., 1 + longest]
        self._most: list[list[float]] = self._gains.max(-1).tolist()
        self._seen = np.full(shape, PRIOR_STRENGTH)
        self._rate = rate
        self._kept = [[Agreement(memory=0.98) for _ in range(shape[1])] for _ in range(shape[0])]

    def is_worth(self, where: tuple[int, int], factor: float, least: float) -> bool:
        """Whether any draft gains at least `least` tokens, in the light of a request's `factor`."""
        heat, promise = where
        return factor * self._kept[heat][promise].factor * self._most[heat][promise] >= least

    def classes(self, heat: int, promise: float) -> tuple[int, int]:
        """heat: from `temperature_class`. promise: expected accepted tokens of the free draft."""
        return heat, bisect_left(self.PROMISES, promise)

    def gains(self, where: tuple[int, int]) -> Floats:
        """`[1 + longest]` more expected accepted tokens than the free draft's, by the draft's length."""
        gains: Floats = self._gains[where] * self._kept[where[0]][where[1]].factor
        return gains

    def verify(self, where: tuple[int, int], gained: float, expected: float) -> None:
        """Take in what a draft has really gained: what is expected of the better of two drafts is too much."""
        self._kept[where[0]][where[1]].observe(gained, expected)

    def observe(self, where: tuple[int, int], gains: Floats, cap: int) -> None:
        """Take in what a pass has added, by length, before the draft was cut to the length worth it.

        cap: most tokens it might have had; nothing is said of those beyond.
        """
        self._seen[where] += 1.0
        stored = self._gains[where][: cap + 1]
        stored += max(self._rate, 1.0 / self._seen[where]) * (gains[: cap + 1] - stored)
        self._most[where[0]][where[1]] = float(stored.max())


@dataclass(slots=True)
class RequestAgreement:
    """How well each source of drafts has done for one request, and how its diffusion passes compare with the forecast.

    The last is apart because confidences tell of it: where a text has become easy, drafts are surer and longer than the
    forecast says, and as right as they say themselves.
    """

    copy: Agreement = field(default_factory=Agreement)
    diffusion: Agreement = field(default_factory=Agreement)
    forecast: Agreement = field(default_factory=Agreement)
