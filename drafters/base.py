"""The words of drafting, shared by both engines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.int32]
PolicyName = Literal["goodput", "paper", "fixed"]
CausalModelName = Literal["mixed", "ngram", "text", "uniform"]
"""Knowledge of the causal model: `ngram` n-grams fitted offline, `text` the request's own text as it grows, `mixed`
both, `uniform` nothing."""
SourceName = Literal["none", "free", "diffusion"]
"""`none`: nothing drafted. `free`: the causal model alone (the request's own text, n-grams). `diffusion`: begins with a
path that the search found in the diffusion model's lattice."""
BypassReason = Literal[
    "",
    "prefill",  # the prompt is still being read
    "disabled",  # the request or the service wants no drafts
    "last_token",  # a step adds one token by itself, and only one is left
    "no_candidates",  # nothing drafted anything
    "not_worth_it",  # the policy expects more tokens per second without the draft
    "resting",  # drafts were not worth it lately, so none was made
    "scheduler",  # vLLM's scheduler cut the draft to nothing
    "drafter_failed",
    "other",  # a reason that a pipeline of one's own gives
]
"""Reason that a step of a request had no draft; empty if it had one."""


class DraftConstraint(Protocol):
    """A structure that a request's output keeps to, such as a JSON schema, after the committed tokens."""

    def next_allowed(self, draft: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return `[tokens]` which may follow the committed tokens and `draft`; None if `draft` breaks or ends it."""

    def complete(self, draft: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Return the allowed beginning of a draft, then the tokens that the structure forces; at most `max_tokens`."""


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request as the pipeline sees it, before a step."""

    request_id: str
    tokens: Tokens  # [length] all committed tokens: prompt, then output; a view, not to be kept
    max_draft_tokens: int  # from `draft_limit`
    policy: PolicyName | None = None  # None: the service's
    temperature: float = 0.0  # acceptance falls with it, so estimates are kept apart by it
    seed: int | None = None  # of the noise that the target draws with (`transformer.noise`); None: unknown
    hidden_states: "Tensor | None" = None  # [length or more, hidden] the target's, one row before each token; a view
    constraint: DraftConstraint | None = None


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """Findings of a path search beside its path."""

    raw_length: int = 0  # tokens before the first end-of-text in the drafter's raw argmax (Eq. 9)
    lattice_width: float = 0.0  # mean candidates per position
    path_gain: float = 0.0  # score of the chosen path minus that of the raw argmax path, nats per token
    promised: float = 0.0  # accepted tokens that the policy expected of the free draft beside it


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens to verify and how they were chosen: a value that nothing changes."""

    tokens: tuple[int, ...] = ()
    source: SourceName = "none"
    confidences: tuple[float, ...] = ()  # [tokens] raw: the probability that the token had for what chose it
    num_searched: int = 0  # the path search chose the first so many tokens, the causal model the others
    survival: tuple[float, ...] = ()  # [tokens] the policy's estimate that this token and all before it are accepted
    search: SearchFacts | None = None  # None: no path was searched for this request in this step
    free: tuple[int, ...] = ()  # the free draft that lost against a searched one
    bypass_reason: BypassReason = ""

    @property
    def expected_accepted(self) -> float:
        """Expected accepted tokens, by the policy's estimates."""
        return sum(self.survival)

    def cut(self, length: int, reason: BypassReason = "not_worth_it") -> "Draft":
        """Return the draft's first `length` tokens; none of them: no draft, for that reason."""
        if length >= len(self.tokens):
            return self
        if length <= 0:
            return Draft(search=self.search, bypass_reason=reason)
        return Draft(
            self.tokens[:length],
            self.source,
            self.confidences[:length],
            min(self.num_searched, length),
            self.survival[:length],
            self.search,
            self.free,
        )

    def with_survival(self, survival: Sequence[float]) -> "Draft":
        """Return the draft with the policy's estimate of it."""
        return Draft(
            self.tokens,
            self.source,
            self.confidences,
            self.num_searched,
            tuple(survival),
            self.search,
            self.free,
            self.bypass_reason,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fate of one request's draft in one step, fed back to the pipeline by `observe`."""

    request_id: str
    draft: Draft  # as it was verified
    num_accepted: int
    policy: PolicyName | None = None  # the request's; None: the service's
    num_cut: int = 0  # accepted tokens behind a stop token: drafted right, but no part of the output
    next_token: int | None = None  # what the target drew after the accepted tokens; None: unknown
    is_cut: bool = False  # less was verified than was proposed: what the whole draft was worth is not known

    @property
    def num_kept(self) -> int:
        """Accepted tokens that are part of the output: clients and dashboards count these."""
        return self.num_accepted - self.num_cut


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """Wall-clock seconds of one engine step."""

    draft: float  # free drafts, drafter passes, and the policy
    search: float  # lattice and path search
    verify: float
    commit: float

    @property
    def total(self) -> float:
        return self.draft + self.search + self.verify + self.commit


@dataclass(frozen=True, slots=True)
class DraftingCost:
    """Time and work of one call of `Pipeline.propose`."""

    draft_seconds: float = 0.0  # all but lattice and path search
    search_seconds: float = 0.0
    pass_seconds: float = 0.0  # the part of `draft_seconds` that the diffusion pass took
    num_diffusion_rows: int = 0  # rows of that pass; 0: there was none
    num_searches: int = 0  # requests that a path was searched for


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step. The policy and Prometheus read this same record."""

    outcomes: Sequence[Outcome]  # requests that were verified in this step, drafted or not
    num_rows: int  # rows of the verification pass: pending tokens and drafts of all requests
    num_prefill_rows: int  # the prompt tokens among them
    drafting: DraftingCost = DraftingCost()
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    num_drafter_failures: int = 0  # since the step before; embedded engine only (vLLM's worker reports its own)

    @property
    def seconds(self) -> PhaseSeconds:
        drafting = self.drafting
        return PhaseSeconds(drafting.draft_seconds, drafting.search_seconds, self.verify_seconds, self.commit_seconds)


class Pipeline(Protocol):
    """The interface of anything that drafts for an engine; `drafters.pipeline.DraftPipeline` is the real one."""

    @property
    def max_draft_tokens(self) -> int:
        """The service's largest draft; 0 for plain decoding."""

    @property
    def description(self) -> str:
        """For people, e.g. `diffusion (block, 1.3M) + own text`."""

    @property
    def drafter_up(self) -> bool:
        """False while a part of it is left out after a failure."""

    @property
    def num_failures(self) -> int:
        """Failures of such a part so far: contained and logged, not raised by `propose`."""

    @property
    def last_cost(self) -> DraftingCost:
        """Cost of the latest `propose`."""

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
        """Return one draft per request, none longer than its `max_draft_tokens`.

        num_prefill_rows: prompt rows that the same verification pass will carry.
        """

    def observe(self, step: StepRecord) -> None:
        """Learn from one verified step."""

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        """Take in what verification costs at start-up: seconds of a pass of few requests, by its rows.

        plain_seconds: seconds of a pass without drafts, by its requests; None: as by rows.
        """


def max_draft_tokens(is_enabled: bool, wanted: int | None, service_limit: int) -> int:
    """Return the most tokens that a request's drafts may have. wanted: the request's own limit; None: the service's."""
    if not is_enabled:
        return 0
    return max(min(service_limit if wanted is None else wanted, service_limit), 0)


def draft_limit(request_limit: int, num_left: int) -> tuple[int, BypassReason]:
    """Return the most tokens worth drafting in a step, and the reason if that is none.

    request_limit: from `max_draft_tokens`. num_left: tokens that may still be generated; the step adds one of them
    itself.
    """
    if request_limit <= 0:
        return 0, "disabled"
    if num_left <= 1:
        return 0, "last_token"
    return min(request_limit, num_left - 1), ""


def num_common(left: Sequence[int] | Tokens, right: Sequence[int] | Tokens) -> int:
    """Return how many tokens two sequences begin with in common."""
    size = min(len(left), len(right))
    differs = np.asarray(left[:size]) != np.asarray(right[:size])
    return int(differs.argmax()) if differs.any() else size


class Backoff:
    """Pauses after failures: a second, then twice as long after each further failure in a row, up to a minute."""

    FIRST_SECONDS, MAX_SECONDS = 1.0, 60.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._resumes_at = 0.0
        self.seconds = 0.0  # of the latest pause; 0: the latest try was no failure

    @property
    def is_paused(self) -> bool:
        return self.seconds > 0.0 and self._clock() < self._resumes_at

    def fail(self) -> float:
        """Begin a pause; returns its seconds."""
        self.seconds = min(max(2 * self.seconds, self.FIRST_SECONDS), self.MAX_SECONDS)
        self._resumes_at = self._clock() + self.seconds
        return self.seconds

    def end(self) -> None:
        """End the pause: the next try may come at once."""
        self._resumes_at = 0.0

    def succeed(self) -> None:
        """Forget the failures: the next pause is a short one again."""
        self.seconds = 0.0
