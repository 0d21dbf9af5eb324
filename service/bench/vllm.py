"""Contestants on vLLM: our pipeline beside vLLM's own methods, on the same target, one engine each."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from service.bench.cells import PLAIN, UnknownCellError
from service.bench.embedded import EmbeddedContestant, StepLog
from service.bench.prompts import Prompt
from service.bench.records import Acceptance, Pass, Role, Workload
from service.engine.base import GenerationRequest, SpeculationStats
from service.engine.vllm.engine import VllmEngine
from service.settings import Settings

NEAR_TIE_NATS = 1e-4  # a step of several rows rounds differently from a step of one


@dataclass(frozen=True, slots=True)
class VllmCell:
    """One configuration of the vLLM engine."""

    name: str
    meaning: str
    role: Role = "other"
    vllm: Mapping[str, Any] = field(default_factory=dict)  # overrides of the `vllm` settings
    speculation: Mapping[str, Any] = field(default_factory=dict)
    is_usual: bool = True


VLLM_CELLS = (
    VllmCell(PLAIN, "vLLM without speculation", "reference", {"method": "none"}),
    VllmCell("ngram", "vLLM's n-gram method, 8 tokens", "free", {"method": "ngram"}),
    VllmCell(
        "suffix",
        "vLLM's suffix decoding, at most 32 tokens (needs arctic-inference)",
        "free",
        {"method": "suffix", "method_tokens": 32},
        is_usual=False,
    ),
    VllmCell(
        "free",
        "our pipeline without a model: own text and n-grams",
        "free",
        speculation={"diffusion": False},
        is_usual=False,
    ),
    VllmCell("default", "our pipeline as the settings have it"),
    VllmCell(
        "garbage",
        "our pipeline with an always wrong drafter and no free drafts",
        vllm={"pipeline": "service.bench.vllm:garbage"},
        is_usual=False,
    ),
)


def choose_vllm_cells(names: Sequence[str] | None, everything: bool) -> list[VllmCell]:
    """Return the cells to measure, `plain` always first. Raises UnknownCellError."""
    known = {cell.name: cell for cell in VLLM_CELLS}
    if names is None:
        return [cell for cell in VLLM_CELLS if everything or cell.is_usual]
    for name in names:
        if name not in known:
            raise UnknownCellError(f"unknown cell {name!r}; on vLLM choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys([PLAIN, *names])]


def garbage(settings: Mapping[str, Any], device: str) -> Any:
    """Return our pipeline without free drafts, with a drafter whose logits are all given to the next token id."""
    import torch

    from service.bench.cells import ShiftedTransformer
    from service.wiring import build_pipeline, warm_up
    from transformer.config import TransformerConfig

    built = Settings(**settings)
    speculation = built.speculation.model_copy(update={"free_drafts": False, "search": False})
    built = built.model_copy(update={"speculation": speculation})
    dtype: torch.dtype = getattr(torch, built.model.dtype)
    drafter = ShiftedTransformer.load(built.model.drafter_choice, device, dtype)  # type: ignore[arg-type]
    pipeline = build_pipeline(built, TransformerConfig.read(built.model.target), drafter)
    warm_up(pipeline)
    return pipeline


class VllmContestant(EmbeddedContestant):
    """Sends the same requests to vLLM. Its steps come from the worker, its counts from vLLM itself."""

    def __init__(self, name: str, engine: VllmEngine, log: StepLog, role: Role) -> None:
        super().__init__(name, engine, log, role, time.perf_counter)
        self.tolerated_margin = NEAR_TIE_NATS
        self._vllm = engine
        self._stats: dict[str, SpeculationStats] = {}

    def takes(self, workload: Workload) -> bool:
        return workload.temperature == 0  # vLLM draws with its own noise, so sampled texts cannot be compared

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        self._stats.clear()
        result = await super().run(prompts, workload, pair, seed)
        counts = list(self._stats.values())  # in the order of the prompts
        generations = tuple(
            replace(generation, reported=None if generation.steps else _acceptance(len(generation.tokens), stats))
            for generation, stats in zip(result.generations, counts, strict=True)
        )
        phases = result.phases if any(generation.steps for generation in generations) else None
        return replace(result, generations=generations, phases=phases)

    async def _settle(self) -> None:
        await self._vllm.report()

    async def _consume(self, request: GenerationRequest, started: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
        self._stats[request.request_id] = SpeculationStats()
        tokens: list[int] = []
        arrivals: list[float] = []
        async for delta in self._vllm.generate(request):
            if delta.stats is not None:
                self._stats[request.request_id] = delta.stats
            if delta.tokens:
                tokens += delta.tokens
                arrivals.append(self._clock() - started)
        return tuple(tokens), tuple(arrivals)


def _acceptance(num_tokens: int, stats: SpeculationStats) -> Acceptance:
    """Derive the steps from totals: each step after the prompt's adds one token to those that it accepts."""
    num_steps = max(num_tokens - 1 - stats.num_accepted_draft_tokens, stats.num_spec_steps)
    return Acceptance(num_steps, stats.num_spec_steps, stats.num_draft_tokens, stats.num_accepted_draft_tokens)


@asynccontextmanager
async def vllm_contestants(
    settings: Settings, cells: Sequence[VllmCell], num_running: int
) -> AsyncIterator[list[VllmContestant]]:
    """Start one engine per cell, in processes of its own. Only one of them works at any time."""
    scheduler = settings.scheduler.model_copy(update={"max_running": num_running, "prefix_cache": False})
    engines: list[VllmEngine] = []
    contestants = []
    try:
        for cell in cells:
            changed = settings.model_copy(
                update={
                    "scheduler": scheduler,
                    "vllm": settings.vllm.model_copy(update=dict(cell.vllm)),
                    "speculation": settings.speculation.model_copy(update=dict(cell.speculation)),
                }
            )
            log = StepLog()
            engine = VllmEngine(changed, [log])
            engines.append(engine)
            try:
                await engine.start()
            except (ValueError, ImportError) as error:  # vLLM cannot run this method here
                raise UnknownCellError(f"the cell {cell.name!r} cannot be started: {error}") from error
            contestants.append(VllmContestant(cell.name, engine, log, cell.role))
        yield contestants
    finally:
        for engine in engines:
            await engine.stop(drain_seconds=0)
