"""From settings to running engines: weights are loaded once and shared by all."""

import functools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from drafters.base import Pipeline
from service.bench.cells import Cell, DrafterUse, Models, ShiftedTransformer, build
from service.bench.embedded import EmbeddedContestant, StepLog
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.folders import find_mismatch, read_folder
from service.setting_groups import NO_DRAFTER, PROMPT_LOOKUP
from service.settings import Settings
from service.text.tokenizer import TextTokenizer
from service.wiring import build_tokenizer
from transformer.config import CheckpointError
from transformer.model import Transformer
from verifiers.base import Verifier
from verifiers.torch_lm import TorchVerifier


@dataclass(frozen=True, slots=True)
class Loaded:
    settings: Settings
    tokenizer: TextTokenizer
    verifier: Verifier
    models: Models
    facts: dict[str, str]


def has_drafter(settings: Settings) -> bool:
    return settings.model.drafter_choice not in (PROMPT_LOOKUP, NO_DRAFTER)


def load(settings: Settings, cells: Sequence[Cell], num_slots: int) -> Loaded:
    """Load what the cells need, with room for `num_slots` requests at the same time.

    Raises CheckpointError or TokenizerError.
    """
    scheduler = settings.scheduler.model_copy(update={"max_running": num_slots, "max_waiting": 0})
    settings = settings.model_copy(update={"scheduler": scheduler})
    model = settings.model
    dtype: torch.dtype = getattr(torch, model.dtype)
    tokenizer = build_tokenizer(model.target)
    target = Transformer.load(model.target, model.device, dtype)
    context = min(model.context_length or target.config.max_positions, target.config.max_positions)
    facts = {"target": f"{_describe(model.target)}, {model.dtype} on {model.device}"}
    drafters: dict[DrafterUse, Transformer] = {}
    if any(cell.drafter != "none" for cell in cells):
        folder = Path(model.drafter_choice)
        if mismatch := find_mismatch(read_folder(model.target), read_folder(folder)):
            raise CheckpointError(mismatch)
        drafters["real"] = Transformer.load(folder, model.device, dtype)
        drafters["garbage"] = ShiftedTransformer.load(folder, model.device, dtype)
        facts["drafter"] = _describe(folder)
    facts["n-grams"] = "none" if model.ngram_folder is None else str(model.ngram_folder)
    is_conditioned = any(drafter.config.target_hidden_size for drafter in drafters.values())
    verifier = TorchVerifier(target, num_slots, context, tokenizer.size, is_conditioned)
    return Loaded(settings, tokenizer, verifier, Models(target.config, drafters), facts)


@asynccontextmanager
async def embedded_contestants(loaded: Loaded, cells: Sequence[Cell]) -> AsyncIterator[list[EmbeddedContestant]]:
    """One started engine per cell, over the same verifier: only one of them may work at any time."""
    scheduler = loaded.settings.scheduler
    limits = SchedulerLimits(
        max_running=scheduler.max_running,
        max_waiting=scheduler.max_waiting,
        prefill_chunk_tokens=scheduler.prefill_chunk_tokens,
        reuse_prefixes=False,  # every cell reads its prompts itself; and the slots belong to all of them in turn
    )
    engines: list[EmbeddedEngine] = []
    contestants = []
    try:
        for cell in cells:
            log = StepLog()
            engine = EmbeddedEngine(functools.partial(_parts, loaded, cell), limits, observers=[log])
            engines.append(engine)
            await engine.start()
            contestants.append(EmbeddedContestant(cell.name, engine, log, cell.role, time.perf_counter))
        yield contestants
    finally:
        for engine in engines:
            await engine.stop(drain_seconds=0)


def _parts(loaded: Loaded, cell: Cell, progress: Progress) -> tuple[Verifier, Pipeline]:
    return loaded.verifier, build(cell, loaded.settings, loaded.models)


def _describe(folder: Path) -> str:
    facts = read_folder(folder)
    config = facts.config
    return (
        f"{folder.name}: {config.architecture}, {facts.num_parameters / 1e6:.1f}M parameters, "
        f"{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocabulary_size}"
    )
