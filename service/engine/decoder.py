"""The step: propose, verify, commit."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drafters.base import Backoff, Draft, DraftingCost, DraftRequest, Outcome, Pipeline, StepRecord, draft_limit
from service.engine.base import NoTokenLeftError, RequestFailedError, TokenDelta
from service.engine.scheduler import Scheduled
from service.engine.sequence import Decoding
from verifiers.base import Verifier, VerifyRequest, VerifyResult

log = logging.getLogger(__name__)

StepObserver = Callable[[StepRecord], None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One request's share of a step: a delta, nothing yet (its prompt is being read), or its failure."""

    decoding: Decoding
    outcome: TokenDelta | RequestFailedError | None


class Decoder:
    """Advances a batch of requests step by step. Not thread-safe."""

    def __init__(
        self, verifier: Verifier, pipeline: Pipeline, observers: Sequence[StepObserver], clock: Callable[[], float]
    ) -> None:
        """`observers` get the record of every step after `pipeline` got it; `clock` is in seconds."""
        self._verifier = verifier
        self._pipeline = pipeline
        self._observers = list(observers)
        self._clock = clock
        self._backoff = Backoff(clock)
        self._learning = Backoff(clock)  # of `observe`: it is called in every step, drafts or not
        self._num_failures = 0  # exceptions of the pipeline
        self._num_reported = 0  # failures of any kind that step records have told of

    @property
    def drafter_up(self) -> bool:
        """False from a failure of the drafter, or of a part of it, until it has drafted again."""
        return self._backoff.seconds == 0.0 and self._pipeline.drafter_up

    def step(self, batch: Sequence[Scheduled]) -> list[StepResult]:
        """Advance every request: by at least one token once its prompt is read (DiffuSpec, Algorithm 1).

        Raises whatever the verifier raises; then nothing was committed.
        """
        num_prefill_rows = sum(each.num_new for each in batch if each.decoding.is_reading)
        drafts, cost = self._propose(batch, num_prefill_rows)
        verifying = self._clock()
        verified = self._verifier.verify([_rows(*each) for each in zip(batch, drafts, strict=True)])
        committing = self._clock()
        results = [_commit(*each) for each in zip(batch, drafts, verified, strict=True)]
        self._report(
            StepRecord(
                outcomes=_outcomes(batch, drafts, verified),
                num_rows=sum(each.num_new for each in batch) + sum(len(draft.tokens) for draft in drafts),
                num_prefill_rows=num_prefill_rows,
                drafting=cost,
                verify_seconds=committing - verifying,
                commit_seconds=self._clock() - committing,
                num_drafter_failures=self._take_failures(),
            )
        )
        return results

    def release(self, decoding: Decoding) -> None:
        """Forget what the pipeline remembers of a request."""
        try:
            self._pipeline.release(decoding.request.request_id)
        except Exception:
            self._pause("the drafter could not forget a request")

    def _propose(self, batch: Sequence[Scheduled], num_prefill_rows: int) -> tuple[list[Draft], DraftingCost]:
        """Return a draft for every request, and what drafting cost; no draft where none is possible or wanted."""
        drafts: list[Draft] = []
        requests: list[DraftRequest] = []  # with a row of their own in this step, whether or not they may draft
        places: list[int] = []
        for place, decoding in enumerate(each.decoding for each in batch):
            if decoding.is_reading:
                drafts.append(Draft(bypass_reason="prefill"))
                continue
            limit, reason = draft_limit(decoding.max_draft_tokens, decoding.num_left)
            drafts.append(Draft(bypass_reason=reason or "drafter_failed"))
            requests.append(self._draft_request(decoding, limit))
            places.append(place)
        if not any(request.max_draft_tokens for request in requests) or self._backoff.is_paused:
            return drafts, DraftingCost()
        try:
            proposed = self._pipeline.propose(requests, num_prefill_rows)
            self._check(requests, proposed)
        except Exception:
            self._pause("the drafter failed")
            return drafts, DraftingCost()
        self._backoff.succeed()
        for place, request, draft in zip(places, requests, proposed, strict=True):
            if request.max_draft_tokens:
                drafts[place] = draft
        return drafts, self._pipeline.last_cost

    def _draft_request(self, decoding: Decoding, limit: int) -> DraftRequest:
        request = decoding.request
        return DraftRequest(
            request_id=request.request_id,
            tokens=decoding.tokens,
            max_draft_tokens=limit,
            policy=request.speculation.policy,
            temperature=0.0 if request.rules.is_greedy else request.rules.temperature,
            seed=request.rules.seed,
            hidden_states=self._verifier.hidden_states(decoding.slot),
            constraint=decoding.constraint,
        )

    def _check(self, requests: Sequence[DraftRequest], drafts: Sequence[Draft]) -> None:
        """Raise ValueError on drafts that would harm the verifier: it trusts their number, lengths and ids."""
        vocabulary_size = self._verifier.vocabulary_size
        for request, draft in zip(requests, drafts, strict=True):
            tokens = draft.tokens
            if len(tokens) > request.max_draft_tokens:
                raise ValueError(f"a draft of {len(tokens)} tokens, at most {request.max_draft_tokens} were asked for")
            if tokens and (min(tokens) < 0 or max(tokens) >= vocabulary_size):
                raise ValueError(f"a draft with token ids outside 0..{vocabulary_size - 1}")

    def _pause(self, what: str) -> None:
        """Contain a failure of the pipeline: decode without drafts for a while, longer each time it fails again."""
        self._num_failures += 1
        log.exception("%s; decoding goes on without drafts for %.0f s", what, self._backoff.fail())

    def _take_failures(self) -> int:
        """Return the failures of the drafter, or of a part of it, that no record has told of yet."""
        count = self._num_failures + self._pipeline.num_failures
        fresh, self._num_reported = count - self._num_reported, count
        return fresh

    def _report(self, record: StepRecord) -> None:
        if not self._learning.is_paused:
            try:
                self._pipeline.observe(record)
                self._learning.succeed()
            except Exception:
                self._learning.fail()
                self._pause("the drafter could not learn from a step")
        for observe in tuple(self._observers):
            try:
                observe(record)
            except Exception:
                log.exception("%r failed on a step's record and gets no more of them", observe)
                self._observers.remove(observe)


def _rows(scheduled: Scheduled, draft: Draft) -> VerifyRequest:
    decoding = scheduled.decoding
    is_drawn = decoding.constraint is not None and scheduled.num_new == decoding.num_pending
    return VerifyRequest(
        slot=decoding.slot,
        tokens=decoding.tokens,
        num_prompt=decoding.num_prompt,
        num_cached=decoding.num_cached,
        num_new=scheduled.num_new,
        draft=draft.tokens,
        rules=decoding.request.rules,
        prompt_logprobs=decoding.request.prompt_logprobs,
        allowed=decoding.constraint.masks(draft.tokens) if decoding.constraint is not None and is_drawn else None,
    )


def _commit(scheduled: Scheduled, draft: Draft, result: VerifyResult) -> StepResult:
    decoding = scheduled.decoding
    if result.is_request_at_fault:
        constraint = decoding.constraint
        return StepResult(decoding, NoTokenLeftError((constraint and constraint.error) or result.error))
    if result.error:
        return StepResult(decoding, RequestFailedError(result.error))
    return StepResult(decoding, decoding.commit(scheduled.num_new, draft, result))


def _outcomes(batch: Sequence[Scheduled], drafts: Sequence[Draft], verified: Sequence[VerifyResult]) -> list[Outcome]:
    """Return what became of the drafts of all requests that were verified."""
    outcomes = []
    for decoding, draft, result in zip((each.decoding for each in batch), drafts, verified, strict=True):
        verification = result.verification
        if verification is None:
            continue
        outcomes.append(
            Outcome(
                request_id=decoding.request.request_id,
                draft=draft,
                num_accepted=verification.num_accepted,
                policy=decoding.request.speculation.policy,
                num_cut=verification.num_accepted - decoding.num_accepted_kept,
                next_token=verification.next_token,
            )
        )
    return outcomes
