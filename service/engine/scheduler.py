"""Who waits, who runs, and how much of which prompt is read in the next step."""

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engine.base import QueueFullError, RequestFailedError
from service.engine.prefix_cache import PrefixCache
from service.engine.sequence import Decoding

_DRAIN_WINDOW = 32  # admissions over which the queue's drain rate is observed
_SHORTEST_RETRY_SECONDS, _UNKNOWN_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 5.0, 60.0


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much the engine takes on."""

    max_running: int = 32  # requests decoded at once
    max_waiting: int = 256  # requests in the queue, beyond those that can run at once
    prefill_chunk_tokens: int = 256  # prompt tokens read in one step, over all requests
    kv_cache_tokens: int | None = None  # cache positions promised to running requests; None: all slots, filled
    reuse_prefixes: bool = True  # off: every prompt is read in full

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.prefill_chunk_tokens < 1 or self.max_waiting < 0:
            raise ValueError(
                f"max_running ({self.max_running}) and prefill_chunk_tokens ({self.prefill_chunk_tokens}) must be at "
                f"least 1, max_waiting ({self.max_waiting}) at least 0"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """One request's share of a step: `num_new` of its pending tokens."""

    decoding: Decoding
    num_new: int


class Scheduler:
    """The queue and the batch, of the engine thread alone (`check_room` may be called from any thread).

    A request is admitted when a slot is free and the cache positions it may come to need (prompt plus `max_tokens`)
    fit the budget, so that nothing is ever evicted while running. The queue is served by priority, then arrival, and
    nobody overtakes a request that waits for memory: large requests do not starve.
    """

    def __init__(
        self, limits: SchedulerLimits, slots: PrefixCache, context_length: int, clock: Callable[[], float]
    ) -> None:
        self.running: list[Decoding] = []
        self._waiting: list[tuple[tuple[int, int], Decoding]] = []  # in order of service
        self._slots = slots
        self._clock = clock
        self._max_running = min(limits.max_running, slots.num_slots)
        self._max_waiting = limits.max_waiting
        self._chunk_tokens = limits.prefill_chunk_tokens
        self._budget = limits.kv_cache_tokens or slots.num_slots * context_length
        self._num_reserved = 0
        self._admissions: deque[float] = deque(maxlen=_DRAIN_WINDOW)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[Decoding]:
        return [decoding for _, decoding in self._waiting]

    @property
    def cache_usage(self) -> float:
        """Promised share of the cache budget, 0 to 1."""
        return self._num_reserved / self._budget

    def check_room(self, decoding: Decoding, num_arriving: int) -> None:
        """Raise QueueFullError if the queue is full, counting `num_arriving` requests on their way into it.

        RequestFailedError if the request could never run.
        """
        if decoding.num_reserved > self._budget:
            raise RequestFailedError(
                f"prompt ({decoding.num_prompt} tokens) plus max_tokens ({decoding.request.max_tokens}) exceed the "
                f"cache budget of {self._budget} tokens: shorten one of them"
            )
        ahead = len(self._waiting) + num_arriving
        num_startable = self._max_running - len(self.running)
        if ahead >= self._max_waiting + num_startable:
            raise QueueFullError(f"{ahead} requests are waiting already: try again later", self._retry_after(ahead))

    def enqueue(self, decoding: Decoding) -> None:
        insort(self._waiting, ((decoding.request.priority, decoding.arrival), decoding), key=lambda entry: entry[0])

    def admit(self) -> None:
        """Move requests from the queue into the batch while there is room."""
        for entry in tuple(self._waiting):
            decoding = entry[1]
            fits = self._num_reserved + decoding.num_reserved <= self._budget
            if len(self.running) >= self._max_running or not fits:
                break
            if not self._slots.place(decoding):
                continue
            self._waiting.remove(entry)
            self.running.append(decoding)
            self._num_reserved += decoding.num_reserved
            now = self._clock()
            decoding.queue_seconds = now - decoding.submitted_at
            self._admissions.append(now)

    def plan(self) -> list[Part]:
        """The next step, by slot: one pending token of everyone who decodes, and the next chunks of prompts."""
        reading = [decoding for decoding in self.running if decoding.is_reading]
        parts = [Part(decoding, decoding.num_pending) for decoding in self.running if not decoding.is_reading]
        shares = fair_shares(self._chunk_tokens, [decoding.num_pending for decoding in reading])
        parts += [Part(decoding, share) for decoding, share in zip(reading, shares, strict=True) if share]
        parts.sort(key=lambda part: part.decoding.slot)
        return parts

    def remove(self, decoding: Decoding, is_intact: bool = True) -> None:
        """Take a request out of the batch or the queue; `is_intact`: its keys and values may be reused."""
        if decoding.slot < 0:
            self._waiting = [entry for entry in self._waiting if entry[1] is not decoding]
            return
        self.running.remove(decoding)
        self._num_reserved -= decoding.num_reserved
        self._slots.vacate(decoding, is_intact)

    def _retry_after(self, ahead: int) -> float:
        """Seconds until everyone who waits now will have been admitted, at the pace of the latest admissions."""
        if not self._admissions:
            return _UNKNOWN_RETRY_SECONDS
        elapsed = self._clock() - self._admissions[0]  # up to now: a stalled queue drains more and more slowly
        expected = ahead * elapsed / len(self._admissions)
        return min(max(expected, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)


def fair_shares(total: int, wants: Sequence[int]) -> list[int]:
    """Divide `total` as evenly as `wants` allow: small wants are met in full, and what they leave goes to the others.

    Units that cannot be divided go to those who come first, so that a total of 1 serves them one after another.
    """
    level, left = 0, total
    for rank, want in enumerate(sorted(wants)):
        level = left // (len(wants) - rank)
        left -= min(want, level)
        if want > level:
            break
    shares = [min(want, level) for want in wants]
    left = total - sum(shares)
    for i, want in enumerate(wants):
        extra = min(want - shares[i], left)
        shares[i] += extra
        left -= extra
    return shares
