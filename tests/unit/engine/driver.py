"""Runs an engine loop turn by turn, so that who joins and leaves when is the test's to say."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from drafters.base import Pipeline
from service.engine.base import GenerationRequest, TokenDelta
from service.engine.decoder import StepObserver
from service.engine.loop import EngineLoop, Event
from service.engine.scheduler import SchedulerLimits
from verifiers.base import Verifier


@dataclass
class Received:
    """What one request was given."""

    deltas: list[TokenDelta] = field(default_factory=list)
    error: Exception | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.finish_reason is not None


class Driver:
    """An engine loop in the test's own thread."""

    def __init__(
        self,
        verifier: Verifier,
        drafter: Pipeline,
        limits: SchedulerLimits | None = None,
        clock: Callable[[], float] = time.perf_counter,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.received: dict[str, Received] = {}
        self.num_deliveries = 0
        self.loop = EngineLoop(verifier, drafter, limits or SchedulerLimits(), observers, clock, self._receive)

    def submit(self, request: GenerationRequest) -> None:
        self.loop.submit(request)
        self.received[request.request_id] = Received()

    def finish(self) -> None:
        """Turn until nothing runs or waits."""
        self.loop.turn()
        while self.loop.num_running or self.loop.num_waiting:
            self.loop.turn()

    def outputs(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Submit all at once, finish, and return their tokens."""
        for request in requests:
            self.submit(request)
        self.finish()
        return [self.received[request.request_id].tokens for request in requests]

    def _receive(self, events: list[Event]) -> None:
        self.num_deliveries += 1
        for request_id, item in events:
            received = self.received[request_id]
            assert not received.is_finished
            if isinstance(item, Exception):
                received.error = item
            else:
                received.deltas.append(item)
