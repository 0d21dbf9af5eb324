"""Containment: whatever a proposer does inside vLLM's worker, the engine lives.

vLLM trusts a proposer: an exception, a draft that is too long or an id outside the vocabulary ends its engine for good.
`DraftGuard` checks every call. It knows nothing of vLLM but the shape of that call.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from drafters.base import Backoff

log = logging.getLogger(__name__)

TokenIds = NDArray[np.int32]


class Proposer(Protocol):
    """The object that vLLM calls after every step (`speculative_config.method = "custom_class"`)."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: TokenIds,
        token_ids_cpu: TokenIds,
        slot_mappings: Any = None,
    ) -> Any:
        """Return one draft per row of the batch, each of 0 to K token ids.

        sampled_token_ids: per row, the tokens that the step committed; empty while a prompt is being read.
        num_tokens_no_spec: `[rows]` number of committed tokens. token_ids_cpu: `[rows, context]` the tokens themselves.
        """


class DraftGuard:
    """Calls a proposer and returns valid drafts only.

    After a failure (an exception, nonsense, or a call that took longer than `slow_seconds`) the batch is decoded
    plainly during a pause, which grows with every failure in a row. Then drafting is tried again.
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
        """context_length: tokens that a sequence may have; a draft leaves room for one more token."""
        self.proposer = proposer
        self._vocabulary_size = vocabulary_size
        self._max_draft_tokens = max_draft_tokens
        self._context_length = context_length
        self._slow_seconds = slow_seconds
        self._clock = clock
        self.backoff = Backoff(clock)
        self.num_failures = 0
        self.last_failure = ""

    @property
    def is_up(self) -> bool:
        """True if the proposer is asked for drafts."""
        return not self.backoff.is_paused

    def load_model(self, target_model: Any) -> None:
        """Pass on vLLM's one call with the loaded target. Whatever it raises ends the start of the engine."""
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
        """See `Proposer.propose`. Never raises, and every draft can be verified."""
        count = len(sampled_token_ids)
        if not self.is_up:
            skip = getattr(self.proposer, "skip", None)
            if skip is not None:
                self.contain(lambda: skip(sampled_token_ids, num_tokens_no_spec, token_ids_cpu))
            return [[] for _ in range(count)]
        started = self._clock()
        try:
            proposed = self.proposer.propose(
                sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=slot_mappings
            )
            drafts = self._checked(proposed, count, num_tokens_no_spec)
            seconds = self._clock() - started
            if seconds > self._slow_seconds:
                raise TimeoutError(f"drafting took {seconds:.1f} s, at most {self._slow_seconds:g} s are allowed")
        except Exception as error:
            self._fail(error)
            return [[] for _ in range(count)]
        self.backoff.succeed()
        return drafts

    def contain(self, action: Callable[[], None]) -> None:
        """Run any other action of the proposer's; count what it raises as a failure."""
        try:
            action()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Note a failure and begin a pause."""
        self.num_failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"
        log.error(
            "the drafter failed (%s); decoding goes on without drafts for %.0f s",
            self.last_failure,
            self.backoff.fail(),
            exc_info=error,
        )

    def _checked(self, proposed: Any, count: int, num_tokens: TokenIds) -> list[list[int]]:
        """Return plain lists of plain ids, cut to what may be verified. Raises ValueError or TypeError on nonsense."""
        if not isinstance(proposed, Sequence) or len(proposed) != count:
            what = f"{len(proposed)} drafts" if isinstance(proposed, Sequence) else f"a {type(proposed).__name__}"
            raise ValueError(f"{what} for {count} requests")
        limits = np.minimum(self._context_length - 1 - num_tokens[:count], self._max_draft_tokens).tolist()
        return [self._ids(draft, limit) for draft, limit in zip(proposed, limits, strict=True)]

    def _ids(self, draft: Any, limit: int) -> list[int]:
        if draft is None:
            raise TypeError("None is no draft")
        if limit <= 0:
            return []
        ids = []
        for token in draft[:limit]:
            if isinstance(token, bool | float | np.floating):
                raise TypeError(f"{token!r} is no token id")
            ids.append(int(token))
        if ids and not 0 <= min(ids) <= max(ids) < self._vocabulary_size:
            raise ValueError(f"a draft with token ids outside 0..{self._vocabulary_size - 1}")
        return ids
