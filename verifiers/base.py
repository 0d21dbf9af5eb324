"""The words of verification, and what the engine asks of a verifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = Sequence[int] | NDArray[np.int32]


MIN_TEMPERATURE = 1e-5  # below it a request is greedy: so small a number would not survive in float32


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """How one request's tokens are drawn from the target's logits, in the order in which the rules apply.

    Every rule is applied on every verified row, with the tokens before that row as its context, so that a draft of
    any length gives the very token that plain decoding would give.
    """

    seed: int  # 64 bits; with the absolute position it keys the draw
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> nats added
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()  # token sequences that must not appear in the output
    min_tokens: int = 0  # `stop_token_ids` are banned before that many generated tokens
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None  # how many alternatives to report besides the drawn token; None: no log probabilities

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken rather than drawn."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def temperature_alone(self) -> bool:
        """Whether the temperature alone says how tokens are drawn from what the other rules leave."""
        return self.top_k == 0 and self.top_p >= 1.0 and self.min_p == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities (nats) of one committed position, from the target's logits before any rule was applied."""

    token: int
    logprob: float
    rank: int  # 1 is the most probable token
    top: tuple[tuple[int, float], ...]  # the most probable tokens, best first


@dataclass(frozen=True, slots=True)
class Verification:
    """What the target made of one request's draft.

    One precise type against a common mistake: the extra token is never counted as accepted, and there is
    always exactly one extra token.
    """

    num_accepted: int  # draft tokens kept; excludes next_token
    next_token: int  # recovered if num_accepted < len(draft), else bonus
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the accepted tokens and next_token, if the rules ask for them


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One request's rows in the next forward pass.

    `tokens[num_cached : num_cached + num_new]` are run through the model, followed by `draft`. If
    `num_cached + num_new == len(tokens)` the rows of the last token and of the draft are verified;
    otherwise this is a part of a longer prefill and nothing is drawn.
    """

    slot: int  # its place in the verifier's key-value cache
    tokens: TokenIds  # all committed tokens: prompt, then output; the engine passes an array
    num_prompt: int  # tokens of `tokens` that are the prompt
    num_cached: int  # tokens whose keys and values stand in the slot already
    num_new: int
    draft: Sequence[int]
    rules: SamplingRules
    prompt_logprobs: int | None = None  # alternatives to report for each prompt token among the new rows; None: off
    allowed: NDArray[np.bool_] | None = None  # [len(draft) + 1, ids] what may be drawn in each row; None: everything


@dataclass(frozen=True, slots=True)
class VerifyResult:
    verification: Verification | None  # None while the prompt is not fully read, and with an error
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens in (num_cached, num_cached + num_new]
    error: str = ""  # why this request alone cannot go on, e.g. logits that are not numbers; then nothing is verified
    is_request_at_fault: bool = False  # the error: its rules ban every token; else the model or the engine is


class Verifier(Protocol):
    """The target model with its key-value cache."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits, in tokens; ids beyond it are invalid."""

    @property
    def context_length(self) -> int:
        """Most tokens a slot holds."""

    @property
    def num_slots(self) -> int: ...

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
        """Run one forward pass over all rows of all requests and check their drafts."""

    def hidden_states(self, slot: int) -> "Tensor | None":
        """What each token of a slot was predicted from, `[positions, hidden]`, zero for the first; None: not kept.

        A view; what it holds beyond the slot's tokens says nothing.
        """

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's keys and values over another's."""
