"""vLLM as the engine: its `AsyncLLM` in this process, our drafting pipeline inside its worker (vLLM 0.32)."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from drafters.base import StepRecord
from service.engine.base import (
    EngineStatus,
    EngineUnavailableError,
    GenerationRequest,
    NoTokenLeftError,
    QueueFullError,
    RequestFailedError,
    RequestRefusedError,
    RequestTimeoutError,
    TokenDelta,
)
from service.engine.vllm import config as vllm_config
from service.engine.vllm.calibration import run_probes
from service.engine.vllm.config import GIB, TargetFacts
from service.engine.vllm.records import NO_DRAFTS_HERE, unpack_records
from service.engine.vllm.requests import DeltaReader, LiveRequests, leaves_no_token, sampling_params
from service.settings import Settings

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.25  # between two reports of the worker about its steps
_LAST_STEP_SECONDS = 5.0  # the wait for a last step after aborting all requests


class StepWatch:
    """Counts vLLM's steps and keeps its newest gauges. Implements vLLM's `StatLoggerBase` without importing it."""

    def __init__(self, note_progress: Callable[[], None]) -> None:
        self._note_progress = note_progress
        self.num_steps = 0
        self.num_running = 0
        self.kv_cache_usage = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        self.num_steps += 1
        self.num_running = scheduler_stats.num_running_reqs
        self.kv_cache_usage = scheduler_stats.kv_cache_usage
        self._note_progress()

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, is_awake: int, level: int) -> None: ...


class VllmEngine:
    """Implements `Engine`. Bound to the event loop that awaited `start`. Start it once."""

    def __init__(
        self,
        settings: Settings,
        observers: Sequence[Callable[[StepRecord], None]] = (),
        observe_failures: Callable[[int], None] = lambda count: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """observers: get every step's record, in the event loop.

        observe_failures: gets the number of the drafter's failures since the last time.
        """
        self._settings = settings
        self._observers = list(observers)
        self._observe_failures = observe_failures
        self._clock = clock
        self._llm: Any = None
        self._live = LiveRequests(clock)
        self._watch = StepWatch(self._live.note_progress)
        self._loading = ("not started", 0.0)
        self._failure = ""
        self._is_ready = False
        self._is_stopping = False
        self._reporting: asyncio.Task[None] | None = None
        self._drafter_up, self.num_drafter_failures = True, 0
        self._target: TargetFacts | None = None
        self._description = ""

    @property
    def vocabulary_size(self) -> int:
        return self._facts.vocabulary_size

    @property
    def context_length(self) -> int:
        return vllm_config.context_length(self._settings, self._facts)

    @property
    def default_draft_tokens(self) -> int:
        return vllm_config.max_draft_tokens(self._settings)

    @property
    def unsupported_fields(self) -> Mapping[str, str]:
        if self.default_draft_tokens == 0:
            return {}
        reason = "vLLM cannot do this while it decodes speculatively; serve with --method none"
        return {"min_p": reason, "logit_bias": reason}

    @property
    def drafter_description(self) -> str:
        return self._description

    async def start(self) -> None:
        """Load everything and return when ready. Raises CheckpointError, MemoryBudgetError, or an error of vLLM's."""
        try:
            await asyncio.to_thread(self._load)
            if self._is_stopping:
                raise EngineUnavailableError("the server is shutting down")
            self._description = await self._describe()
            await self._calibrate()
        except BaseException as error:
            self._failure = f"loading failed: {error}"
            await self._shutdown()
            raise
        self._reporting = asyncio.create_task(self._report_forever())
        self._is_ready = True

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, give the others at most `drain_seconds` to end, then end them with `abort`."""
        self._is_stopping = True
        if not await self._live.wait_idle(drain_seconds) and self._llm is not None:
            await self._llm.abort(list(self._live))
            if not await self._live.wait_idle(_LAST_STEP_SECONDS):
                log.error("vLLM hangs in a step; shutting down without waiting for it")
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
        await self._shutdown()

    def status(self) -> EngineStatus:
        if self._failure:
            return EngineStatus("dead", self._failure)
        if not self._is_ready:
            return EngineStatus("loading", *self._loading)
        running = min(self._watch.num_running, len(self._live))
        counts = (1.0, running, len(self._live) - running, self._watch.kv_cache_usage, self._drafter_up)
        if self._llm is None and self._is_stopping:  # the shutdown takes seconds; the engine has not died
            return EngineStatus("draining", "the server is shutting down", *counts)
        if self._llm is None or self._llm.errored:
            return EngineStatus("dead", "vLLM's engine has died", *counts)
        seconds = self._live.seconds_without_progress
        if seconds > self._settings.scheduler.hang_seconds:
            return EngineStatus("hung", f"no step has ended for {seconds:.0f} seconds while requests run", *counts)
        if self._is_stopping:
            return EngineStatus("draining", "the server is shutting down", *counts)
        return EngineStatus("ready", "", *counts)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the request's deltas. Closing the generator cancels the request (see `Engine.generate`)."""
        self._admit(request)
        with self._live.hold(request.request_id, len(request.prompt) + request.max_tokens):
            async with aclosing(self._deltas(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _deltas(self, request: GenerationRequest, probe: int | None = None) -> AsyncGenerator[TokenDelta, None]:
        """Run one request in vLLM and translate vLLM's errors into this service's."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        reader = DeltaReader(request, self.default_draft_tokens)
        seconds = request.timeout_seconds
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        has_begun = False
        tokens: list[int] = []
        try:
            stream = self._llm.generate(
                tokens_input(list(map(int, request.prompt)), cache_salt=request.tenant or None),
                sampling_params(request, probe),
                request.request_id,
                priority=request.priority,
            )
            async with aclosing(stream):
                while not reader.has_ended:
                    async with asyncio.timeout_at(deadline):
                        output = await anext(stream)
                        steps = await self._trace(request) if request.speculation.trace else []
                    has_begun = True
                    for delta in reader.read(output, steps):
                        tokens += delta.tokens
                        if delta.finish_reason == "error" and leaves_no_token(request, tokens, self.vocabulary_size):
                            raise NoTokenLeftError("The request's rules leave no token to choose from.")
                        yield delta
        except TimeoutError:
            raise RequestTimeoutError(f"the request did not finish within {seconds:g} seconds") from None
        except NoTokenLeftError:
            raise
        except EngineDeadError as error:
            raise EngineUnavailableError("vLLM's engine has died") from error
        except StopAsyncIteration:
            raise RequestFailedError("vLLM ended this request without a reason") from None
        except Exception as error:
            if not has_begun and isinstance(error, VLLMClientError | ValueError):  # vLLM's own validation
                raise RequestRefusedError(str(error)) from error
            raise RequestFailedError(f"vLLM failed on this request: {error!r}") from error

    def _admit(self, request: GenerationRequest) -> None:
        """Check that the request may come in. Raises QueueFullError, EngineUnavailableError, RequestFailedError."""
        status = self.status()
        if status.phase != "ready":
            raise EngineUnavailableError(f"the engine is {status.phase}: {status.detail}")
        if request.request_id in self._live:
            raise RequestFailedError(f"a request with the id {request.request_id!r} is running already")
        request.check_length(self.context_length)
        scheduler = self._settings.scheduler
        waiting = self._live.waiting_tokens(scheduler.max_running)
        full = self._live.what_is_full(scheduler.max_running, scheduler.max_waiting, scheduler.max_waiting_tokens)
        if full:
            raise QueueFullError(f"{full}: try again later", self._live.retry_after(len(waiting) + 1))

    @property
    def _facts(self) -> TargetFacts:
        if self._target is None:
            raise EngineUnavailableError(f"the engine is not loaded: {self._failure or self._loading[0]}")
        return self._target

    def _load(self) -> None:
        """Start vLLM, which takes long: runs in a thread of its own."""
        settings = self._settings
        self._loading = ("reading the target's configuration", 0.0)
        target = self._target = TargetFacts.from_folder(Path(settings.model.target), settings.model.dtype)
        plan = vllm_config.budget(settings, target)
        log.info(
            "memory: target %.2f, KV cache %.2f, drafter %.2f, activations %.2f GiB of %.2f",
            *(size / GIB for size in (plan.target, plan.kv_cache, plan.drafter, plan.activations, plan.available)),
        )
        self._loading = ("importing vLLM", 0.05)
        vllm_config.prepare_environment(settings)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._loading = ("starting vLLM's processes", 0.3)
        arguments = vllm_config.engine_arguments(settings, target, plan)
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments), stat_loggers=[lambda config, index: self._watch]
        )

    async def _describe(self) -> str:
        if self._settings.vllm.method != vllm_config.OURS:
            return f"vLLM's {self._settings.vllm.method}" if self.default_draft_tokens else "none"
        if not self.default_draft_tokens:
            return "none"
        descriptions: list[str] = await self._llm.collective_rpc("diffuspec_describe")
        return next((text for text in descriptions if text and text != NO_DRAFTS_HERE), "none")

    async def _calibrate(self) -> None:
        """Measure what a step costs by requests and draft tokens, on real requests, before any other comes."""
        if self._settings.vllm.method != vllm_config.OURS or not self.default_draft_tokens:
            return
        self._loading = ("measuring what a step costs", 0.95)
        max_running = self._settings.scheduler.max_running
        sizes = (max_running, self.default_draft_tokens, self.context_length, self.vocabulary_size)
        await run_probes(self._exhaust, *sizes, self._clock)
        measured: list[list[list[float]]] = await self._llm.collective_rpc("diffuspec_calibrate")
        log.info(
            "steps: %s",
            ", ".join(f"{rows:g} rows {1e3 * seconds:.2f} ms" for table in measured for rows, seconds in table),
        )

    async def _exhaust(self, request: GenerationRequest, probe: int) -> None:
        async for _ in self._deltas(request, probe):
            pass

    async def _trace(self, request: GenerationRequest) -> list[list[Any]]:
        answers: list[list[list[Any]]] = await self._llm.collective_rpc("diffuspec_trace", args=(request.request_id,))
        return next((steps for steps in answers if steps), [])

    async def _report_forever(self) -> None:
        """Call `report` while steps are made, for as long as the engine lives."""
        seen = -1
        while not self._llm.errored:
            await asyncio.sleep(REPORT_SECONDS)
            if self._watch.num_steps == seen and self._drafter_up:
                continue
            seen = self._watch.num_steps
            try:
                await self.report()
            except Exception as error:
                if not self._llm.errored:
                    log.error("the worker does not report (%r)", error)

    async def report(self) -> None:
        """Fetch the records of the steps since the last time, pass them to the observers, note the drafter's health."""
        answers: list[dict[str, Any]] = await self._llm.collective_rpc("diffuspec_report")
        self._drafter_up = all(answer["up"] for answer in answers)
        failures = sum(answer["failures"] for answer in answers)
        if failures > self.num_drafter_failures:
            failure = next((answer["failure"] for answer in answers if answer["failure"]), "the worker's log says why")
            log.error("the drafter has failed (%s); decoding goes on without it for a while", failure)
            self._observe_failures(failures - self.num_drafter_failures)
        self.num_drafter_failures = failures
        for answer in answers:
            for record in unpack_records(answer["records"]):
                for observe in self._observers:
                    observe(record)

    async def _shutdown(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
