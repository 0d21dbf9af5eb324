"""From settings to running engines: the target's weights are loaded once and shared by all."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from drafters.ngram import NgramModel
from service.bench.cells import PLAIN, Cell, Parts
from service.bench.embedded import EmbeddedContestant, StepLog
from service.engine.drafting import Drafting
from service.engine.embedded import EmbeddedEngine, Load, Progress
from service.engine.scheduler import SchedulerLimits
from service.settings import NO_DRAFTER, PROMPT_LOOKUP, Settings
from service.text.tokenizer import TextTokenizer
from transformer.model import Transformer
from verifiers.base import Verifier
from verifiers.torch_lm import TorchVerifier


@dataclass(frozen=True, slots=True)
class Loaded:
    tokenizer: TextTokenizer
    verifier: Verifier
    parts: Parts
    facts: dict[str, str]


def has_drafter(settings: Settings) -> bool:
    return settings.model.drafter_choice not in (PROMPT_LOOKUP, NO_DRAFTER)


def load(settings: Settings, num_slots: int) -> Loaded:
    """Load target, tokenizer, and what drafts, with room for `num_slots` requests at the same time.

    Raises CheckpointError, TokenizerError, NgramError.
    """
    model = settings.model
    dtype = getattr(torch, model.dtype)
    target = Transformer.load(model.target, model.device, dtype)
    config = target.config
    tokenizer = TextTokenizer.from_folder(model.target, config.end_token_ids)
    drafter = Transformer.load(Path(model.drafter_choice), model.device, dtype) if has_drafter(settings) else None
    ngram = NgramModel.load(model.ngram_folder) if model.ngram_folder is not None else None
    parts = Parts(
        drafter=drafter,
        ngram=ngram,
        vocabulary_size=config.vocabulary_size,
        end_tokens=config.end_token_ids,
        num_slots=num_slots,
        speculation=settings.speculation,
    )
    verifier = TorchVerifier(target, num_slots, config.max_positions, tokenizer.size)
    facts = {
        "target": f"{model.target}: {_describe(target)}, {model.dtype} on {model.device}",
        "drafter": "none" if drafter is None else f"{model.drafter_choice}: {_describe(drafter)}",
        "n-grams": "none"
        if ngram is None
        else f"{model.ngram_folder}: order {ngram.order}, {ngram.num_bytes / 1e6:.1f} MB",
    }
    return Loaded(tokenizer, verifier, parts, facts)


@asynccontextmanager
async def embedded_contestants(
    loaded: Loaded, cells: Sequence[Cell], settings: Settings
) -> AsyncIterator[list[EmbeddedContestant]]:
    """One started engine per cell, over the same verifier: only one of them may work at any time."""
    limits = SchedulerLimits(
        max_running=loaded.parts.num_slots,
        prefill_chunk_tokens=settings.scheduler.prefill_chunk_tokens,
        reuse_prefixes=False,  # every cell reads its prompts itself; and the slots belong to all of them in turn
    )
    engines: list[EmbeddedEngine] = []
    contestants = []
    try:
        for cell in cells:
            log = StepLog()
            engine = EmbeddedEngine(_loader(loaded.verifier, cell, loaded.parts), limits, observers=[log])
            engines.append(engine)
            await engine.start()
            contestants.append(EmbeddedContestant(cell.name, engine, log, cell.name == PLAIN, time.perf_counter))
        yield contestants
    finally:
        for engine in engines:
            await engine.stop(drain_seconds=0)


def _loader(verifier: Verifier, cell: Cell, parts: Parts) -> Load:
    def build(progress: Progress) -> tuple[Verifier, Drafting]:
        return verifier, cell.build(parts)

    return build


def _describe(model: Transformer) -> str:
    config = model.config
    return (
        f"{config.architecture}, {config.num_layers} layers of {config.hidden_size}, "
        f"vocabulary {config.vocabulary_size}"
    )
