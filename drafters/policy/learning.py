"""Moving means that begin with a prior, and one rule against estimates that go stale."""

from collections import defaultdict
from collections.abc import Hashable

PRIOR_WEIGHT = 8.0  # observations that a prior counts for. Doubled: slower to learn at first; halved: jumpier
RATE = 0.04  # weight of an observation in a moving mean. Doubled: follows a change sooner, and noise more
STALE_STEPS = (
    4  # steps that one step counts for, if its kind was not seen for so long. Doubled: one slow step hurts more
)
MAX_OUTLIER = 2.0  # predictions that a slow step counts for at most. Doubled: one descheduled step hurts more
EXPLORE_SHARE = 0.002  # of all time, for each kind of action that isn't observed. Doubled: fresher, costs twice as much


def moved(mean: float, observed: float, rate: float = RATE) -> float:
    """Return a moving mean of seconds after one more observation, which counts as `MAX_OUTLIER` means at most."""
    return mean + rate * (min(max(observed, 0.0), MAX_OUTLIER * mean) - mean)


class Exploring:
    """The one rule against staleness: time is saved up for a kind of action while nobody takes it, then it is tried.

    Estimates of actions that look bad could never rise again otherwise. Each kind may spend a small share of all time.
    """

    def __init__(self) -> None:
        self._saved: defaultdict[Hashable, float] = defaultdict(float)  # seconds, by kind

    def pass_time(self, seconds: float) -> None:
        for kind in self._saved:
            self._saved[kind] += EXPLORE_SHARE * seconds

    def saw(self, kind: Hashable) -> None:
        """Note that somebody took such an action: nothing need be saved for it."""
        self._saved[kind] = 0.0

    def has_saved(self, kind: Hashable) -> bool:
        """Return whether any time is saved for the kind: else its price need not be known."""
        return self._saved[kind] > 0.0

    def is_due(self, kind: Hashable, price: float) -> bool:
        """Return whether enough is saved to try an action that costs `price` seconds more than the best; spend it."""
        if self._saved[kind] <= price:
            return False
        self._saved[kind] = 0.0
        return True
