"""The drafting pipeline: drafter, lattice, path search, length. Both engines call it the same way, once a step:
`observe` what became of the last drafts, then `propose` the next ones.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from drafters.base import Draft, DraftRequest, Outcome, PolicyName, StepRecord
from drafters.candidate import Candidate, RequestState
from drafters.causal_scorer import CausalModel
from drafters.constraint import keep_path_to_structure, keep_to_structure, mask_logits
from drafters.costs import CostCurve, StepCosts
from drafters.coupling import known_noise
from drafters.estimates import (
    TEMPERATURES,
    Calibration,
    DiffusionForecast,
    Floats,
    temperature_class,
)
from drafters.goodput import choose_lengths, choose_sources
from drafters.lattice import DraftLattice, LatticeOptions
from drafters.length import PaperLength, PaperLengthOptions
from drafters.masked import MaskedDrafter, MaskedRequest, measure_passes
from drafters.path_search import PathSearch

log = logging.getLogger(__name__)

LEAST_SURVIVAL = 0.05  # a free draft goes on while it is kept with at least this probability, by its own account
RETRY_AFTER_STEPS = 256  # steps without the diffusion drafter after it failed; doubled with every further failure
PROMISED_TOKENS = 8  # of a free draft, by whose expected acceptance the benefit of a diffusion pass is foretold
MOST_CATCH_UP_ROWS = 16  # a first pass reads the whole window, but later ones profit: it is charged no more rows
PROBE_INTERVAL = 48  # steps without a draft in a class of temperatures, until one token is verified all the same


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What the pipeline does where a request doesn't say."""

    policy: PolicyName = "goodput"
    max_draft_tokens: int = 32
    fixed_length: int = 8  # tokens, of policy `fixed`
    diffusion_length: int = 6  # most tokens of a diffusion draft under `goodput`
    paper: PaperLengthOptions = field(default_factory=PaperLengthOptions)
    lattice: LatticeOptions = field(default_factory=LatticeOptions)


class DraftPipeline:
    """Proposes drafts for a batch of requests. Not thread-safe; lives in the engine's thread.

    A failing diffusion drafter is logged and left out for a while (`drafter_up` is False), and requests fall back to
    the free draft or to none; whatever else `propose` raises, its caller contains.
    """

    def __init__(
        self,
        causal: CausalModel | None,
        search: PathSearch | None,
        diffusion: MaskedDrafter | None,
        options: PipelineOptions,
        description: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """causal: the free drafter; None drafts nothing without a diffusion pass. search: None without `diffusion`."""
        self._causal, self._search, self._diffusion = causal, search, diffusion
        self._options, self._clock = options, clock
        self.description = description
        self.max_draft_tokens = options.max_draft_tokens
        self._states: dict[str, RequestState] = {}
        self._forecast = DiffusionForecast(options.max_draft_tokens)
        self._copy_calibration, self._path_calibration = Calibration(1.0), Calibration(0.9)
        guess = {1: 3e-3, 64: 2e-2}
        self._costs = StepCosts(CostCurve(guess), CostCurve(guess), CostCurve({1: 5e-4, 64: 4e-3}))
        self._paused_steps, self._failures = 0, 0
        self.num_failures = 0  # of the diffusion drafter, in all
        self._idle_steps = [0] * (len(TEMPERATURES) + 1)  # by class: steps since one of it had a draft
        self.last_draft_seconds = self.last_search_seconds = self._last_overhead_seconds = 0.0
        self.last_diffusion_rows = 0
        self.reads_hidden_states = False  # set by whoever loads a drafter that profits from the target's

    @property
    def drafter_up(self) -> bool:
        """Whether the diffusion drafter is in use (True too where none is configured)."""
        return self._paused_steps == 0

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
        """Draft for every request of the next step: `drafter -> lattice -> path search -> length`.

        num_prefill_rows: prompt rows that the same verification pass will carry.
        """
        started = self._clock()
        self.last_draft_seconds = self.last_search_seconds = 0.0
        self.last_diffusion_rows = 0
        candidates = [self._candidate(request) for request in requests]
        drafting = [candidate for candidate in candidates if candidate.cap > 0]
        base_rows = len(requests) + num_prefill_rows
        if drafting:
            self._draft_freely(drafting)
            self._plan_diffusion(drafting, base_rows)
            self._diffuse([candidate for candidate in drafting if candidate.diffusion_length])
        drafts = self._cut(candidates, base_rows)
        elapsed = self._clock() - started
        self._last_overhead_seconds = max(elapsed - self.last_draft_seconds - self.last_search_seconds, 0.0)
        return drafts

    def observe(self, step: StepRecord) -> None:
        """Learn from one verified step: acceptance per confidence and request, and what the passes cost."""
        searches = 0
        for outcome in step.outcomes:
            searches += outcome.draft.source == "diffusion"
            state = self._states.get(outcome.request_id)
            if state is not None:
                self._learn(state, outcome)
        if step.num_prefill_rows == 0:  # prefill rows need no logits and long attention: another cost
            has_drafts = any(outcome.draft.tokens for outcome in step.outcomes)
            curve = self._costs.verify if has_drafts else self._costs.plain
            curve.observe(step.num_rows, step.seconds.verify)
        self._costs.draft.observe(step.num_diffusion_rows, step.seconds.draft)
        self._costs.observe_overheads(searches, step.seconds.search, step.seconds.commit + self._last_overhead_seconds)

    def release(self, request_id: str) -> None:
        """Forget a request; harmless if it is unknown."""
        self._states.pop(request_id, None)
        if self._diffusion is not None:
            self._diffusion.release(request_id)

    def calibrate(self, verify_seconds: Mapping[int, float]) -> None:
        """Set the cost table at start-up: `verify_seconds` by rows, and the drafter's own, which is measured here."""
        self._costs.verify, self._costs.plain = CostCurve(verify_seconds), CostCurve(verify_seconds)
        if self._diffusion is not None:
            self._costs.draft = CostCurve(measure_passes(self._diffusion, self._clock))

    def _candidate(self, request: DraftRequest) -> Candidate:
        state = self._states.get(request.request_id)
        if state is None:
            state = RequestState(PaperLength(self._options.paper), temperature_class(request.temperature))
            self._states[request.request_id] = state
        cap = min(request.max_draft_tokens, self.max_draft_tokens)
        policy = request.policy or self._options.policy
        is_resting = policy == "goodput" and state.rest_steps > 0
        if is_resting:
            state.rest_steps -= 1
        return Candidate(request, state, policy, 0 if is_resting else cap, is_resting)

    def _draft_freely(self, candidates: Sequence[Candidate]) -> None:
        if self._causal is None:
            return
        histories = [candidate.request.tokens for candidate in candidates]
        for candidate in candidates:
            tokens = candidate.request.tokens
            if candidate.state.num_learned:
                self._causal.learn(tokens, candidate.state.num_learned)
            candidate.state.num_learned = len(tokens)
        floors = [LEAST_SURVIVAL if candidate.policy == "goodput" else 0.0 for candidate in candidates]
        noise = known_noise([candidate.request for candidate in candidates])
        chains = self._causal.greedy_chains(histories, [candidate.cap for candidate in candidates], floors, noise)
        for candidate, chain in zip(candidates, chains, strict=True):
            candidate.tokens, candidate.confidences = keep_to_structure(
                candidate.request, chain.tokens, chain.confidences, candidate.cap
            )

    def _plan_diffusion(self, candidates: Sequence[Candidate], base_rows: int) -> None:
        """Decide, before paying for it, which requests take part in a diffusion pass and with how many tokens."""
        if self._diffusion is None:
            return
        if self._paused_steps:
            self._paused_steps -= 1
            return
        longest = self._diffusion.longest
        adaptive = [candidate for candidate in candidates if candidate.policy == "goodput"]
        for candidate in candidates:
            if candidate.policy == "fixed":
                candidate.diffusion_length = min(candidate.cap, self._options.fixed_length, longest)
            elif candidate.policy == "paper":
                candidate.diffusion_length = min(candidate.cap, candidate.state.paper.next_length, longest)
        if not adaptive:
            return
        longest = min(longest, self._options.diffusion_length)
        copied = np.array([self._accepted_by_length(candidate) for candidate in adaptive])
        diffused = np.empty_like(copied)
        draft_rows = np.empty(len(adaptive))
        for i, candidate in enumerate(adaptive):
            promise = copied[i, min(candidate.cap, PROMISED_TOKENS)]
            candidate.forecast_class = where = self._forecast.classes(candidate.state.heat, promise)
            factor = candidate.state.agreement.diffusion.factor
            diffused[i] = self._forecast.accepted_by_length(where, factor, candidate.cap)
            pending = self._diffusion.pending_rows(candidate.request.request_id, len(candidate.request.tokens))
            draft_rows[i] = min(pending, MOST_CATCH_UP_ROWS) + min(candidate.cap, longest)
        caps = np.array([candidate.cap for candidate in adaptive])
        chosen = choose_sources(copied, diffused, caps, draft_rows, base_rows, self._costs)
        for candidate, is_chosen in zip(adaptive, chosen.tolist(), strict=True):
            if self._forecast.is_probe_due(candidate.forecast_class, is_chosen) or is_chosen:
                candidate.diffusion_length = min(candidate.cap, longest)

    def _diffuse(self, candidates: Sequence[Candidate]) -> None:
        """One diffusion pass and one path search for all `candidates`; on any failure they keep their free drafts."""
        if not candidates or self._diffusion is None or self._search is None:
            return
        requests = [
            MaskedRequest(c.request.request_id, c.request.tokens, c.diffusion_length, c.request.hidden_states)
            for c in candidates
        ]
        try:
            started = self._clock()
            rows = sum(self._diffusion.pending_rows(r.request_id, len(r.tokens)) + r.length for r in requests)
            logits = self._diffusion.propose(requests)
            drafted = self._clock()
            lengths = [request.length for request in requests]
            mask_logits(logits, [candidate.request for candidate in candidates], lengths)
            lattice = DraftLattice.from_logits(logits, lengths, self._options.lattice)
            if lattice.has_broken_rows:
                raise ValueError("the diffusion drafter's logits are not numbers")
            noise = known_noise([candidate.request for candidate in candidates], self._diffusion.temperature)
            paths = self._search.search([request.tokens for request in requests], lattice, noise)
        except Exception:
            self._pause(candidates)
            return
        self._failures = 0
        for candidate, path in zip(candidates, paths, strict=True):
            if path.tokens:  # the free draft is better than none
                candidate.take_path(keep_path_to_structure(candidate.request, path, candidate.cap))
        self._draft_on([candidate for candidate in candidates if candidate.path])
        self.last_draft_seconds = drafted - started
        self.last_search_seconds = self._clock() - drafted
        self.last_diffusion_rows = rows
        for candidate in candidates:
            if candidate.policy == "goodput":
                accepted = self._accepted_by_length(candidate, in_general=True)
                self._forecast.observe(candidate.forecast_class, accepted, candidate.cap)

    def _draft_on(self, candidates: Sequence[Candidate]) -> None:
        """Let the free draft go on where a searched path ends: where text is being copied, that is most of a draft."""
        if self._causal is None:
            return
        ends = set(self._causal.end_tokens.tolist())
        going = [
            candidate
            for candidate in candidates
            if candidate.policy == "goodput"
            and candidate.request.constraint is None
            and 0 < len(candidate.tokens) < candidate.cap
            and candidate.tokens[-1] not in ends
        ]
        requests = [
            replace(candidate.request, tokens=np.append(candidate.request.tokens, np.array(candidate.tokens, np.int32)))
            for candidate in going
        ]
        chains = self._causal.greedy_chains(
            [request.tokens for request in requests],
            [candidate.cap - len(candidate.tokens) for candidate in going],
            [LEAST_SURVIVAL] * len(going),
            known_noise(requests),
        )
        for candidate, chain in zip(going, chains, strict=True):
            candidate.extend(chain.tokens, chain.confidences)

    def _cut(self, candidates: Sequence[Candidate], base_rows: int) -> list[Draft]:
        """Turn candidates into drafts of the length that is worth verifying."""
        lengths = [0] * len(candidates)
        adaptive = []
        for i, candidate in enumerate(candidates):
            if candidate.cap == 0:
                continue
            if candidate.policy == "goodput":
                adaptive.append(i)
                continue
            wanted = self._options.fixed_length if candidate.policy == "fixed" else candidate.state.paper.next_length
            lengths[i] = min(len(candidate.tokens), wanted, candidate.cap)
            base_rows += lengths[i]
        accepted = np.zeros((len(adaptive), self.max_draft_tokens + 1))
        if adaptive:
            caps = np.zeros(len(adaptive), dtype=np.int64)
            for row, i in enumerate(adaptive):
                candidate = candidates[i]
                caps[row] = min(len(candidate.tokens), candidate.cap)
                accepted[row] = self._accepted_by_length(candidate)
            spent = self.last_draft_seconds + self.last_search_seconds
            for row, length in enumerate(choose_lengths(accepted, caps, base_rows, spent, self._costs).tolist()):
                state = candidates[adaptive[row]].state
                state.note(length > 0)
                lengths[adaptive[row]] = length or self._probe(state.heat, int(caps[row]))
            for heat in {candidates[i].state.heat for i in adaptive}:
                has_draft = any(lengths[i] for i in adaptive if candidates[i].state.heat == heat)
                self._idle_steps[heat] = 0 if has_draft else self._idle_steps[heat] + 1
        return [self._draft(candidate, length) for candidate, length in zip(candidates, lengths, strict=True)]

    def _probe(self, heat: int, known: int) -> int:
        """Length of a draft that is not worth verifying: once in a while 1, or no estimate could ever rise again."""
        if self._idle_steps[heat] < PROBE_INTERVAL or known == 0:
            return 0
        self._idle_steps[heat] = 0
        return 1

    def _accepted_by_length(self, candidate: Candidate, in_general: bool = False) -> Floats:
        """`[1 + longest]` expected accepted tokens of the candidate's draft, by its length, in its request's light.

        in_general: in no request's light.
        """
        agreement, heat, searched = candidate.state.agreement, candidate.state.heat, candidate.num_searched
        factor = (agreement.copy if candidate.path is None else agreement.diffusion).factor
        factor = 1.0 if in_general else factor
        accepted = np.empty(self.max_draft_tokens + 1)
        path, free = candidate.confidences[:searched], candidate.confidences[searched:]
        survival = self._path_calibration.accumulate(path, heat, factor, accepted) if searched else 1.0
        if len(free) or not searched:
            self._copy_calibration.accumulate(free, heat, factor, accepted, searched, survival)
        return accepted

    def _draft(self, candidate: Candidate, length: int) -> Draft:
        state, searched = candidate.state, min(candidate.num_searched, length)
        state.confidences, state.num_searched = candidate.confidences[:length], searched
        calibrated = np.concatenate(
            [
                self._path_calibration.estimate(state.confidences[:searched], state.heat),
                self._copy_calibration.estimate(state.confidences[searched:], state.heat),
            ]
        )
        return candidate.draft(length, calibrated)

    def _learn(self, state: RequestState, outcome: Outcome) -> None:
        draft, agreement, num_accepted = outcome.draft, state.agreement, outcome.num_accepted
        if not draft.tokens:
            agreement.copy.forget()
            agreement.diffusion.forget()
            return
        is_diffused = draft.source == "diffusion"
        (agreement.diffusion if is_diffused else agreement.copy).observe(num_accepted, draft.expected_accepted)
        searched = state.num_searched
        self._path_calibration.observe(state.confidences[:searched], num_accepted, state.heat)
        if num_accepted >= searched:
            self._copy_calibration.observe(state.confidences[searched:], num_accepted - searched, state.heat)
        if is_diffused:
            state.paper.observe(draft.raw_length, num_accepted)
            if self._diffusion is not None:
                self._diffusion.note(outcome.request_id, num_accepted)

    def _pause(self, candidates: Sequence[Candidate]) -> None:
        """Contain a failure of the diffusion drafter: say so, free what the requests held, try again later."""
        self._failures += 1
        self.num_failures += 1
        self._paused_steps = RETRY_AFTER_STEPS * 2 ** min(self._failures - 1, 8)
        log.exception("the diffusion drafter failed; drafting goes on without it for %d steps", self._paused_steps)
        if self._diffusion is not None:
            for candidate in candidates:
                self._diffusion.release(candidate.request.request_id)
