"""The runtime audit: decode some live requests again, plainly and in idle time, and compare the outputs."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from drafters.base import num_common
from service.engine.base import Engine, EngineStatus, GenerationRequest, SpeculationOptions, TokenDelta
from verifiers.base import TokenLogprobs

log = logging.getLogger(__name__)

NEAR_TIE_NATS = 1e-4  # largest margin between the two tokens that float32 rounding explains
ALTERNATIVES = 20  # log probabilities reported beside each plain token, to find the margin to the live token


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """Choice of the audited requests, and of the time for audits."""

    fraction: float = 0.01  # of the requests that use speculation
    idle_seconds: float = 1.0  # an audit begins after the engine was idle for this long
    max_pending: int = 64  # requests that may wait for their audit; one more drops the oldest
    greedy_only: bool = False  # for engines whose draws are not keyed by position


@dataclass(frozen=True, slots=True)
class Audit:
    """The comparison of one request's two outputs."""

    request_id: str
    num_tokens: int  # compared
    differs_at: int | None  # position of the first output token that differs; None: all are the same
    margin_nats: float = 0.0  # at that position, by how much the plain token is more probable; a lower bound

    @property
    def is_failed(self) -> bool:
        return self.differs_at is not None and abs(self.margin_nats) > NEAR_TIE_NATS


@dataclass(slots=True)
class _Live:
    """A request as it was served: what its audit is compared with."""

    request: GenerationRequest
    tokens: list[int]


class AuditedEngine:
    """An engine whose outputs are audited. Implements `Engine` over another engine. Live requests go first."""

    def __init__(
        self,
        engine: Engine,
        options: AuditOptions,
        report: Callable[[Audit], None],
        draw: Callable[[], float],
        poll_seconds: float = 0.1,
        report_error: Callable[[], None] = lambda: None,
    ) -> None:
        """report: is called with every finished audit. report_error: is called when an audit is given up.

        draw: returns uniform numbers in [0, 1), which choose the requests.
        """
        self._engine = engine
        self._options = options
        self._report = report
        self._report_error = report_error
        self._draw = draw
        self._poll_seconds = poll_seconds
        self._pending: deque[_Live] = deque(maxlen=options.max_pending)
        self.num_begun = 0  # audits, including those that gave way to live requests
        self._has_pending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def vocabulary_size(self) -> int:
        return self._engine.vocabulary_size

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def default_draft_tokens(self) -> int:
        return self._engine.default_draft_tokens

    @property
    def unsupported_fields(self) -> Mapping[str, str]:
        return self._engine.unsupported_fields

    @property
    def drafter_description(self) -> str:
        return self._engine.drafter_description

    @property
    def num_pending(self) -> int:
        """The number of requests that wait for their audit."""
        return len(self._pending)

    async def start(self) -> None:
        await self._engine.start()
        self._task = asyncio.create_task(self._audit_forever())

    async def stop(self, drain_seconds: float) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._engine.stop(drain_seconds)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        is_comparable = request.speculation.enabled and request.max_tokens > 0
        if self._options.greedy_only and not request.rules.is_greedy:
            is_comparable = False
        if not is_comparable or self._draw() >= self._options.fraction:
            return self._engine.generate(request)
        return self._listen(request)

    async def _listen(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Pass on a request's deltas and remember its tokens, also when it is closed early."""
        tokens: list[int] = []
        try:
            async with aclosing(_generator(self._engine.generate(request))) as deltas:
                async for delta in deltas:
                    tokens += delta.tokens
                    yield delta
        finally:
            if tokens:
                self._pending.append(_Live(request, tokens))
                self._has_pending.set()

    async def _audit_forever(self) -> None:
        """Audit one request after another until cancelled. An audit that fails for any reason is given up."""
        while True:
            await self._has_pending.wait()
            live = self._pending[0]
            try:
                is_done = await self._audit(live)
            except Exception:
                log.exception("the audit of request %s was given up", live.request.request_id)
                self._report_error()
                is_done = True
            if is_done and self._pending[0] is live:  # else newer ones have pushed it out
                self._pending.popleft()
            if not self._pending:
                self._has_pending.clear()

    async def _audit(self, live: _Live) -> bool:
        """Audit one request as soon as the engine is idle. Returns False if a live request comes in between."""
        await self._wait_idle()
        audit = await self._decode_again(live)
        if audit is None:
            return False
        self._tell(live, audit)
        return True

    async def _wait_idle(self) -> None:
        """Return once the engine was idle for `idle_seconds`."""
        seconds = 0.0
        while seconds < self._options.idle_seconds:
            await asyncio.sleep(self._poll_seconds)
            status = self.status()
            is_idle = status.phase == "ready" and status.num_running == status.num_waiting == 0
            seconds = seconds + self._poll_seconds if is_idle else 0.0

    async def _decode_again(self, live: _Live) -> Audit | None:
        """Decode a request again, plainly, and compare. Returns None if a live request comes in between."""
        self.num_begun += 1
        request = replace(
            live.request,
            request_id=f"audit-{self.num_begun}",  # new for every try: the engine may not have let go of the last one
            max_tokens=len(live.tokens),
            rules=replace(live.request.rules, logprobs=ALTERNATIVES),
            prompt_logprobs=None,
            speculation=SpeculationOptions(enabled=False),
            timeout_seconds=None,
            reuse_prefix=False,
        )
        plain: list[TokenLogprobs] = []
        async with aclosing(_generator(self._engine.generate(request))) as deltas:
            async for delta in deltas:
                plain += delta.logprobs
                if num_common([entry.token for entry in plain], live.tokens) < min(len(plain), len(live.tokens)):
                    break
                status = self.status()
                if delta.finish_reason is None and (status.num_running > 1 or status.num_waiting):
                    return None
        return _compare(live, plain)

    def _tell(self, live: _Live, audit: Audit) -> None:
        """Log and report a finished audit."""
        if audit.differs_at is not None:
            log.log(
                logging.ERROR if audit.is_failed else logging.WARNING,
                "audit of request %s: output token %d of %d differs from plain decoding, margin %.2e nats%s",
                audit.request_id,
                audit.differs_at,
                len(live.tokens),
                audit.margin_nats,
                "" if audit.is_failed else ", a near-tie",
            )
        self._report(audit)


def _compare(live: _Live, plain: list[TokenLogprobs]) -> Audit:
    request_id = live.request.request_id
    position = num_common([entry.token for entry in plain], live.tokens)
    if position >= len(live.tokens):
        return Audit(request_id, len(live.tokens), None)
    if position == len(plain):  # plain decoding ended earlier
        return Audit(request_id, position, position, float("inf"))
    known = dict(plain[position].top)
    lowest = min(known.values(), default=plain[position].logprob)
    return Audit(request_id, position, position, plain[position].logprob - known.get(live.tokens[position], lowest))


def _generator(deltas: AsyncIterator[TokenDelta]) -> AsyncGenerator[TokenDelta, None]:
    """Add `aclose` to the type: the protocol promises it, but AsyncIterator does not have it."""
    return cast(AsyncGenerator[TokenDelta, None], deltas)
