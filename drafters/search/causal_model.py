"""The left-to-right proxy of Eq. 8, and the free drafter: the request's own text mixed with a static n-gram model.

`p(token) = w(m) * [token == copied] + (1 - w(m)) * p_static(token | context)`, where `copied` follows the longest
earlier match of the current suffix in the request's own text and `m` is the length of that match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from drafters.base import Tokens
from drafters.search.kernels.chains import Noise, greedy_chains
from drafters.search.kernels.copying import MAX_MATCH, Copying, copy_weight
from drafters.search.kernels.ngram import new_workspace
from drafters.search.ngram import NgramModel

WINDOW = 4096  # tokens of a request's text that copying looks at
MAX_CHAIN = 256  # tokens
PRIOR_STRENGTH = 20.0  # observations the shipped weights count for
# By match length 0..16, fitted on half of the held-out text beside an earlier n-gram model; serving moves them.
PRIOR_WEIGHTS = (0, 0.17, 0.36, 0.47, 0.54, 0.62, 0.67, 0.7, 0.74, 0.77, 0.76, 0.77, 0.79, 0.81, 0.81, 0.82, 0.85)


def new_copying(
    prior_weights: Sequence[float] = PRIOR_WEIGHTS, prior_strength: float = PRIOR_STRENGTH, decay: float = 0.998
) -> Copying:
    """How far a match of each length is to be trusted: starts from a prior, learns and forgets while serving.

    prior_weights: [17] by match length, the first is 0. decay: per observation; 0.998 remembers about 500.
    """
    if len(prior_weights) != MAX_MATCH + 1:
        raise ValueError(f"prior_weights needs {MAX_MATCH + 1} values, one per match length; got {len(prior_weights)}")
    seen = np.full(MAX_MATCH + 1, prior_strength)
    right = seen * np.asarray(prior_weights, np.float64)
    weights = np.zeros(MAX_MATCH + 1, np.float32)
    for length in range(1, MAX_MATCH + 1):
        weights[length] = copy_weight(right[length], seen[length])
    return Copying(weights, right, seen, decay)


@dataclass(frozen=True, slots=True)
class Chain:
    """A free draft. May be shorter than asked for: nothing known, or an end token, which is then the last one."""

    tokens: tuple[int, ...]
    confidences: NDArray[np.float64]  # [tokens] the mixture's probability of each, given those before it


class CausalModel:
    """Copying and n-grams, mixed. Not thread-safe: it learns while serving."""

    def __init__(
        self,
        vocabulary_size: int,
        ngram: NgramModel | None = None,
        copying: Copying | None = None,
        end_tokens: Sequence[int] = (),
        use_copy: bool = True,
    ) -> None:
        """Without `ngram` the static part is uniform; without copying either, every token is equally likely.

        copying: is taken over, and changed by learning.

        Raises ValueError if the n-gram model is of another vocabulary.
        """
        if ngram is not None and ngram.vocabulary_size != vocabulary_size:
            raise ValueError(
                f"the n-gram model was fitted on {ngram.vocabulary_size} token ids, the target has {vocabulary_size}: "
                "fit one on the target's own ids or leave it out"
            )
        self.vocabulary_size = vocabulary_size
        self.ngram = ngram or NgramModel.uniform(vocabulary_size)
        self.end_tokens = np.array(sorted(set(end_tokens)), np.int32)
        self.ends = frozenset(end_tokens)
        self.use_copy = use_copy
        self._copying = copying or new_copying()
        if not use_copy:
            self._copying.weights[:] = 0.0
        self.workspace = new_workspace(vocabulary_size, WINDOW + MAX_CHAIN)

    @property
    def has_ngrams(self) -> bool:
        return self.ngram.order > 1

    @property
    def copy_weights(self) -> NDArray[np.float32]:
        """[MAX_MATCH + 1] weight of the copied token in the mixture, by match length."""
        return self._copying.weights

    def greedy_chains(
        self,
        histories: Sequence[Tokens],
        max_tokens: Sequence[int],
        least_survival: Sequence[float] | None = None,
        noise: Noise | None = None,
        num_learned: Sequence[int] | None = None,
    ) -> list[Chain]:
        """Draft for a batch of requests without any neural pass: at each position the mixture's most probable token, or
        the one that the target would draw from the mixture, where its `noise` is known. At most MAX_CHAIN tokens.

        least_survival: a request's chain ends where it would survive with less than this probability (default 0).
        num_learned: how far to trust copying is learned from what the histories hold behind so many tokens, as the
        target chose it (default: nothing is). It costs little here, where the texts are indexed anyway.
        """
        if not histories:
            return []
        text, starts = join(histories)
        bounds, longest = [], 1
        for request, (history, most) in enumerate(zip(histories, max_tokens, strict=True)):
            start, stop = starts[request], starts[request + 1]
            behind = len(history) if num_learned is None or not self.use_copy else num_learned[request]
            first = max(stop - start - max(len(history) - behind, 0), 0)
            most = min(most, MAX_CHAIN)
            bounds.append((start, stop, first, most))
            longest = max(longest, most)
        count = len(bounds)
        tokens, lengths = np.empty((count, longest), np.int32), np.zeros(count, np.int64)
        confidences = np.empty((count, longest))
        greedy_chains(
            text,
            np.array(bounds, np.int64),
            np.zeros(count) if least_survival is None else np.array(least_survival, np.float64),
            self.end_tokens,
            noise or no_noise(count),
            self.ngram.arrays,
            self._copying,
            self.workspace,
            lengths,
            tokens,
            confidences,
        )
        return [
            Chain(tuple(row[:length].tolist()), confidence[:length])
            for row, confidence, length in zip(tokens, confidences, lengths.tolist(), strict=True)
        ]

    def learn(self, histories: Sequence[Tokens], num_known: Sequence[int]) -> None:
        """Learn how far to trust copying from what each history holds behind so many tokens, as the target chose it."""
        if self.use_copy:
            self.greedy_chains(histories, [0] * len(histories), num_learned=num_known)


def no_noise(count: int) -> Noise:
    """Nothing is known of the noise of `count` requests: each is drafted for as if it were greedy."""
    return Noise(np.zeros((count, 2), np.uint64), np.zeros((count, 2)))


def join(histories: Sequence[Tokens]) -> tuple[Tokens, list[int]]:
    """The last WINDOW tokens of each history in one array, and where each starts: [requests + 1]."""
    windows = [history[-WINDOW:] for history in histories]
    text = windows[0] if len(windows) == 1 else np.concatenate(windows)
    return np.ascontiguousarray(text, np.int32), [0, *accumulate(len(window) for window in windows)]
