"""The protocol between the pipeline and a diffusion drafter, for any model and vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from torch import Tensor

from drafters.base import Tokens


@dataclass(frozen=True, slots=True)
class MaskedRequest:
    """One request of a pass: propose `length` tokens after `tokens`."""

    request_id: str
    tokens: Tokens  # [any] committed tokens, at least one
    length: int  # tokens to propose, at least one
    hidden_states: Tensor | None = None  # [any or more, target hidden] the target's last hidden states
    hints: Sequence[int] = ()  # the free draft after `tokens`, for a drafter that was trained to improve it


class MaskedDrafter(Protocol):
    """A diffusion drafter over any vocabulary (see `drafters.diffusion.vocabulary`)."""

    @property
    def max_tokens(self) -> int:
        """Maximum tokens per call."""

    @property
    def temperature(self) -> float:
        """Temperature of the target's distribution that the logits approximate."""

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Return the clean rows that a pass for this request must run before its masks."""

    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """Return the logits `[sum of lengths, vocabulary]` (float32) by the target's ids.

        A row of -inf ends the draft. A row of NaN counts as a failure.
        """

    def note(self, request_id: str, num_accepted: int) -> None:
        """Learn how much of the request's last draft was accepted."""

    def release(self, request_id: str) -> None:
        """Free everything that the request holds; harmless if it holds nothing."""


def split_rows(lengths: Sequence[int]) -> list[slice]:
    """Return the rows of each request in the logits of `MaskedDrafter.propose`."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def measure_passes(diffusion: MaskedDrafter, clock: Callable[[], float]) -> dict[int, float]:
    """Measure the seconds of a diffusion pass by its rows: the median of a few passes each."""
    history = np.zeros(diffusion.max_tokens, dtype=np.int32)
    measured: dict[int, float] = {}
    for count, length in ((1, 1), (1, 4), (1, 8), (1, 16), (2, 16), (4, 16), (8, 16)):
        length = min(length, diffusion.max_tokens)
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
            break  # there are fewer slots
        finally:
            for request in requests:
                diffusion.release(request.request_id)
        measured[count * length] = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return measured
