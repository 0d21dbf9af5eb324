"""Causal-consistency path search (CPS): one path through the lattice of every request (Eq. 8).

The search maximises `sum(λ * log q_lattice(token) + (1 - λ) * log p_causal(token | path so far))` from left to right,
in natural logarithms, floored at LOG_FLOOR so that a single impossible token does not rule out a whole path.

End of text. The paper always keeps the end token as a candidate, and ends a path at the first one. Taken together, an
improbable end token could win only because it ends the sum of negative terms early. Here an end token competes with its
own log probability, and finished and unfinished paths are compared by their mean score per token, which does not prefer
short ones. A path includes its end token: if the target agrees, the request ends in the same step.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.base import Tokens
from drafters.search.causal_model import CausalModel, join, no_noise
from drafters.search.kernels.chains import Noise
from drafters.search.kernels.options import Search
from drafters.search.kernels.search import (
    IS_BROKEN,
    LENGTH,
    MEAN_WIDTH,
    RAW_LENGTH,
    RAW_SCORE,
    SCORE,
    Found,
    search_paths,
)
from drafters.search.lattice import DraftLattice

LOG_FLOOR = -20.0  # nats


class Path(NamedTuple):
    """The path that the search chose for one request, with the scores of every token."""

    tokens: tuple[int, ...]  # ends with an end token, or where the lattice does
    confidences: NDArray[np.float64]  # [tokens] share of the mixed probability among the position's options
    details: NDArray[np.float64]  # [tokens, 4] score, log lattice, log causal (nats, floored), confidence
    score: float  # nats per token (Eq. 8); 0 for an empty path
    raw_score: float  # of the raw argmax path, likewise
    raw_length: int  # tokens before the first end token in the raw argmax (Eq. 9)
    lattice_width: float  # mean candidates per position

    @property
    def log_lattice(self) -> NDArray[np.float64]:
        """[tokens] nats, floored."""
        return self.details[:, 1]

    @property
    def log_causal(self) -> NDArray[np.float64]:
        """[tokens] nats, floored."""
        return self.details[:, 2]

    @property
    def gain(self) -> float:
        """Nats per token over the raw argmax path; never negative, because that path competes too."""
        return self.score - self.raw_score


class PathSearch:
    """Beam search for a whole batch in one compiled call. No more thread-safe than its causal model."""

    def __init__(
        self,
        causal: CausalModel,
        end_tokens: Sequence[int] = (),
        beam_width: int = 3,
        lattice_weight: float = 0.5,
        lattice_weight_decay: float = 1.0,
        mode: Literal["search", "argmax"] = "search",
        use_proposals: bool = True,
    ) -> None:
        """Set the search up.

        lattice_weight: λ of Eq. 8 at the first position. `lattice_weight_decay` multiplies it from one position to the
        next. The paper's λ is constant (a decay of 1), but a drafter knows less about positions far from clean text.
        mode: `argmax` takes the raw argmax path, as a baseline. use_proposals: the causal model's own best tokens join
        the lattice's candidates; otherwise it only scores them. Raises ValueError for values out of range.
        """
        if beam_width < 1 or not (0.0 <= lattice_weight <= 1.0 and 0.0 <= lattice_weight_decay <= 1.0):
            raise ValueError(
                "beam_width must be at least 1, lattice_weight and lattice_weight_decay in 0..1; "
                f"got {beam_width}, {lattice_weight} and {lattice_weight_decay}"
            )
        self.causal = causal
        self.end_tokens = np.array(sorted(set(end_tokens)), np.int32)
        self.beam_width = beam_width
        self.lattice_weight, self.lattice_weight_decay = lattice_weight, lattice_weight_decay
        self.mode, self.use_proposals = mode, use_proposals
        self._weights: NDArray[np.float64] = np.empty(0)  # λ by position

    def search(self, histories: Sequence[Tokens], lattice: DraftLattice, noise: Noise | None = None) -> list[Path]:
        """Choose a path for every request; `histories` and `noise` are in the order of the lattice's requests.

        Raises ValueError if their numbers differ, or if a row of the lattice has no finite maximum although it is not
        all -inf: a failure of the drafter.
        """
        if len(histories) != lattice.num_requests:
            raise ValueError(f"{len(histories)} histories for a lattice of {lattice.num_requests} requests")
        if not histories:
            return []
        text, starts = join(histories)
        count, max_length, causal = len(histories), max(lattice.max_length, 1), self.causal
        search = Search(
            row_starts=lattice.row_starts,
            logits=lattice.logits,
            candidate_mass=lattice.candidate_mass,
            max_candidates=lattice.max_candidates,
            lattice_ends=lattice.end_tokens,
            ends=self.end_tokens,
            noise=noise or no_noise(count),
            lattice_weights=self._lattice_weights(max_length),
            log_floor=LOG_FLOOR,
            beam_width=self.beam_width,
            use_copy=causal.use_copy,
            use_proposals=self.use_proposals,
            use_beams=self.mode == "search",
        )
        found = Found(np.empty((count, max_length), np.int32), np.empty((count, max_length, 4)), np.zeros((count, 6)))
        search_paths(
            text, np.array(starts, np.int64), causal.ngram.arrays, causal.copy_weights, search, causal.workspace, found
        )
        summaries = found.summary.tolist()
        if any(summary[IS_BROKEN] for summary in summaries):
            raise ValueError("the diffusion drafter's logits are not numbers")
        return [_path(*parts) for parts in zip(found.tokens.tolist(), found.details, summaries, strict=True)]

    def _lattice_weights(self, max_length: int) -> NDArray[np.float64]:
        if max_length > len(self._weights):
            self._weights = self.lattice_weight * np.power(self.lattice_weight_decay, np.arange(max_length))
        return self._weights[:max_length]


def _path(tokens: list[int], details: NDArray[np.float64], summary: list[float]) -> Path:
    length = int(summary[LENGTH])
    return Path(
        tokens=tuple(tokens[:length]),
        confidences=np.ascontiguousarray(details[:length, 3]),
        details=details[:length],
        score=summary[SCORE],
        raw_score=summary[RAW_SCORE],
        raw_length=int(summary[RAW_LENGTH]),
        lattice_width=summary[MEAN_WIDTH],
    )
