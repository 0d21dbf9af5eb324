"""The requests that vLLM has at the moment, seen from beside it: when they came, when they end, whether they move."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

from service.engine.pace import Pace


class LiveRequests:
    """Of one event loop. Progress is anything that vLLM gets done: a hang is its absence while requests are live."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: dict[str, int] = {}  # request id -> tokens of its prompt and output; in the order of arrival
        self._idle = asyncio.Event()
        self._idle.set()
        self._endings = Pace(clock)
        self._progress_at = 0.0  # when vLLM last got something done, or began to have something to do

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tokens

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    @contextlib.contextmanager
    def hold(self, request_id: str, num_tokens: int) -> Iterator[None]:
        """Count the request, of at most so many tokens, as live for as long as the block lasts."""
        if not self._tokens:
            self.note_progress()
        self._tokens[request_id] = num_tokens
        self._idle.clear()
        try:
            yield
        finally:
            del self._tokens[request_id]
            self._endings.note()
            if not self._tokens:
                self._endings.forget()
                self._idle.set()

    def note_progress(self) -> None:
        self._progress_at = self._clock()

    @property
    def seconds_without_progress(self) -> float:
        return self._clock() - self._progress_at if self._tokens else 0.0

    def waiting_tokens(self, num_places: int) -> list[int]:
        """Tokens of each request that waits, if the first `num_places` run: vLLM tells nobody which ones do."""
        return list(islice(self._tokens.values(), num_places, None))

    def what_is_full(self, num_places: int, max_waiting: int, max_waiting_tokens: int | None) -> str:
        """Why one more cannot come: the bound that is reached, for people; empty if there is room."""
        waiting = self.waiting_tokens(num_places)
        if len(self) >= num_places + max_waiting:
            if not waiting:
                return f"{len(self)} requests are running already, and none may wait"
            return f"{len(waiting)} requests are waiting already"
        if waiting and max_waiting_tokens is not None and sum(waiting) >= max_waiting_tokens:
            return f"requests of {sum(waiting)} tokens are waiting already"
        return ""

    def retry_after(self, num_ahead: int) -> float:
        """Seconds until `num_ahead` places should have become free, from the rate at which requests ended lately."""
        return self._endings.seconds_until(num_ahead)

    async def wait_idle(self, seconds: float) -> bool:
        """Whether none is live any more after at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return not self._tokens
