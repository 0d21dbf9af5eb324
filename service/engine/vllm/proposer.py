"""The drafting pipeline inside vLLM's worker: rows of a batch in, drafts out, true counts back to the pipeline.

Nothing here imports vLLM: `service.engine.vllm.worker` translates its objects into `Row`.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from drafters.base import (
    BypassReason,
    Draft,
    DraftingCost,
    DraftRequest,
    Outcome,
    Pipeline,
    StepRecord,
    Tokens,
    draft_limit,
    max_draft_tokens,
)
from service.engine.vllm.calibration import ProbeSteps, probe_draft
from service.engine.vllm.records import RequestOptions, Trace

if TYPE_CHECKING:
    from torch import Tensor

MAX_RECORDS = 4096  # kept until somebody takes them
MAX_TRACES = 64  # requests whose traces are kept; the oldest goes first

_READING = Draft(bypass_reason="prefill")
_PAUSED = Draft(bypass_reason="drafter_failed")


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the batch after a step."""

    request_id: str  # vLLM's
    tokens: Tokens  # [length] committed; a view
    num_sampled: int  # tokens that the step committed; 0: its prompt is still being read
    num_verified: int  # draft tokens that the step verified: the scheduler may have cut the draft
    num_rows: int  # rows of the target's pass
    is_prefill: bool  # whether these rows are prompt
    num_left: int  # tokens that may still be generated
    temperature: float
    options: RequestOptions
    hidden_states: "Tensor | None" = None  # [length, hidden] the target's that each token was predicted from; a view


class VllmProposer:
    """Observes what the step made of the last drafts, then proposes the next ones. Not thread-safe."""

    def __init__(self, pipeline: Pipeline, vocabulary_size: int, clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._drafts: dict[str, Draft] = {}  # by vLLM's id: proposed after the last step, to be verified by the next
        self._cost = DraftingCost()  # of these drafts
        self._names: dict[str, str] = {}  # requests in the batch: vLLM's id -> the service's
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._traces: OrderedDict[str, Trace] = OrderedDict()  # by the service's id
        self._probes = ProbeSteps()
        self._step_started = 0.0
        self._last_ended: float | None = None  # None: no request was left over from the step before

    def begin(self, gone: Iterable[str], running: Iterable[str]) -> None:
        """Note that a step starts. gone: finished, aborted and preempted requests. running: those in the step."""
        self._step_started = self._clock()
        failures = []
        for request_id in gone:
            self._drafts.pop(request_id, None)
            if self._names.pop(request_id, None) is None:
                continue
            try:
                self._pipeline.release(request_id)
            except Exception as error:  # vLLM names a finished request once: the others must not be forgotten
                failures.append(error)
        if failures:
            raise failures[0]
        if not any(request_id in self._names for request_id in running):
            self._last_ended = None  # the engine was idle, and idle time is no cost of a step

    def propose(self, rows: Sequence[Row]) -> list[list[int]]:
        """Learn from the step that made `rows`, then return one draft per row, none longer than the row allows."""
        record = self._note(rows)
        if all(row.options.probe is None for row in rows):  # a probe's draft is wrong on purpose
            self._pipeline.observe(record)
        drafts = self._draft(rows)
        self._last_ended = self._clock()
        return drafts

    def skip(self, rows: Sequence[Row]) -> None:
        """Note the step that made `rows`, without asking the pipeline: it is paused after a failure."""
        self._drafts = {}  # the guard threw them away
        self._note(rows)
        self._last_ended = self._clock()

    def take_records(self) -> list[StepRecord]:
        """Return every step since the last call, with the service's request ids."""
        records = list(self._records)
        self._records.clear()
        return records

    def trace_of(self, name: str) -> Trace:
        """Return the steps of a request that asked for a trace. name: the service's id."""
        return self._traces.get(name, [])

    def calibrate(self) -> dict[int, float]:
        """Set the pipeline's costs from the probe requests that have run. Returns seconds by rows."""
        measured = self._probes.calibrate(self._pipeline)
        self._records.clear()
        return measured

    def _draft(self, rows: Sequence[Row]) -> list[list[int]]:
        limits = {row.request_id: self._limit(row) for row in rows}
        requests = [
            DraftRequest(
                row.request_id,
                row.tokens,
                limits[row.request_id][0],
                row.options.policy,
                row.temperature,
                hidden_states=row.hidden_states,
            )
            for row in rows
            if row.num_sampled
        ]
        drafts = {request_id: Draft(bypass_reason=reason) for request_id, (_, reason) in limits.items()}
        if any(limit for limit, _ in limits.values()):
            proposed = self._pipeline.propose(requests)
            if len(proposed) != len(requests):
                raise ValueError(f"{len(proposed)} drafts for {len(requests)} requests")
            for request, draft in zip(requests, proposed, strict=True):
                if request.max_draft_tokens:
                    drafts[request.request_id] = draft
            self._cost = self._pipeline.last_cost
        for row in rows:
            if row.options.probe is not None and row.num_sampled:
                length = min(row.options.probe, row.num_left - 1)
                drafts[row.request_id] = probe_draft(int(row.tokens[-1]), length, self._vocabulary_size)
        tokens = [list(drafts[row.request_id].tokens) for row in rows]
        self._drafts = drafts
        return tokens

    def _limit(self, row: Row) -> tuple[int, BypassReason]:
        """Return the most tokens worth drafting, and the reason if that is none."""
        if not row.num_sampled:
            return 0, "prefill"
        options = row.options
        wanted = max_draft_tokens(options.enabled, options.max_draft_tokens, self._pipeline.max_draft_tokens)
        return draft_limit(wanted, row.num_left)

    def _note(self, rows: Sequence[Row]) -> StepRecord:
        """Record the step that made `rows`, from the drafts that it verified."""
        now = self._clock()
        drafts, self._drafts = self._drafts, {}
        cost, self._cost = self._cost, DraftingCost()
        self._names.update((row.request_id, row.options.name) for row in rows)
        record = StepRecord(
            outcomes=[_outcome(row, drafts) for row in rows if row.num_sampled],
            num_rows=sum(row.num_rows for row in rows),
            num_prefill_rows=sum(row.num_rows for row in rows if row.is_prefill),
            drafting=cost,
            verify_seconds=now - self._step_started,
            commit_seconds=0.0 if self._last_ended is None else max(self._step_started - self._last_ended, 0.0),
        )
        self._keep(record, rows)
        return record

    def _keep(self, record: StepRecord, rows: Sequence[Row]) -> None:
        """Keep the record for the service, or as a probe's; keep the steps of traced requests."""
        named = [replace(outcome, request_id=self._names[outcome.request_id]) for outcome in record.outcomes]
        probes = {row.options.probe for row in rows}
        if probes == {None}:
            self._records.append(replace(record, outcomes=named))
        elif len(probes) == 1:
            self._probes.keep(record, len(rows), probes.pop() or 0)
        traced = {row.options.name for row in rows if row.options.trace}
        for outcome in named:
            if outcome.request_id in traced:
                trace = self._traces.setdefault(outcome.request_id, [])
                trace.append((outcome.draft.source, list(outcome.draft.tokens), outcome.num_accepted))
        while len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)


def _outcome(row: Row, drafts: Mapping[str, Draft]) -> Outcome:
    """Return what became of a row's draft, cut to the part that was verified.

    vLLM's scheduler cuts drafts that a grammar or its budget of tokens refuses.
    """
    draft = _READING if row.is_prefill else drafts.get(row.request_id, _PAUSED)
    return Outcome(
        row.request_id,
        draft.cut(row.num_verified, "scheduler"),
        row.num_sampled - 1,
        row.options.policy,
        next_token=int(row.tokens[-1]),
        is_cut=row.num_verified < len(draft.tokens),
    )
