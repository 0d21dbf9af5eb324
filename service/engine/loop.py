"""The loop of the engine thread: requests join and leave the batch at every step."""

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
from service.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from service.engine.sequence import Decoding
from verifiers.base import Verifier

log = logging.getLogger(__name__)

Event = tuple[str, TokenDelta | Exception]
"""A request's id, and either its next delta or the error that ended it."""

_FAILED = "the engine has failed; the log says why"  # clients don't see the reason, which may name files
_FATAL_FAILURES = 3  # failed steps in a row; a model that fails this often won't recover


class EngineLoop:
    """Continuous batching over a verifier and a drafting pipeline.

    One thread calls `run` and blocks in it while there is nothing to do. Any other thread may use `submit`, `cancel`,
    `drain`, `abort` and the properties; they never wait for a step to end.
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
        """`deliver` is called in the engine thread, at most once per step, with all events of the step."""
        slots = PrefixCache(verifier.num_slots, verifier.copy_slot, limits.reuse_prefixes)
        self._scheduler = Scheduler(limits, slots, verifier.context_length, clock)
        self._decoder = Decoder(verifier, pipeline, observers, clock)
        self._context_length = verifier.context_length
        self._service_draft_tokens = pipeline.max_draft_tokens
        self._clock = clock
        self._deliver = deliver
        self._outbox: list[Event] = []  # events of the step in progress
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
        """The reason why the loop ended for good; empty while it is alive."""
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
        """False from a failure of the drafter until it drafts again."""
        return self._decoder.drafter_up

    @property
    def seconds_in_step(self) -> float:
        """Seconds since the current step began; 0 when idle."""
        started = self._step_started
        return 0.0 if started is None else self._clock() - started

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises QueueFullError, EngineUnavailableError or RequestFailedError."""
        request.check_length(self._context_length)
        with self._changed:
            if self._failure:
                raise EngineUnavailableError(_FAILED)
            if self._is_draining:
                raise EngineUnavailableError("the server is shutting down")
            if request.request_id in self._live:
                raise RequestFailedError(f"a request with the id {request.request_id!r} is running already")
            decoding = Decoding(request, self._num_submitted, self._clock(), self._service_draft_tokens)
            self._scheduler.check_capacity(decoding, self._arrived)
            self._num_submitted += 1
            self._live[request.request_id] = decoding
            self._arrived.append(decoding)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, without a last delta. Do nothing if it has ended or is unknown."""
        with self._changed:
            decoding = self._live.get(request_id)
            if decoding is not None:
                self._cancelled.append(decoding)
                self._changed.notify()

    def drain(self) -> None:
        """Refuse new requests. `run` returns once the present ones have ended."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def abort(self) -> None:
        """End every request with `abort` before the next step; then `run` returns."""
        with self._changed:
            self._is_draining = self._is_aborting = True
            self._changed.notify()

    def run(self) -> None:
        """Serve until drained, aborted or dead. Never raises: `failure` says why a loop died."""
        try:
            while self._await_work():
                self.turn()
        except Exception as error:
            log.critical("the engine has died", exc_info=True)
            self._die(str(error) if isinstance(error, EngineUnavailableError) else f"the engine failed: {error!r}")
        finally:
            self._step_started = None

    def turn(self) -> None:
        """One round of `run`: remove whoever leaves, admit whoever fits, and advance the batch by one step."""
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
        step = self._scheduler.schedule()
        if step:
            self._advance(step)
        self._flush()

    def _await_work(self) -> bool:
        """Block while there is nothing to do. False means that `run` should return."""
        with self._changed:
            self._step_started = None
            self._changed.wait_for(lambda: self._live or self._is_draining)
            self._step_started = self._clock()
            return bool(self._live)

    def _advance(self, step: Sequence[Scheduled]) -> None:
        try:
            results = self._decoder.step(step)
        except Exception as error:
            log.exception("a step over %d requests failed", len(step))
            for scheduled in step:
                failure = RequestFailedError(f"the model failed while this request was running: {error!r}")
                self._end(scheduled.decoding, failure, is_intact=False)
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
        """End a request that finished, failed, was cancelled, timed out or was aborted. A second call does nothing.

        `is_intact`: others may reuse its keys and values.
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
