"""The engine of this repository: an async face over one engine thread."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from drafters.base import Pipeline
from service.engine.base import (
    EngineStatus,
    EngineUnavailableError,
    GenerationRequest,
    RequestFailedError,
    TokenDelta,
)
from service.engine.calibration import measure_verify_seconds
from service.engine.decoder import StepObserver
from service.engine.loop import EngineLoop, Event
from service.engine.scheduler import SchedulerLimits
from verifiers.base import Verifier

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""What is being loaded, and how much of all the loading is done, 0 to 1."""
Load = Callable[[Progress], tuple[Verifier, Pipeline]]

_LAST_STEP_SECONDS = 5.0  # how long `stop` waits for the step in progress before it gives the thread up


class EmbeddedEngine:
    """Implements `Engine` with a verifier and a drafting pipeline in this process.

    Everything is loaded and run in one thread of its own. A step's deltas, of all requests, reach the event loop in
    one call. Of the event loop in which `start` was awaited, and not to be started twice.
    """

    def __init__(
        self,
        load: Load,
        limits: SchedulerLimits,
        observers: Sequence[StepObserver] = (),
        clock: Callable[[], float] = time.perf_counter,
        hung_after_seconds: float = 60.0,
    ) -> None:
        """load: returns the parts, in the engine thread; what it raises, `start` raises.

        observers: get every step's record, in the engine thread. hung_after_seconds: a step that takes longer means
        that the engine hangs.
        """
        self._load = load
        self._limits = limits
        self._observers = observers
        self._clock = clock
        self._hung_after_seconds = hung_after_seconds
        self._parts: tuple[Verifier, Pipeline] | None = None
        self._core: EngineLoop | None = None
        self._streams: dict[str, asyncio.Queue[TokenDelta | Exception]] = {}
        self._loading = ("not started", 0.0)
        self._failure = ""
        self._is_stopping = False
        self._events: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()  # the thread is through

    @property
    def vocabulary_size(self) -> int:
        return self._loaded[0].vocabulary_size

    @property
    def context_length(self) -> int:
        budget = self._limits.kv_cache_tokens
        length = self._loaded[0].context_length
        return length if budget is None else min(length, budget)

    @property
    def default_draft_tokens(self) -> int:
        return self._loaded[1].max_draft_tokens

    @property
    def unsupported_fields(self) -> Mapping[str, str]:
        return {}

    @property
    def drafter_description(self) -> str:
        return self._loaded[1].description

    async def start(self) -> None:
        """Load everything in the engine thread; returns when ready, raises what `load` raised.

        Raises CancelledError if `stop` comes first.
        """
        assert self._events is None
        self._events = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._events.create_future()
        threading.Thread(target=self._main, args=(ready,), name="engine", daemon=True).start()
        await ready

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others end for at most `drain_seconds`, then end them with `abort`."""
        self._is_stopping = True
        if self._core is None:  # still loading, which ends at the next sign of progress, or never begun
            if self._events is not None and not await self._wait_ended(_LAST_STEP_SECONDS):
                log.warning("loading does not stop; its thread is left behind")
            return
        self._core.drain()
        if not await self._wait_ended(drain_seconds):
            self._core.abort()
            if not await self._wait_ended(_LAST_STEP_SECONDS):
                log.error("the engine thread hangs in a step and is left behind")

    def status(self) -> EngineStatus:
        core = self._core
        if self._failure:
            return EngineStatus("dead", self._failure)
        if core is None:
            return EngineStatus("loading", *self._loading)
        counts = (1.0, core.num_running, core.num_waiting, core.cache_usage, core.drafter_up)
        seconds = core.seconds_in_step
        if core.failure:
            return EngineStatus("dead", core.failure, *counts)
        if seconds > self._hung_after_seconds:
            return EngineStatus("hung", f"a step has taken {seconds:.0f} seconds so far", *counts)
        if self._is_stopping:
            return EngineStatus("draining", "the server is shutting down", *counts)
        return EngineStatus("ready", "", *counts)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the request's deltas; closing the generator cancels the request (see `Engine.generate`)."""
        core, status = self._core, self.status()
        if core is None or status.phase != "ready":
            raise EngineUnavailableError(f"the engine is {status.phase}")
        if request.request_id in self._streams:
            raise RequestFailedError(f"a request with the id {request.request_id!r} is running already")
        core.submit(request)
        stream = self._streams[request.request_id] = asyncio.Queue()
        try:
            while True:
                item = await stream.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._streams[request.request_id]
            core.cancel(request.request_id)  # nothing, if it has ended

    @property
    def _loaded(self) -> tuple[Verifier, Pipeline]:
        if self._parts is None:
            raise EngineUnavailableError(f"the engine is not loaded: {self._failure or self._loading[0]}")
        return self._parts

    async def _wait_ended(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _main(self, ready: "asyncio.Future[None]") -> None:
        """The engine thread."""
        try:
            self._core = core = self._prepare()
            self._tell(_settle, ready, None)
            if self._is_stopping:
                core.drain()
            core.run()
        except _LoadingStoppedError:
            self._tell(ready.cancel)
        except Exception as error:
            self._failure = f"loading failed: {error}"
            self._tell(_settle, ready, error)
        finally:
            self._tell(self._ended.set)

    def _prepare(self) -> EngineLoop:
        verifier, pipeline = self._load(self._note_progress)
        self._note_progress("measuring what a step costs", 1.0)
        costs = measure_verify_seconds(verifier, pipeline.max_draft_tokens, self._loading_clock)
        pipeline.calibrate(costs.by_rows, costs.by_requests)
        log.info("verification: %s", ", ".join(f"{n} rows {1e3 * s:.2f} ms" for n, s in costs.by_rows.items()))
        self._parts = verifier, pipeline
        return EngineLoop(verifier, pipeline, self._limits, self._observers, self._clock, self._deliver)

    def _note_progress(self, what: str, done: float) -> None:
        self._go_on_loading()
        self._loading = (what, done)

    def _loading_clock(self) -> float:
        self._go_on_loading()
        return self._clock()

    def _go_on_loading(self) -> None:
        if self._is_stopping:
            raise _LoadingStoppedError

    def _deliver(self, events: list[Event]) -> None:
        if not self._tell(self._dispatch, events):
            assert self._core is not None
            self._core.abort()  # the event loop is gone, and with it everyone who would listen

    def _dispatch(self, events: list[Event]) -> None:
        """In the event loop: hand a step's deltas to whoever waits for them."""
        for request_id, item in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(item)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> bool:
        """Run a callback in the event loop; False if that is closed."""
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            return False
        return True


class _LoadingStoppedError(Exception):
    """`stop` was called while loading: no failure."""


def _settle(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if future.done():  # `start` was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
