"""What the pipeline asks of a drafter that fills in masks, whatever its model and its vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from torch import Tensor

from drafters.base import Tokens


@dataclass(frozen=True, slots=True)
class MaskedRequest:
    """One request's share of a pass: propose `length` tokens after `tokens`."""

    request_id: str
    tokens: Tokens  # [any] committed tokens, at least one
    length: int  # tokens to propose, at least one
    hidden_states: Tensor | None = None  # [any or more, target hidden] what the target predicted tokens from
    hints: Sequence[int] = ()  # what another draft has after `tokens`, for a drafter that was trained to improve on it


class MaskedDrafter(Protocol):
    """What the pipeline asks of a diffusion drafter, whatever its vocabulary (see `drafters.diffusion.vocabulary`)."""

    @property
    def longest(self) -> int:
        """Most tokens one call proposes."""

    @property
    def temperature(self) -> float:
        """Of the target's distribution that the logits stand for."""

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Clean rows that a pass for this request would have to run before its masks."""

    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """Logits `[sum of lengths, vocabulary]` (float32) by the target's ids; a row all of -inf ends the draft.

        Rows of what is no number are taken for a failure.
        """

    def note(self, request_id: str, num_accepted: int) -> None:
        """Learn how much of the request's last draft was accepted."""

    def release(self, request_id: str) -> None:
        """Free what the request holds; harmless if it holds nothing."""


def split_rows(lengths: Sequence[int]) -> list[slice]:
    """The rows of each request in `DiffusionDrafter.propose`'s answer."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def measure_passes(diffusion: MaskedDrafter, clock: Callable[[], float]) -> dict[int, float]:
    """Seconds of a diffusion pass by rows, the median of a few passes each."""
    history = np.zeros(diffusion.longest, dtype=np.int32)
    measured: dict[int, float] = {}
    for count, length in ((1, 1), (1, 4), (1, 8), (1, 16), (2, 16), (4, 16), (8, 16)):
        length = min(length, diffusion.longest)
        requests = [MaskedRequest(f"measure-{i}", history, length) for i in range(count)]
        seconds = []
        try:
            for _ in range(6):
                started = clock()
                diffusion.propose(requests)
                seconds.append(clock() - started)
        except RuntimeError:
            if not measured:
                raise
            break  # fewer slots than that
        finally:
            for request in requests:
                diffusion.release(request.request_id)
        measured[count * length] = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return measured
