"""The paper's adaptive draft length (ADL), policy `paper`. The default policy, `goodput`, is `policy.py`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperOptions:
    """The paper's constants (DiffuSpec, section 4) and their symbols."""

    min_length: int = 20  # k_min, tokens
    max_length: int = 30  # k_max, tokens
    increment: int = 10  # delta, tokens
    ema_rate: float = 0.5  # rho


class PaperLength:
    """Adaptive draft length of one request (Eqs. 9 to 11), exactly as published.

    The averages start at 0. So the length falls from `max_length` to `min_length` after one step, and stays there until
    nearly everything is accepted: `goodput` is the policy that adapts.
    """

    def __init__(self, options: PaperOptions) -> None:
        self._options = options
        self._mean_generated = 0.0  # tokens before the first end-of-text in the raw draft (Eq. 9)
        self._mean_accepted = 0.0
        self.next_length = options.max_length

    def observe(self, generated: int, accepted: int) -> None:
        """Take in one step's raw draft length and accepted tokens (Eq. 10), and set the next length (Eq. 11)."""
        rate = self._options.ema_rate
        self._mean_generated += rate * (generated - self._mean_generated)
        self._mean_accepted += rate * (accepted - self._mean_accepted)
        increment = self._options.increment if self._mean_accepted >= self._mean_generated else 0
        length = int(self._mean_generated + increment)
        self.next_length = max(self._options.min_length, min(self._options.max_length, length))
