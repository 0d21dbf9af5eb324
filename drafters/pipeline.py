"""The drafting pipeline: drafter, lattice, path search, length. Both engines call it the same way, once a step:
`observe` what became of the last drafts, then `propose` the next ones.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from drafters.base import Draft, DraftingCost, DraftRequest, StepRecord
from drafters.candidate import Candidate, RequestState
from drafters.constraint import keep_path_to_structure, keep_to_structure, mask_logits
from drafters.coupling import known_noise
from drafters.diffusion.masked import MaskedDrafter, MaskedRequest, measure_passes
from drafters.estimates import temperature_class
from drafters.length import PaperLength
from drafters.planner import DraftPlanner, LengthOptions
from drafters.search.causal_model import CausalModel
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.path_search import PathSearch

log = logging.getLogger(__name__)

MIN_SURVIVAL = 0.05  # a free draft goes on while it is kept with at least this probability, by its own account
RETRY_AFTER_STEPS = 256  # steps without the diffusion drafter after it failed; doubled with every further failure


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
        lengths: LengthOptions,
        description: str,
        lattice: LatticeOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
        free_drafts: bool = True,
    ) -> None:
        """causal: the free drafter, and the search's judge. search: None without `diffusion`.

        free_drafts: False lets `causal` only judge; nothing is drafted without a diffusion pass then.
        """
        self._causal, self._search, self._diffusion = causal, search, diffusion
        self._free_drafts = free_drafts and causal is not None
        self._lengths, self._lattice, self._clock = lengths, lattice or LatticeOptions(), clock
        self.description = description
        self.max_draft_tokens = lengths.max_draft_tokens
        self._states: dict[str, RequestState] = {}
        self._planner = DraftPlanner(lengths)
        self._paused_steps, self._failures = 0, 0
        self.num_failures = 0  # of the diffusion drafter, in all
        self.last_cost = DraftingCost()  # of the latest `propose`
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
        cost = DraftingCost()
        candidates = [self._candidate(request) for request in requests]
        drafting = [candidate for candidate in candidates if candidate.cap > 0]
        if drafting:
            self._planner.open_step(len(requests), num_prefill_rows)
            self._draft_freely(drafting)
            self._plan_diffusion(drafting)
            cost = self._diffuse([candidate for candidate in drafting if candidate.diffusion_length])
            drafts = self._planner.cut(candidates, cost.pass_seconds + cost.search_seconds)
        else:
            drafts = [candidate.no_draft for candidate in candidates]
        self.last_cost = replace(cost, draft_seconds=self._clock() - started - cost.search_seconds)
        return drafts

    def observe(self, step: StepRecord) -> None:
        """Learn from one verified step: acceptance per confidence and request, and what the passes cost."""
        for outcome in step.outcomes:
            state = self._states.get(outcome.request_id)
            if state is None:
                continue
            self._planner.learn(state, outcome)
            if outcome.draft.source == "diffusion" and outcome.draft.tokens and self._diffusion is not None:
                self._diffusion.note(outcome.request_id, outcome.num_accepted)
        self._planner.learn_costs(step)

    def release(self, request_id: str) -> None:
        """Forget a request; harmless if it is unknown."""
        self._states.pop(request_id, None)
        if self._diffusion is not None:
            self._diffusion.release(request_id)

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        """Set the cost table at start-up (see `StepCosts`); the drafter's part of it is measured here."""
        draft_seconds = None if self._diffusion is None else measure_passes(self._diffusion, self._clock)
        self._planner.calibrate(verify_seconds, draft_seconds, plain_seconds)

    def _candidate(self, request: DraftRequest) -> Candidate:
        state = self._states.get(request.request_id)
        if state is None:
            state = RequestState(PaperLength(self._lengths.paper), temperature_class(request.temperature))
            self._states[request.request_id] = state
        cap = min(request.max_draft_tokens, self.max_draft_tokens)
        policy = request.policy or self._lengths.policy
        is_resting = policy == "goodput" and state.rest_steps > 0
        if is_resting:
            state.rest_steps -= 1
        return Candidate(request, state, policy, 0 if is_resting else cap, is_resting)

    def _draft_freely(self, candidates: Sequence[Candidate]) -> None:
        if self._causal is None or not self._free_drafts:
            return
        histories = [candidate.request.tokens for candidate in candidates]
        least = max(MIN_SURVIVAL, self._planner.least_survival(len(candidates)))
        floors = [least if candidate.policy == "goodput" else 0.0 for candidate in candidates]
        noise = known_noise([candidate.request for candidate in candidates])
        chains = self._causal.draft(
            histories, [candidate.cap for candidate in candidates], floors, noise, _take_unlearned(candidates)
        )
        for candidate, chain in zip(candidates, chains, strict=True):
            candidate.tokens, candidate.confidences = keep_to_structure(
                candidate.request, chain.tokens, chain.confidences, candidate.cap
            )

    def _plan_diffusion(self, candidates: Sequence[Candidate]) -> None:
        """Say which requests take part in a diffusion pass; none, while the drafter is left out."""
        diffusion = self._diffusion
        if diffusion is None:
            return
        if self._paused_steps:
            self._paused_steps -= 1
            return

        def pending_rows(request: DraftRequest) -> int:
            return diffusion.pending_rows(request.request_id, len(request.tokens))

        self._planner.plan_diffusion(candidates, diffusion.max_tokens, pending_rows)

    def _diffuse(self, candidates: Sequence[Candidate]) -> DraftingCost:
        """One diffusion pass and one path search for all `candidates`; on any failure they keep their free drafts.

        Returns what pass and search took; nothing if they failed.
        """
        if not candidates or self._diffusion is None or self._search is None:
            return DraftingCost()
        requests = [
            MaskedRequest(c.request.request_id, c.request.tokens, c.diffusion_length, c.request.hidden_states, c.tokens)
            for c in candidates
        ]
        if self._causal is not None and not self._free_drafts:  # what only judges learns just before it is asked
            self._causal.learn([request.tokens for request in requests], _take_unlearned(candidates))
        try:
            started = self._clock()
            rows = sum(self._diffusion.pending_rows(r.request_id, len(r.tokens)) + r.length for r in requests)
            logits = self._diffusion.propose(requests)
            drafted = self._clock()
            lengths = [request.length for request in requests]
            mask_logits(logits, [candidate.request for candidate in candidates], lengths)
            lattice = DraftLattice.from_logits(logits, lengths, self._lattice)
            noise = known_noise([candidate.request for candidate in candidates], self._diffusion.temperature)
            paths = self._search.search([request.tokens for request in requests], lattice, noise)
        except Exception:
            self._pause(candidates)
            return DraftingCost()
        searched = self._clock()
        self._failures = 0
        for candidate, path in zip(candidates, paths, strict=True):
            if path.tokens:  # the free draft is better than none
                candidate.take_path(keep_path_to_structure(candidate.request, path, candidate.cap))
        self._draft_on([candidate for candidate in candidates if candidate.path])
        self._planner.settle(candidates)
        return DraftingCost(
            pass_seconds=drafted - started,
            search_seconds=searched - drafted,
            num_diffusion_rows=rows,
            num_searches=len(candidates),
        )

    def _draft_on(self, candidates: Sequence[Candidate]) -> None:
        """Let the free draft go on where a searched path ends: where text is being copied, that is most of a draft."""
        if self._causal is None or not self._free_drafts:
            return
        going = []
        for candidate in candidates:
            length = len(candidate.tokens)
            if candidate.policy != "goodput" or candidate.request.constraint is not None or length >= candidate.cap:
                continue
            if candidate.tokens == candidate.free_tokens[:length]:  # the search has found nothing better
                candidate.extend(candidate.free_tokens[length:], candidate.free_confidences[length:])
            elif candidate.tokens[-1] not in self._causal.ends:
                going.append(candidate)
        if not going:
            return
        requests = [
            replace(candidate.request, tokens=np.append(candidate.request.tokens, np.array(candidate.tokens, np.int32)))
            for candidate in going
        ]
        chains = self._causal.draft(
            [request.tokens for request in requests],
            [candidate.cap - len(candidate.tokens) for candidate in going],
            [MIN_SURVIVAL] * len(going),
            known_noise(requests),
        )
        for candidate, chain in zip(going, chains, strict=True):
            candidate.extend(chain.tokens, chain.confidences)

    def _pause(self, candidates: Sequence[Candidate]) -> None:
        """Contain a failure of the diffusion drafter: say so, free what the requests held, try again later."""
        self._failures += 1
        self.num_failures += 1
        self._paused_steps = RETRY_AFTER_STEPS * 2 ** min(self._failures - 1, 8)
        log.exception("the diffusion drafter failed; drafting goes on without it for %d steps", self._paused_steps)
        if self._diffusion is not None:
            for candidate in candidates:
                self._diffusion.release(candidate.request.request_id)


def _take_unlearned(candidates: Sequence[Candidate]) -> list[int]:
    """How many of each request's tokens the causal model has learned from: of the prompt nothing is; now all are."""
    learned = []
    for candidate in candidates:
        length = len(candidate.request.tokens)
        learned.append(candidate.state.num_learned or length)
        candidate.state.num_learned = length
    return learned
