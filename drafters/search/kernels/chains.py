"""Free drafts: chains of the causal model's most probable tokens, or of the tokens that the target likely draws."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.copying import (
    clear_text,
    copied_token,
    follow_copy,
    index_token,
    learn_copying,
    mixed_probability,
)
from drafters.search.kernels.ngram import enter_context, leave_context
from drafters.search.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import compiled
from transformer.noise import gumbel, noise_key

MIN_SHARE = 1e-3  # of the best token's probability: a less probable token is not expected to be drawn


class Noise(NamedTuple):
    """The noise that the target draws with, as far as it is known, per request of a batch.

    The target takes the token with the largest `log p / temperature + noise`. A draft does the same with its own
    estimate of p.
    """

    places: NDArray[np.uint64]  # [requests, 2] seed, and absolute position of the first drafted token
    scales: NDArray[np.float64]  # [requests, 2] of the log probabilities of causal model and lattice; 0: no noise


@compiled
def _most_probable(
    ngram: Any, found: int, rest: float, copied: int, weight: float, work: Any
) -> tuple[np.int64, float]:
    """Return the mixture's most probable token in the current context, and its probability."""
    best, best_probability = np.int64(NO_TOKEN), 0.0
    tokens, unigram, sums, starts, stops = ngram.tokens, ngram.unigram, work.sums, work.starts, work.stops
    for index in range(found):
        for successor in range(starts[index], stops[index]):
            token = np.int64(tokens[successor])
            probability = mixed_probability(token, copied, weight, rest, sums, unigram)
            if probability > best_probability:
                best, best_probability = token, probability
    if weight > 0.0:
        probability = mixed_probability(copied, copied, weight, rest, sums, unigram)
        if probability > best_probability:
            best, best_probability = np.int64(copied), probability
    return best, best_probability


@compiled
def _likely_draw(
    ngram: Any,
    found: int,
    rest: float,
    copied: int,
    weight: float,
    min_probability: float,
    scale: float,
    key: np.uint64,
    work: Any,
) -> tuple[np.int64, float]:
    """Return the token that the target would draw with this noise from the mixture, and a confidence.

    Leaves out tokens of a probability below `min_probability`. The confidence grows with the lead over the second best.
    """
    best, first, second = np.int64(NO_TOKEN), -np.inf, -np.inf
    tokens, unigram, sums, starts, stops = ngram.tokens, ngram.unigram, work.sums, work.starts, work.stops
    for index in range(-1, found):
        start, stop = (starts[index], stops[index]) if index >= 0 else (np.int64(0), np.int64(weight > 0.0))
        for successor in range(start, stop):
            token = np.int64(tokens[successor]) if index >= 0 else np.int64(copied)
            probability = mixed_probability(token, copied, weight, rest, sums, unigram)
            if probability < min_probability or token == best:
                continue
            value = scale * np.log(probability) + gumbel(key, token)
            if value > first:
                best, first, second = token, value, first
            elif value > second:
                second = value
    return best, (1.0 - np.exp(second - first)) * (1.0 - (1.0 - weight) * rest)


@compiled
def draft_chains(
    flat: Any, bounds: Any, min_survival: Any, ends: Any, noise: Any, ngram: Any, copying: Any, work: Any,
    lengths: Any, tokens: Any, confidences: Any,
) -> None:  # fmt: skip
    """For each text, learn from its last tokens, then chain the mixture's most probable tokens (or likely draws).

    bounds: [requests, 4] where each text starts and stops in `flat`, the first of its tokens to learn from, and the
    maximum number of tokens to draft. A chain also ends with an end token, or before the product of its confidences
    falls below its `min_survival`.
    """
    for request in range(len(bounds)):
        start, stop, first, max_tokens = bounds[request]
        text, path = flat[start:stop], tokens[request]
        learn_copying(text, first, ngram, copying, work)
        survival, match, place = 1.0, np.int64(0), np.int64(NO_TOKEN)
        for step in range(max_tokens):
            match, place = follow_copy(text, path, step, step, match, place, work)
            copied = copied_token(text, path, match, place)
            weight = copying.weights[match]
            found, rest = enter_context(ngram, text, path, step, work)
            best, confidence = _most_probable(ngram, found, rest, copied, weight, work)
            if noise.scales[request, 0] > 0.0 and best != NO_TOKEN:
                key = noise_key(noise.places[request, 0], np.int64(noise.places[request, 1]) + step)
                scale, min_probability = noise.scales[request, 0], confidence * MIN_SHARE
                best, confidence = _likely_draw(ngram, found, rest, copied, weight, min_probability, scale, key, work)
            leave_context(ngram, found, work)
            survival *= confidence
            if best == NO_TOKEN or survival < min_survival[request]:
                break
            path[step], confidences[request, step] = best, confidence
            lengths[request] = step + 1
            index_token(stop - start + step, best, work.last, work.previous)
            if contains(ends, len(ends), best):
                break
        clear_text(text, work)
        clear_text(path[: lengths[request]], work)
