"""What a path may go on with at one position, and how good each of it is: the terms of Eq. 8's sum."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.chains import Noise
from drafters.search.kernels.copying import copied_token, follow_copy, mixed_probability
from drafters.search.kernels.ngram import enter_context, leave_context
from drafters.search.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import allocating, compiled
from transformer.intrinsics import exponential, logarithm
from transformer.noise import gumbel, noise_key

BEST_SUCCESSORS = 8  # of each of the two longest contexts, that join the lattice as the n-gram model's proposals


class Search(NamedTuple):
    """What a batch's search reads besides the texts and the causal model."""

    row_starts: NDArray[np.int64]  # [requests + 1]
    logits: NDArray[np.float32]  # [rows, drafter's vocabulary]
    candidate_mass: float
    most_candidates: int
    lattice_ends: NDArray[np.int64]  # always candidates
    ends: NDArray[np.int32]
    noise: Noise
    lattice_weights: NDArray[np.float64]  # [longest] by position of the draft
    log_floor: float  # nats
    beam_width: int
    use_copy: bool  # whether the causal model looks at the request's own text
    use_proposals: bool  # whether what the causal model would go on with joins the lattice
    use_beams: bool


class SearchRoom(NamedTuple):
    """Working memory of one call: its rows' candidates, the options of one position, and the beams."""

    candidates: NDArray[np.int32]  # [longest, most candidates]
    widths: NDArray[np.int64]  # [longest]
    log_normalisers: NDArray[np.float32]  # [longest]
    option_tokens: NDArray[np.int64]  # [most options] of one position: candidates and what is joined to them
    option_scores: NDArray[np.float64]  # [4, most options] score, log lattice, log causal, confidence
    paths: NDArray[np.int32]  # [2, beam width + 1, longest] before and after a position
    details: NDArray[np.float64]  # [2, beam width + 1, longest, 4] the same four
    sums: NDArray[np.float64]  # [2, beam width] scores summed over the path
    matches: NDArray[np.int64]  # [2, beam width + 1, 2] of a path without its last token: length, where it goes on
    picks: NDArray[np.int64]  # [beam width, 2] parent beam and token of each new beam
    pick_scores: NDArray[np.float64]  # [beam width, 4]


@allocating
def new_room(search: Any) -> Any:
    width, longest = search.beam_width, len(search.lattice_weights)
    most = search.most_candidates + len(search.lattice_ends)
    most_options = most + 1 + 2 * BEST_SUCCESSORS
    return SearchRoom(
        np.empty((longest, most), np.int32),
        np.empty(longest, np.int64),
        np.empty(longest, np.float32),
        np.empty(most_options, np.int64),
        np.empty((4, most_options), np.float64),
        np.empty((2, width + 1, longest), np.int32),
        np.empty((2, width + 1, longest, 4), np.float64),
        np.empty((2, width), np.float64),
        np.empty((2, width + 1, 2), np.int64),
        np.empty((width, 2), np.int64),
        np.empty((width, 4), np.float64),
    )


@compiled
def _join(tokens: Any, count: np.int64, token: np.int64, vocabulary: int) -> np.int64:
    """Append a token that is in the vocabulary and not there yet; return the new number."""
    if not 0 <= token < vocabulary or contains(tokens, count, token):
        return count
    tokens[count] = token
    return count + 1


@compiled
def expand(
    search: Any, room: Any, row: int, request: int, ngram: Any, copy_weights: Any, text: Any, path: Any, length: int,
    match: Any, work: Any,
) -> np.int64:  # fmt: skip
    """Fill the room's options for the token after `text + path[:length]`, whose lattice row is `row`; their number.

    They are the lattice's candidates and, where proposals may join, the copied token and the n-gram model's best
    successors of this very path. match: [2] length of the match one token before, and where it goes on; becomes the one
    at hand.
    """
    if search.use_copy:
        match[0], match[1] = follow_copy(text, path, length, 0, match[0], match[1], work)
    copied = copied_token(text, path, match[0], match[1])
    weight = copy_weights[match[0]]
    found, rest = enter_context(ngram, text, path, length, work)
    vocabulary = min(search.logits.shape[1], len(ngram.unigram))
    tokens, count = room.option_tokens, np.int64(0)
    for token in room.candidates[length, : room.widths[length]]:
        if token < vocabulary:
            tokens[count] = token
            count += 1
    if search.use_proposals:
        count = _join_proposals(
            ngram, found, copied if weight > 0.0 else np.int64(NO_TOKEN), vocabulary, work, tokens, count
        )
    _look_up_lattice(search, room, row, length, count)
    _look_up_causal(room, ngram, rest, copied, weight, work, search.log_floor, count)
    leave_context(ngram, found, work)
    _score(search, room, request, length, count)
    return count


@compiled
def _join_proposals(
    ngram: Any, found: int, copied: np.int64, vocabulary: int, work: Any, tokens: Any, count: np.int64
) -> np.int64:
    starts, stops, successors = work.starts, work.stops, ngram.tokens
    count = _join(tokens, count, copied, vocabulary)
    for index in range(max(found - 2, 0), found):  # the two longest contexts
        for successor in range(starts[index], min(starts[index] + BEST_SUCCESSORS, stops[index])):
            count = _join(tokens, count, np.int64(successors[successor]), vocabulary)
    return count


@compiled
def _look_up_lattice(search: Any, room: Any, row: int, length: int, count: int) -> None:
    """What the drafter says of every option: log probability, floored."""
    tokens, log_lattice = room.option_tokens, room.option_scores[1]
    logits, log_normaliser, log_floor = search.logits[row], room.log_normalisers[length], search.log_floor
    is_known = room.widths[length] > 0
    for index in range(count):
        log_lattice[index] = log_floor
        if is_known:
            value = float(logits[tokens[index]] - log_normaliser)
            if value > log_floor:  # not-a-number is not
                log_lattice[index] = min(value, 0.0)


@compiled
def _look_up_causal(
    room: Any, ngram: Any, rest: float, copied: int, weight: float, work: Any, log_floor: float, count: int
) -> None:
    """What the mixture of copying and n-grams says in the context at hand: log probability, floored."""
    tokens, log_causal, sums, unigram = room.option_tokens, room.option_scores[2], work.sums, ngram.unigram
    for index in range(count):  # not logarithms yet
        log_causal[index] = mixed_probability(tokens[index], copied, weight, rest, sums, unigram)
    for index in range(count):
        log_causal[index] = max(float(logarithm(np.float32(max(log_causal[index], 1e-30)))), log_floor)


@compiled
def _score(search: Any, room: Any, request: int, length: int, count: int) -> None:
    """Mix both, as a product of experts: an option's confidence is its share of the mixture.

    Where the noise of the draw is known, it is part of the mixture, and the score is the confidence's logarithm; the
    weightier model counts in full then, for two models that agree are surer than either (so it showed when held-out
    draws were replayed).
    """
    scores, log_lattice, log_causal, confidences = room.option_scores
    lattice_share = search.lattice_weights[length]
    causal_share = 1.0 - lattice_share
    causal_scale, lattice_scale = search.noise.scales[request]
    is_drawn = causal_scale > 0.0
    if is_drawn:
        weightier = max(lattice_share, causal_share)
        lattice_share, causal_share = lattice_share * lattice_scale / weightier, causal_share * causal_scale / weightier
    for index in range(count):
        scores[index] = lattice_share * log_lattice[index] + causal_share * log_causal[index]
    if is_drawn:
        tokens = room.option_tokens
        key = noise_key(search.noise.places[request, 0], np.int64(search.noise.places[request, 1]) + length)
        for index in range(count):
            scores[index] += gumbel(key, tokens[index])
    total, highest = 0.0, -np.inf
    for index in range(count):
        highest = max(highest, scores[index])
    for index in range(count):
        confidences[index] = float(exponential(np.float32(scores[index] - highest)))
        total += confidences[index]
    for index in range(count):
        confidences[index] /= total
    if is_drawn:
        highest += np.log(total)
        for index in range(count):
            scores[index] = max(scores[index] - highest, search.log_floor)
