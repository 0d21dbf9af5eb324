"""What the tests of a running engine share."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

from drafters.base import DraftRequest, Pipeline
from service.engine.base import (
    GenerationRequest,
    TokenDelta,
)
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from tests.checkpoints import CONTEXT_LENGTH
from transformer.model import Transformer
from verifiers.base import SamplingRules, Verifier
from verifiers.torch_lm import TorchVerifier


def verifier(model: Transformer, num_slots: int = 4) -> TorchVerifier:
    return TorchVerifier(model, num_slots=num_slots, context_length=CONTEXT_LENGTH)


def request(name: str = "r", prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(name, list(prompt), max_tokens, SamplingRules(seed=0, temperature=0))


def loading(verifier: Verifier, drafter: Pipeline) -> Callable[[Progress], tuple[Verifier, Pipeline]]:
    def load(progress: Progress) -> tuple[Verifier, Pipeline]:
        progress("everything", 0.5)
        return verifier, drafter

    return load


async def started(
    model: Transformer, drafter: Pipeline, limits: SchedulerLimits | None = None, hung_after_seconds: float = 60.0
) -> EmbeddedEngine:
    engine = EmbeddedEngine(
        loading(verifier(model), drafter), limits or SchedulerLimits(), hung_after_seconds=hung_after_seconds
    )
    await engine.start()
    return engine


async def collect(engine: EmbeddedEngine, one: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(one)]


def tokens_of(deltas: Sequence[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


class Gate:
    """A rule that drafts nothing and lets no step pass while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open()
        self.shut = self._open.clear

    def open(self) -> None:
        self._open.set()

    def __call__(self, _: DraftRequest) -> tuple[int, ...]:
        assert self._open.wait(20)
        return ()


def slow(_: DraftRequest) -> tuple[int, ...]:
    """Drafts nothing, and takes its time."""
    time.sleep(0.01)
    return ()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (the engine thread has no event for each of these)
            await asyncio.sleep(0.002)
