"""The Engine protocol, and the types that HTTP and engines share. Engines know token ids, never text."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from drafters.base import DraftConstraint, PolicyName, SourceName
from verifiers.base import SamplingRules, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]
EnginePhase = Literal["loading", "ready", "draining", "hung", "dead"]


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """The request's `speculative` field."""

    enabled: bool = True
    max_draft_tokens: int | None = None  # None: the service's default
    policy: PolicyName | None = None  # None: the service's default
    trace: bool = False


class Constraint(DraftConstraint, Protocol):
    """The tokens that may come next in one output that follows a structure."""

    @property
    def error(self) -> str:
        """The reason why no token may follow, if the structure's state has failed; else empty."""

    def masks(self, draft: Sequence[int]) -> NDArray[np.bool_]:
        """Return `[len(draft) + 1, tokens]`: the tokens allowed at each position of the draft and after it."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Advance the state by committed tokens."""


class StructureSpec(Protocol):
    """The definition of a structure."""

    @property
    def kind(self) -> Literal["json_schema", "regex", "grammar", "choice"]: ...

    @property
    def definition(self) -> str:
        """A JSON schema, a regular expression, a Lark or GBNF grammar, or a JSON list of choices."""


class Structure(Protocol):
    """A compiled structure."""

    @property
    def spec(self) -> StructureSpec:
        """The definition it was compiled from, for engines that compile themselves."""

    def start(self) -> Constraint:
        """Return the state of an empty output."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate, already validated: ids in range, prompt plus `max_tokens` within the context."""

    request_id: str
    prompt: Sequence[int]
    max_tokens: int  # 0: only read the prompt, for its log probabilities
    rules: SamplingRules  # with a seed; its stop_token_ids are all tokens that end this request
    include_stop_token: bool = False  # whether the stop token that ends the output is part of it
    prompt_logprobs: int | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    priority: int = 0  # lower runs first
    tenant: str = ""  # tenants take turns and share no cached prefixes
    timeout_seconds: float | None = None
    structure: Structure | None = None  # that the output must follow
    reuse_prefix: bool = True  # False: read the whole prompt again, whatever is cached

    def check_length(self, context_length: int) -> None:
        """Raise RequestFailedError if there is no prompt, or if prompt and output don't fit into the context."""
        if not self.prompt or len(self.prompt) + self.max_tokens > context_length:
            raise RequestFailedError(
                f"prompt ({len(self.prompt)} tokens) and max_tokens ({self.max_tokens}) must be at least 1 and "
                f"at most {context_length} tokens together"
            )


@dataclass(slots=True)
class SpeculationStats:
    """Counts of one request, under vLLM's names. Only steps after the prompt was read count.

    A drafted token counts as accepted only if it was kept, so not if it came after the stop token.
    """

    num_spec_steps: int = 0  # verification steps with at least one draft token
    num_spec_tokens: int = 0  # maximum draft tokens of a step
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)  # [num_spec_tokens + 1] steps by accepted tokens


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Origin of one step's tokens. Only requests with `speculation.trace` get it."""

    source: SourceName
    drafted: tuple[int, ...]
    num_accepted: int  # drafted tokens at the beginning of the delta; the next token is recovered or bonus


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The tokens that one step added to one request. The last delta has a finish reason."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, if requested
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt tokens 1.. in order; set on the first delta
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token that ended the request, whether or not it is in `tokens`
    trace: StepTrace | None = None
    stats: SpeculationStats | None = None  # counts so far, on every delta, because a stop string may end the request
    num_cached_prompt_tokens: int = 0  # prompt tokens whose keys and values were reused; set on the first delta
    queue_seconds: float = 0.0  # set on the first delta


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for probes. Taking it is cheap and never waits for the engine."""

    phase: EnginePhase
    detail: str = ""  # the reason why it isn't ready, or what is being loaded
    progress: float = 0.0  # of loading, 0 to 1
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0 to 1
    drafter_up: bool = True  # False from a failure of the drafter until it drafts again; True without a drafter


class EngineError(Exception):
    """Base class of everything an engine raises. The message is fit for a client."""


class QueueFullError(EngineError):
    """Too many requests wait. `retry_after_seconds` is estimated from how fast the queue drains."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineUnavailableError(EngineError):
    """The engine is loading, draining, hung or dead."""


class RequestRefusedError(EngineError):
    """The engine can't do what this request asks for. Raised before anything ran."""


class RequestFailedError(EngineError):
    """This request failed while running. Others are not affected."""


class NoTokenLeftError(RequestFailedError):
    """The request's own rules ban every token at some position. The request must change."""


class RequestTimeoutError(RequestFailedError):
    """The request's own `timeout_seconds` ran out, while waiting or running."""


class Engine(Protocol):
    """Generates tokens for many requests at once."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the target's logits. Prompt ids must be below it."""

    @property
    def context_length(self) -> int:
        """Maximum tokens of prompt and output together."""

    @property
    def default_draft_tokens(self) -> int:
        """The service's limit on draft tokens: `num_spec_tokens` of a request that sets none."""

    @property
    def unsupported_fields(self) -> Mapping[str, str]:
        """Request fields that this engine refuses, each with the reason for the client."""

    @property
    def drafter_description(self) -> str:
        """The drafter in words, for `/v1/models` and the banner: `diffusion (block, 1.3M) + own text`."""

    async def start(self) -> None:
        """Load everything. Returns when ready, raises if loading fails."""

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others finish for at most `drain_seconds`, then end them with `abort`."""

    def status(self) -> EngineStatus: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Yield the request's deltas. Admission errors are raised at the first `anext`.

        Closing the iterator early (`aclose`) cancels the request. Everything it held is free after the next step.
        Raises QueueFullError, EngineUnavailableError, RequestRefusedError or RequestFailedError.
        """
