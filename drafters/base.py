"""The words of drafting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.int32]
PolicyName = Literal["goodput", "paper", "fixed"]
CausalModelName = Literal["mixed", "ngram", "text", "uniform"]
"""What the causal model knows. `ngram`: n-grams that were fitted offline. `text`: the request's own text, as it grows.
`mixed`: both. `uniform`: nothing."""
SourceName = Literal["none", "free", "diffusion"]
"""`none`: nothing drafted. `copy`: the free draft (the request's own text and the n-gram model).
`diffusion`: a pass of the diffusion model, its lattice joined with the free candidates in one search."""


class DraftConstraint(Protocol):
    """A structure that a request's output keeps to, such as a JSON schema, after the committed tokens."""

    def next_allowed(self, draft: Sequence[int]) -> NDArray[np.bool_] | None:
        """`[tokens]` what may follow the committed tokens and `draft`; None if the draft itself may not, or ends it."""

    def complete(self, draft: Sequence[int], most: int) -> tuple[int, ...]:
        """The allowed beginning of a draft, then tokens that the structure leaves no choice about; at most `most`."""


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request as the pipeline sees it, before a step."""

    request_id: str
    tokens: Tokens  # [length] all committed tokens: prompt, then output; a view, not to be kept
    max_draft_tokens: int  # never more than this many (API limit, room in the context, tokens left to generate)
    policy: PolicyName | None = None  # None: the service's
    temperature: float = 0.0  # acceptance falls with it, so estimates are kept apart by it
    seed: int | None = None  # of the noise that the target draws with (`transformer.noise`); None: not to be known
    hidden_states: "Tensor | None" = None  # [length or more, hidden] what the target predicted tokens from; a view
    constraint: DraftConstraint | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """The tokens sent to verification, and what led to them."""

    tokens: tuple[int, ...] = ()
    source: SourceName = "none"
    confidences: tuple[float, ...] = ()  # per token: the pipeline's estimate that it is accepted if all before it are
    raw_length: int = 0  # tokens before the first end-of-text in the drafter's raw argmax, before the search (Eq. 9)
    expected_accepted: float = 0.0  # by the policy's survival estimates, tokens
    lattice_width: float = 0.0  # mean candidates per position; 0 without a lattice
    path_gain: float = 0.0  # score of the chosen path minus that of the raw argmax path, nats per token
    bypass_reason: str = ""  # why nothing was drafted, from a bounded set


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request's draft: fed back to the pipeline by `observe`."""

    request_id: str
    draft: Draft
    num_accepted: int
    policy: PolicyName | None = None  # the request's; None: the service's
    num_cut: int = 0  # accepted tokens behind a stop token: drafted right, but no part of the output

    @property
    def num_kept(self) -> int:
        """Accepted tokens that are part of the output: what clients and dashboards are told."""
        return self.num_accepted - self.num_cut


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """Wall-clock seconds of one engine step."""

    draft: float  # drafter passes, the free draft, and weighing what is worth it
    search: float  # lattice and path search
    verify: float
    commit: float

    @property
    def total(self) -> float:
        return self.draft + self.search + self.verify + self.commit


@dataclass(frozen=True, slots=True)
class DraftingCost:
    """What one call of a pipeline's `propose` took."""

    draft_seconds: float = 0.0  # all but lattice and path search
    search_seconds: float = 0.0
    pass_seconds: float = 0.0  # of the drafting, in the drafter's pass
    num_diffusion_rows: int = 0  # of that pass; 0: there was none
    num_searches: int = 0  # requests that the search was for


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step. The length controller and Prometheus read this same record."""

    outcomes: Sequence[Outcome]  # requests that were verified in this step, drafted or not
    num_rows: int  # rows of the verification pass: pending tokens and drafts of all requests
    num_prefill_rows: int  # of these, prompt tokens
    drafting: DraftingCost = DraftingCost()
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    mean_context: float = 0.0  # tokens
    num_drafter_failures: int = 0  # since the step before; of the embedded engine (vLLM's worker reports them itself)

    @property
    def seconds(self) -> PhaseSeconds:
        drafting = self.drafting
        return PhaseSeconds(drafting.draft_seconds, drafting.search_seconds, self.verify_seconds, self.commit_seconds)
