"""The options for the next token of a path, and their scores: the terms of Eq. 8's sum."""

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

MAX_PROPOSED_SUCCESSORS = 8  # best successors that each of the two longest n-gram contexts adds to the options


class Search(NamedTuple):
    """The inputs of a batch's search, besides the texts and the causal model."""

    row_starts: NDArray[np.int64]  # [requests + 1]
    logits: NDArray[np.float32]  # [rows, drafter's vocabulary]
    candidate_mass: float
    max_candidates: int  # per row, without end tokens
    lattice_ends: NDArray[np.int64]  # end tokens of the lattice: always candidates
    ends: NDArray[np.int32]  # end tokens of a path
    noise: Noise
    lattice_weights: NDArray[np.float64]  # [max_length] by position of the draft
    log_floor: float  # nats
    beam_width: int
    use_copy: bool  # whether the causal model looks at the request's own text
    use_proposals: bool  # whether tokens that the causal model proposes join the candidates
    use_beams: bool  # False: only score the raw argmax path


class SearchWorkspace(NamedTuple):
    """Working memory of one search: the candidates of all rows, the options of one position, and the beams."""

    candidates: NDArray[np.int32]  # [max_length, max_candidates and end tokens]
    widths: NDArray[np.int64]  # [max_length]
    log_normalisers: NDArray[np.float32]  # [max_length]
    option_tokens: NDArray[np.int64]  # [max_options] of one position: candidates, then proposals
    option_scores: NDArray[np.float64]  # [4, max_options] score, log lattice, log causal, confidence
    paths: NDArray[np.int32]  # [2, beam_width + 1, max_length] before and after a position
    details: NDArray[np.float64]  # [2, beam_width + 1, max_length, 4] the same four
    sums: NDArray[np.float64]  # [2, beam_width] scores summed over the path
    matches: NDArray[
        np.int64
    ]  # [2, beam_width + 1, 2] match of a path without its last token: length, where it continues
    picks: NDArray[np.int64]  # [beam_width, 2] parent beam and token of each new beam
    pick_scores: NDArray[np.float64]  # [beam_width, 4]


@allocating
def new_search_workspace(search: Any) -> Any:
    width, max_length = search.beam_width, len(search.lattice_weights)
    max_candidates = search.max_candidates + len(search.lattice_ends)
    max_options = max_candidates + 1 + 2 * MAX_PROPOSED_SUCCESSORS
    return SearchWorkspace(
        np.empty((max_length, max_candidates), np.int32),
        np.empty(max_length, np.int64),
        np.empty(max_length, np.float32),
        np.empty(max_options, np.int64),
        np.empty((4, max_options), np.float64),
        np.empty((2, width + 1, max_length), np.int32),
        np.empty((2, width + 1, max_length, 4), np.float64),
        np.empty((2, width), np.float64),
        np.empty((2, width + 1, 2), np.int64),
        np.empty((width, 2), np.int64),
        np.empty((width, 4), np.float64),
    )


@compiled
def _join(tokens: Any, count: np.int64, token: np.int64, vocabulary: int) -> np.int64:
    """Append a token if it is in the vocabulary and not yet among the first `count`; return the new count."""
    if not 0 <= token < vocabulary or contains(tokens, count, token):
        return count
    tokens[count] = token
    return count + 1


@compiled
def expand(
    search: Any, search_work: Any, row: int, request: int, ngram: Any, copy_weights: Any, text: Any, path: Any,
    length: int, match: Any, work: Any,
) -> np.int64:  # fmt: skip
    """Fill `search_work` with the scored options for the token after `text + path[:length]`; return their number.

    Options are the lattice's candidates in `row`. With proposals, also the copied token and the n-gram model's best
    successors of this path. match: [2] length of the match at the token before, and where it continues; updated to the
    current token.
    """
    if search.use_copy:
        match[0], match[1] = follow_copy(text, path, length, 0, match[0], match[1], work)
    copied = copied_token(text, path, match[0], match[1])
    weight = copy_weights[match[0]]
    found, rest = enter_context(ngram, text, path, length, work)
    vocabulary = min(search.logits.shape[1], len(ngram.unigram))
    tokens, count = search_work.option_tokens, np.int64(0)
    for token in search_work.candidates[length, : search_work.widths[length]]:
        if token < vocabulary:
            tokens[count] = token
            count += 1
    if search.use_proposals:
        count = _join_proposals(
            ngram, found, copied if weight > 0.0 else np.int64(NO_TOKEN), vocabulary, work, tokens, count
        )
    _look_up_lattice(search, search_work, row, length, count)
    _look_up_causal(search_work, ngram, rest, copied, weight, work, search.log_floor, count)
    leave_context(ngram, found, work)
    _score(search, search_work, request, length, count)
    return count


@compiled
def _join_proposals(
    ngram: Any, found: int, copied: np.int64, vocabulary: int, work: Any, tokens: Any, count: np.int64
) -> np.int64:
    starts, stops, successors = work.starts, work.stops, ngram.tokens
    count = _join(tokens, count, copied, vocabulary)
    for index in range(max(found - 2, 0), found):  # the two longest contexts
        for successor in range(starts[index], min(starts[index] + MAX_PROPOSED_SUCCESSORS, stops[index])):
            count = _join(tokens, count, np.int64(successors[successor]), vocabulary)
    return count


@compiled
def _look_up_lattice(search: Any, search_work: Any, row: int, length: int, count: int) -> None:
    """Fill in the diffusion model's log probability of every option, floored."""
    tokens, log_lattice = search_work.option_tokens, search_work.option_scores[1]
    logits, log_normaliser, log_floor = search.logits[row], search_work.log_normalisers[length], search.log_floor
    is_known = search_work.widths[length] > 0
    for index in range(count):
        log_lattice[index] = log_floor
        if is_known:
            value = float(logits[tokens[index]] - log_normaliser)
            if value > log_floor:  # false for NaN
                log_lattice[index] = min(value, 0.0)


@compiled
def _look_up_causal(
    search_work: Any, ngram: Any, rest: float, copied: int, weight: float, work: Any, log_floor: float, count: int
) -> None:
    """Fill in the causal model's log probability of every option in the current context, floored."""
    tokens, log_causal, sums, unigram = (
        search_work.option_tokens,
        search_work.option_scores[2],
        work.sums,
        ngram.unigram,
    )
    for index in range(count):  # probabilities first
        log_causal[index] = mixed_probability(tokens[index], copied, weight, rest, sums, unigram)
    for index in range(count):
        log_causal[index] = max(float(logarithm(np.float32(max(log_causal[index], 1e-30)))), log_floor)


@compiled
def _score(search: Any, search_work: Any, request: int, length: int, count: int) -> None:
    """Mix both models as a product of experts. An option's confidence is its share of the mixture.

    If the noise of the draw is known, it joins the mixture, and the score is the logarithm of the confidence. The model
    with the larger weight then counts in full: two models that agree are surer than either alone. Replaying held-out
    draws showed this.
    """
    scores, log_lattice, log_causal, confidences = search_work.option_scores
    lattice_share = search.lattice_weights[length]
    causal_share = 1.0 - lattice_share
    causal_scale, lattice_scale = search.noise.scales[request]
    is_drawn = causal_scale > 0.0
    if is_drawn:
        max_share = max(lattice_share, causal_share)
        lattice_share, causal_share = lattice_share * lattice_scale / max_share, causal_share * causal_scale / max_share
    for index in range(count):
        scores[index] = lattice_share * log_lattice[index] + causal_share * log_causal[index]
    if is_drawn:
        tokens = search_work.option_tokens
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
