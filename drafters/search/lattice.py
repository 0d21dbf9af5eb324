"""The draft lattice: the diffusion model's distributions, and the candidates per position (Eq. 7)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LatticeOptions:
    """The rule by which tokens of a position become candidates."""

    candidate_mass: float = 0.8  # τ: the smallest set of top tokens that reaches this probability
    max_candidates: int = 15  # M_max
    end_tokens: tuple[int, ...] = ()  # always candidates, beyond max_candidates, with their own log probability

    def __post_init__(self) -> None:
        if not 0.0 <= self.candidate_mass <= 1.0:
            raise ValueError(f"candidate_mass must be in 0..1, not {self.candidate_mass}")
        if self.max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, not {self.max_candidates}")


@dataclass(frozen=True, slots=True)
class DraftLattice:
    """A drafter's distributions for a ragged batch: the rows of request 0, then those of request 1, and so on.

    The search selects each row's candidates from the logits, and looks up the logits of tokens that the causal model
    proposes.
    """

    row_starts: NDArray[np.int64]  # [requests + 1]
    max_length: int  # positions of the longest request
    logits: NDArray[np.float32]  # [rows, vocabulary]
    candidate_mass: float
    max_candidates: int  # per row, without end tokens
    end_tokens: NDArray[np.int64]

    @classmethod
    def from_logits(cls, logits: Tensor, lengths: Sequence[int], options: LatticeOptions) -> "DraftLattice":
        """Build a lattice from the drafter's logits `[sum of lengths, vocabulary]`, which must not change afterwards.

        Tokens that must not be drafted have a logit of -inf. A single NaN in a row counts as probability 0.
        Raises ValueError if the shapes do not fit.
        """
        row_starts = np.array([0, *accumulate(lengths)], np.int64)
        if logits.ndim != 2 or len(logits) != row_starts[-1]:
            raise ValueError(f"lengths sum to {row_starts[-1]} rows, but the logits have shape {tuple(logits.shape)}")
        values = np.ascontiguousarray(logits.float().cpu().numpy())
        vocabulary = values.shape[1]
        return cls(
            row_starts=row_starts,
            max_length=max(lengths, default=0),
            logits=values,
            candidate_mass=options.candidate_mass,
            max_candidates=min(options.max_candidates, vocabulary),
            end_tokens=known_ids(options.end_tokens, vocabulary),
        )

    @property
    def num_requests(self) -> int:
        return len(self.row_starts) - 1


@functools.cache
def known_ids(tokens: tuple[int, ...], vocabulary_size: int) -> NDArray[np.int64]:
    """Return the distinct tokens that are in the vocabulary, sorted: [tokens], read-only."""
    ids = np.array(sorted({token for token in tokens if 0 <= token < vocabulary_size}), np.int64)
    ids.setflags(write=False)
    return ids
