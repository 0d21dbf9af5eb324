"""Estimate when places become free, from how fast they did lately."""

from collections import deque
from collections.abc import Callable

_MEMORY = 32  # latest places that the pace is estimated from
_MIN_SECONDS, _UNKNOWN_SECONDS, _MAX_SECONDS = 1.0, 1.0, 60.0


class Pace:
    """The pace at which places become free. One thread notes and forgets; any thread may read."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_MEMORY)

    def note(self) -> None:
        """Note that a place has become free."""
        self._times.append(self._clock())

    def forget(self) -> None:
        """Forget all times. Call this when nobody is left: idle time says nothing about the pace."""
        self._times.clear()

    def seconds_until(self, num_places: int) -> float:
        """Estimate the seconds until `num_places` more places are free."""
        times = list(self._times)
        if len(times) < 2:
            return _UNKNOWN_SECONDS
        elapsed = self._clock() - times[0]  # up to now, so that the estimate grows while nothing becomes free
        return min(max(num_places * elapsed / len(times), _MIN_SECONDS), _MAX_SECONDS)
