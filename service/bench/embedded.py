"""Contestants in this process: the embedded engine as users get it, each with its own drafting pipeline."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

from drafters.base import StepRecord
from service.bench.prompts import Prompt
from service.bench.records import DraftedStep, Generation, Mismatch, Pass, Phases, Role, Workload
from service.engine.base import Engine, GenerationRequest
from verifiers.base import SamplingRules, TokenLogprobs

READING = "prefill"  # the bypass reason of a step that read a prompt
ALTERNATIVES = 20


class StepLog:
    """Collects the engine's step records of one pass. The engine's thread writes; read it after the pass."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []

    def __call__(self, record: StepRecord) -> None:
        self._records.append(record)

    def take(self) -> list[StepRecord]:
        """Return the records since the last call."""
        taken, self._records = self._records, []
        return taken


class EmbeddedContestant:
    """An engine as a contestant. `log` must be one of its observers, and nobody else may use it during a pass."""

    def __init__(self, name: str, engine: Engine, log: StepLog, role: Role, clock: Callable[[], float]) -> None:
        self.name = name
        self.role = role
        self.tolerated_margin: float | None = None
        self._engine, self._log, self._clock = engine, log, clock
        self._numbers = itertools.count()

    def takes(self, workload: Workload) -> bool:
        return True

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        self._log.take()
        requests = [
            self._request(prompt, workload.max_tokens, SamplingRules(seed + i, temperature=workload.temperature))
            for i, prompt in enumerate(prompts)
        ]
        started = self._clock()
        pieces = await asyncio.gather(*(self._consume(request, started) for request in requests))
        await self._settle()
        records = self._log.take()
        steps = _steps_by_request(records)
        generations = tuple(
            Generation(prompt.name, tokens, arrivals, tuple(steps.get(request.request_id, ())))
            for prompt, request, (tokens, arrivals) in zip(prompts, requests, pieces, strict=True)
        )
        ended = max(generation.delta_seconds[-1] for generation in generations)
        return Pass(
            contestant=self.name,
            pair=pair,
            seconds=ended,
            generations=generations,
            phases=phases_of(records, ended),
            diffusion_step_seconds=sum(
                record.seconds.total for record in records if record.drafting.num_diffusion_rows
            ),
        )

    async def margin(self, prompt: Prompt, mismatch: Mismatch, max_tokens: int) -> float | None:
        rules = SamplingRules(seed=0, temperature=0.0, logprobs=ALTERNATIVES)
        found: list[TokenLogprobs] = []
        async for delta in self._engine.generate(self._request(prompt, max_tokens, rules)):
            found += delta.logprobs
        if mismatch.position >= len(found) or mismatch.expected is None or mismatch.found is None:
            return None
        entry = found[mismatch.position]
        known = dict(entry.top) | {entry.token: entry.logprob}
        if mismatch.expected not in known or mismatch.found not in known:
            return None
        return abs(known[mismatch.expected] - known[mismatch.found])

    def _request(self, prompt: Prompt, max_tokens: int, rules: SamplingRules) -> GenerationRequest:
        return GenerationRequest(f"{self.name}-{next(self._numbers)}", prompt.tokens, max_tokens, rules)

    async def _settle(self) -> None:
        """Wait until the log has all records of the finished requests."""

    async def _consume(self, request: GenerationRequest, started: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the tokens, and when each piece of them arrived."""
        tokens: list[int] = []
        arrivals: list[float] = []
        async for delta in self._engine.generate(request):
            if delta.tokens:
                tokens += delta.tokens
                arrivals.append(self._clock() - started)
        return tuple(tokens), tuple(arrivals)


def phases_of(records: Sequence[StepRecord], seconds: float) -> Phases:
    """Split the `seconds` of a pass into phases, by its step records."""
    prompt = sum(record.verify_seconds for record in records if record.num_prefill_rows)
    verify = sum(record.verify_seconds for record in records if not record.num_prefill_rows)
    draft = sum(record.drafting.draft_seconds for record in records)
    search = sum(record.drafting.search_seconds for record in records)
    commit = sum(record.commit_seconds for record in records)
    other = max(seconds - prompt - verify - draft - search - commit, 0.0)
    return Phases(prompt, draft, search, verify, commit, other)


def _steps_by_request(records: Sequence[StepRecord]) -> dict[str, list[DraftedStep]]:
    """Return every request's verifications, without the steps that read its prompt."""
    steps: dict[str, list[DraftedStep]] = {}
    for record in records:
        for outcome in record.outcomes:
            draft = outcome.draft
            if draft.bypass_reason != READING:
                step = DraftedStep(draft.source, len(draft.tokens), outcome.num_accepted)
                steps.setdefault(outcome.request_id, []).append(step)
    return steps
