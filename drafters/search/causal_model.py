"""The causal model of Eq. 8: the request's own text, mixed with a static n-gram model. It also makes the free drafts.

`p(token) = w(m) * [token == copied] + (1 - w(m)) * p_static(token | context)`. `copied` follows the longest earlier
match of the context's end in the request's own text; `m` is the length of that match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from drafters.base import Tokens
from drafters.search.kernels.chains import Noise, draft_chains
from drafters.search.kernels.copying import MAX_MATCH, Copying, copy_weight
from drafters.search.kernels.ngram import new_workspace
from drafters.search.ngram import NgramModel

WINDOW = 4096  # latest tokens of a request's text that the causal model reads
MAX_CHAIN = 256  # tokens of a free draft
COPY_PRIOR_STRENGTH = 20.0  # observations that the prior weights count for
# By match length 0..16. Fitted on half of the held-out text, with an earlier n-gram model; serving updates them.
COPY_PRIOR_WEIGHTS = (0, 0.17, 0.36, 0.47, 0.54, 0.62, 0.67, 0.7, 0.74, 0.77, 0.76, 0.77, 0.79, 0.81, 0.81, 0.82, 0.85)


def new_copying(
    prior_weights: Sequence[float] = COPY_PRIOR_WEIGHTS,
    prior_strength: float = COPY_PRIOR_STRENGTH,
    decay: float = 0.998,
) -> Copying:
    """Return weights of the copied token by match length. They start from a prior, and learn and forget while serving.

    prior_weights: [17] by match length, the first is 0. decay: per observation; 0.998 remembers about 500 of them.
    Raises ValueError for another number of weights.
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
    """A free draft. It is shorter than asked for if the model knows nothing more, or if it ends with an end token."""

    tokens: tuple[int, ...]
    confidences: NDArray[np.float64]  # [tokens] the mixture's probability of each, given the tokens before


class CausalModel:
    """Copying and n-grams, mixed. It learns while serving, so it is not thread-safe."""

    def __init__(
        self,
        vocabulary_size: int,
        ngram: NgramModel | None = None,
        copying: Copying | None = None,
        end_tokens: Sequence[int] = (),
        use_copy: bool = True,
    ) -> None:
        """Mix `ngram`, or a uniform distribution if it is None, with copying.

        copying: owned by this model from now on; learning changes it. use_copy: False leaves copying out.
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
        """True if there is an n-gram model with contexts."""
        return self.ngram.order > 1

    @property
    def copy_weights(self) -> NDArray[np.float32]:
        """[MAX_MATCH + 1] weight of the copied token in the mixture, by match length."""
        return self._copying.weights

    def draft(
        self,
        histories: Sequence[Tokens],
        max_tokens: Sequence[int],
        min_survival: Sequence[float] | None = None,
        noise: Noise | None = None,
        num_learned: Sequence[int] | None = None,
    ) -> list[Chain]:
        """Draft for a batch of requests without a neural pass, at most MAX_CHAIN tokens each.

        Takes the mixture's most probable token at each position; where the target's `noise` is known, the token that
        the target would draw from the mixture.
        min_survival: end a request's draft before its probability of being accepted whole falls below this (default 0).
        num_learned: learn the weights of copying from the tokens after the first `num_learned` of each history, which
        the target chose (default: learn nothing). This costs little here, because the texts are indexed anyway.
        """
        if not histories:
            return []
        text, starts = join(histories)
        bounds, max_length = [], 1
        for request, (history, limit) in enumerate(zip(histories, max_tokens, strict=True)):
            start, stop = starts[request], starts[request + 1]
            learned = len(history) if num_learned is None or not self.use_copy else num_learned[request]
            first = max(stop - start - max(len(history) - learned, 0), 0)
            limit = min(limit, MAX_CHAIN)
            bounds.append((start, stop, first, limit))
            max_length = max(max_length, limit)
        count = len(bounds)
        tokens, lengths = np.empty((count, max_length), np.int32), np.zeros(count, np.int64)
        confidences = np.empty((count, max_length))
        draft_chains(
            text,
            np.array(bounds, np.int64),
            np.zeros(count) if min_survival is None else np.array(min_survival, np.float64),
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
        """Learn the weights of copying from the tokens after the first `num_known` of each history."""
        if self.use_copy:
            self.draft(histories, [0] * len(histories), num_learned=num_known)


def no_noise(count: int) -> Noise:
    """Return the unknown noise of `count` requests: drafts for them are greedy."""
    return Noise(np.zeros((count, 2), np.uint64), np.zeros((count, 2)))


def join(histories: Sequence[Tokens]) -> tuple[Tokens, list[int]]:
    """Join the last WINDOW tokens of each history in one array; also return where each starts: [requests + 1]."""
    windows = [history[-WINDOW:] for history in histories]
    text = windows[0] if len(windows) == 1 else np.concatenate(windows)
    return np.ascontiguousarray(text, np.int32), [0, *accumulate(len(window) for window in windows)]
