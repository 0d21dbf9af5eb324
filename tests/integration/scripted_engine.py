"""An engine that plays a fixed script, for what no model does on request: failing, waiting, filling up.

It keeps the promises of the Engine protocol (admission at the first `anext`, cancelling by `aclose`), so that the HTTP
edge can be tested without a model. Everything about real generation is tested with the real engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from service.engine.base import (
    EngineStatus,
    EngineUnavailableError,
    GenerationRequest,
    TokenDelta,
)

Step = TokenDelta | Exception | float
"""A delta, what is raised, or seconds to wait."""


@dataclass
class ScriptedEngine:
    """Plays `script(request)` for every request, and notes how each one ended."""

    script: Callable[[GenerationRequest], Iterable[Step]]
    phase: str = "ready"
    seen: list[GenerationRequest] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)  # request id -> finished, failed or cancelled
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    start_error: Exception | None = None
    start_seconds: float = 0.0
    vocabulary_size: int = 272
    context_length: int = 512
    default_draft_tokens: int = 16
    drafter_description: str = "a script"
    unsupported_fields: Mapping[str, str] = field(default_factory=dict)
    drafter_up: bool = True

    def __post_init__(self) -> None:
        self._idle.set()

    async def start(self) -> None:
        self.phase = "loading"
        await asyncio.sleep(self.start_seconds)
        if self.start_error is not None:
            raise self.start_error
        self.phase = "ready"

    async def stop(self, drain_seconds: float) -> None:
        self.phase = "draining"
        async with asyncio.timeout(drain_seconds):
            await self._idle.wait()

    def status(self) -> EngineStatus:
        return EngineStatus(
            self.phase,  # type: ignore[arg-type]
            "the script says so" if self.phase != "ready" else "",
            0.5 if self.phase == "loading" else 1.0,
            num_running=len(self.seen) - len(self.ended),
            drafter_up=self.drafter_up,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if self.phase != "ready":
            raise EngineUnavailableError(f"the engine is {self.phase}")
        self.seen.append(request)
        self._idle.clear()
        outcome = "cancelled"
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    outcome = "failed"
                    raise step
                if isinstance(step, TokenDelta):
                    if step.finish_reason is not None:
                        outcome = "finished"
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.ended[request.request_id] = outcome
            if len(self.ended) == len(self.seen):
                self._idle.set()


def deltas(text: str, *, sizes: Iterable[int] = (), finish_reason: str = "length") -> list[TokenDelta]:
    """`text` as byte tokens, cut into deltas of the given sizes; what is left comes in one more."""
    tokens = tuple(text.encode())
    parts: list[tuple[int, ...]] = []
    for size in sizes:
        parts.append(tokens[:size])
        tokens = tokens[size:]
    parts.append(tokens)
    last = len(parts) - 1
    return [
        TokenDelta(tokens=part, finish_reason=finish_reason if index == last else None)  # type: ignore[arg-type]
        for index, part in enumerate(parts)
    ]
