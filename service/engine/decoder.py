"""The step: propose, verify, commit."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from drafters.base import Draft, DraftingCost, DraftRequest, Outcome, StepRecord
from service.engine.base import NoTokenLeftError, RequestFailedError, TokenDelta
from service.engine.drafting import Drafting
from service.engine.scheduler import Scheduled
from service.engine.sequence import Decoding
from verifiers.base import Verifier, VerifyRequest, VerifyResult

log = logging.getLogger(__name__)

StepObserver = Callable[[StepRecord], None]

_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 60.0
_READING = Draft(bypass_reason="prefill")
_DISABLED = Draft(bypass_reason="disabled")
_LAST_TOKEN = Draft(bypass_reason="last_token")
_FAILED = Draft(bypass_reason="drafter_failed")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did for one request: a delta, nothing yet (its prompt is being read), or its failure."""

    decoding: Decoding
    outcome: TokenDelta | RequestFailedError | None


@dataclass(slots=True)
class _Proposal:
    """What goes into the verification pass besides the pending tokens."""

    drafts: list[Draft]  # one per part
    num_prefill_rows: int
    cost: DraftingCost = field(default_factory=DraftingCost)


class Decoder:
    """Advances a batch of requests step by step. Not thread-safe."""

    def __init__(
        self, verifier: Verifier, pipeline: Drafting, observers: Sequence[StepObserver], clock: Callable[[], float]
    ) -> None:
        """`observers` get the record of every step after `pipeline` got it; `clock` is in seconds."""
        self._verifier = verifier
        self._pipeline = pipeline
        self._observers = list(observers)
        self._clock = clock
        self._drafting_resumes_at = 0.0
        self._pause_seconds = 0.0
        self._num_failures = 0  # whatever the pipeline raised
        self._num_reported = 0  # of all failures, by step records

    @property
    def drafter_up(self) -> bool:
        """False from a failure of the drafter, or of a part of it, until it has drafted again."""
        return self._pause_seconds == 0.0 and self._pipeline.drafter_up

    def step(self, parts: Sequence[Scheduled]) -> list[StepResult]:
        """Advance every request by its part: by at least one token once its prompt is read (DiffuSpec, Algorithm 1).

        Raises whatever the verifier raises; then nothing was committed.
        """
        proposal = self._propose(parts)
        started = self._clock()
        verified = self._verifier.verify([_rows(*work) for work in zip(parts, proposal.drafts, strict=True)])
        committing = self._clock()
        mean_context = sum(part.decoding.length for part in parts) / len(parts)
        results = [_commit(*work) for work in zip(parts, proposal.drafts, verified, strict=True)]
        seconds = committing - started, self._clock() - committing
        self._report(_record(parts, proposal, verified, *seconds, mean_context, self._take_failures()))
        return results

    def release(self, decoding: Decoding) -> None:
        """Forget what the pipeline remembers of a request."""
        try:
            self._pipeline.release(decoding.request.request_id)
        except Exception:
            self._pause_drafting("the drafter could not forget a request")

    def _propose(self, parts: Sequence[Scheduled]) -> _Proposal:
        """One draft per part: empty while a prompt is read, and where none is wanted or possible."""
        reading = [part for part in parts if part.decoding.is_reading]
        proposal = _Proposal(drafts=[], num_prefill_rows=sum(part.num_new for part in reading))
        limits = [_draft_limit(part.decoding) for part in parts]
        requests = [
            self._draft_request(part.decoding, most)
            for part, (most, _) in zip(parts, limits, strict=True)
            if not part.decoding.is_reading  # those that may not draft are there too: they are rows of the step
        ]
        drafts: list[Draft] | None = None
        if any(most for most, _ in limits) and self._clock() >= self._drafting_resumes_at:
            drafts = self._ask(requests, proposal)
        proposed = iter(drafts or [_FAILED] * len(requests))
        for part, (most, none) in zip(parts, limits, strict=True):
            draft = none if part.decoding.is_reading else next(proposed)
            proposal.drafts.append(draft if most else none)
        return proposal

    def _draft_request(self, decoding: Decoding, most: int) -> DraftRequest:
        request = decoding.request
        return DraftRequest(
            request_id=request.request_id,
            tokens=decoding.tokens,
            max_draft_tokens=most,
            policy=request.speculation.policy,
            temperature=0.0 if request.rules.is_greedy else request.rules.temperature,
            seed=request.rules.seed,
            hidden_states=self._verifier.hidden_states(decoding.slot),
            constraint=decoding.constraint,
        )

    def _ask(self, requests: Sequence[DraftRequest], proposal: _Proposal) -> list[Draft] | None:
        """The pipeline's drafts, their cost noted in `proposal`; None if it failed."""
        try:
            drafts = self._pipeline.propose(requests, proposal.num_prefill_rows)
            self._check(requests, drafts)
        except Exception:
            self._pause_drafting("the drafter failed")
            return None
        self._pause_seconds = 0.0
        proposal.cost = self._pipeline.last_cost
        return drafts

    def _check(self, requests: Sequence[DraftRequest], drafts: Sequence[Draft]) -> None:
        """Raise ValueError on drafts that would harm the verifier: it trusts their number, lengths and ids."""
        vocabulary_size = self._verifier.vocabulary_size
        for request, draft in zip(requests, drafts, strict=True):
            tokens = draft.tokens
            if len(tokens) > request.max_draft_tokens:
                raise ValueError(f"a draft of {len(tokens)} tokens, at most {request.max_draft_tokens} were asked for")
            if tokens and (min(tokens) < 0 or max(tokens) >= vocabulary_size):
                raise ValueError(f"a draft with token ids outside 0..{vocabulary_size - 1}")

    def _pause_drafting(self, what: str) -> None:
        """Contain a failure of the pipeline: decode without drafts for a while, longer each time it fails again."""
        self._num_failures += 1
        self._pause_seconds = min(max(2 * self._pause_seconds, _MIN_PAUSE_SECONDS), _MAX_PAUSE_SECONDS)
        self._drafting_resumes_at = self._clock() + self._pause_seconds
        log.exception("%s; decoding goes on without drafts for %.0f s", what, self._pause_seconds)

    def _take_failures(self) -> int:
        """Failures of the drafter, or of a part of it, that no record has told yet."""
        count = self._num_failures + self._pipeline.num_failures
        fresh, self._num_reported = count - self._num_reported, count
        return fresh

    def _report(self, record: StepRecord) -> None:
        try:
            self._pipeline.observe(record)
        except Exception:
            self._pause_drafting("the drafter could not learn from a step")
        for observe in tuple(self._observers):
            try:
                observe(record)
            except Exception:
                log.exception("%r failed on a step's record and gets no more of them", observe)
                self._observers.remove(observe)


def _draft_limit(decoding: Decoding) -> tuple[int, Draft]:
    """The most tokens worth drafting, and what stands for a draft if that is none.

    A step adds one token to those it accepts, so that a draft must leave room for one.
    """
    if decoding.is_reading:
        return 0, _READING
    if decoding.max_draft_tokens == 0:
        return 0, _DISABLED
    return max(min(decoding.max_draft_tokens, decoding.num_left - 1), 0), _LAST_TOKEN


def _rows(part: Scheduled, draft: Draft) -> VerifyRequest:
    decoding = part.decoding
    is_drawn = decoding.constraint is not None and part.num_new == decoding.num_pending
    return VerifyRequest(
        slot=decoding.slot,
        tokens=decoding.tokens,
        num_prompt=decoding.num_prompt,
        num_cached=decoding.num_cached,
        num_new=part.num_new,
        draft=draft.tokens,
        rules=decoding.request.rules,
        prompt_logprobs=decoding.request.prompt_logprobs,
        allowed=decoding.constraint.masks(draft.tokens) if decoding.constraint is not None and is_drawn else None,
    )


def _commit(part: Scheduled, draft: Draft, result: VerifyResult) -> StepResult:
    if result.is_request_at_fault:
        constraint = part.decoding.constraint
        return StepResult(part.decoding, NoTokenLeftError((constraint and constraint.error) or result.error))
    if result.error:
        return StepResult(part.decoding, RequestFailedError(result.error))
    return StepResult(part.decoding, part.decoding.commit(part.num_new, draft, result))


def _record(
    parts: Sequence[Scheduled],
    proposal: _Proposal,
    verified: Sequence[VerifyResult],
    verify_seconds: float,
    commit_seconds: float,
    mean_context: float,
    num_drafter_failures: int,
) -> StepRecord:
    return StepRecord(
        outcomes=[
            Outcome(
                part.decoding.request.request_id,
                draft,
                result.verification.num_accepted,
                part.decoding.request.speculation.policy,
                result.verification.num_accepted - part.decoding.num_accepted_kept,
            )
            for part, draft, result in zip(parts, proposal.drafts, verified, strict=True)
            if result.verification is not None
        ],
        num_rows=sum(part.num_new for part in parts) + sum(len(draft.tokens) for draft in proposal.drafts),
        num_prefill_rows=proposal.num_prefill_rows,
        drafting=proposal.cost,
        verify_seconds=verify_seconds,
        commit_seconds=commit_seconds,
        mean_context=mean_context,
        num_drafter_failures=num_drafter_failures,
    )
