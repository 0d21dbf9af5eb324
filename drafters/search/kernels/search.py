"""The beam search through the lattice (Eq. 8)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.copying import clear_text, index_text
from drafters.search.kernels.lattice import is_broken, new_select_workspace, select_row
from drafters.search.kernels.options import expand, new_search_workspace
from drafters.search.kernels.tokens import contains
from transformer.compiled import allocating, compiled


class Found(NamedTuple):
    """Results of a search, filled in by the kernel."""

    tokens: NDArray[np.int32]  # [requests, max_length]
    details: NDArray[np.float64]  # [requests, max_length, 4] score, log lattice, log causal, confidence
    summary: NDArray[np.float64]  # [requests, 6] at the indices below


LENGTH, RAW_LENGTH, SCORE, RAW_SCORE, MEAN_WIDTH, IS_BROKEN = range(6)
"""Tokens of the path; tokens of the raw argmax path before its first end token; nats per token of the path and of the
raw argmax path, 0 if empty; mean lattice candidates per position; 1 if a row is no distribution."""


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
def _select(search: Any, search_work: Any, select_work: Any, request: int, found: Any) -> np.int64:
    """Fill in the candidates of the request's rows; return the number of rows before the first one without any."""
    first, last = search.row_starts[request], search.row_starts[request + 1]
    count, total = np.int64(0), np.int64(0)
    for row in range(first, last):
        width, log_normaliser = select_row(
            search.logits[row], search.candidate_mass, search.max_candidates, search.lattice_ends, select_work,
            search_work.candidates[row - first],
        )  # fmt: skip
        search_work.widths[row - first], search_work.log_normalisers[row - first] = width, log_normaliser
        total += width
        if width > 0 and count == row - first:
            count += 1
        if width == 0 and is_broken(search.logits[row]):
            found.summary[request, IS_BROKEN] = 1.0
    found.summary[request, MEAN_WIDTH] = total / max(last - first, 1)
    return count


@compiled
def _raw_argmax(search_work: Any, ends: Any, count: int, vocabulary: int, path: Any) -> np.int64:
    """Fill `path` with the best candidate of each of `count` rows, and return its length.

    It stops after an end token, and before a candidate that the target does not have.
    """
    for step in range(count):
        if search_work.candidates[step, 0] >= vocabulary:
            return np.int64(step)
        path[step] = search_work.candidates[step, 0]
        if contains(ends, len(ends), path[step]):
            return np.int64(step + 1)
    return np.int64(count)


@compiled
def _keep_best(search_work: Any, side: int, num_kept: int, score: float, beam: int, option: int) -> int:
    """Insert one option of one beam into the sorted new beams if its score is good enough; return their number."""
    sums, picks, pick_scores = search_work.sums[1 - side], search_work.picks, search_work.pick_scores
    width = len(picks)
    at = num_kept
    while at > 0 and sums[at - 1] < score:
        at -= 1
    if at == width:
        return num_kept
    num_kept = min(num_kept + 1, width)
    for later in range(num_kept - 1, at, -1):
        sums[later], picks[later, 0], picks[later, 1] = sums[later - 1], picks[later - 1, 0], picks[later - 1, 1]
        for index in range(4):
            pick_scores[later, index] = pick_scores[later - 1, index]
    sums[at], picks[at, 0], picks[at, 1] = score, beam, search_work.option_tokens[option]
    for index in range(4):
        pick_scores[at, index] = search_work.option_scores[index, option]
    return num_kept


@allocating
def search_paths(flat: Any, starts: Any, ngram: Any, copy_weights: Any, search: Any, work: Any, found: Any) -> None:
    """Search a path (Eq. 8) for every request; without beams, only score the raw argmax path."""
    search_work, select_work = new_search_workspace(search), new_select_workspace(search.logits.shape[1])
    for request in range(len(starts) - 1):
        text = flat[starts[request] : starts[request + 1]]
        if search.use_copy:
            index_text(text, 0, len(text), work)
        _search_request(text, request, ngram, copy_weights, search, work, search_work, select_work, found)
        if search.use_copy:
            clear_text(text, work)


@compiled
def _search_request(
    text: Any, request: int, ngram: Any, copy_weights: Any, search: Any, work: Any, search_work: Any, select_work: Any,
    found: Any,
) -> None:  # fmt: skip
    """Search the path of one request. Its text must be indexed if the causal model copies from it.

    The raw argmax path is scored too, mostly as one of the beams, and competes at the end: the search never ends below
    it. The arrays of paths have one more place after the beams: on side 0 for the raw argmax path, on side 1 for the
    best finished path.
    """
    width = search.beam_width
    raw_path, raw_details, raw_match = (
        search_work.paths[0, width],
        search_work.details[0, width],
        search_work.matches[0, width],
    )
    finished_path, finished_details = search_work.paths[1, width], search_work.details[1, width]
    summary, first = found.summary[request], search.row_starts[request]
    num_steps = _select(search, search_work, select_work, request, found)
    raw_length = _raw_argmax(search_work, search.ends, num_steps, len(ngram.unigram), raw_path)
    raw_sum, finished_score, finished_length = 0.0, -np.inf, 0
    side, num_beams, length = np.int64(0), np.int64(1 if search.use_beams else 0), np.int64(0)
    search_work.sums[0, 0] = 0.0
    search_work.matches[:] = 0
    twin = num_beams - 1  # the beam that is the raw argmax path so far, or -1
    for step in range(num_steps):
        num_new, next_twin = np.int64(0), np.int64(-1)
        for beam in range(width + 1):
            is_raw = step < raw_length and beam == (twin if twin >= 0 else width)
            if beam >= num_beams and not is_raw:
                continue
            path = raw_path if beam == width else search_work.paths[side, beam]
            match = raw_match if beam == width else search_work.matches[side, beam]
            count = expand(
                search, search_work, first + step, request, ngram, copy_weights, text, path, step, match, work
            )
            for option in range(count):
                token = search_work.option_tokens[option]
                if is_raw and token == raw_path[step]:
                    raw_sum += search_work.option_scores[0, option]
                    _append(raw_path, raw_details, step, token, search_work.option_scores[:, option])
                if beam == width:
                    continue
                score = search_work.sums[side, beam] + search_work.option_scores[0, option]
                if not contains(search.ends, len(search.ends), token):
                    num_new = _keep_best(search_work, side, num_new, score, beam, option)
                elif score / (step + 1) > finished_score:
                    finished_score, finished_length = score / (step + 1), step + 1
                    _copy_path(path, search_work.details[side, beam], step, finished_path, finished_details)
                    _append(finished_path, finished_details, step, token, search_work.option_scores[:, option])
        for beam in range(num_new):
            parent, new_path = search_work.picks[beam, 0], search_work.paths[1 - side, beam]
            new_details = search_work.details[1 - side, beam]
            search_work.matches[1 - side, beam, 0] = search_work.matches[side, parent, 0]
            search_work.matches[1 - side, beam, 1] = search_work.matches[side, parent, 1]
            _copy_path(search_work.paths[side, parent], search_work.details[side, parent], step, new_path, new_details)
            _append(new_path, new_details, step, search_work.picks[beam, 1], search_work.pick_scores[beam])
            if parent == twin and step < raw_length and search_work.picks[beam, 1] == raw_path[step]:
                next_twin = np.int64(beam)
        if twin >= 0:
            raw_match[0], raw_match[1] = search_work.matches[side, twin, 0], search_work.matches[side, twin, 1]
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
    if length > 0 and search_work.sums[side, 0] / length > best_score:
        best, best_side, best_score, best_length = np.int64(0), side, search_work.sums[side, 0] / length, length
    if best_length > 0:
        summary[SCORE], summary[LENGTH] = best_score, best_length
        path, details = search_work.paths[best_side, best], search_work.details[best_side, best]
        _copy_path(path, details, best_length, found.tokens[request], found.details[request])
