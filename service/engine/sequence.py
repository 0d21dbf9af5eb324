"""The state of one request while the engine decodes it."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from drafters.base import Draft, Tokens, max_draft_tokens
from service.engine.base import FinishReason, GenerationRequest, SpeculationStats, StepTrace, TokenDelta
from verifiers.base import TokenLogprobs, VerifyResult


class Decoding:
    """One request from its submission to its last delta. After submission, only the engine thread touches it.

    The slot of the key-value cache holds the first `num_cached` of `tokens`. While the prompt is being read,
    `num_cached < num_prompt`; after that, all tokens but the newest are cached. Rows of rejected drafts are beyond
    `num_cached`, and the next step overwrites them.
    """

    __slots__ = (
        "_buffer",
        "_is_first_delta",
        "_length",
        "_prompt_logprobs",
        "_stop_tokens",
        "arrival",
        "constraint",
        "deadline",
        "max_draft_tokens",
        "num_accepted_kept",
        "num_cached",
        "num_prompt",
        "num_reused",
        "queue_seconds",
        "request",
        "slot",
        "stats",
        "submitted_at",
    )

    def __init__(
        self, request: GenerationRequest, arrival: int, submitted_at: float, service_draft_tokens: int
    ) -> None:
        """`arrival` numbers the requests; `submitted_at` is in seconds of the engine's clock."""
        speculation = request.speculation
        self.request = request
        self.arrival = arrival
        self.submitted_at = submitted_at
        self.deadline = None if request.timeout_seconds is None else submitted_at + request.timeout_seconds
        self.max_draft_tokens = max_draft_tokens(
            speculation.enabled, speculation.max_draft_tokens, service_draft_tokens
        )
        self.num_prompt = len(request.prompt)
        self.num_cached = 0
        self.num_accepted_kept = 0  # accepted draft tokens of the latest step that are part of the output
        self.num_reused = 0  # prompt tokens whose keys and values came from another request
        self.constraint = None if request.structure is None else request.structure.start()
        self.slot = -1  # none yet
        self.queue_seconds = 0.0
        self.stats = SpeculationStats(
            num_spec_tokens=self.max_draft_tokens, acceptance_histogram=[0] * (self.max_draft_tokens + 1)
        )
        self._buffer: NDArray[np.int32] = np.empty(self.num_prompt + request.max_tokens, dtype=np.int32)
        self._buffer[: self.num_prompt] = request.prompt
        self._length = self.num_prompt
        self._stop_tokens = frozenset(request.rules.stop_token_ids)
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._is_first_delta = True

    @property
    def tokens(self) -> Tokens:
        """`[length]`, a view: all committed tokens, prompt then output."""
        return self._buffer[: self._length]

    @property
    def prompt(self) -> Tokens:
        """`[num_prompt]`, a view: the prompt."""
        return self._buffer[: self.num_prompt]

    @property
    def cached_tokens(self) -> Tokens:
        """`[num_cached]`, a view: the tokens whose keys and values are in the slot."""
        return self._buffer[: self.num_cached]

    @property
    def length(self) -> int:
        return self._length

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.num_prompt + self.request.max_tokens - self._length

    @property
    def num_pending(self) -> int:
        """Committed tokens that are not cached: the unread rest of the prompt, later only the newest token."""
        return self._length - self.num_cached

    @property
    def is_reading(self) -> bool:
        """True while some prompt tokens have not run through the model."""
        return self.num_cached < self.num_prompt

    @property
    def num_reserved(self) -> int:
        """Cache positions that this request may need at most."""
        return len(self._buffer)

    @property
    def may_reuse_prefix(self) -> bool:
        """True if a cached prefix may be reused. Log probabilities of the prompt need the rows that reuse skips."""
        return self.request.prompt_logprobs is None and self.request.reuse_prefix

    def commit(self, num_new: int, draft: Draft, result: VerifyResult) -> TokenDelta | None:
        """Commit one step, which ran `num_new` pending tokens and `draft`. Returns None while the prompt is read."""
        self.num_cached += num_new
        self._prompt_logprobs.extend(result.prompt_logprobs)
        verification = result.verification
        if verification is None:
            return None
        num_accepted = verification.num_accepted
        drawn = (*draft.tokens[:num_accepted], verification.next_token)
        num_kept, reason = self._count_kept(drawn)
        kept = drawn[:num_kept]
        self._buffer[self._length : self._length + num_kept] = kept
        self._length += num_kept
        self.num_cached = min(self.num_cached + num_accepted, self._length)
        if self.constraint is not None and reason is None:
            self.constraint.advance(kept)
        stop_token = kept[-1] if reason == "stop" else None
        if reason == "stop" and not self.request.include_stop_token:
            kept = kept[:-1]
        self.num_accepted_kept = min(num_accepted, len(kept))
        if draft.tokens:
            self.stats.num_spec_steps += 1
            self.stats.num_draft_tokens += len(draft.tokens)
            self.stats.num_accepted_draft_tokens += self.num_accepted_kept
            self.stats.acceptance_histogram[self.num_accepted_kept] += 1
        trace = None
        if self.request.speculation.trace:
            trace = StepTrace(draft.source, draft.tokens, self.num_accepted_kept)
        return self._delta(kept, verification.logprobs[: len(kept)], reason, stop_token, trace)

    def abort(self) -> TokenDelta:
        """Return the last delta of a request that the engine ends early."""
        return self._delta((), (), "abort", None, None)

    def _count_kept(self, drawn: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        """Return how many of the drawn tokens belong to the output, and whether they end it.

        Plain decoding never draws the tokens after the first stop token or beyond `max_tokens`.
        """
        num_left = self.num_left
        for count, token in enumerate(drawn[:num_left], start=1):
            if token in self._stop_tokens:
                return count, "stop"
        if len(drawn) >= num_left:
            return num_left, "length"
        return len(drawn), None

    def _delta(
        self,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        stop_token: int | None,
        trace: StepTrace | None,
    ) -> TokenDelta:
        is_first, self._is_first_delta = self._is_first_delta, False
        return TokenDelta(
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(self._prompt_logprobs) if is_first else (),
            finish_reason=reason,
            stop_token=stop_token,
            trace=trace,
            stats=replace(self.stats, acceptance_histogram=self.stats.acceptance_histogram.copy()),
            num_cached_prompt_tokens=self.num_reused if is_first else 0,
            queue_seconds=self.queue_seconds if is_first else 0.0,
        )
