"""The runtime audit: some live requests are decoded again, plainly and in idle time, and must come out the same."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from service.engine.base import Engine, EngineError, EngineStatus, GenerationRequest, SpeculationOptions, TokenDelta
from verifiers.base import TokenLogprobs

log = logging.getLogger(__name__)

NEAR_TIE_NATS = 1e-4  # between the two tokens: within rounding of float32
ALTERNATIVES = 20  # reported beside each plain token: where the margin to the live token is looked up


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What is audited, and when."""

    fraction: float = 0.01  # of the requests that use speculation
    idle_seconds: float = 1.0  # how long nothing must have run or waited before an audit begins
    max_pending: int = 64  # requests that wait for their audit; beyond it the oldest is dropped
    greedy_only: bool = False  # for engines whose draws are not keyed by position


@dataclass(frozen=True, slots=True)
class Audit:
    """One request, decoded twice."""

    request_id: str
    num_tokens: int  # compared
    differs_at: int | None  # the first output token that differs; None: all are the same
    margin_nats: float = 0.0  # log probability of the plain token above the live one there; at least so much

    @property
    def is_failed(self) -> bool:
        return self.differs_at is not None and abs(self.margin_nats) > NEAR_TIE_NATS


@dataclass(slots=True)
class _Heard:
    request: GenerationRequest
    tokens: list[int]


class AuditedEngine:
    """An engine that is watched. Implements `Engine` over another one; live requests go first at every step."""

    def __init__(
        self,
        engine: Engine,
        options: AuditOptions,
        report: Callable[[Audit], None],
        draw: Callable[[], float],
        poll_seconds: float = 0.1,
    ) -> None:
        """report: hears of every finished audit. draw: uniform numbers in [0, 1) that choose the requests."""
        self._engine = engine
        self._options = options
        self._report = report
        self._draw = draw
        self._poll_seconds = poll_seconds
        self._pending: deque[_Heard] = deque(maxlen=options.max_pending)
        self.num_begun = 0  # audits, those that gave way to live requests included
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
        """Requests that wait for their audit."""
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
        """Pass on a request's deltas and remember its tokens; those of one that is closed early, too."""
        heard: list[int] = []
        try:
            async with aclosing(_generator(self._engine.generate(request))) as deltas:
                async for delta in deltas:
                    heard += delta.tokens
                    yield delta
        finally:
            if heard:
                self._pending.append(_Heard(request, heard))
                self._has_pending.set()

    async def _audit_forever(self) -> None:
        while True:
            await self._has_pending.wait()
            await self._wait_idle()
            heard = self._pending.popleft()
            try:
                audit = await self._decode_again(heard)
            except EngineError:
                log.warning("the audit of request %s was given up", heard.request.request_id, exc_info=True)
                audit = None
                continue
            finally:
                if not self._pending:
                    self._has_pending.clear()
            if audit is None:  # a live request came
                self._pending.appendleft(heard)
                self._has_pending.set()
                continue
            self._tell(heard, audit)

    async def _wait_idle(self) -> None:
        seconds = 0.0
        while seconds < self._options.idle_seconds:
            await asyncio.sleep(self._poll_seconds)
            status = self.status()
            is_idle = status.phase == "ready" and status.num_running == status.num_waiting == 0
            seconds = seconds + self._poll_seconds if is_idle else 0.0

    async def _decode_again(self, heard: _Heard) -> Audit | None:
        """Compare; None if a live request came in between."""
        self.num_begun += 1
        request = replace(
            heard.request,
            request_id=f"audit-{self.num_begun}",  # a new one for every try: the last may not have left yet
            max_tokens=len(heard.tokens),
            rules=replace(heard.request.rules, logprobs=ALTERNATIVES),
            prompt_logprobs=None,
            speculation=SpeculationOptions(enabled=False),
            timeout_seconds=None,
            reuse_prefix=False,
        )
        plain: list[TokenLogprobs] = []
        async with aclosing(_generator(self._engine.generate(request))) as deltas:
            async for delta in deltas:
                plain += delta.logprobs
                if any(entry.token != live for entry, live in zip(plain, heard.tokens, strict=False)):
                    break
                status = self.status()
                if delta.finish_reason is None and (status.num_running > 1 or status.num_waiting):
                    return None
        return _compare(heard, plain)

    def _tell(self, heard: _Heard, audit: Audit) -> None:
        if audit.differs_at is not None:
            log.log(
                logging.ERROR if audit.is_failed else logging.WARNING,
                "audit of request %s: output token %d of %d is not that of plain decoding, margin %.2e nats%s",
                audit.request_id,
                audit.differs_at,
                len(heard.tokens),
                audit.margin_nats,
                "" if audit.is_failed else ", a near-tie",
            )
        self._report(audit)


def _compare(heard: _Heard, plain: list[TokenLogprobs]) -> Audit:
    request_id, live = heard.request.request_id, heard.tokens
    for position, (entry, token) in enumerate(zip(plain, live, strict=False)):
        if entry.token != token:
            known = dict(entry.top)
            least = min(known.values(), default=entry.logprob)
            return Audit(request_id, position, position, entry.logprob - known.get(token, least))
    if len(plain) < len(live):  # plain decoding had ended
        return Audit(request_id, len(plain), len(plain), float("inf"))
    return Audit(request_id, len(live), None)


def _generator(deltas: AsyncIterator[TokenDelta]) -> AsyncGenerator[TokenDelta, None]:
    """The protocol promises `aclose`; AsyncIterator does not have it."""
    return cast(AsyncGenerator[TokenDelta, None], deltas)
