"""The drafting pipeline as vLLM's worker sees it: batch rows in, drafts out, true counts back.

Nothing here imports vLLM: `service.engine.vllm.worker` translates its objects into the few words below.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from drafters.base import Draft, DraftingCost, DraftRequest, Outcome, PolicyName, StepRecord, Tokens

if TYPE_CHECKING:
    from torch import Tensor

MAX_RECORDS = 4096  # kept until somebody takes them
MAX_TRACES = 64  # requests whose traces are kept after they ended

_READING = Draft(bypass_reason="prefill")
_DISABLED = Draft(bypass_reason="disabled")
_LAST_TOKEN = Draft(bypass_reason="last_token")
_PAUSED = Draft(bypass_reason="drafter_failed")

Trace = list[tuple[str, list[int], int]]
"""Per step of a request: where its draft came from, the tokens that were verified, how many were accepted."""


class Pipeline(Protocol):
    """`drafters.pipeline.DraftPipeline`, or whatever stands in for it."""

    max_draft_tokens: int
    last_cost: DraftingCost  # of the latest `propose`

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]: ...

    def observe(self, step: StepRecord) -> None: ...

    def release(self, request_id: str) -> None: ...

    def calibrate(self, verify_seconds: Mapping[int, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request says about its drafts; it travels in vLLM's `extra_args`."""

    name: str = ""  # the service's id of the request; vLLM's has a suffix
    enabled: bool = True
    max_draft_tokens: int | None = None
    policy: PolicyName | None = None
    trace: bool = False
    probe: int | None = None  # calibration: always draft so many tokens, whatever they are

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RequestOptions":
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the batch after a step."""

    request_id: str
    tokens: Tokens  # [length] committed, a view
    num_sampled: int  # tokens that the step committed; 0: its prompt is still being read
    num_verified: int  # draft tokens that the step really verified: the scheduler may have cut the draft
    num_rows: int  # of the target's pass
    is_prefill: bool  # whether these rows are prompt
    num_left: int  # tokens that may still be generated
    temperature: float
    options: RequestOptions
    hidden_states: "Tensor | None" = None  # [length, hidden] the target's that each token was predicted from; a view


@dataclass(slots=True)
class _Pending:
    """What was proposed after the last step, until the next one tells what became of it."""

    drafts: dict[str, Draft] = field(default_factory=dict)
    cost: DraftingCost = field(default_factory=DraftingCost)


class VllmProposer:
    """`observe` what the step made of the last drafts, then `propose` the next ones. Not thread-safe."""

    def __init__(self, pipeline: Pipeline, vocabulary_size: int, clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._pending = _Pending()
        self._names: dict[str, str] = {}  # requests in the batch: vLLM's id -> the service's
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._probes: dict[tuple[int, int], list[StepRecord]] = {}  # (batch, drafted tokens) -> calibration steps
        self._step_started = 0.0
        self._last_ended: float | None = None  # None: nobody was left over from the step before

    def begin(self, gone: Iterable[str], running: Iterable[str]) -> None:
        """A step starts. gone: finished, aborted and preempted requests. running: those in the step."""
        self._step_started = self._clock()
        for request_id in gone:
            self._pending.drafts.pop(request_id, None)
            if self._names.pop(request_id, None) is not None:
                self._pipeline.release(request_id)
        if not any(request_id in self._names for request_id in running):
            self._last_ended = None  # the engine has been idle: that is no cost of a step

    def propose(self, rows: Sequence[Row]) -> list[list[int]]:
        """Learn from the step that made `rows`, then draft for each of them (none longer than it may be)."""
        self._pipeline.observe(self._note(rows))
        drafts = self._draft(rows)
        self._last_ended = self._clock()
        return [list(draft.tokens) for draft in drafts]

    def skip(self, rows: Sequence[Row]) -> None:
        """Note the step that made `rows` while the pipeline must not be asked."""
        self._note(rows)
        self._last_ended = self._clock()

    def _note(self, rows: Sequence[Row]) -> StepRecord:
        record = self._record(rows, self._clock())
        for row in rows:
            self._names[row.request_id] = row.options.name
        self._keep(record, rows)
        self._pending = _Pending()
        return record

    def take_records(self) -> list[StepRecord]:
        """Every step since the last call, with the service's request ids."""
        records = list(self._records)
        self._records.clear()
        return records

    def trace_of(self, name: str) -> Trace:
        """The steps of a request that asked for a trace, by the service's id."""
        return self._traces.get(name, [])

    def calibrate(self) -> dict[int, float]:
        """Set the pipeline's costs from the probe requests that have run; returns seconds by rows."""
        measured = {
            batch + drafted: float(np.median([record.verify_seconds for record in records[1:] or records]))
            for (batch, drafted), records in sorted(self._probes.items())
            if drafted > 0 or batch == 1
        }
        if measured:
            self._pipeline.calibrate(measured)
            for (_, drafted), records in self._probes.items():
                if drafted == 0:
                    for record in records[1:]:
                        self._pipeline.observe(record)  # what a plain step costs, and what goes on between two steps
        self._probes.clear()
        self._records.clear()
        return measured

    def _draft(self, rows: Sequence[Row]) -> list[Draft]:
        """One draft per row; those whose prompt is still read are no rows of the next step's drafts."""
        limits = [_limit(row, self._pipeline.max_draft_tokens) for row in rows]
        requests = [
            DraftRequest(
                row.request_id,
                row.tokens,
                most,
                row.options.policy,
                row.temperature,
                hidden_states=row.hidden_states,
            )
            for row, (most, _) in zip(rows, limits, strict=True)
            if row.num_sampled
        ]
        proposed: Iterable[Draft] = iter(())
        if any(most for most, _ in limits):
            drafts = self._pipeline.propose(requests, 0)
            if len(drafts) != len(requests):
                raise ValueError(f"{len(drafts)} drafts for {len(requests)} requests")
            proposed = iter(drafts)
            self._pending.cost = self._pipeline.last_cost
        else:
            proposed = iter([_LAST_TOKEN] * len(requests))
        chosen = []
        for row, (most, none) in zip(rows, limits, strict=True):
            draft = next(proposed) if row.num_sampled else none
            if not most:
                draft = none
            if row.options.probe is not None and row.num_sampled:
                draft = self._probe(row)
            self._pending.drafts[row.request_id] = draft
            chosen.append(draft)
        return chosen

    def _probe(self, row: Row) -> Draft:
        """A draft that is surely wrong but costs what a draft costs."""
        count = min(row.options.probe or 0, row.num_left - 1)
        last = int(row.tokens[-1])
        return Draft(tuple((last + 1 + i) % self._vocabulary_size for i in range(count)), "free")

    def _record(self, rows: Sequence[Row], now: float) -> StepRecord:
        gap = 0.0 if self._last_ended is None else max(self._step_started - self._last_ended, 0.0)
        pending = self._pending
        outcomes = []
        for row in rows:
            if not row.num_sampled:
                continue
            draft = _READING if row.is_prefill else pending.drafts.get(row.request_id, _PAUSED)
            verified = _verified(draft, row.num_verified)
            outcomes.append(Outcome(row.request_id, verified, row.num_sampled - 1, row.options.policy))
        return StepRecord(
            outcomes=outcomes,
            num_rows=sum(row.num_rows for row in rows),
            num_prefill_rows=sum(row.num_rows for row in rows if row.is_prefill),
            drafting=pending.cost,
            verify_seconds=now - self._step_started,
            commit_seconds=gap,
            mean_context=sum(len(row.tokens) for row in rows) / max(len(rows), 1),
        )

    def _keep(self, record: StepRecord, rows: Sequence[Row]) -> None:
        names = self._names
        named = [replace(outcome, request_id=names[outcome.request_id]) for outcome in record.outcomes]
        probes = {row.options.probe for row in rows}
        if probes == {None}:
            self._records.append(replace(record, outcomes=named))
        elif len(probes) == 1 and record.num_prefill_rows == 0:
            (drafted,) = probes
            if record.num_rows == len(rows) * (1 + (drafted or 0)):
                self._probes.setdefault((len(rows), len(rows) * (drafted or 0)), []).append(record)
        traced = {row.options.name for row in rows if row.options.trace}
        for outcome in named:
            if outcome.request_id in traced:
                trace = self._traces.setdefault(outcome.request_id, [])
                trace.append((outcome.draft.source, list(outcome.draft.tokens), outcome.num_accepted))
        while len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)


def _limit(row: Row, service_draft_tokens: int) -> tuple[int, Draft]:
    """The most tokens worth drafting, and what stands for a draft if that is none (a step adds one token itself)."""
    if not row.num_sampled:
        return 0, _READING
    options = row.options
    wanted = service_draft_tokens if options.max_draft_tokens is None else options.max_draft_tokens
    if not options.enabled or wanted <= 0:
        return 0, _DISABLED
    return max(min(wanted, service_draft_tokens, row.num_left - 1), 0), _LAST_TOKEN


def _verified(draft: Draft, count: int) -> Draft:
    """The part of a draft that was verified: the scheduler cuts drafts that a grammar or its budget refuses."""
    if count == len(draft.tokens):
        return draft
    if count == 0:
        return Draft(bypass_reason="scheduler")
    return replace(draft, tokens=draft.tokens[:count], confidences=draft.confidences[:count])
