"""The candidates per draft position (Eq. 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.kernels.tokens import contains
from transformer.compiled import compiled
from transformer.intrinsics import exponential

_BLOCK = 64  # logits whose largest is kept, so that the search for candidates skips most of a row


@dataclass(frozen=True, slots=True)
class LatticeOptions:
    """Which tokens of a position become candidates."""

    candidate_mass: float = 0.8  # τ: the smallest set of top tokens that reaches this probability
    max_candidates: int = 15  # M_max
    end_tokens: tuple[int, ...] = ()  # always candidates, with their own log probability, on top of max_candidates

    def __post_init__(self) -> None:
        if not 0.0 <= self.candidate_mass <= 1.0:
            raise ValueError(f"candidate_mass must be in 0..1, not {self.candidate_mass}")
        if self.max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, not {self.max_candidates}")


@dataclass(frozen=True, slots=True)
class DraftLattice:
    """Candidates of a ragged batch: the rows of request 0, then those of request 1, and so on.

    The logits are kept too: the search looks up tokens that other sources propose.
    """

    row_starts: NDArray[np.int64]  # [requests + 1]
    longest: int  # most positions of a request
    tokens: NDArray[np.int32]  # [rows, most candidates] best first, then end tokens; -1: none
    log_probs: NDArray[np.float32]  # [rows, most candidates] nats; -inf: none
    widths: NDArray[np.int64]  # [rows] number of candidates; 0 for a row without a finite maximum
    logits: NDArray[np.float32]  # [rows, vocabulary]
    log_normalisers: NDArray[np.float32]  # [rows] log q(token) = logits[row, token] - log_normalisers[row]

    @classmethod
    def from_logits(cls, logits: Tensor, lengths: Sequence[int], options: LatticeOptions) -> "DraftLattice":
        """Build from the drafter's logits `[sum of lengths, vocabulary]`, which must not be changed afterwards.

        Tokens that must not be drafted are -inf in them already. Raises ValueError if the shapes do not fit.
        """
        row_starts = np.array([0, *accumulate(lengths)], np.int64)
        if logits.ndim != 2 or len(logits) != row_starts[-1]:
            raise ValueError(f"lengths sum to {row_starts[-1]} rows, but the logits have shape {tuple(logits.shape)}")
        values = logits.detach().to("cpu", torch.float32).contiguous().numpy()
        rows, vocabulary = values.shape
        ends = np.array(sorted({token for token in options.end_tokens if 0 <= token < vocabulary}), np.int64)
        width = min(options.max_candidates, vocabulary) + len(ends)
        lattice = cls(
            row_starts=row_starts,
            longest=max(lengths, default=0),
            tokens=np.empty((rows, width), np.int32),
            log_probs=np.empty((rows, width), np.float32),
            widths=np.zeros(rows, np.int64),
            logits=values,
            log_normalisers=np.zeros(rows, np.float32),
        )
        _select(
            values, values.view(np.int32), options.candidate_mass, width - len(ends), ends,
            lattice.tokens, lattice.log_probs, lattice.widths, lattice.log_normalisers,
        )  # fmt: skip
        return lattice

    @property
    def num_requests(self) -> int:
        return len(self.row_starts) - 1

    @property
    def has_broken_rows(self) -> bool:
        """Whether a row has no largest number, though not all of it is -inf: a failure of the drafter.

        A row all of -inf only ends a draft. Single NaNs among numbers are not looked for, which would be a pass over
        all logits: they are taken for tokens of probability 0.
        """
        unusable = self.logits[self.widths == 0]
        return bool((unusable != -np.inf).any())

    def log_prob(self, row: int, token: int) -> float:
        """Natural log of the drafter's probability of any token in a row."""
        return float(self.logits[row, token] - self.log_normalisers[row])


@compiled
def _order_keys(bits: Any, keys: Any) -> None:
    """Integers in the order of the floats with these bits; not-a-number comes last."""
    for index in range(len(bits)):
        value = bits[index]
        is_number = (value & 0x7FFFFFFF) <= 0x7F800000
        keys[index] = (value ^ ((value >> 31) & 0x7FFFFFFF)) if is_number else np.int32(-0x80000000)


@compiled
def _log_sum(logits: Any, maximum: np.float32) -> np.float32:
    """Natural log of the sum of all exponentials."""
    total = np.float32(0.0)
    for index in range(len(logits)):
        total += exponential(logits[index] - maximum)
    return maximum + np.float32(np.log(total))


@compiled
def _best_of_row(keys: Any, most: int, block_best: Any, best: Any, tokens: Any) -> int:
    """Fill `tokens` with the `most` largest keys, largest first, the lower token first among equals; their number."""
    vocabulary = len(keys)
    for block in range(len(block_best)):
        largest = np.int32(-0x80000000)
        for index in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
            largest = max(largest, keys[index])
        block_best[block] = largest
    count = 0
    for block in range(len(block_best)):
        if count == most and block_best[block] <= best[most - 1]:
            continue
        for index in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
            key = keys[index]
            if count == most and key <= best[most - 1]:
                continue
            at = min(count, most - 1)
            while at > 0 and best[at - 1] < key:
                best[at], tokens[at] = best[at - 1], tokens[at - 1]
                at -= 1
            best[at], tokens[at] = key, index
            count = min(count + 1, most)
    return count


@compiled
def _blank(tokens: Any, log_probs: Any, first: int) -> None:
    for index in range(first, len(tokens)):
        tokens[index], log_probs[index] = -1, -np.inf


@compiled
def _select(
    logits: Any, bits: Any, candidate_mass: float, most: int, ends: Any,
    tokens: Any, log_probs: Any, widths: Any, log_normalisers: Any,
) -> None:  # fmt: skip
    """Top tokens and log-sum-exp of every row."""
    vocabulary = logits.shape[1]
    block_best = np.empty((vocabulary + _BLOCK - 1) // _BLOCK, np.int32)
    keys = np.empty(vocabulary, np.int32)
    best = np.empty(most, np.int32)
    for row in range(len(logits)):
        _order_keys(bits[row], keys)
        count = _best_of_row(keys, most, block_best, best, tokens[row])
        maximum = logits[row, tokens[row, 0]] if count > 0 else np.float32(-np.inf)
        if not -np.inf < maximum < np.inf:
            _blank(tokens[row], log_probs[row], 0)
            continue
        log_normalisers[row] = _log_sum(logits[row], maximum)
        mass, width = 0.0, 0
        while width < count and (width == 0 or mass < candidate_mass) and logits[row, tokens[row, width]] > -np.inf:
            log_probs[row, width] = logits[row, tokens[row, width]] - log_normalisers[row]
            mass += np.exp(log_probs[row, width])
            width += 1
        _blank(tokens[row], log_probs[row], width)
        for end in ends:
            if logits[row, end] > -np.inf and not contains(tokens[row], width, end):
                tokens[row, width], log_probs[row, width] = end, logits[row, end] - log_normalisers[row]
                width += 1
        widths[row] = width
