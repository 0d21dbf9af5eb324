"""What the embedded engine asks of whatever proposes its drafts."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from drafters.base import Draft, DraftingCost, DraftRequest, StepRecord


class Drafting(Protocol):
    """Proposes drafts for a batch and learns from what became of them; `drafters.pipeline` is the real one."""

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
        """Failures of such a part so far: contained, logged, and no exception of `propose`."""

    @property
    def last_cost(self) -> DraftingCost:
        """Of the latest `propose`."""

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        """One draft per request, none longer than its `max_draft_tokens`."""

    def observe(self, step: StepRecord) -> None:
        """Learn from one finished step."""

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        """Take in what verification costs at start-up: seconds of a pass of few requests, by its rows.

        plain_seconds: of a pass without drafts, by its requests.
        """
