"""The beam search through the lattice (Eq. 8)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.kernels.chains import Noise
from drafters.kernels.copying import clear_text, find_copy, index_text
from drafters.kernels.ngram import enter_context, leave_context
from drafters.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import compiled
from transformer.noise import gumbel, noise_key

BEST_SUCCESSORS = 8  # of each of the two longest contexts, that join the lattice as the n-gram model's proposals


class Search(NamedTuple):
    """What one beam search reads besides the texts and the causal model, and the room it works in."""

    row_starts: NDArray[np.int64]  # [requests + 1]
    candidates: NDArray[np.int32]  # [rows, most candidates]
    widths: NDArray[np.int64]  # [rows]
    logits: NDArray[np.float32]  # [rows, drafter's vocabulary]
    log_normalisers: NDArray[np.float32]  # [rows]
    ends: NDArray[np.int32]
    noise: Noise
    lattice_weights: NDArray[np.float64]  # [longest] by position of the draft
    log_floor: float  # nats
    option_tokens: NDArray[np.int64]  # [most options] of one position: candidates and what is joined to them
    option_scores: NDArray[np.float64]  # [most options, 4] score, log lattice, log causal, confidence
    paths: NDArray[np.int32]  # [2, beam width + 1, longest] before and after a position
    details: NDArray[np.float64]  # [2, beam width + 1, longest, 4] as option_scores
    sums: NDArray[np.float64]  # [2, beam width] scores summed over the path
    picks: NDArray[np.int64]  # [beam width, 2] parent beam and token of each new beam
    pick_scores: NDArray[np.float64]  # [beam width, 4]


class Found(NamedTuple):
    """Results of a search, filled by the kernel."""

    tokens: NDArray[np.int32]  # [requests, longest]
    details: NDArray[np.float64]  # [requests, longest, 4] score, log lattice, log causal, confidence
    lengths: NDArray[np.int64]  # [requests]
    scores: NDArray[np.float64]  # [requests, 2] nats per token: of the path, of the raw argmax path; 0 of an empty one
    mean_widths: NDArray[np.float64]  # [requests] lattice candidates per position
    raw_lengths: NDArray[np.int64]  # [requests]


@compiled
def _join(tokens: Any, count: np.int64, token: np.int64, vocabulary: int) -> np.int64:
    """Append a token that is in the vocabulary and not there yet; return the new number."""
    if not 0 <= token < vocabulary or contains(tokens, count, token):
        return count
    tokens[count] = token
    return count + 1


@compiled
def expand(
    search: Any, row: int, request: int, ngram: Any, copy_weights: Any, text: Any, path: Any, length: int,
    use_copy: bool, work: Any,
) -> np.int64:  # fmt: skip
    """Fill the options for the token after `text + path[:length]`; return their number.

    They are the lattice's candidates, the copied token and the n-gram model's best successors of this very path. An
    option's confidence is its share of their probabilities after mixing (a product of experts). Where the noise of the
    draw is known, it is part of the mixture, and the score is the confidence's logarithm; the weightier model counts in
    full then, for two models that agree are surer than either (so it showed when held-out draws were replayed).
    """
    vocabulary = min(search.logits.shape[1], len(ngram.unigram))
    tokens, scores = search.option_tokens, search.option_scores
    lattice_weight = search.lattice_weights[length]
    match, copied = np.int64(0), np.int64(NO_TOKEN)
    if use_copy:
        match, copied = find_copy(text, path, length, work)
    weight = copy_weights[match]
    found, rest = enter_context(ngram, text, path, length, work)
    count = np.int64(0)
    for index in range(search.widths[row]):
        count = _join(tokens, count, np.int64(search.candidates[row, index]), vocabulary)
    if weight > 0.0:
        count = _join(tokens, count, copied, vocabulary)
    for index in range(max(found - 2, 0), found):  # the two longest contexts
        for successor in range(work.starts[index], min(work.starts[index] + BEST_SUCCESSORS, work.stops[index])):
            count = _join(tokens, count, np.int64(ngram.tokens[successor]), vocabulary)
    noise = search.noise
    is_drawn = noise.causal_scales[request] > 0.0
    key = noise_key(noise.seeds[request], noise.positions[request] + length)
    total, highest = 0.0, -np.inf
    for index in range(count):
        token = tokens[index]
        log_lattice = search.log_floor
        if search.widths[row] > 0:
            value = float(search.logits[row, token] - search.log_normalisers[row])
            if value > search.log_floor:  # not-a-number is not
                log_lattice = min(value, 0.0)
        probability = (1.0 - weight) * (work.sums[token] + rest * ngram.unigram[token])
        if token == copied:
            probability += weight
        log_causal = max(np.log(max(probability, 1e-30)), search.log_floor)
        score = lattice_weight * log_lattice + (1.0 - lattice_weight) * log_causal
        if is_drawn:
            score = lattice_weight * noise.lattice_scales[request] * log_lattice
            score += (1.0 - lattice_weight) * noise.causal_scales[request] * log_causal
            score = score / max(lattice_weight, 1.0 - lattice_weight) + gumbel(key, token)
        scores[index, 0], scores[index, 1], scores[index, 2] = score, log_lattice, log_causal
        highest = max(highest, score)
    for index in range(count):
        scores[index, 3] = np.exp(scores[index, 0] - highest)
        total += scores[index, 3]
    for index in range(count):
        scores[index, 3] /= total
        if is_drawn:
            scores[index, 0] = max(np.log(max(scores[index, 3], 1e-30)), search.log_floor)
    leave_context(ngram, found, work)
    return count


@compiled
def _copy_path(tokens: Any, details: Any, length: int, to_tokens: Any, to_details: Any) -> None:
    for step in range(length):
        to_tokens[step] = tokens[step]
        for index in range(4):
            to_details[step, index] = details[step, index]


@compiled
def _append(tokens: Any, details: Any, length: int, token: int, scores: Any) -> None:
    tokens[length] = token
    for index in range(4):
        details[length, index] = scores[index]


@compiled
def raw_argmax(search: Any, first: int, stop: int, vocabulary: int, path: Any) -> int:
    """The lattice's first candidates, up to an end token (which is included), or to a row without a usable one."""
    for row in range(first, stop):
        if search.widths[row] == 0 or search.candidates[row, 0] >= vocabulary:
            return row - first
        path[row - first] = search.candidates[row, 0]
        if contains(search.ends, len(search.ends), path[row - first]):
            return row - first + 1
    return stop - first


@compiled
def _keep_best(search: Any, side: int, num_kept: int, score: float, beam: int, option: int) -> int:
    """Sort one option of one beam into the new beams, if it is good enough; return their number."""
    sums, picks, pick_scores = search.sums[1 - side], search.picks, search.pick_scores
    width = len(picks)
    at = num_kept
    while at > 0 and sums[at - 1] < score:
        at -= 1
    if at == width:
        return num_kept
    num_kept = min(num_kept + 1, width)
    for later in range(num_kept - 1, at, -1):
        sums[later], picks[later, 0], picks[later, 1] = sums[later - 1], picks[later - 1, 0], picks[later - 1, 1]
        for part in range(4):
            pick_scores[later, part] = pick_scores[later - 1, part]
    sums[at], picks[at, 0], picks[at, 1] = score, beam, search.option_tokens[option]
    for part in range(4):
        pick_scores[at, part] = search.option_scores[option, part]
    return num_kept


@compiled
def search_paths(
    flat: Any, starts: Any, ngram: Any, copy_weights: Any, use_copy: bool, use_beams: bool, search: Any, work: Any,
    found: Any,
) -> None:  # fmt: skip
    """Beam search (Eq. 8) for every request; without `use_beams` the raw argmax path is only scored.

    The raw argmax path is scored along, and takes part at the end, so that the search never ends below it. Behind the
    beams there are two more places: on side 0 for the raw argmax path, on side 1 for the best finished path.
    """
    width = len(search.picks)
    raw_path, raw_details = search.paths[0, width], search.details[0, width]
    finished_path, finished_details = search.paths[1, width], search.details[1, width]
    for request in range(len(starts) - 1):
        text = flat[starts[request] : starts[request + 1]]
        if use_copy:
            index_text(text, 0, len(text), work)
        first, last = search.row_starts[request], search.row_starts[request + 1]
        stop = first
        while stop < last and search.widths[stop] > 0:  # a row without candidates ends the draft
            stop += 1
        raw_length = raw_argmax(search, first, stop, len(ngram.unigram), raw_path)
        raw_sum, finished_score, finished_length = 0.0, -np.inf, 0
        side, num_beams, length = np.int64(0), np.int64(1 if use_beams else 0), np.int64(0)  # not literals: one kernel
        search.sums[0, 0] = 0.0
        for row in range(first, stop):
            step = row - first
            num_new = np.int64(0)
            for beam in range(width + 1):
                if beam >= num_beams and not (beam == width and step < raw_length):
                    continue
                path = raw_path if beam == width else search.paths[side, beam]
                count = expand(search, row, request, ngram, copy_weights, text, path, step, use_copy, work)
                for option in range(count):
                    token = search.option_tokens[option]
                    if beam == width:
                        if token == raw_path[step]:
                            raw_sum += search.option_scores[option, 0]
                            _append(raw_path, raw_details, step, token, search.option_scores[option])
                        continue
                    score = search.sums[side, beam] + search.option_scores[option, 0]
                    if not contains(search.ends, len(search.ends), token):
                        num_new = _keep_best(search, side, num_new, score, beam, option)
                    elif score / (step + 1) > finished_score:
                        finished_score, finished_length = score / (step + 1), step + 1
                        _copy_path(path, search.details[side, beam], step, finished_path, finished_details)
                        _append(finished_path, finished_details, step, token, search.option_scores[option])
            for beam in range(num_new):
                parent, new_path = search.picks[beam, 0], search.paths[1 - side, beam]
                new_details = search.details[1 - side, beam]
                _copy_path(search.paths[side, parent], search.details[side, parent], step, new_path, new_details)
                _append(new_path, new_details, step, search.picks[beam, 1], search.pick_scores[beam])
            if num_new > 0:
                side, length = np.int64(1) - side, np.int64(step + 1)
            num_beams = num_new
        best, best_side, best_score, best_length = np.int64(width), np.int64(0), -np.inf, np.int64(0)
        if raw_length > 0:
            best_score, best_length = raw_sum / raw_length, np.int64(raw_length)
            found.scores[request, 1] = best_score
            ended = contains(search.ends, len(search.ends), raw_path[raw_length - 1])
            found.raw_lengths[request] = raw_length - 1 if ended else raw_length
        if finished_score > best_score:
            best_side, best_score, best_length = np.int64(1), finished_score, np.int64(finished_length)
        if length > 0 and search.sums[side, 0] / length > best_score:
            best, best_side, best_score, best_length = np.int64(0), side, search.sums[side, 0] / length, length
        if best_length > 0:
            found.scores[request, 0] = best_score
            found.lengths[request] = best_length
            path, details = search.paths[best_side, best], search.details[best_side, best]
            _copy_path(path, details, best_length, found.tokens[request], found.details[request])
        for row in range(first, last):
            found.mean_widths[request] += search.widths[row] / (last - first)
        if use_copy:
            clear_text(text, work)
