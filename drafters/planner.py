"""What is worth drafting, and how much of a draft is worth verifying: the draft length of every policy (ADL).

`fixed` and `paper` (Eqs. 9 to 11) say a length whatever it costs. `goodput` weighs what was learned while serving: how
often tokens of a given confidence are accepted (`drafters.estimates`) against what passes cost (`drafters.costs`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drafters.base import Draft, DraftRequest, Outcome, PolicyName, StepRecord
from drafters.candidate import Candidate, RequestState
from drafters.costs import StepCosts
from drafters.estimates import TEMPERATURES, Calibration, DiffusionForecast, Floats
from drafters.goodput import PASS_HYSTERESIS, choose_lengths, choose_sources
from drafters.length import PaperLengthOptions

PROMISED_TOKENS = 8  # of a free draft, by whose expected acceptance the benefit of a diffusion pass is foretold
MAX_CATCH_UP_ROWS = 16  # a first pass may read a long window, but later ones profit: it is charged no more rows
ROWS_AHEAD = 8  # of a draft, over which the cost of one row is taken
CAUTION = 0.5  # confidences are not calibrated yet when a free draft ends
EXPLORATION = 0.005  # of all seconds, for passes that do not seem worth it: estimates must be able to rise again
GUESSED_DRAFT_SECONDS = {1: 5e-4, 64: 4e-3}  # by rows, until they are measured
PLAIN_INTERVAL = 64  # steps with drafts in a row, until one goes without: drafts are weighed against plain passes
PROBE_INTERVAL = 48  # steps without a draft in a class of temperatures, until one token is verified all the same


@dataclass(frozen=True, slots=True)
class LengthOptions:
    """How long drafts are where a request doesn't say."""

    policy: PolicyName = "goodput"
    max_draft_tokens: int = 32
    fixed_length: int = 8  # tokens, of policy `fixed`
    diffusion_length: int = 6  # most tokens of a diffusion draft under `goodput`
    paper: PaperLengthOptions = field(default_factory=PaperLengthOptions)


class DraftPlanner:
    """Decides for a batch: before drafting whom a diffusion pass serves, after it what is verified. Learns from both.

    Not thread-safe.
    """

    def __init__(self, options: LengthOptions) -> None:
        self._options = options
        self._forecast = DiffusionForecast(options.max_draft_tokens)
        self._copy_calibration, self._path_calibration = Calibration(1.0), Calibration(0.9)
        self._costs = StepCosts({1: 3e-3, 64: 2e-2}, GUESSED_DRAFT_SECONDS)  # until they are measured
        self._batch = self._costs.of_batch(1)
        self._exploration_seconds = self._exploration_price = 0.0  # saved up; what the last one asked for cost
        self._drafted_steps = 0  # in a row
        self._idle_steps = [0] * (len(TEMPERATURES) + 1)  # by class: steps since one of it had a draft

    def calibrate(
        self,
        verify_seconds: Mapping[int, float],
        draft_seconds: Mapping[int, float] | None,
        plain_seconds: Mapping[int, float] | None = None,
    ) -> None:
        """Set the cost table at start-up: see `StepCosts`. draft_seconds: None if there is no diffusion drafter."""
        self._costs = StepCosts(verify_seconds, draft_seconds or GUESSED_DRAFT_SECONDS, plain_seconds)
        self.open_step(1, 0)

    def open_step(self, num_requests: int, num_prefill_rows: int) -> None:
        """A step of so many requests begins, with prompt rows beside them; what follows is planned for it."""
        self._batch = self._costs.of_batch(num_requests, num_prefill_rows)

    def least_survival(self, num_requests: int) -> float:
        """Survival below which a token is surely not worth its row: what a row costs against what a token does.

        num_requests: that are drafted for.
        """
        batch = self._batch
        verify = self._costs.verify.at
        row_seconds = (verify(batch.base_rows + ROWS_AHEAD) - verify(batch.base_rows)) / ROWS_AHEAD
        return CAUTION * row_seconds * num_requests / batch.plain_seconds

    def plan_diffusion(
        self,
        candidates: Sequence[Candidate],
        longest: int,
        pending_rows: Callable[[DraftRequest], int],
    ) -> None:
        """Decide, before paying for it, which requests take part in a diffusion pass and with how many tokens.

        longest: tokens that the drafter can propose. pending_rows: clean rows that it would have to run for a request
        before its masks.
        """
        adaptive = [candidate for candidate in candidates if candidate.policy == "goodput"]
        for candidate in candidates:
            if candidate.policy == "fixed":
                candidate.diffusion_length = min(candidate.cap, self._options.fixed_length, longest)
            elif candidate.policy == "paper":
                candidate.diffusion_length = min(candidate.cap, candidate.state.paper.next_length, longest)
        if not adaptive:
            return
        longest = min(longest, self._options.diffusion_length)
        for candidate in adaptive:
            candidate.accepted = self._accepted_by_length(candidate)
            promise = candidate.accepted[min(candidate.cap, PROMISED_TOKENS)]
            candidate.forecast_class = self._forecast.classes(candidate.state.heat, promise)
        least = self._least_gain(candidates, longest)
        is_worth = any(
            self._forecast.is_worth(candidate.forecast_class, candidate.state.agreement.forecast.factor, least)
            for candidate in adaptive
        )
        is_exploring = self._exploration_seconds >= self._exploration_price
        if not is_worth and not is_exploring:
            for candidate in adaptive:
                candidate.state.waited_steps += 1
            return
        pending = [min(pending_rows(candidate.request), MAX_CATCH_UP_ROWS) for candidate in adaptive]
        draft_rows = np.array(pending, np.float64) + [min(candidate.cap, longest) for candidate in adaptive]
        chosen = self._choose(adaptive, draft_rows) if is_worth else np.zeros(len(adaptive), np.bool_)
        explored = None
        if is_exploring and not chosen.all():
            explored = self._explore(adaptive, chosen, draft_rows, longest)
        for i, (candidate, is_chosen) in enumerate(zip(adaptive, chosen.tolist(), strict=True)):
            if is_chosen or i == explored:
                candidate.diffusion_length = min(candidate.cap, longest)
            candidate.state.waited_steps = 0 if candidate.diffusion_length else candidate.state.waited_steps + 1

    def _least_gain(self, candidates: Sequence[Candidate], longest: int) -> float:
        """Accepted tokens that a pass must add per request: less is hardly chosen, so that nothing need be weighed.

        That is what the pass costs at least, and the hysteresis, at the pace of plain decoding, or of the free draft of
        a request that is alone.
        """
        batch, pass_seconds = self._batch, self._costs.draft.at
        adaptive = [candidate for candidate in candidates if candidate.policy == "goodput"]
        others = sum(candidate.diffusion_length for candidate in candidates)  # they have their pass anyway
        rows = sum(min(candidate.cap, longest) for candidate in adaptive)
        seconds = pass_seconds(others + rows) - pass_seconds(others) + len(adaptive) * batch.search_seconds
        plain = batch.overhead_seconds + batch.plain_seconds
        pace = 1.0 / plain
        if batch.base_rows == 1 and candidates[0].accepted is not None:
            length = len(candidates[0].tokens)
            step = batch.overhead_seconds + self._costs.drafted_seconds(1 + length, 1)
            pace = max(pace, (1.0 + float(candidates[0].accepted[length])) / step)
        return pace * (PASS_HYSTERESIS * plain + (1.0 + PASS_HYSTERESIS) * seconds)

    def _choose(self, adaptive: Sequence[Candidate], draft_rows: Floats) -> NDArray[np.bool_]:
        """Which candidates a diffusion pass is worth its cost for, by the forecast."""
        copied = np.array([candidate.accepted for candidate in adaptive])
        gains = np.array(
            [
                candidate.state.agreement.forecast.factor * self._forecast.gains(candidate.forecast_class)
                for candidate in adaptive
            ]
        )
        caps = np.array([candidate.cap for candidate in adaptive])
        return choose_sources(copied, copied + gains, caps, draft_rows, self._batch)

    def _explore(
        self, adaptive: Sequence[Candidate], chosen: NDArray[np.bool_], draft_rows: Floats, longest: int
    ) -> int | None:
        """Which candidate has a diffusion pass although it does not seem worth it; None while that costs too much.

        The one that has waited longest. What it costs is taken from the share of all time that exploration may have.
        """
        waiting = np.flatnonzero(~chosen)
        index = max(waiting.tolist(), key=lambda i: adaptive[i].state.waited_steps)
        batch, rows = self._batch, float(draft_rows[chosen].sum())
        seconds = batch.draft_at(rows + draft_rows[index]) - batch.draft_at(rows) + batch.search_seconds
        seconds += batch.verify_at(batch.base_rows + min(adaptive[index].cap, longest)) - batch.plain_seconds
        self._exploration_price = seconds
        self._exploration_seconds = min(self._exploration_seconds, 2 * seconds)
        if self._exploration_seconds < seconds:
            return None
        self._exploration_seconds -= seconds
        return index

    def settle(self, candidates: Sequence[Candidate]) -> None:
        """After a diffusion pass: keep the better of path and free draft, and learn what the pass has added."""
        for candidate in candidates:
            if candidate.policy != "goodput":
                continue
            state, cap, where = candidate.state, candidate.cap, candidate.forecast_class
            free = self._expected(candidate.free_confidences, 0, state.heat, state.agreement.copy.factor)
            candidate.gains = gains = self._accepted_by_length(candidate) - free
            is_better = bool(gains[cap] > 0.0)
            forecast = float(self._forecast.gains(where)[cap])
            self._forecast.observe(where, gains if is_better else np.zeros_like(gains), cap)
            state.agreement.forecast.observe(float(max(gains[cap], 0.0)), forecast)
            if candidate.path is not None and not is_better:
                candidate.drop_path()

    def cut(self, candidates: Sequence[Candidate], spent_seconds: float) -> list[Draft]:
        """Turn candidates into drafts of the length that is worth verifying.

        spent_seconds: on drafting in this step, which no choice can bring back.
        """
        lengths = [0] * len(candidates)
        other_rows = 0
        adaptive = []
        for i, candidate in enumerate(candidates):
            if candidate.cap == 0:
                continue
            if candidate.policy == "goodput":
                adaptive.append(i)
                continue
            wanted = self._options.fixed_length if candidate.policy == "fixed" else candidate.state.paper.next_length
            lengths[i] = min(len(candidate.tokens), wanted, candidate.cap)
            other_rows += lengths[i]
        if self._drafted_steps >= PLAIN_INTERVAL:  # what a plain pass costs must not be known from long ago
            adaptive = []
        accepted = np.zeros((len(adaptive), self._options.max_draft_tokens + 1))
        if adaptive:
            caps = np.zeros(len(adaptive), dtype=np.int64)
            for row, i in enumerate(adaptive):
                candidate = candidates[i]
                caps[row] = min(len(candidate.tokens), candidate.cap)
                known = candidate.accepted if candidate.path is None else None
                accepted[row] = self._accepted_by_length(candidate) if known is None else known
            chosen = choose_lengths(accepted, caps, other_rows, spent_seconds, self._batch)
            for row, length in enumerate(chosen.tolist()):
                state = candidates[adaptive[row]].state
                state.note(length > 0, len(candidates))
                lengths[adaptive[row]] = length or self._probe(state.heat, int(caps[row]))
            for heat in {candidates[i].state.heat for i in adaptive}:
                has_draft = any(lengths[i] for i in adaptive if candidates[i].state.heat == heat)
                self._idle_steps[heat] = 0 if has_draft else self._idle_steps[heat] + 1
        return [self._draft(candidate, length) for candidate, length in zip(candidates, lengths, strict=True)]

    def learn(self, state: RequestState, outcome: Outcome) -> None:
        """Take in what became of one request's draft: acceptance by confidence and of the request."""
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
            rival = num_common(draft.tokens[:num_accepted], state.rival)
            self._forecast.verify(state.forecast_class, num_accepted - rival, state.expected_gain)

    def learn_costs(self, step: StepRecord) -> None:
        """Take in what one step cost."""
        if step.num_prefill_rows == 0:  # prefill rows need no logits and long attention: another cost
            has_drafts = any(outcome.draft.tokens for outcome in step.outcomes)
            if has_drafts:
                self._costs.observe_drafted(step.num_rows, len(step.outcomes), step.verify_seconds)
            else:
                self._costs.observe_plain(len(step.outcomes), step.verify_seconds)
            self._drafted_steps = self._drafted_steps + 1 if has_drafts else 0
        drafting = step.drafting
        if drafting.num_diffusion_rows:
            self._costs.draft.observe(drafting.num_diffusion_rows, drafting.pass_seconds)
        self._exploration_seconds += EXPLORATION * step.seconds.total
        overhead = max(drafting.draft_seconds - drafting.pass_seconds, 0.0) + step.commit_seconds
        self._costs.observe_overheads(drafting.num_searches, drafting.search_seconds, overhead)

    def _probe(self, heat: int, known: int) -> int:
        """Length of a draft that is not worth verifying: once in a while 1, or no estimate could ever rise again."""
        if self._idle_steps[heat] < PROBE_INTERVAL or known == 0:
            return 0
        self._idle_steps[heat] = 0
        return 1

    def _accepted_by_length(self, candidate: Candidate) -> Floats:
        """`[1 + longest]` expected accepted tokens of the candidate's draft, by its length, in its request's light."""
        agreement = candidate.state.agreement
        factor = (agreement.copy if candidate.path is None else agreement.diffusion).factor
        return self._expected(candidate.confidences, candidate.num_searched, candidate.state.heat, factor)

    def _expected(self, confidences: Floats, num_searched: int, heat: int, factor: float) -> Floats:
        """The same of any draft whose first `num_searched` tokens the path search chose."""
        accepted = np.empty(self._options.max_draft_tokens + 1)
        path, free = confidences[:num_searched], confidences[num_searched:]
        survival = self._path_calibration.accumulate(path, heat, factor, accepted) if num_searched else 1.0
        if len(free) or not num_searched:
            self._copy_calibration.accumulate(free, heat, factor, accepted, num_searched, survival)
        return accepted

    def _draft(self, candidate: Candidate, length: int) -> Draft:
        state, searched = candidate.state, min(candidate.num_searched, length)
        state.confidences, state.num_searched = candidate.confidences[:length], searched
        if candidate.path is not None and candidate.gains is not None:
            state.rival, state.forecast_class = candidate.free_tokens, candidate.forecast_class
            state.expected_gain = max(float(candidate.gains[length]), 0.0)
        return candidate.draft(length, self._calibrated(state) if length else state.confidences)

    def _calibrated(self, state: RequestState) -> Floats:
        """`[tokens]` acceptance of each token of the draft that is being verified, given that all before it are."""
        searched, confidences = state.num_searched, state.confidences
        copied = self._copy_calibration.estimate(confidences[searched:], state.heat)
        if not searched:
            return copied
        return np.concatenate([self._path_calibration.estimate(confidences[:searched], state.heat), copied])


def num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two drafts begin with in common."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))
