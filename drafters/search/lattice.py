"""The candidates per draft position (Eq. 7)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drafters.search.kernels.lattice import select_rows


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
class Candidates:
    """The candidates of every row."""

    tokens: NDArray[np.int32]  # [rows, most candidates] best first, then end tokens; -1: none
    widths: NDArray[np.int64]  # [rows] number of candidates; 0 for a row without a finite maximum
    log_normalisers: NDArray[np.float32]  # [rows] log q(token) = logits[row, token] - log_normalisers[row]


@dataclass
class DraftLattice:
    """A drafter's distributions for a ragged batch: the rows of request 0, then those of request 1, and so on.

    What becomes a candidate follows from the logits and the options: a search selects it row by row, as it comes to
    them, and looks up the logits of tokens that other sources propose.
    """

    row_starts: NDArray[np.int64]  # [requests + 1]
    longest: int  # most positions of a request
    logits: NDArray[np.float32]  # [rows, vocabulary]
    candidate_mass: float
    most_candidates: int  # of a row, without end tokens
    end_tokens: NDArray[np.int64]

    @classmethod
    def from_logits(cls, logits: Tensor, lengths: Sequence[int], options: LatticeOptions) -> "DraftLattice":
        """Build from the drafter's logits `[sum of lengths, vocabulary]`, which must not be changed afterwards.

        Tokens that must not be drafted are -inf in them already. Single NaNs are taken for tokens of probability 0.
        Raises ValueError if the shapes do not fit.
        """
        row_starts = np.array([0, *accumulate(lengths)], np.int64)
        if logits.ndim != 2 or len(logits) != row_starts[-1]:
            raise ValueError(f"lengths sum to {row_starts[-1]} rows, but the logits have shape {tuple(logits.shape)}")
        values = np.ascontiguousarray(logits.float().cpu().numpy())
        vocabulary = values.shape[1]
        return cls(
            row_starts=row_starts,
            longest=max(lengths, default=0),
            logits=values,
            candidate_mass=options.candidate_mass,
            most_candidates=min(options.max_candidates, vocabulary),
            end_tokens=known_ids(options.end_tokens, vocabulary),
        )

    @property
    def num_requests(self) -> int:
        return len(self.row_starts) - 1

    @cached_property
    def candidates(self) -> Candidates:
        """All candidates, to look at: what a search would select."""
        rows, width = len(self.logits), self.most_candidates + len(self.end_tokens)
        tokens, widths = np.empty((rows, width), np.int32), np.empty(rows, np.int64)
        log_normalisers = np.empty(rows, np.float32)
        select_rows(self.logits, self.candidate_mass, self.end_tokens, tokens, widths, log_normalisers)
        return Candidates(tokens, widths, log_normalisers)

    def log_prob(self, row: int, token: int) -> float:
        """Natural log of the drafter's probability of any token in a row."""
        return float(self.logits[row, token] - self.candidates.log_normalisers[row])


@functools.cache
def known_ids(tokens: tuple[int, ...], vocabulary_size: int) -> NDArray[np.int64]:
    """Those in the vocabulary, in order, each once."""
    ids = np.array(sorted({token for token in tokens if 0 <= token < vocabulary_size}), np.int64)
    ids.setflags(write=False)
    return ids
