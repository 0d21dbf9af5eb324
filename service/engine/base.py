"""What HTTP asks of an engine, and the words they share. Engines know token ids, never text."""

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
    max_draft_tokens: int | None = None  # None: the service's
    policy: PolicyName | None = None  # None: the service's
    trace: bool = False


class Constraint(DraftConstraint, Protocol):
    """What may come next in one output that keeps to a structure."""

    @property
    def error(self) -> str:
        """Why nothing may come next any more, if the structure's state has failed; else empty."""

    def masks(self, draft: Sequence[int]) -> NDArray[np.bool_]:
        """`[len(draft) + 1, tokens]` what may follow the output and the draft before each row."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in what was committed."""


class StructureSpec(Protocol):
    """A structure in words."""

    @property
    def kind(self) -> Literal["json_schema", "regex", "grammar", "choice"]: ...

    @property
    def definition(self) -> str:
        """A JSON schema, a regular expression, a Lark or GBNF grammar, or a JSON list of texts."""


class Structure(Protocol):
    """A compiled structure."""

    @property
    def spec(self) -> StructureSpec:
        """What was compiled, for an engine that compiles by itself."""

    def start(self) -> Constraint:
        """The state of an output that has not begun."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. Already validated: ids in range, prompt plus `max_tokens` within the context."""

    request_id: str
    prompt: Sequence[int]
    max_tokens: int  # 0: only the prompt is read, for its log probabilities
    rules: SamplingRules  # its seed is set, and its stop_token_ids are the tokens that end this request
    include_stop_token: bool = False  # whether the ending stop token is part of the output
    prompt_logprobs: int | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    priority: int = 0  # lower runs first
    tenant: str = ""  # on whose behalf: tenants take turns, and share no cached prefixes
    timeout_seconds: float | None = None
    structure: Structure | None = None  # what the output keeps to
    reuse_prefix: bool = True  # False: the whole prompt is read again, whatever is cached of it


@dataclass(slots=True)
class SpeculationStats:
    """Per-request counts, by vLLM's names. Only steps after the prompt was read count.

    A drafted token counts as accepted if it was kept: not if it stood behind the stop token that ended the request.
    """

    num_spec_steps: int = 0  # verification steps with at least one draft token
    num_spec_tokens: int = 0  # the most draft tokens a step may have had
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)  # [num_spec_tokens + 1] steps by accepted tokens


@dataclass(frozen=True, slots=True)
class StepTrace:
    """How one step made its tokens; only with `speculation.trace`."""

    source: SourceName
    drafted: tuple[int, ...]
    num_accepted: int  # the first so many tokens of the delta were drafted; the next one is recovered or bonus


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one request. The last delta has a finish reason; every delta has the statistics so far."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt tokens 1.. in order, before the first token
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token that ended the request, whether or not it is in `tokens`
    trace: StepTrace | None = None
    stats: SpeculationStats | None = None  # running counts on every delta: a stop string ends a request from outside
    num_cached_prompt_tokens: int = 0  # prompt tokens whose keys and values were reused
    queue_seconds: float = 0.0  # set on the first delta


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for probes; cheap, never waits for the engine."""

    phase: EnginePhase
    detail: str = ""  # why not ready, or what is being loaded
    progress: float = 0.0  # of loading, 0 to 1
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0 to 1
    drafter_up: bool = True  # False from a failure of the drafter until it has drafted again; True where there is none


class EngineError(Exception):
    """Base of everything an engine raises; the message is fit for a client."""


class QueueFullError(EngineError):
    """Too many requests wait. `retry_after_seconds` follows from the rate at which the queue drains."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineUnavailableError(EngineError):
    """Loading, draining, hung or dead."""


class RequestRefusedError(EngineError):
    """The engine cannot do what this request asks for; raised before anything ran."""


class RequestFailedError(EngineError):
    """This request failed while running; others did not notice."""


class NoTokenLeftError(RequestFailedError):
    """The request's own rules ban every token at some position: it is the request that must change."""


class RequestTimeoutError(RequestFailedError):
    """The request's own `timeout_seconds` ran out, waiting or running."""


class Engine(Protocol):
    """Generates tokens for many requests at once."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the target's logits: prompt ids must be below it."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and output together."""

    @property
    def default_draft_tokens(self) -> int:
        """The service's largest draft: `num_spec_tokens` where a request sets none."""

    @property
    def unsupported_fields(self) -> Mapping[str, str]:
        """Request fields that this engine refuses, each with the reason that a client is told."""

    @property
    def drafter_description(self) -> str:
        """For `/v1/models` and the banner, e.g. `diffusion (block, 1.3M) + own text`."""

    async def start(self) -> None:
        """Load everything; returns when ready, raises if it cannot be."""

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let running ones end for at most `drain_seconds`, then end them with `abort`."""

    def status(self) -> EngineStatus: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Yield the request's deltas. Admission errors are raised at the first `anext`.

        Closing the iterator early (`aclose`) cancels the request; everything it held is free after the next step.
        Raises QueueFullError, EngineUnavailableError, RequestRefusedError, RequestFailedError.
        """
