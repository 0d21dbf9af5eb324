"""The drafting pipeline: free drafts, diffusion drafts, path search, policy. Both engines call it the same way, once a
step: `observe` what became of the last drafts, then `propose` the next ones.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from drafters.base import Backoff, Draft, DraftingCost, DraftRequest, SearchFacts, StepRecord, num_common
from drafters.constraint import keep_path_to_structure, keep_to_structure, mask_logits
from drafters.coupling import known_noise
from drafters.diffusion.masked import MaskedDrafter, MaskedRequest, measure_passes
from drafters.policy import Policy, PolicyOptions
from drafters.search.causal_model import CausalModel
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.path_search import Path, PathSearch

log = logging.getLogger(__name__)


class DraftPipeline:
    """Proposes drafts for a batch of requests. Not thread-safe; lives in the engine's thread.

    A failing diffusion drafter is logged and left out for a while (`drafter_up` is False), and requests fall back to
    the free draft or to none. The caller contains whatever else `propose` raises.
    """

    def __init__(
        self,
        causal: CausalModel | None,
        search: PathSearch | None,
        diffusion: MaskedDrafter | None,
        options: PolicyOptions,
        description: str,
        lattice: LatticeOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
        free_drafts: bool = True,
    ) -> None:
        """causal: makes free drafts, and scores paths (Eq. 8). search: None without `diffusion`.

        free_drafts: False leaves the scoring only; nothing is drafted without a diffusion pass then.
        """
        self._causal, self._search, self._diffusion = causal, search, diffusion
        self._free_drafts = free_drafts and causal is not None
        self._lattice, self._clock = lattice or LatticeOptions(), clock
        self.description = description
        self.options, self.max_draft_tokens = options, options.max_draft_tokens
        self._policy = Policy(options)
        self._num_learned: dict[
            str, int
        ] = {}  # committed tokens of each request that the causal model has learned from
        self._backoff = Backoff(clock)
        self.num_failures = 0  # of the diffusion drafter, in all
        self.last_cost = DraftingCost()  # of the latest `propose`
        self.reads_hidden_states = False  # set by whoever loads a drafter that profits from the target's

    @property
    def drafter_up(self) -> bool:
        """False while the diffusion drafter is left out after a failure."""
        return not self._backoff.is_paused

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
        """Draft for every request of the next step (DiffuSpec, Algorithm 1, without its verification).

        num_prefill_rows: prompt rows that the same verification pass will carry.
        """
        started = self._clock()
        cost = DraftingCost()
        drafting = self._policy.open_step(requests, num_prefill_rows)
        drafts: dict[str, Draft] = {}
        if drafting:
            free = self._policy.weigh(drafting, self._draft_freely(drafting))
            found, cost = self._diffuse(drafting, free)
            chosen = self._policy.choose(drafting, free, found, cost.pass_seconds + cost.search_seconds)
            drafts = {request.request_id: draft for request, draft in zip(drafting, chosen, strict=True)}
        answer = [drafts.get(request.request_id) or _no_draft(request) for request in requests]
        self.last_cost = replace(cost, draft_seconds=self._clock() - started - cost.search_seconds)
        return answer

    def observe(self, step: StepRecord) -> None:
        """Learn from one verified step: what was accepted, and what the passes cost."""
        self._policy.observe(step)
        if self._diffusion is not None:
            for outcome in step.outcomes:
                if outcome.draft.source == "diffusion":
                    self._diffusion.note(outcome.request_id, outcome.num_accepted)

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""
        self._policy.release(request_id)
        self._num_learned.pop(request_id, None)
        if self._diffusion is not None:
            self._diffusion.release(request_id)

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        """Set what steps cost at start-up (see `StepSeconds`); the drafter's passes are measured here."""
        passes = None if self._diffusion is None else measure_passes(self._diffusion, self._clock)
        self._policy.calibrate(verify_seconds, passes, plain_seconds)

    def _draft_freely(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Let the causal model go on with each request's text."""
        nothing = Draft(bypass_reason="no_candidates")
        if self._causal is None or not self._free_drafts:
            return [nothing] * len(requests)
        chains = self._causal.draft(
            [request.tokens for request in requests],
            [request.max_draft_tokens for request in requests],
            self._policy.min_survival(requests),
            known_noise(requests),
            self._take_unlearned(requests),
        )
        drafts = []
        for request, chain in zip(requests, chains, strict=True):
            tokens, confidences = keep_to_structure(request, chain.tokens, chain.confidences, request.max_draft_tokens)
            drafts.append(Draft(tokens, "free", tuple(confidences.tolist())) if tokens else nothing)
        return drafts

    def _diffuse(
        self, requests: Sequence[DraftRequest], free: Sequence[Draft]
    ) -> tuple[list[Draft | None], DraftingCost]:
        """Run one diffusion pass and one path search for the requests that the policy chooses; None for the others.

        Also returns what both took. On any failure nothing is found, and the drafter is left out for a while.
        """
        found: list[Draft | None] = [None] * len(requests)
        diffusion = self._diffusion
        if diffusion is None or self._search is None or self._backoff.is_paused:
            return found, DraftingCost()
        pending = [diffusion.pending_rows(request.request_id, len(request.tokens)) for request in requests]
        lengths = self._policy.pass_lengths(requests, free, pending, diffusion.max_tokens)
        places = [i for i, length in enumerate(lengths) if length]
        if not places:
            return found, DraftingCost()
        served = [requests[i] for i in places]
        masked = [
            MaskedRequest(r.request_id, r.tokens, lengths[i], r.hidden_states, free[i].tokens)
            for i, r in zip(places, served, strict=True)
        ]
        try:
            paths, cost = self._find_paths(served, masked, diffusion, self._search)
        except Exception:
            self._leave_out(served)
            return found, DraftingCost()
        self._backoff.succeed()
        rivals = [free[i] for i in places]
        drafts = [self._from_path(*each) for each in zip(served, paths, rivals, strict=True)]
        for i, draft in zip(places, self._policy.weigh(served, self._draft_on(served, drafts, rivals)), strict=True):
            found[i] = draft
        return found, replace(cost, num_diffusion_rows=sum(pending[i] + lengths[i] for i in places))

    def _find_paths(
        self,
        requests: Sequence[DraftRequest],
        masked: Sequence[MaskedRequest],
        diffusion: MaskedDrafter,
        search: PathSearch,
    ) -> tuple[list[Path], DraftingCost]:
        """Run pass, lattice and search; return the paths and the time it took. Raises whatever they raise."""
        if self._causal is not None and not self._free_drafts:  # as no free draft does it
            self._causal.learn([request.tokens for request in requests], self._take_unlearned(requests))
        started = self._clock()
        logits = diffusion.propose(masked)
        drafted = self._clock()
        lengths = [request.length for request in masked]
        mask_logits(logits, requests, lengths)
        lattice = DraftLattice.from_logits(logits, lengths, self._lattice)
        noise = known_noise(requests, diffusion.temperature)
        paths = search.search([request.tokens for request in requests], lattice, noise)
        return paths, DraftingCost(
            pass_seconds=drafted - started, search_seconds=self._clock() - drafted, num_searches=len(requests)
        )

    def _from_path(self, request: DraftRequest, path: Path, free: Draft) -> Draft:
        """Return a searched path as a draft; without tokens if the structure refuses all of it."""
        facts = SearchFacts(path.raw_length, path.lattice_width, path.gain, free.expected_accepted)
        kept = keep_path_to_structure(request, path, request.max_draft_tokens)
        if not kept.tokens:
            return Draft(search=facts, bypass_reason="no_candidates")
        num_searched = num_common(kept.tokens, path.tokens)  # what the structure forces was not searched for
        return Draft(kept.tokens, "diffusion", tuple(kept.confidences.tolist()), num_searched, search=facts)

    def _draft_on(
        self, requests: Sequence[DraftRequest], drafts: Sequence[Draft], free: Sequence[Draft]
    ) -> Sequence[Draft]:
        """Let the causal model go on where a path ends: where text is being copied, that is most of a draft."""
        if self._causal is None or not self._free_drafts:
            return drafts
        drafts, going = list(drafts), []
        for i, (request, draft, own) in enumerate(zip(requests, drafts, free, strict=True)):
            length = len(draft.tokens)
            if not self._policy.is_adaptive(request) or request.constraint is not None:
                continue
            if not 0 < length < request.max_draft_tokens:
                continue
            if draft.tokens == own.tokens[:length]:  # the search has found nothing better
                drafts[i] = _extended(draft, own.tokens[length:], own.confidences[length:])
            elif draft.tokens[-1] not in self._causal.ends:
                going.append(i)
        if not going:
            return drafts
        longer = [
            replace(requests[i], tokens=np.append(requests[i].tokens, np.array(drafts[i].tokens, np.int32)))
            for i in going
        ]
        chains = self._causal.draft(
            [request.tokens for request in longer],
            [request.max_draft_tokens - len(drafts[i].tokens) for i, request in zip(going, longer, strict=True)],
            self._policy.min_survival(longer),
            known_noise(longer),
        )
        for i, chain in zip(going, chains, strict=True):
            drafts[i] = _extended(drafts[i], chain.tokens, tuple(chain.confidences.tolist()))
        return drafts

    def _leave_out(self, requests: Sequence[DraftRequest]) -> None:
        """Contain a failure of the diffusion drafter: say so, free what the requests held, try again later."""
        self.num_failures += 1
        seconds = self._backoff.fail()
        log.exception("the diffusion drafter failed; drafting goes on without it for %.0f s", seconds)
        if self._diffusion is not None:
            for request in requests:
                self._diffusion.release(request.request_id)

    def _take_unlearned(self, requests: Sequence[DraftRequest]) -> list[int]:
        """Return how many of each request's tokens the causal model has learned from, and count all as learned.

        It learns nothing from a prompt: the target didn't choose that.
        """
        learned = []
        for request in requests:
            length = len(request.tokens)
            learned.append(self._num_learned.get(request.request_id, length))
            self._num_learned[request.request_id] = length
        return learned


def _no_draft(request: DraftRequest) -> Draft:
    return Draft(bypass_reason="resting" if request.max_draft_tokens else "disabled")


def _extended(draft: Draft, tokens: tuple[int, ...], confidences: tuple[float, ...]) -> Draft:
    return replace(draft, tokens=draft.tokens + tokens, confidences=draft.confidences + confidences)
