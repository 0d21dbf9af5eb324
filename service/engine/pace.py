"""When to come again, from how fast places became free lately."""

from collections import deque
from collections.abc import Callable

_MEMORY = 32  # places that the pace is estimated from
_MIN_SECONDS, _UNKNOWN_SECONDS, _MAX_SECONDS = 1.0, 1.0, 60.0


class Pace:
    """Noted and forgotten by one thread, read by any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_MEMORY)

    def note(self) -> None:
        """A place has become free."""
        self._times.append(self._clock())

    def forget(self) -> None:
        """Nobody is there any more: the time until somebody comes says nothing about the pace."""
        self._times.clear()

    def seconds_until(self, num_places: int) -> float:
        """Until so many more places should have become free."""
        times = list(self._times)
        if len(times) < 2:
            return _UNKNOWN_SECONDS
        elapsed = self._clock() - times[0]  # up to now: if nothing becomes free any more, it takes longer and longer
        return min(max(num_places * elapsed / len(times), _MIN_SECONDS), _MAX_SECONDS)
