"""The engine thread: requests join and leave the batch at every step."""

import logging
import threading
from collections.abc import Callable, Sequence

from drafters.base import Pipeline
from service.engine.base import (
    EngineUnavailableError,
    GenerationRequest,
    RequestFailedError,
    RequestTimeoutError,
    TokenDelta,
)
from service.engine.decoder import Decoder, StepObserver
from service.engine.prefix_cache import PrefixCache
from service.engine.scheduler import Part, Scheduler, SchedulerLimits
from service.engine.sequence import Decoding
from verifiers.base import Verifier

log = logging.getLogger(__name__)

Event = tuple[str, TokenDelta | Exception]
"""A request's id, and its next delta or what ended it."""

_FAILED = "the engine has failed; the log says why"  # for clients: the reason may name files
_FATAL_FAILURES = 3  # steps in a row: a model that fails so often won't recover by itself


class EngineLoop:
    """Continuous batching over a verifier and a drafting pipeline.

    `run` belongs to one thread, which blocks while there is nothing to do. `submit`, `cancel`, `drain`, `abort` and
    the read-only properties may be used from any other; they never wait for a step to end.
    """

    def __init__(
        self,
        verifier: Verifier,
        pipeline: Pipeline,
        limits: SchedulerLimits,
        observers: Sequence[StepObserver],
        clock: Callable[[], float],
        deliver: Callable[[list[Event]], None],
    ) -> None:
        """`deliver` is called in the engine thread, at most once a step, with everything the step has to say."""
        slots = PrefixCache(verifier.num_slots, verifier.copy_slot, limits.reuse_prefixes)
        self._scheduler = Scheduler(limits, slots, verifier.context_length, clock)
        self._decoder = Decoder(verifier, pipeline, observers, clock)
        self._context_length = verifier.context_length
        self._service_draft_tokens = pipeline.max_draft_tokens
        self._clock = clock
        self._deliver = deliver
        self._outbox: list[Event] = []  # of the step in progress
        self._num_failures = 0  # in a row
        self._step_started: float | None = None  # None: idle
        self._changed = threading.Condition()  # guards what follows
        self._live: dict[str, Decoding] = {}  # by request id, from submission to the end
        self._arrived: list[Decoding] = []
        self._cancelled: list[Decoding] = []
        self._num_submitted = 0
        self._is_draining = False
        self._is_aborting = False
        self._failure = ""

    @property
    def failure(self) -> str:
        """Why the loop has ended for good; empty while it is alive."""
        return self._failure

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting + len(self._arrived)

    @property
    def cache_usage(self) -> float:
        """Promised share of the key-value cache, 0 to 1."""
        return self._scheduler.cache_usage

    @property
    def drafter_up(self) -> bool:
        """False from a failure of the drafter until it has drafted again."""
        return self._decoder.drafter_up

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has taken so far; 0 when idle."""
        started = self._step_started
        return 0.0 if started is None else self._clock() - started

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises QueueFullError, EngineUnavailableError, RequestFailedError."""
        num_tokens = len(request.prompt) + request.max_tokens
        if not request.prompt or num_tokens > self._context_length:
            raise RequestFailedError(
                f"prompt ({len(request.prompt)} tokens) and max_tokens ({request.max_tokens}) must be at least 1 and "
                f"at most {self._context_length} tokens together"
            )
        with self._changed:
            if self._failure:
                raise EngineUnavailableError(_FAILED)
            if self._is_draining:
                raise EngineUnavailableError("the server is shutting down")
            if request.request_id in self._live:
                raise RequestFailedError(f"a request with the id {request.request_id!r} is running already")
            decoding = Decoding(request, self._num_submitted, self._clock(), self._service_draft_tokens)
            self._scheduler.check_room(decoding, self._arrived)
            self._num_submitted += 1
            self._live[request.request_id] = decoding
            self._arrived.append(decoding)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, without a last delta; unknown and ended ones are fine."""
        with self._changed:
            decoding = self._live.get(request_id)
            if decoding is not None:
                self._cancelled.append(decoding)
                self._changed.notify()

    def drain(self) -> None:
        """Take no more requests; `run` returns when those that are here have ended."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def abort(self) -> None:
        """End every request with `abort` before the next step; `run` returns then."""
        with self._changed:
            self._is_draining = self._is_aborting = True
            self._changed.notify()

    def run(self) -> None:
        """Serve until drained, aborted or dead. Never raises: a dead loop says why in `failure`."""
        try:
            while self._await_work():
                self.turn()
        except Exception as error:
            log.critical("the engine has died", exc_info=True)
            self._die(str(error) if isinstance(error, EngineUnavailableError) else f"the engine failed: {error!r}")
        finally:
            self._step_started = None

    def turn(self) -> None:
        """One round of `run`: let go whoever is to leave, let in whoever fits, advance the batch by one step."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            is_aborting = self._is_aborting
            for decoding in arrived:
                self._scheduler.enqueue(decoding)
        for decoding in cancelled:
            self._end(decoding)
        if is_aborting:
            for decoding in self._everyone():
                self._end(decoding, decoding.abort())
        self._end_expired()
        self._scheduler.admit()
        parts = self._scheduler.plan()
        if parts:
            self._advance(parts)
        self._flush()

    def _await_work(self) -> bool:
        """Block while there is nothing to do; False: time to return."""
        with self._changed:
            self._step_started = None
            self._changed.wait_for(lambda: self._live or self._is_draining)
            self._step_started = self._clock()
            return bool(self._live)

    def _advance(self, parts: Sequence[Part]) -> None:
        try:
            results = self._decoder.step(parts)
        except Exception as error:
            log.exception("a step over %d requests failed", len(parts))
            for part in parts:
                failure = RequestFailedError(f"the model failed while this request was running: {error!r}")
                self._end(part.decoding, failure, is_intact=False)
            self._num_failures += 1
            if self._num_failures >= _FATAL_FAILURES:
                raise EngineUnavailableError(f"the model failed {_FATAL_FAILURES} times in a row: {error!r}") from error
            return
        self._num_failures = 0
        for result in results:
            outcome = result.outcome
            if isinstance(outcome, RequestFailedError):
                self._end(result.decoding, outcome, is_intact=False)
            elif outcome is not None and outcome.finish_reason is not None:
                self._end(result.decoding, outcome)
            elif outcome is not None:
                self._outbox.append((result.decoding.request.request_id, outcome))

    def _end(self, decoding: Decoding, last: TokenDelta | Exception | None = None, is_intact: bool = True) -> None:
        """The one way out: finished, failed, cancelled, timed out or aborted. Nothing happens the second time.

        `is_intact`: its keys and values may be reused by others.
        """
        request_id = decoding.request.request_id
        if self._live.get(request_id) is not decoding:
            return
        self._scheduler.remove(decoding, is_intact)
        self._decoder.release(decoding)
        if last is not None:
            self._outbox.append((request_id, last))
        with self._changed:
            del self._live[request_id]

    def _end_expired(self) -> None:
        now = self._clock()
        for decoding in self._everyone():
            if decoding.deadline is not None and now >= decoding.deadline:
                seconds = decoding.request.timeout_seconds
                self._end(decoding, RequestTimeoutError(f"the request did not finish within {seconds:g} seconds"))

    def _everyone(self) -> list[Decoding]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._deliver(events)

    def _die(self, why: str) -> None:
        with self._changed:
            self._failure = why
            unheard = list(self._live)
            self._live.clear()
            self._arrived.clear()
        self._outbox += [(request_id, EngineUnavailableError(_FAILED)) for request_id in unheard]
        self._flush()
