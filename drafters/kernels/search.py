"""The beam search through the lattice (Eq. 8)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.kernels.chains import Noise
from drafters.kernels.copying import clear_text, follow_copy, index_text
from drafters.kernels.lattice import is_broken, new_select_room, select_row
from drafters.kernels.ngram import enter_context, leave_context
from drafters.kernels.tokens import NO_TOKEN, contains, token_at
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


class Found(NamedTuple):
    """Results of a search, filled by the kernel."""

    tokens: NDArray[np.int32]  # [requests, longest]
    details: NDArray[np.float64]  # [requests, longest, 4] score, log lattice, log causal, confidence
    summary: NDArray[np.float64]  # [requests, 6] by the places below


LENGTH, RAW_LENGTH, SCORE, RAW_SCORE, MEAN_WIDTH, IS_BROKEN = range(6)
"""Tokens of the path; tokens of the raw argmax before its first end token; nats per token of the path and of the raw
argmax, 0 if empty; lattice candidates per position; whether a row is no distribution."""


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
    copies: NDArray[np.int64]  # [2, beam width + 1, 2] longest match before a path's last token, and where it goes on
    picks: NDArray[np.int64]  # [beam width, 2] parent beam and token of each new beam
    pick_scores: NDArray[np.float64]  # [beam width, 4]


@allocating
def _new_room(search: Any) -> Any:
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
    copy: Any, work: Any,
) -> np.int64:  # fmt: skip
    """Fill the room's options for the token after `text + path[:length]`, whose lattice row is `row`; their number.

    copy: what was found to copy one token before; becomes what is found now.

    They are the lattice's candidates, and perhaps the copied token and the n-gram model's best successors of this very
    path. An
    option's confidence is its share of their probabilities after mixing (a product of experts). Where the noise of the
    draw is known, it is part of the mixture, and the score is the confidence's logarithm; the weightier model counts in
    full then, for two models that agree are surer than either (so it showed when held-out draws were replayed).
    """
    vocabulary = min(search.logits.shape[1], len(ngram.unigram))
    tokens, width, lattice_weight = room.option_tokens, room.widths[length], search.lattice_weights[length]
    copied = np.int64(NO_TOKEN)
    if search.use_copy:
        copy[0], copy[1] = follow_copy(text, path, length, 0, copy[0], copy[1], work)
        if copy[0] > 0:
            copied = np.int64(token_at(text, path, copy[1]))
    weight = copy_weights[copy[0]]
    found, rest = enter_context(ngram, text, path, length, work)
    count, starts, stops, successors = np.int64(0), work.starts, work.stops, ngram.tokens
    for token in room.candidates[length, :width]:
        if token < vocabulary:
            tokens[count] = token
            count += 1
    if search.use_proposals:
        if weight > 0.0:
            count = _join(tokens, count, copied, vocabulary)
        for index in range(max(found - 2, 0), found):  # the two longest contexts
            for successor in range(starts[index], min(starts[index] + BEST_SUCCESSORS, stops[index])):
                count = _join(tokens, count, np.int64(successors[successor]), vocabulary)
    scores, log_lattice, log_causal, confidences = room.option_scores
    logits, log_normaliser, log_floor = search.logits[row], room.log_normalisers[length], search.log_floor
    sums, unigram = work.sums, ngram.unigram
    for index in range(count):
        token = tokens[index]
        log_lattice[index] = log_floor
        if width > 0:
            value = float(logits[token] - log_normaliser)
            if value > log_floor:  # not-a-number is not
                log_lattice[index] = min(value, 0.0)
        log_causal[index] = (1.0 - weight) * (sums[token] + rest * unigram[token])  # not a logarithm yet
        if token == copied:
            log_causal[index] += weight
    leave_context(ngram, found, work)
    causal_scale, lattice_scale = search.noise.scales[request]
    is_drawn = causal_scale > 0.0
    lattice_share, causal_share = lattice_weight, 1.0 - lattice_weight
    if is_drawn:
        weightier = max(lattice_share, causal_share)
        lattice_share, causal_share = lattice_share * lattice_scale / weightier, causal_share * causal_scale / weightier
    for index in range(count):
        log_causal[index] = max(float(logarithm(np.float32(max(log_causal[index], 1e-30)))), log_floor)
        scores[index] = lattice_share * log_lattice[index] + causal_share * log_causal[index]
    if is_drawn:
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
            scores[index] = max(scores[index] - highest, log_floor)
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
def _select(search: Any, room: Any, select_room: Any, request: int, found: Any) -> np.int64:
    """Fill the room with the candidates of the request's rows; how many rows there are before one without any."""
    first, last = search.row_starts[request], search.row_starts[request + 1]
    count, total = np.int64(0), np.int64(0)
    for row in range(first, last):
        width, log_normaliser = select_row(
            search.logits[row], search.candidate_mass, search.most_candidates, search.lattice_ends, select_room,
            room.candidates[row - first],
        )  # fmt: skip
        room.widths[row - first], room.log_normalisers[row - first] = width, log_normaliser
        total += width
        if width > 0 and count == row - first:
            count += 1
        if width == 0 and is_broken(search.logits[row]):
            found.summary[request, IS_BROKEN] = 1.0
    found.summary[request, MEAN_WIDTH] = total / max(last - first, 1)
    return count


@compiled
def _raw_argmax(room: Any, ends: Any, count: int, vocabulary: int, path: Any) -> np.int64:
    """The best candidates of `count` rows, up to an end token (which is included), or to a row without a usable one."""
    for step in range(count):
        if room.candidates[step, 0] >= vocabulary:
            return np.int64(step)
        path[step] = room.candidates[step, 0]
        if contains(ends, len(ends), path[step]):
            return np.int64(step + 1)
    return np.int64(count)


@compiled
def _keep_best(room: Any, side: int, num_kept: int, score: float, beam: int, option: int) -> int:
    """Sort one option of one beam into the new beams, if it is good enough; return their number."""
    sums, picks, pick_scores = room.sums[1 - side], room.picks, room.pick_scores
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
    sums[at], picks[at, 0], picks[at, 1] = score, beam, room.option_tokens[option]
    for part in range(4):
        pick_scores[at, part] = room.option_scores[part, option]
    return num_kept


@allocating
def search_paths(flat: Any, starts: Any, ngram: Any, copy_weights: Any, search: Any, work: Any, found: Any) -> None:
    """Beam search (Eq. 8) for every request; without beams the raw argmax path is only scored."""
    room, select_room = _new_room(search), new_select_room(search.logits.shape[1])
    for request in range(len(starts) - 1):
        text = flat[starts[request] : starts[request + 1]]
        if search.use_copy:
            index_text(text, 0, len(text), work)
        _search_request(text, request, ngram, copy_weights, search, work, room, select_room, found)
        if search.use_copy:
            clear_text(text, work)


@compiled
def _search_request(
    text: Any, request: int, ngram: Any, copy_weights: Any, search: Any, work: Any, room: Any, select_room: Any,
    found: Any,
) -> None:  # fmt: skip
    """The path of one request, whose text is indexed.

    The raw argmax path is scored along, mostly as one of the beams, and takes part at the end, so that the search never
    ends below it.

    Behind the beams there are two more places: on side 0 for the raw argmax path, on side 1 for the best finished path.
    """
    width = search.beam_width
    raw_path, raw_details, raw_copy = room.paths[0, width], room.details[0, width], room.copies[0, width]
    finished_path, finished_details = room.paths[1, width], room.details[1, width]
    summary, first = found.summary[request], search.row_starts[request]
    num_steps = _select(search, room, select_room, request, found)
    raw_length = _raw_argmax(room, search.ends, num_steps, len(ngram.unigram), raw_path)
    raw_sum, finished_score, finished_length = 0.0, -np.inf, 0
    side, num_beams, length = np.int64(0), np.int64(1 if search.use_beams else 0), np.int64(0)
    room.sums[0, 0] = 0.0
    room.copies[:] = 0
    twin = num_beams - 1  # the beam that is the raw argmax path so far, or -1
    for step in range(num_steps):
        num_new, next_twin = np.int64(0), np.int64(-1)
        for beam in range(width + 1):
            is_raw = step < raw_length and beam == (twin if twin >= 0 else width)
            if beam >= num_beams and not is_raw:
                continue
            path = raw_path if beam == width else room.paths[side, beam]
            copy = raw_copy if beam == width else room.copies[side, beam]
            count = expand(search, room, first + step, request, ngram, copy_weights, text, path, step, copy, work)
            for option in range(count):
                token = room.option_tokens[option]
                if is_raw and token == raw_path[step]:
                    raw_sum += room.option_scores[0, option]
                    _append(raw_path, raw_details, step, token, room.option_scores[:, option])
                if beam == width:
                    continue
                score = room.sums[side, beam] + room.option_scores[0, option]
                if not contains(search.ends, len(search.ends), token):
                    num_new = _keep_best(room, side, num_new, score, beam, option)
                elif score / (step + 1) > finished_score:
                    finished_score, finished_length = score / (step + 1), step + 1
                    _copy_path(path, room.details[side, beam], step, finished_path, finished_details)
                    _append(finished_path, finished_details, step, token, room.option_scores[:, option])
        for beam in range(num_new):
            parent, new_path = room.picks[beam, 0], room.paths[1 - side, beam]
            new_details = room.details[1 - side, beam]
            room.copies[1 - side, beam, 0] = room.copies[side, parent, 0]
            room.copies[1 - side, beam, 1] = room.copies[side, parent, 1]
            _copy_path(room.paths[side, parent], room.details[side, parent], step, new_path, new_details)
            _append(new_path, new_details, step, room.picks[beam, 1], room.pick_scores[beam])
            if parent == twin and step < raw_length and room.picks[beam, 1] == raw_path[step]:
                next_twin = np.int64(beam)
        if twin >= 0:
            raw_copy[0], raw_copy[1] = room.copies[side, twin, 0], room.copies[side, twin, 1]
        twin = next_twin
        if num_new > 0:
            side, length = np.int64(1) - side, np.int64(step + 1)
        num_beams = num_new
    best, best_side, best_score, best_length = np.int64(width), np.int64(0), -np.inf, np.int64(0)
    if raw_length > 0:
        best_score, best_length = raw_sum / raw_length, np.int64(raw_length)
        summary[RAW_SCORE] = best_score
        ended = contains(search.ends, len(search.ends), raw_path[raw_length - 1])
        summary[RAW_LENGTH] = raw_length - 1 if ended else raw_length
    if finished_score > best_score:
        best_side, best_score, best_length = np.int64(1), finished_score, np.int64(finished_length)
    if length > 0 and room.sums[side, 0] / length > best_score:
        best, best_side, best_score, best_length = np.int64(0), side, room.sums[side, 0] / length, length
    if best_length > 0:
        summary[SCORE], summary[LENGTH] = best_score, best_length
        path, details = room.paths[best_side, best], room.details[best_side, best]
        _copy_path(path, details, best_length, found.tokens[request], found.details[request])
