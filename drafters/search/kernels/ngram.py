"""The static n-gram model: find contexts by hash, and compute the distribution after a context."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.tokens import NO_TOKEN, token_at
from transformer.compiled import compiled

MAX_ORDER = 8


class NgramArrays(NamedTuple):
    """A static n-gram model in the form that the kernels read (see `drafters.search.ngram`)."""

    order: int  # longest context plus one; 1: no contexts, only `unigram`
    bucket_contexts: NDArray[np.uint32]  # [buckets + 1] first context of each hash bucket
    bucket_successors: NDArray[np.uint32]  # [buckets] first successor of each hash bucket
    fingerprints: NDArray[np.uint16]  # [contexts]
    successor_counts: NDArray[np.uint8]  # [contexts]
    tokens: NDArray[np.unsignedinteger[Any]]  # [successors]
    levels: NDArray[np.uint8]  # [successors] index into level_probabilities
    level_probabilities: NDArray[np.float32]  # [256]
    unigram: NDArray[np.float32]  # [vocabulary] sums to one


class Workspace(NamedTuple):
    """Working memory of the causal kernels. Made once, so that a call allocates nothing; clean between calls."""

    sums: NDArray[
        np.float32
    ]  # [vocabulary] of the current context: `p(t) = sums[t] + rest * unigram[t]`; zero without one
    starts: NDArray[np.int64]  # [MAX_ORDER] first successor of each context found, shortest first
    stops: NDArray[np.int64]  # [MAX_ORDER]
    last: NDArray[np.int32]  # [vocabulary] last position of a token in the current text, or -1
    previous: NDArray[np.int32]  # [window] previous position of the same token, in a text and its draft; -1: none


def new_workspace(vocabulary_size: int, window: int) -> Workspace:
    """Return a clean workspace for texts and drafts of up to `window` tokens together."""
    return Workspace(
        sums=np.zeros(vocabulary_size, np.float32),
        starts=np.zeros(MAX_ORDER, np.int64),
        stops=np.zeros(MAX_ORDER, np.int64),
        last=np.full(vocabulary_size, NO_TOKEN, np.int32),
        previous=np.zeros(window, np.int32),
    )


@compiled
def extend_hash(state: np.uint64, token: int) -> np.uint64:
    """Return the hash of a context with one more token on its left. The empty context has hash 0."""
    state = (state ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(29))


@compiled
def bucket_of(state: np.uint64, num_buckets: int) -> np.int64:
    return np.int64((state >> np.uint64(24)) % np.uint64(num_buckets))


@compiled
def fingerprint_of(state: np.uint64) -> np.uint16:
    return np.uint16(state & np.uint64(0xFFFF))


@compiled
def locate_contexts(text: Any, ends: Any, width: int, num_buckets: int, buckets: Any, fingerprints: Any) -> None:
    """Fill in bucket and fingerprint of the `width` tokens before each end. Used for fitting."""
    for index in range(len(ends)):
        state = np.uint64(0)
        for back in range(1, width + 1):
            state = extend_hash(state, text[ends[index] - back])
        buckets[index] = bucket_of(state, num_buckets)
        fingerprints[index] = fingerprint_of(state)


@compiled
def enter_context(ngram: Any, text: Any, path: Any, length: int, work: Any) -> tuple[np.int64, np.float32]:
    """Add up the successors' shares after `text + path[:length]` in `work.sums`; return (contexts found, rest).

    `rest` is the share that is left for the unigram. Call `leave_context` when done.
    """
    end = len(text) + length
    state = np.uint64(0)
    found = np.int64(0)
    starts, stops = work.starts, work.stops
    bucket_contexts, bucket_successors = ngram.bucket_contexts, ngram.bucket_successors
    fingerprints, successor_counts = ngram.fingerprints, ngram.successor_counts
    for width in range(1, min(ngram.order - 1, end) + 1):
        state = extend_hash(state, token_at(text, path, end - width))
        bucket = bucket_of(state, len(bucket_successors))
        fingerprint = fingerprint_of(state)
        first = np.int64(bucket_successors[bucket])
        for context in range(np.int64(bucket_contexts[bucket]), np.int64(bucket_contexts[bucket + 1])):
            count = np.int64(successor_counts[context])
            if fingerprints[context] == fingerprint:
                starts[found], stops[found] = first, first + count
                found = np.int64(found + 1)
                break
            first += count
        if found < width:
            break  # a longer context is hardly ever kept without this one: looking for it only costs time
    sums, tokens, levels, shares = work.sums, ngram.tokens, ngram.levels, ngram.level_probabilities
    rest = np.float32(1.0)
    for index in range(found - 1, -1, -1):
        mass = np.float32(0.0)
        for successor in range(starts[index], stops[index]):
            share = shares[levels[successor]]
            mass += share
            sums[tokens[successor]] += rest * share
        rest *= np.float32(1.0) - mass
    return found, rest


@compiled
def leave_context(ngram: Any, found: int, work: Any) -> None:
    """Set `work.sums` back to zero after `enter_context` found `found` contexts."""
    sums, tokens, starts, stops = work.sums, ngram.tokens, work.starts, work.stops
    for index in range(found):
        for successor in range(starts[index], stops[index]):
            sums[tokens[successor]] = np.float32(0.0)


@compiled
def score_text(text: Any, ngram: Any, work: Any, log_probabilities: Any, is_best: Any) -> None:
    """Fill in every token's natural log probability, and whether it was the most probable. Used for evaluation."""
    for position in range(len(text)):
        before = text[:position]
        found, rest = enter_context(ngram, before, before, 0, work)
        probability = work.sums[text[position]] + rest * ngram.unigram[text[position]]
        is_best[position] = found > 0
        for index in range(found):
            for successor in range(work.starts[index], work.stops[index]):
                token = np.int64(ngram.tokens[successor])
                if work.sums[token] + rest * ngram.unigram[token] > probability:
                    is_best[position] = False
        leave_context(ngram, found, work)
        log_probabilities[position] = np.log(max(probability, 1e-30))
