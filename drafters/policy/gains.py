"""Accepted tokens that a diffusion pass adds to the free draft, as they turned out."""

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from drafters.base import Outcome, num_common
from drafters.policy.acceptance import NUM_CLASSES
from drafters.policy.learning import PRIOR_WEIGHT, RATE

PROMISES = (0.4, 0.9, 1.8, 4.0)  # upper edges of the classes: accepted tokens expected of the free draft
PRIOR_GAIN = 1.0  # accepted tokens, before any pass was verified. Doubled: more passes are tried at first

PassClass = tuple[int, int]
"""Temperature class, and class of what the free draft promised: where text is being copied, a pass adds nothing."""


class PassGains:
    """One moving mean for each class of passes."""

    def __init__(self) -> None:
        shape = (NUM_CLASSES, len(PROMISES) + 1)
        self._gains: NDArray[np.float64] = np.full(shape, PRIOR_GAIN)
        self._seen: NDArray[np.float64] = np.full(shape, PRIOR_WEIGHT)

    def of(self, where: PassClass) -> float:
        """Return the accepted tokens that a pass of this class adds."""
        return float(self._gains[where])

    def observe(self, where: PassClass, added: float) -> None:
        """Take in what one pass added; 0 if its draft was not even verified."""
        self._seen[where] += 1.0
        self._gains[where] += max(RATE, 1.0 / self._seen[where]) * (added - self._gains[where])


def pass_class(temperature_class: int, promised: float) -> PassClass:
    """Return the class of a pass. promised: expected accepted tokens of the free draft, before the pass is decided."""
    return temperature_class, bisect_left(PROMISES, promised)


def added_tokens(outcome: Outcome) -> int:
    """Return the accepted tokens of a step with a pass, less those that the free draft would have had accepted."""
    draft = outcome.draft
    if draft.source != "diffusion":
        return 0
    right = draft.tokens[: outcome.num_accepted]
    if outcome.next_token is not None and outcome.num_accepted < len(draft.tokens):
        right = (*right, outcome.next_token)  # in place of a rejected token: the free draft may have had it
    return outcome.num_accepted - num_common(draft.free, right)
