"""Fit the n-gram model over the target's token ids, within a budget of bytes.

Uses interpolated Witten-Bell smoothing: a context gives the shorter context the weight
`w * types / (w * types + count)`, where `types` is the number of different tokens that followed it. Keeps the n-grams
with the largest gain, `count * (log p(token | context) - log p(token | shorter context))`. On held-out text this beat
absolute discounting with Chen and Goodman's three discounts at equal size. Kneser-Ney's continuation counts are wrong
for contexts whose longer contexts were pruned: here, most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.ngram import MAX_ORDER, NgramArrays, locate_contexts, new_workspace, score_text
from drafters.search.ngram import LEVEL_PROBABILITIES, LEVELS_PER_NAT, MAX_SUCCESSORS, NgramModel, assemble

CONTEXTS_PER_BUCKET = 4
NEW_WORD_WEIGHT = 3.0  # w above; on held-out text, values from 2 to 4.5 are equally good
BYTES_PER_SUCCESSOR = 3
BYTES_PER_CONTEXT = 4  # fingerprint, count, and its share of the bucket table
MAX_MASS = 0.9999  # of a context's successors; the rest is left for other tokens

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Grams:
    """The distinct n-grams of one order that occur at least twice."""

    order: int
    token: Ids  # last token
    last_end: Ids  # a position in the text where the n-gram ends
    context: Ids  # index of its first n - 1 tokens
    share: NDArray[np.float64]  # discounted relative frequency in its context
    gain: NDArray[np.float64]  # nats that keeping it saves over the training text


def fit_ngram(
    tokens: Sequence[NDArray[np.int32]],
    vocabulary_size: int,
    folder: Path | None = None,
    order: int = 6,
    max_bytes: int = 6_000_000,
) -> NgramModel:
    """Fit on token arrays, and save to `folder` if given. N-grams do not cross from one array to the next.

    `max_bytes` bounds the stored successors and contexts; the unigram is not counted. Raises ValueError without tokens,
    or for tokens or an order out of range.
    """
    text = np.concatenate([np.asarray(part, np.int64) for part in tokens])
    if not len(text):
        raise ValueError("the n-gram model needs at least one token to be fitted on")
    if text.min() < 0 or text.max() >= vocabulary_size:
        raise ValueError(f"token ids run from {text.min()} to {text.max()}, outside a vocabulary of {vocabulary_size}")
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be in 1..{MAX_ORDER}, not {order}")
    offsets = np.concatenate([np.arange(len(part)) for part in tokens])
    unigram = np.bincount(text, minlength=vocabulary_size) + 0.1
    unigram = (unigram / unigram.sum()).astype(np.float32)
    grams = _count(text, offsets, order, unigram)
    kept = _prune(grams, max_bytes)
    arrays = _pack(text, kept, order, unigram, vocabulary_size)
    model = NgramModel(arrays)
    if folder is not None:
        model.save(folder)
    return model


@dataclass(frozen=True, slots=True)
class NgramQuality:
    """Quality of an n-gram model on held-out text."""

    perplexity: float
    accuracy: float  # share of tokens that the model found most probable
    num_bytes: int


def evaluate_ngram(model: NgramModel, tokens: NDArray[np.int32]) -> NgramQuality:
    """Score one array of held-out tokens."""
    text = np.ascontiguousarray(tokens, np.int32)
    log_probabilities, is_best = np.zeros(len(text)), np.zeros(len(text), np.bool_)
    score_text(text, model.arrays, new_workspace(model.vocabulary_size, 0), log_probabilities, is_best)
    return NgramQuality(float(np.exp(-log_probabilities.mean())), float(is_best.mean()), model.num_bytes)


def _count(text: Ids, offsets: Ids, order: int, unigram: NDArray[np.float32]) -> list[_Grams]:
    """Count order by order. Longer orders leave out positions whose context occurred only once."""
    grams: list[_Grams] = []
    ids = text.copy()  # id of the n-gram that ends at a position; -1: not extended
    probabilities = unigram.astype(np.float64)[text]  # probability of the token at a position, given the context so far
    for size in range(2, order + 1):
        ends = np.flatnonzero((offsets >= size - 1) & (np.roll(ids, 1) >= 0))
        if not len(ends):
            break
        keys, gram_of, counts = np.unique(
            ids[ends - 1] * (text.max() + 1) + text[ends], return_inverse=True, return_counts=True
        )
        contexts, context_of = np.unique(keys // (text.max() + 1), return_inverse=True)
        rest_weight = NEW_WORD_WEIGHT * np.bincount(context_of)
        totals = np.bincount(context_of, weights=counts)
        last_end = np.zeros(len(keys), np.int64)
        last_end[gram_of] = ends
        share = np.asarray(np.where(counts < 2, 0.0, counts / (totals + rest_weight)[context_of]), np.float64)
        rest = 1.0 - np.bincount(context_of, weights=share, minlength=len(contexts))
        probability = share + rest[context_of] * probabilities[last_end]
        gain = counts * np.log(probability / probabilities[last_end])
        probabilities[ends] = probability[gram_of]
        ids = np.full(len(text), -1)
        repeated = counts[gram_of] >= 2
        ids[ends[repeated]] = gram_of[repeated]
        worth = np.flatnonzero((share > LEVEL_PROBABILITIES[-1]) & (gain > 0))
        token = text[last_end[worth]]
        gains = np.asarray(gain[worth], np.float64)
        grams.append(_Grams(size, token, last_end[worth], context_of[worth], share[worth], gains))
    return grams


def _prune(grams: list[_Grams], max_bytes: int) -> list[_Grams]:
    """Keep the n-grams above a threshold of the gain, so that the model fits into `max_bytes`."""

    def chosen(threshold: float) -> list[NDArray[np.bool_]]:
        return [gram.gain > threshold for gram in grams]

    def size(threshold: float) -> int:
        total = 0
        for gram, keep in zip(grams, chosen(threshold), strict=True):
            contexts = int(np.count_nonzero(np.bincount(gram.context[keep])))
            total += BYTES_PER_SUCCESSOR * int(keep.sum()) + BYTES_PER_CONTEXT * contexts
        return total

    low, high = 0.0, max((float(gram.gain.max()) for gram in grams if len(gram.gain)), default=0.0)
    if size(low) > max_bytes:
        for _ in range(40):
            middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
            low, high = (low, middle) if size(middle) <= max_bytes else (middle, high)
        low = high
    return [
        _Grams(gram.order, gram.token[keep], gram.last_end[keep], gram.context[keep], gram.share[keep], gram.gain[keep])
        for gram, keep in zip(grams, chosen(low), strict=True)
    ]


def _pack(
    text: Ids, grams: list[_Grams], order: int, unigram: NDArray[np.float32], vocabulary_size: int
) -> NgramArrays:
    num_contexts = sum(len(np.unique(gram.context)) for gram in grams)
    num_buckets = max(num_contexts // CONTEXTS_PER_BUCKET, 1)
    columns: list[NDArray[Any]] = []
    for gram in grams:
        buckets, fingerprints = np.zeros(len(gram.token), np.int64), np.zeros(len(gram.token), np.uint16)
        locate_contexts(text, gram.last_end, gram.order - 1, num_buckets, buckets, fingerprints)
        context = gram.context * MAX_ORDER + gram.order - 1  # distinct over orders
        columns.append(np.stack([buckets, context, fingerprints, gram.token, _levels(gram)]))
    rows = np.concatenate(columns, axis=1) if columns else np.zeros((5, 0), np.int64)
    rows = rows[:, np.lexsort((rows[4], rows[1], rows[0]))]  # by bucket, context, falling share
    is_first = np.diff(rows[1], prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    rank = np.arange(rows.shape[1]) - starts[np.cumsum(is_first) - 1] if len(starts) else np.zeros(0, np.int64)
    rows = rows[:, rank < MAX_SUCCESSORS]
    starts = np.flatnonzero(np.diff(rows[1], prepend=-1) != 0)
    counts = np.diff(starts, append=rows.shape[1])
    per_bucket = np.bincount(rows[0, starts], minlength=num_buckets)
    return assemble(
        order=order,
        bucket_contexts=np.concatenate([[0], np.cumsum(per_bucket)]).astype(np.uint32),
        fingerprints=rows[2, starts].astype(np.uint16),
        successor_counts=counts.astype(np.uint8),
        tokens=rows[3].astype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32),
        levels=rows[4].astype(np.uint8),
        unigram=unigram,
    )


def _levels(gram: _Grams) -> Ids:
    """Return the nearest level of each share; the next lower one if a context's shares would add up to one or more."""
    scale = -np.log(np.clip(gram.share / LEVEL_PROBABILITIES[0], None, 1.0)) * LEVELS_PER_NAT
    nearest = np.clip(np.rint(scale), 0, 255).astype(np.int64)
    sums = np.bincount(gram.context, weights=LEVEL_PROBABILITIES[nearest])
    lower = np.clip(np.ceil(scale), 0, 255).astype(np.int64)
    return np.asarray(np.where(sums[gram.context] > MAX_MASS, lower, nearest), np.int64)
