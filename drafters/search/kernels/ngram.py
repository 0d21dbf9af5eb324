"""The static n-gram model: contexts found by hash, and the distribution after a context."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.tokens import NO_TOKEN, token_at
from transformer.compiled import compiled

MAX_ORDER = 8


class NgramArrays(NamedTuple):
    """A static n-gram model as the kernels read it (see `drafters.search.ngram`)."""

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
    """Working memory of the causal kernels, clean between calls: made once, so that a call allocates nothing."""

    sums: NDArray[np.float32]  # [vocabulary] of the context at hand: `p(t) = sums[t] + rest * unigram[t]`; else zero
    starts: NDArray[np.int64]  # [MAX_ORDER] first successor of each context found, shortest first
    stops: NDArray[np.int64]  # [MAX_ORDER]
    last: NDArray[np.int32]  # [vocabulary] last position of a token in the text at hand, or -1
    previous: NDArray[np.int32]  # [window] of a text and what is drafted after it: previous position of a token, or -1


def new_workspace(vocabulary_size: int, window: int) -> Workspace:
    return Workspace(
        sums=np.zeros(vocabulary_size, np.float32),
        starts=np.zeros(MAX_ORDER, np.int64),
        stops=np.zeros(MAX_ORDER, np.int64),
        last=np.full(vocabulary_size, NO_TOKEN, np.int32),
        previous=np.zeros(window, np.int32),
    )


@compiled
def extend_hash(state: np.uint64, token: int) -> np.uint64:
    """Hash of a context that is one token longer to the left; starts from 0."""
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
    """Fill bucket and fingerprint of the `width` tokens before each end; for fitting."""
    for index in range(len(ends)):
        state = np.uint64(0)
        for back in range(1, width + 1):
            state = extend_hash(state, text[ends[index] - back])
        buckets[index] = bucket_of(state, num_buckets)
        fingerprints[index] = fingerprint_of(state)


@compiled
def enter_context(ngram: Any, text: Any, path: Any, length: int, work: Any) -> tuple[np.int64, np.float32]:
    """Sum the successors' shares after `text + path[:length]` into `work.sums`; return (contexts found, rest)."""
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
            break  # a context is hardly ever kept without the shorter one: looking for it would only cost time
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
    sums, tokens, starts, stops = work.sums, ngram.tokens, work.starts, work.stops
    for index in range(found):
        for successor in range(starts[index], stops[index]):
            sums[tokens[successor]] = np.float32(0.0)


@compiled
def score_text(text: Any, ngram: Any, work: Any, log_probabilities: Any, is_best: Any) -> None:
    """For evaluation: every token's natural log probability in the n-gram model, and whether it was the best."""
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
