"""One request after another through an engine with a given pipeline, and what became of the drafts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drafters.base import Pipeline, StepRecord
from service.bench.embedded import READING, StepLog
from service.bench.loading import Loaded
from service.bench.prompts import Prompt, cut_prompts, held_out_texts
from service.engine.base import GenerationRequest
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.structured import Structure
from verifiers.base import SamplingRules, Verifier


@dataclass(frozen=True, slots=True)
class Decoded:
    """What was generated, by which steps, in what time."""

    outputs: list[tuple[int, ...]]
    records: list[StepRecord]
    seconds: float

    @property
    def _drafts(self) -> list[tuple[int, int]]:
        """Drafted and accepted tokens of every verification, without those that read a prompt."""
        outcomes = [outcome for record in self.records for outcome in record.outcomes]
        return [(len(o.draft.tokens), o.num_accepted) for o in outcomes if o.draft.bypass_reason != READING]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return sum(accepted for _, accepted in self._drafts) / max(sum(drafted for drafted, _ in self._drafts), 1)

    @property
    def acceptance_length(self) -> float:
        """Tokens per step, the extra one included."""
        return 1 + sum(accepted for _, accepted in self._drafts) / len(self._drafts)

    @property
    def accepted_per_draft(self) -> float:
        """Accepted tokens of a draft."""
        drafts = [accepted for drafted, accepted in self._drafts if drafted]
        return sum(drafts) / max(len(drafts), 1)

    @property
    def seconds_per_draft(self) -> float:
        """Of steps with a diffusion pass, in all that drafts but the search."""
        passes = [record.seconds.draft for record in self.records if record.drafting.num_diffusion_rows]
        return sum(passes) / max(len(passes), 1)


def held_out_prompts(loaded: Loaded, count: int, length: int) -> list[Prompt]:
    """Pieces of held-out files, the same ones every time."""

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.encode(text, add_special_tokens=False)

    return cut_prompts(held_out_texts(), count, length, encode, seed=0)


async def start_engine(
    loaded: Loaded, build: Callable[[], Pipeline], places: int = 1, observers: Sequence[StepLog] = ()
) -> EmbeddedEngine:
    """An engine over the shared weights, with a pipeline of its own; every prompt is read anew."""

    def parts(progress: Progress) -> tuple[Verifier, Pipeline]:
        return loaded.verifier, build()

    limits = SchedulerLimits(places, max_waiting=0, reuse_prefixes=False)
    engine = EmbeddedEngine(parts, limits, observers=observers)
    await engine.start()
    return engine


async def decode(
    loaded: Loaded,
    build: Callable[[], Pipeline],
    prompts: Sequence[Prompt],
    max_tokens: int,
    temperature: float = 0.0,
    structure: Structure | None = None,
) -> Decoded:
    """Continue each prompt, one at a time, with a pipeline of its own."""
    log = StepLog()

    engine = await start_engine(loaded, build, observers=[log])
    outputs = []
    started = time.perf_counter()
    try:
        for number, prompt in enumerate(prompts):
            rules = SamplingRules(
                number, temperature=temperature, stop_token_ids=loaded.models.target.end_token_ids if structure else ()
            )
            request = GenerationRequest(f"{number}", prompt.tokens, max_tokens, rules, structure=structure)
            tokens: list[int] = []
            async for delta in engine.generate(request):
                tokens += delta.tokens
            outputs.append(tuple(tokens))
        seconds = time.perf_counter() - started
    finally:
        await engine.stop(0)
    return Decoded(outputs, log.take(), seconds)
