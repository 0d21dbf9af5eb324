"""Containment: whatever a proposer does inside vLLM's worker, the engine lives.

vLLM trusts a proposer: an exception, a draft that is too long or an id outside the vocabulary ends its engine for good.
`DraftGuard` stands between the two. It knows nothing of vLLM but the shape of the call.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0

TokenIds = NDArray[np.int32]


class Proposer(Protocol):
    """What vLLM calls after every step (`speculative_config.method = "custom_class"`)."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: TokenIds,
        token_ids_cpu: TokenIds,
        slot_mappings: Any = None,
    ) -> Any:
        """One draft per row of the batch, each of 0 to K token ids.

        sampled_token_ids: per row what the step committed; empty while a prompt is read. num_tokens_no_spec: `[rows]`
        committed tokens. token_ids_cpu: `[rows, context]` the tokens themselves.
        """


class DraftGuard:
    """Calls a proposer so that nothing but valid drafts ever comes back.

    After a failure (an exception, nonsense, or a call that took longer than `slow_seconds`) the batch is decoded
    plainly for a while, longer each time it fails again, then drafting is tried anew.
    """

    def __init__(
        self,
        proposer: Proposer,
        vocabulary_size: int,
        max_draft_tokens: int,
        context_length: int,
        slow_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        """context_length: tokens a sequence may have; a draft leaves room for one more token."""
        self.proposer = proposer
        self._vocabulary_size = vocabulary_size
        self._max_draft_tokens = max_draft_tokens
        self._context_length = context_length
        self._slow_seconds = slow_seconds
        self._clock = clock
        self._pause_seconds = 0.0
        self._resumes_at = 0.0
        self.num_failures = 0
        self.last_failure = ""

    @property
    def is_up(self) -> bool:
        """Whether the proposer is asked for drafts."""
        return self._clock() >= self._resumes_at

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this once, with the loaded target. Whatever it raises ends the start of the engine."""
        load = getattr(self.proposer, "load_model", None)
        if load is not None:
            load(target_model)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: TokenIds,
        token_ids_cpu: TokenIds,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """See `Proposer.propose`; never raises, and every draft is one that can be verified."""
        count = len(sampled_token_ids)
        started = self._clock()
        if started < self._resumes_at:
            skip = getattr(self.proposer, "skip", None)
            if skip is not None:
                self.contain(lambda: skip(sampled_token_ids, num_tokens_no_spec, token_ids_cpu))
            return [[] for _ in range(count)]
        try:
            proposed = self.proposer.propose(
                sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=slot_mappings
            )
            drafts = self._checked(proposed, count, num_tokens_no_spec)
            seconds = self._clock() - started
            if seconds > self._slow_seconds:
                raise TimeoutError(f"drafting took {seconds:.1f} s, at most {self._slow_seconds:g} s are allowed")
        except Exception as error:
            self.fail(error)
            return [[] for _ in range(count)]
        self._pause_seconds = 0.0
        return drafts

    def contain(self, action: Callable[[], None]) -> None:
        """Run anything else of the proposer's with the same care."""
        try:
            action()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note a failure, and decode plainly for a while."""
        self.num_failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"
        self._pause_seconds = min(max(2 * self._pause_seconds, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
        self._resumes_at = self._clock() + self._pause_seconds
        log.error(
            "the drafter failed (%s); decoding goes on without drafts for %.0f s",
            self.last_failure,
            self._pause_seconds,
            exc_info=error,
        )

    def _checked(self, proposed: Any, count: int, num_tokens: TokenIds) -> list[list[int]]:
        """Plain lists of plain ids, cut to what may be verified. Raises ValueError or TypeError on nonsense."""
        if not isinstance(proposed, Sequence) or len(proposed) != count:
            what = f"{len(proposed)} drafts" if isinstance(proposed, Sequence) else f"a {type(proposed).__name__}"
            raise ValueError(f"{what} for {count} requests")
        rooms = (self._context_length - 1 - num_tokens[:count]).tolist()
        return [
            self._ids(draft, min(room, self._max_draft_tokens)) for draft, room in zip(proposed, rooms, strict=True)
        ]

    def _ids(self, draft: Any, most: int) -> list[int]:
        if draft is None:
            raise TypeError("None is no draft")
        if most <= 0:
            return []
        ids = []
        for token in draft[:most]:
            if isinstance(token, bool | float | np.floating):
                raise TypeError(f"{token!r} is no token id")
            ids.append(int(token))
        if ids and not 0 <= min(ids) <= max(ids) < self._vocabulary_size:
            raise ValueError(f"a draft with token ids outside 0..{self._vocabulary_size - 1}")
        return ids
