"""Copying from the request's own text: the longest earlier match of its end, and the weight of the copied token."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.ngram import enter_context, leave_context
from drafters.search.kernels.tokens import NO_TOKEN, token_at
from transformer.compiled import compiled

MAX_MATCH = 16  # tokens; longer matches of the request's own text count as this long


class Copying(NamedTuple):
    """The weight of the copied token by match length, and the counts behind it. Arrays are [MAX_MATCH + 1]."""

    weights: NDArray[np.float32]  # share of the copied token in the mixture
    right: NDArray[np.float64]  # right copies, a decaying count
    seen: NDArray[np.float64]  # all copies, a decaying count
    decay: float  # of both counts, per observation


@compiled
def index_text(text: Any, first: int, stop: int, work: Any) -> None:
    """Chain the positions of equal tokens, so that a search for matches visits only places with the same last token."""
    last, previous = work.last, work.previous
    for position in range(first, stop):
        index_token(position, text[position], last, previous)


@compiled
def index_token(position: int, token: int, last: Any, previous: Any) -> None:
    """Add one position to the chain of its token."""
    if 0 <= token < len(last):
        previous[position] = last[token]
        last[token] = position


@compiled
def clear_text(text: Any, work: Any) -> None:
    """Remove a text's tokens from the index."""
    last = work.last
    for token in text:
        if 0 <= token < len(last):
            last[token] = NO_TOKEN


@compiled
def _match_length(text: Any, path: Any, position: int, end: int, best: int) -> int:
    """Return how many tokens up to and including `position` equal those before `end`; 0 if no more than `best` do.

    Compares the token that a longer match needs first: that rules most positions out.
    """
    if position < best or token_at(text, path, position - best) != token_at(text, path, end - 1 - best):
        return 0
    match = 0
    while (
        match < MAX_MATCH
        and match <= position
        and token_at(text, path, position - match) == token_at(text, path, end - 1 - match)
    ):
        match += 1
    return match


@compiled
def find_copy(text: Any, path: Any, length: int, num_indexed: int, work: Any) -> tuple[np.int64, np.int64]:
    """Return the longest earlier match of the end of `text + path[:length]`: (length, where it continues), or (0, -1).

    The text must be indexed, and the first `num_indexed` tokens of the path. The most recent of equally long matches
    wins. A match may end in the path itself and continue there.
    """
    end, last, previous = len(text) + length, work.last, work.previous
    if end < 2:
        return np.int64(0), np.int64(NO_TOKEN)
    last_token = token_at(text, path, end - 1)
    if not 0 <= last_token < len(last):
        return np.int64(0), np.int64(NO_TOKEN)
    best, best_position = 0, -1
    for position in range(end - 2, len(text) + num_indexed - 1, -1):
        match = _match_length(text, path, position, end, best)
        if match > best:
            best, best_position = match, position
        if best == MAX_MATCH:
            break
    position = last[last_token] if length > num_indexed else previous[end - 1]
    while position >= best and best < MAX_MATCH:
        match = _match_length(text, path, position, end, best)
        if match > best:
            best, best_position = match, position
        position = previous[position]
    if best == 0:
        return np.int64(0), np.int64(NO_TOKEN)
    if not 0 <= token_at(text, path, best_position + 1) < len(last):
        return np.int64(0), np.int64(NO_TOKEN)
    return np.int64(best), np.int64(best_position + 1)


@compiled
def follow_copy(
    text: Any, path: Any, length: int, num_indexed: int, match: int, place: int, work: Any
) -> tuple[np.int64, np.int64]:
    """Do what `find_copy` does, given its result for the token before: `match` and `place`.

    If that match goes on, it is still the longest and the latest: a better one would have been found before. This does
    not hold for matches that were cut to MAX_MATCH, which are searched again.
    """
    end = len(text) + length
    if 0 < match < MAX_MATCH and token_at(text, path, place) == token_at(text, path, end - 1):
        if 0 <= token_at(text, path, place + 1) < len(work.last):
            return np.int64(match + 1), np.int64(place + 1)
        return np.int64(0), np.int64(NO_TOKEN)
    found: tuple[np.int64, np.int64] = find_copy(text, path, length, num_indexed, work)
    return found


@compiled
def copied_token(text: Any, path: Any, match: int, place: int) -> np.int64:
    """Return the token that continues a match; NO_TOKEN without a match."""
    return np.int64(token_at(text, path, place)) if match > 0 else np.int64(NO_TOKEN)


@compiled
def mixed_probability(token: int, copied: int, weight: float, rest: float, sums: Any, unigram: Any) -> float:
    """Return a token's probability in the mixture: `weight` on the copied token, the rest on the current n-grams."""
    probability: float = (1.0 - weight) * (sums[token] + rest * unigram[token])
    return probability + weight if token == copied else probability


@compiled
def copy_weight(right: float, seen: float) -> float:
    """Return the weight of a copied token, from its counts."""
    return min(right / seen, 0.995)  # other tokens must stay possible


@compiled
def learn_copying(text: Any, first: int, ngram: Any, copying: Any, work: Any) -> None:
    """Predict `text[first:]` token by token, update `copying` by the results, and leave the whole text indexed.

    A right copy counts with its share of the mixture's probability (expectation maximisation): a token that the n-gram
    model expects anyway says little about copying.
    """
    weights, right, seen, decay = copying.weights, copying.right, copying.seen, copying.decay
    index_text(text, 0, first, work)
    match, place = np.int64(0), np.int64(NO_TOKEN)
    for position in range(first, len(text)):
        before = text[:position]
        match, place = follow_copy(before, before, 0, 0, match, place, work)
        if match > 0:
            copied, credit = text[place], 0.0
            if copied == text[position]:
                found, rest = enter_context(ngram, before, before, 0, work)
                otherwise = work.sums[copied] + rest * ngram.unigram[copied]
                leave_context(ngram, found, work)
                credit = weights[match] / (weights[match] + (1.0 - weights[match]) * otherwise)
            right[match] = decay * right[match] + credit
            seen[match] = decay * seen[match] + 1.0
            weights[match] = copy_weight(right[match], seen[match])
        index_text(text, position, position + 1, work)
