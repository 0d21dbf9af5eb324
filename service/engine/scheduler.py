"""The scheduler: decides who waits, who runs, and how much of each prompt the next step reads."""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engine.base import QueueFullError, RequestFailedError
from service.engine.pace import Pace
from service.engine.prefix_cache import PrefixCache
from service.engine.sequence import Decoding


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits on the work that the engine takes on."""

    max_running: int = 32  # requests decoded at once
    max_waiting: int = 256  # requests in the queue, beyond those that can run at once
    max_waiting_tokens: int | None = None  # prompt and output tokens in the queue; None: unbounded
    prefill_chunk_tokens: int = 256  # prompt tokens read in one step, over all requests
    kv_cache_tokens: int | None = None  # cache positions promised to running requests; None: all slots in full
    reuse_prefixes: bool = True  # False: every prompt is read in full

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.prefill_chunk_tokens < 1 or self.max_waiting < 0:
            raise ValueError(
                f"max_running ({self.max_running}) and prefill_chunk_tokens ({self.prefill_chunk_tokens}) must be at "
                f"least 1, max_waiting ({self.max_waiting}) at least 0"
            )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's share of the next step: `num_new` of its pending tokens."""

    decoding: Decoding
    num_new: int


class Scheduler:
    """The queue and the batch. Only the engine thread uses it, except that any thread may call `check_capacity`.

    A request is admitted when a slot is free and the budget covers every cache position it may ever need (prompt plus
    `max_tokens`). A running request is therefore never evicted. The queue is ordered by priority, then by tenant (the
    one with the fewest running requests goes first), then by arrival. Nobody overtakes a request that waits for memory,
    so large requests don't starve. A named tenant may fill at most half of the queue and leaves the rest to others.
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
        self._max_waiting_tokens = limits.max_waiting_tokens
        self._chunk_tokens = limits.prefill_chunk_tokens
        self._budget = limits.kv_cache_tokens or slots.num_slots * context_length
        self._num_reserved = 0
        self._admissions = Pace(clock)

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

    def check_capacity(self, decoding: Decoding, arriving: Sequence[Decoding]) -> None:
        """Raise QueueFullError if the queue is full, and RequestFailedError if the request could never run.

        `arriving`: requests on their way into the queue; they count as if they were in it.
        """
        if decoding.num_reserved > self._budget:
            raise RequestFailedError(
                f"prompt ({decoding.num_prompt} tokens) plus max_tokens ({decoding.request.max_tokens}) exceed the "
                f"cache budget of {self._budget} tokens: shorten one of them"
            )
        queue = [*self.waiting, *arriving]
        num_places = self._max_waiting + self._max_running - len(self.running)  # whoever starts at once doesn't wait
        if len(queue) >= num_places:
            full = f"{len(queue)} requests are waiting already"
            if not queue:
                full = f"{len(self.running)} requests are running already, and none may wait"
            raise QueueFullError(f"{full}: try again later", self._admissions.seconds_until(len(queue)))
        tenant = decoding.request.tenant
        num_own = sum(other.request.tenant == tenant for other in queue) if tenant else 0
        if num_own >= max(num_places // 2, 1):
            raise QueueFullError(
                f"{num_own} requests of this key are waiting already: try again later",
                self._admissions.seconds_until(num_own),
            )
        num_tokens = sum(other.num_reserved for other in queue)
        if queue and self._max_waiting_tokens is not None and num_tokens >= self._max_waiting_tokens:
            raise QueueFullError(
                f"requests of {num_tokens} tokens are waiting already: try again later",
                self._admissions.seconds_until(len(queue)),
            )

    def enqueue(self, decoding: Decoding) -> None:
        insort(self._waiting, ((decoding.request.priority, decoding.arrival), decoding), key=lambda entry: entry[0])

    def admit(self) -> None:
        """Move requests from the queue into the batch until no more fit."""
        while len(self.running) < self._max_running and self._admit_one():
            pass

    def _admit_one(self) -> bool:
        for entry in self._in_turn():
            decoding = entry[1]
            if self._num_reserved + decoding.num_reserved > self._budget:
                return False
            if not self._slots.place(decoding):
                continue
            self._waiting.remove(entry)
            self.running.append(decoding)
            self._num_reserved += decoding.num_reserved
            decoding.queue_seconds = self._clock() - decoding.submitted_at
            self._admissions.note()
            return True
        return False

    def _in_turn(self) -> list[tuple[tuple[int, int], Decoding]]:
        """The queue, in the order in which requests are admitted next."""
        running = Counter(decoding.request.tenant for decoding in self.running)
        return sorted(self._waiting, key=lambda entry: (entry[0][0], running[entry[1].request.tenant], entry[0][1]))

    def schedule(self) -> list[Scheduled]:
        """Choose the next step, ordered by slot: one token of every decoding request, and the next prompt chunks."""
        reading = [decoding for decoding in self.running if decoding.is_reading]
        step = [Scheduled(decoding, decoding.num_pending) for decoding in self.running if not decoding.is_reading]
        shares = fair_shares(self._chunk_tokens, [decoding.num_pending for decoding in reading])
        step += [Scheduled(decoding, share) for decoding, share in zip(reading, shares, strict=True) if share]
        step.sort(key=lambda scheduled: scheduled.decoding.slot)
        return step

    def remove(self, decoding: Decoding, is_intact: bool = True) -> None:
        """Take a request out of the batch or the queue. `is_intact`: its keys and values may be reused."""
        if decoding.slot < 0:
            self._waiting = [entry for entry in self._waiting if entry[1] is not decoding]
        else:
            self.running.remove(decoding)
            self._num_reserved -= decoding.num_reserved
            self._slots.vacate(decoding, is_intact)
        if not self.running and not self._waiting:
            self._admissions.forget()


def fair_shares(total: int, wants: Sequence[int]) -> list[int]:
    """Divide `total` as evenly as `wants` allow. Small wants are met in full; the others share what is left.

    Units that can't be divided go to whoever comes first, so a total of 1 serves one request after another.
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
