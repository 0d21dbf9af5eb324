"""The types of verification, and the protocol between the engine and a verifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = Sequence[int] | NDArray[np.int32]


MIN_TEMPERATURE = 1e-5  # a request with less is greedy: float32 cannot handle smaller ones


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """The rules by which one request's tokens are drawn from the target's logits.

    Every rule applies to every verified row, with the tokens before that row as its context. So a draft of any length
    gives the same tokens as plain decoding.
    """

    seed: int  # 64 bits; together with the absolute position, the key of each draw
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
    min_tokens: int = 0  # `stop_token_ids` are banned until this many tokens are generated
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None  # alternatives to report besides the drawn token; None: report no log probabilities

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is taken, not drawn."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def temperature_alone(self) -> bool:
        """True if only the temperature shapes the distribution."""
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
    """The target's verdict on one request's draft.

    This type prevents a common mistake: the extra token never counts as accepted, and there is always exactly one.
    """

    num_accepted: int  # draft tokens kept; excludes next_token
    next_token: int  # recovered if num_accepted < len(draft), else bonus
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the accepted tokens and next_token, if the rules ask for them


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One request's rows in the next forward pass.

    The model runs `tokens[num_cached : num_cached + num_new]`, followed by `draft`. If `num_cached + num_new` equals
    `len(tokens)`, the rows of the last token and of the draft are verified. Otherwise this is one chunk of a longer
    prefill, and nothing is drawn.
    """

    slot: int  # in the verifier's key-value cache
    tokens: TokenIds  # all committed tokens: prompt, then output; the engine passes an array
    num_prompt: int  # length of the prompt
    num_cached: int  # tokens whose keys and values are in the slot already
    num_new: int
    draft: Sequence[int]
    rules: SamplingRules
    prompt_logprobs: int | None = None  # alternatives to report for each prompt token among the new rows; None: off
    allowed: NDArray[np.bool_] | None = None  # [len(draft) + 1, ids] tokens that may be drawn in each row; None: all


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verification of one request, or the error that prevents it."""

    verification: Verification | None  # None until the prompt is fully read, and with an error
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens in (num_cached, num_cached + num_new]
    error: str = ""  # reason why this request alone cannot continue, e.g. logits of NaN; nothing is verified then
    is_request_at_fault: bool = False  # True: its rules ban every token. False: the fault of model or engine


class Verifier(Protocol):
    """The target model with its key-value cache."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits, in tokens; ids beyond it are invalid."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens in a slot."""

    @property
    def num_slots(self) -> int: ...

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
        """Run one forward pass over all rows of all requests and check their drafts."""

    def hidden_states(self, slot: int) -> "Tensor | None":
        """Return the hidden state that each token of a slot was predicted from; None if they are not kept.

        A view `[positions, hidden]`, zero for the first token. Positions beyond the slot's tokens are meaningless.
        """

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's keys and values over another's."""
