"""The length of drafts: `fixed` and `paper` say one; `goodput` takes what pays, by acceptance and by seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from drafters.base import Draft, DraftRequest, PolicyName, StepRecord
from drafters.policy.acceptance import Acceptance, RequestFactor, temperature_class
from drafters.policy.gains import PassGains, added_tokens, pass_class
from drafters.policy.learning import Exploring
from drafters.policy.paper import PaperLength, PaperOptions
from drafters.policy.seconds import FIRST_GUESS, StepSeconds
from transformer.compiled import allocating

Floats = NDArray[np.float64]

MIN_GAIN = 0.03  # smallest relative gain for which drafting beats plain decoding. Doubled: fewer drafts that hardly pay
MIN_SURVIVAL = 0.05  # of a free draft's tokens, however cheap rows are. Doubled: shorter free drafts
MAX_REST_STEPS = 16  # in which a request isn't looked at while nothing pays. Doubled: cheaper, slower to see a change
MAX_CATCH_UP_ROWS = 16  # context rows charged to one pass. Doubled: long-idle drafters are asked less


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """Lengths of drafts where a request doesn't say."""

    policy: PolicyName = "goodput"
    max_draft_tokens: int = 32
    fixed_length: int = 8  # tokens, policy `fixed`
    diffusion_length: int = 6  # most tokens of a diffusion draft under `goodput`
    paper: PaperOptions = field(default_factory=PaperOptions)


@dataclass(slots=True)
class RequestState:
    """The policy's memory of one request."""

    temperature_class: int
    paper: PaperLength
    factor: RequestFactor = field(default_factory=RequestFactor)
    idle_steps: int = 0  # in a row for which nothing was worth drafting
    rest_steps: int = 0  # still to come in which it isn't looked at


class Policy:
    """Decides whom a diffusion pass serves, and how much of each draft is verified; learns from every step.

    A request's drafts depend on its own policy and on what the step costs, never on what other requests ask for. In
    every step call `open_step`, `weigh`, `pass_lengths` and `choose`, in this order; then `observe`. Not thread-safe.
    """

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options
        self._acceptance = Acceptance()
        self._seconds = StepSeconds(FIRST_GUESS, FIRST_GUESS)
        self._exploring = Exploring()
        self._states: dict[str, RequestState] = {}
        self._gains = PassGains()
        self._num_requests, self._num_rows = 1, 1  # of the step: requests, and rows without drafts
        self._base_seconds = 0.0  # of its verification pass without the drafts of `goodput`

    def calibrate(
        self, verify: Mapping[int, float], passes: Mapping[int, float] | None, plain: Mapping[int, float] | None = None
    ) -> None:
        """Set the start-up curves (see `StepSeconds`). passes: None without a diffusion drafter."""
        self._seconds = StepSeconds(verify, passes or FIRST_GUESS, plain)

    def open_step(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[DraftRequest]:
        """Begin a step of these requests; returns those worth drafting for: the others rest, or may not draft."""
        self._num_requests, self._num_rows = len(requests), len(requests) + num_prefill_rows
        wanting = [request for request in requests if request.max_draft_tokens > 0]
        if all(self.is_adaptive(request) for request in wanting):
            self._base_seconds = self._seconds.plain(self._num_requests, self._num_rows)
            if wanting and not num_prefill_rows and self._exploring.is_due("plain", self._base_seconds):
                return []  # a step without drafts tells what plain decoding costs
        else:
            self._base_seconds = float(self._seconds.drafted(self._num_requests, self._num_rows, 0)[0])
        return [request for request in wanting if not self._rests(request)]

    def min_survival(self, requests: Sequence[DraftRequest]) -> list[float]:
        """Return the survival, by its own account, at which each request's free draft ends: less isn't worth a row."""
        pace = self._num_requests / self._base_seconds
        worth = pace * self._seconds.row(self._num_requests, self._num_rows)
        least = max(worth / 2, MIN_SURVIVAL)  # half: confidences are not acceptance rates yet
        return [least if self.is_adaptive(request) else 0.0 for request in requests]

    def is_adaptive(self, request: DraftRequest) -> bool:
        """Return whether `goodput` decides for the request: nothing else says how long its drafts are."""
        return self._is_goodput(request.policy)

    def weigh(self, requests: Sequence[DraftRequest], drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts with the survival of their tokens, as estimated for each request."""
        states = [self._state(request) for request in requests]
        survival = self._acceptance.survival(
            drafts, [state.temperature_class for state in states], [state.factor.value for state in states]
        )
        return [draft.with_survival(row) if row else draft for draft, row in zip(drafts, survival, strict=True)]

    def pass_lengths(
        self, requests: Sequence[DraftRequest], free: Sequence[Draft], pending: Sequence[int], max_length: int
    ) -> list[int]:
        """Decide, before it is paid for, whom a diffusion pass serves: return the tokens to ask of it, 0 for no pass.

        free: the weighed free drafts. pending: context rows that the pass would have to run for each request first.
        max_length: tokens that it can propose. Under `goodput` a pass serves the requests for which it adds enough.
        """
        wanted = [min(self._length(request), request.max_draft_tokens, max_length) for request in requests]
        is_adaptive = [self.is_adaptive(request) for request in requests]
        lengths = [0 if adapts else length for adapts, length in zip(is_adaptive, wanted, strict=True)]
        adaptive = [i for i, adapts in enumerate(is_adaptive) if adapts]
        if not adaptive:
            return lengths
        wanted = [min(length, self._options.diffusion_length) for length in wanted]
        classes = {
            i: pass_class(self._state(requests[i]).temperature_class, free[i].expected_accepted) for i in adaptive
        }
        order = sorted(adaptive, key=lambda i: -self._gains.of(classes[i]))
        gains = np.cumsum([self._gains.of(classes[i]) for i in order])
        others = sum(lengths)  # rows of a pass that is taken anyway
        rows = np.array([min(pending[i], MAX_CATCH_UP_ROWS) + wanted[i] for i in order])
        anyway = self._seconds.diffusion(np.array([others]))
        seconds = self._seconds.diffusion(others + np.cumsum(rows)) - anyway
        seconds += self._seconds.search * np.arange(1, len(order) + 1)
        count = self._num_worth(requests, free, gains, seconds, [wanted[i] for i in order])
        for i in order[:count]:
            lengths[i] = wanted[i]
        prices = self._seconds.diffusion(others + rows) - anyway + self._seconds.search
        for i, price in zip(order[count:], prices[count:].tolist(), strict=True):
            if self._exploring.is_due(("pass", classes[i]), price):
                lengths[i] = wanted[i]
                break
        return lengths

    def choose(
        self,
        requests: Sequence[DraftRequest],
        free: Sequence[Draft],
        found: Sequence[Draft | None],
        spent_seconds: float = 0.0,
    ) -> list[Draft]:
        """Return what is verified: the better of each request's two drafts, cut to the length that pays.

        found: weighed drafts that begin with a searched path; None without a pass. spent_seconds: on drafting in this
        step, which no choice can bring back.
        """
        drafts = [self._better(*pair) for pair in zip(requests, free, found, strict=True)]
        chosen = [draft.cut(self._length(request)) for request, draft in zip(requests, drafts, strict=True)]
        adaptive = [i for i, request in enumerate(requests) if self.is_adaptive(request)]
        if adaptive:
            best, _, _ = self._best_lengths(requests, chosen, spent_seconds)
            for i, length in zip(adaptive, best, strict=True):
                state = self._state(requests[i])
                state.idle_steps = 0 if length else state.idle_steps + 1
                state.rest_steps = min(state.idle_steps // 2, MAX_REST_STEPS)
                chosen[i] = drafts[i].cut(length or self._probe(state, drafts[i]))
        return chosen

    def observe(self, step: StepRecord) -> None:
        """Learn from one verified step: from its drafts as they were verified, and from what it cost."""
        known = [(self._states[each.request_id], each) for each in step.outcomes if each.request_id in self._states]
        drafted = [(state, outcome) for state, outcome in known if outcome.draft.tokens]
        drafts, classes = [each.draft for _, each in drafted], [state.temperature_class for state, _ in drafted]
        expected = self._acceptance.observe(drafts, classes, [outcome.num_accepted for _, outcome in drafted])
        for (state, outcome), tokens in zip(drafted, expected, strict=True):
            state.factor.observe(outcome.num_accepted, tokens)
        for state, outcome in known:
            if not outcome.draft.tokens:
                state.factor.observe(0.0, 0.0)
            facts = outcome.draft.search
            if facts is None or outcome.is_cut:
                continue
            if outcome.draft.source == "diffusion":
                state.paper.observe(facts.raw_length, outcome.num_accepted)
            if self._is_goodput(outcome.policy):  # others verify paths that it would not
                kind = pass_class(state.temperature_class, facts.promised)
                self._gains.observe(kind, added_tokens(outcome))
                self._exploring.saw(("pass", kind))
        self._seconds.observe(step)
        self._exploring.pass_time(step.seconds.total)
        for where in set(classes):
            self._exploring.saw(("free", where))
        if not drafts and not step.num_prefill_rows:
            self._exploring.saw("plain")

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""
        self._states.pop(request_id, None)

    def _num_worth(
        self,
        requests: Sequence[DraftRequest],
        free: Sequence[Draft],
        gains: Floats,
        seconds: Floats,
        wanted: Sequence[int],
    ) -> int:
        """Return for how many requests a pass pays, those that gain most first; 0 for none.

        gains, seconds, wanted: `[requests]` accepted tokens and seconds of a pass for the first 1, 2, ... of them, and
        tokens of each one's draft.
        """
        if (gains / seconds).max() * self._base_seconds <= self._num_requests:  # slower than no drafts at all
            return 0
        settled = [draft.cut(self._length(request)) for request, draft in zip(requests, free, strict=True)]
        _, tokens, before = self._best_lengths(requests, settled, 0.0)
        more = self._seconds.row(self._num_requests, self._num_rows) * np.cumsum(wanted)
        rates = (tokens + gains) / (before + seconds + more)
        best = int(rates.argmax())
        return best + 1 if rates[best] > (1.0 + MIN_GAIN) * tokens / before else 0

    def _best_lengths(
        self, requests: Sequence[DraftRequest], drafts: Sequence[Draft], spent_seconds: float
    ) -> tuple[list[int], float, float]:
        """Return the lengths of the adaptive requests' drafts that maximise expected committed tokens per second.

        Also returns those tokens and seconds. The drafts of the other requests are verified whole.
        """
        pairs = list(zip(requests, drafts, strict=True))
        adaptive = [draft for request, draft in pairs if self.is_adaptive(request)]
        others = [draft for request, draft in pairs if not self.is_adaptive(request)]
        other_rows = sum(len(draft.tokens) for draft in others)
        survival = np.array([value for draft in adaptive for value in draft.survival])
        seconds = self._seconds.drafted(self._num_requests, self._num_rows + other_rows, len(survival))
        if not other_rows:
            seconds[0] = self._base_seconds
        seconds += self._seconds.overhead + spent_seconds
        base_tokens = float(self._num_requests) + sum(draft.expected_accepted for draft in others)
        sizes = np.array([len(draft.tokens) for draft in adaptive])
        lengths, tokens, best = _best_lengths(survival, sizes, seconds, base_tokens, MIN_GAIN)
        return lengths.tolist(), tokens, best

    def _better(self, request: DraftRequest, free: Draft, found: Draft | None) -> Draft:
        """Return the draft that is expected to have more tokens accepted; a fixed length takes any searched path."""
        if found is None:
            return free
        prefers = bool(found.tokens) and (
            not self.is_adaptive(request) or found.expected_accepted > free.expected_accepted
        )
        return replace(found, free=free.tokens) if prefers else replace(free, search=found.search)

    def _probe(self, state: RequestState, draft: Draft) -> int:
        """Return 1 if a token is worth verifying for what it tells, though not for itself; else 0."""
        if not draft.tokens or not self._exploring.has_saved(("free", state.temperature_class)):
            return 0
        drafted = self._seconds.drafted(self._num_requests, self._num_rows, 1)
        price = max(float(drafted[1]) - self._base_seconds, float(drafted[1] - drafted[0]))
        return int(self._exploring.is_due(("free", state.temperature_class), price))

    def _length(self, request: DraftRequest) -> int:
        """Return the most tokens of the request's draft by its policy."""
        policy = request.policy or self._options.policy
        if policy == "fixed":
            return self._options.fixed_length
        if policy == "paper":
            return self._state(request).paper.next_length
        return self._options.max_draft_tokens

    def _is_goodput(self, policy: PolicyName | None) -> bool:
        return (policy or self._options.policy) == "goodput"

    def _rests(self, request: DraftRequest) -> bool:
        state = self._state(request)
        if not self.is_adaptive(request) or state.rest_steps == 0:
            return False
        state.rest_steps -= 1
        return True

    def _state(self, request: DraftRequest) -> RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            state = RequestState(temperature_class(request.temperature), PaperLength(self._options.paper))
            self._states[request.request_id] = state
        return state


@allocating
def _best_lengths(
    survival: Floats, sizes: NDArray[np.int64], seconds: Floats, base_tokens: float, min_gain: float
) -> tuple[NDArray[np.int64], float, float]:
    """Return the lengths, tokens and seconds of the step with most tokens per second.

    survival: of all drafts' tokens, draft after draft; it never rises along one, so that tokens taken by survival are
    taken in order. sizes: `[drafts]` tokens of each. seconds: `[1 + tokens]` of the step with 0, 1, ... of them.
    base_tokens: that the step commits without them.
    """
    order = np.argsort(-survival, kind="mergesort")
    tokens = best_tokens = base_tokens
    best = 0
    best_rate = (1.0 + min_gain) * tokens / seconds[0]
    for count in range(1, len(order) + 1):
        tokens += survival[order[count - 1]]
        if tokens / seconds[count] > best_rate:
            best, best_rate, best_tokens = count, tokens / seconds[count], tokens
    owners = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.zeros(len(sizes), np.int64)
    for place in order[:best]:
        lengths[owners[place]] += 1
    return lengths, best_tokens, seconds[best]
