"""The compiled inner loops of drafting: arrays in, arrays out, no Python objects.

All kernels stand in this one file on purpose: numba's disk cache notices a change of the file a function is
defined in, but not of functions it calls in other files, and would go on running stale machine code.

Words: a `text` is the flat window of a request's committed tokens; positions past its end are the path under search.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

MAX_MATCH = 16  # tokens; longer matches of the request's own text count as this long
NO_TOKEN = -1


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, without the interpreter lock; cached on disk unless no folder for the cache is writable."""
    try:
        kernel: Callable[..., Any] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable place: a read-only install, as in some containers
        kernel = numba.njit(nogil=True)(function)
    return kernel


class NgramArrays(NamedTuple):
    """A static n-gram model as the kernels read it (see `drafters.ngram`)."""

    order: int  # longest context plus one; 1: no contexts, only `unigram`
    bucket_contexts: NDArray[np.uint32]  # [buckets + 1] first context of each hash bucket
    bucket_successors: NDArray[np.uint32]  # [buckets] first successor of each hash bucket
    fingerprints: NDArray[np.uint16]  # [contexts]
    successor_counts: NDArray[np.uint8]  # [contexts]
    tokens: NDArray[np.unsignedinteger[Any]]  # [successors]
    levels: NDArray[np.uint8]  # [successors] index into level_probabilities
    level_probabilities: NDArray[np.float32]  # [256]
    unigram: NDArray[np.float32]  # [vocabulary] sums to one


class Scratch(NamedTuple):
    """Working memory of one kernel call, clean between contexts and requests.

    The n-gram model's distribution in one context is kept sparse: `p(t) = sums[t] + rest * unigram[t]`.
    """

    sums: NDArray[np.float32]  # [vocabulary] zero where not touched
    touched: NDArray[np.int32]  # tokens with a sum
    last: NDArray[np.int32]  # [vocabulary] last position of a token in the text, or -1
    previous: NDArray[np.int32]  # [window] previous position of the same token, or -1


@compiled
def new_scratch(ngram: Any, window: int) -> Any:
    vocabulary = len(ngram.unigram)
    room = min(vocabulary, 255 * (ngram.order - 1)) + 1
    return Scratch(
        np.zeros(vocabulary, np.float32),
        np.zeros(room, np.int32),
        np.full(vocabulary, NO_TOKEN, np.int32),
        np.zeros(window, np.int32),
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
def contains(values: Any, value: int) -> bool:
    for index in range(len(values)):  # noqa: SIM110
        if values[index] == value:
            return True
    return False


@compiled
def _token_at(text: Any, path: Any, position: int) -> np.int32:
    return text[position] if position < len(text) else path[position - len(text)]


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
def static_distribution(ngram: Any, text: Any, path: Any, length: int, scratch: Any) -> tuple[int, float]:
    """Sum the n-gram model's successors of `text + path[:length]` into `scratch`; return (touched, rest)."""
    end = len(text) + length
    starts, counts = np.zeros(8, np.int64), np.zeros(8, np.int64)
    state = np.uint64(0)
    found = 0
    num_buckets = len(ngram.bucket_successors)
    for width in range(1, min(ngram.order - 1, end) + 1):
        state = extend_hash(state, _token_at(text, path, end - width))
        bucket = bucket_of(state, num_buckets)
        fingerprint = fingerprint_of(state)
        successor = np.int64(ngram.bucket_successors[bucket])
        for context in range(ngram.bucket_contexts[bucket], ngram.bucket_contexts[bucket + 1]):
            if ngram.fingerprints[context] == fingerprint:
                starts[found], counts[found] = successor, ngram.successor_counts[context]
                found += 1
                break
            successor += ngram.successor_counts[context]
    touched = 0
    rest = 1.0
    for index in range(found - 1, -1, -1):
        mass = 0.0
        for successor in range(starts[index], starts[index] + counts[index]):
            token = ngram.tokens[successor]
            share = ngram.level_probabilities[ngram.levels[successor]]
            mass += share
            if scratch.sums[token] == 0.0:
                scratch.touched[touched] = token
                touched += 1
            scratch.sums[token] += rest * share
        rest *= 1.0 - mass
    return touched, rest


@compiled
def clear_static(scratch: Any, touched: int) -> None:
    for index in range(touched):
        scratch.sums[scratch.touched[index]] = 0.0


@compiled
def index_text(text: Any, first: int, stop: int, scratch: Any) -> None:
    """Chain the positions of equal tokens, so that a match is looked for only where its last token stands."""
    for position in range(first, stop):
        token = text[position]
        if 0 <= token < len(scratch.last):
            scratch.previous[position] = scratch.last[token]
            scratch.last[token] = position


@compiled
def clear_text(text: Any, scratch: Any) -> None:
    for position in range(len(text)):
        if 0 <= text[position] < len(scratch.last):
            scratch.last[text[position]] = NO_TOKEN


@compiled
def _match_length(text: Any, path: Any, position: int, end: int) -> int:
    """How many tokens up to and including `position` equal those at the end."""
    match = 0
    while (
        match < MAX_MATCH
        and match <= position
        and _token_at(text, path, position - match) == _token_at(text, path, end - 1 - match)
    ):
        match += 1
    return match


@compiled
def find_copy(text: Any, path: Any, length: int, scratch: Any) -> tuple[int, int]:
    """Longest earlier match of the end of `text + path[:length]`: (match length, token after it), or (0, -1).

    The most recent of equally long matches wins. A match may end, and its continuation lie, in the path itself.
    """
    end = len(text) + length
    if end < 2:
        return 0, NO_TOKEN
    last_token = _token_at(text, path, end - 1)
    if not 0 <= last_token < len(scratch.last):
        return 0, NO_TOKEN
    best, best_position = 0, -1
    for position in range(end - 2, len(text) - 1, -1):  # the path is short and not chained
        match = _match_length(text, path, position, end)
        if match > best:
            best, best_position = match, position
    position = scratch.last[last_token] if length > 0 else scratch.previous[len(text) - 1]
    while position >= 0 and best < MAX_MATCH:
        match = _match_length(text, path, position, end)
        if match > best:
            best, best_position = match, position
        position = scratch.previous[position]
    if best == 0:
        return 0, NO_TOKEN
    token = _token_at(text, path, best_position + 1)
    if not 0 <= token < len(scratch.last):
        return 0, NO_TOKEN
    return best, token


@compiled
def greedy_chains(
    flat: Any, starts: Any, caps: Any, ends: Any, ngram: Any, copy_weights: Any, tokens: Any, confidences: Any
) -> Any:
    """Per text, follow the mixture's most probable token up to `caps` times or to an end token; return the lengths."""
    lengths = np.zeros(len(caps), np.int64)
    scratch = new_scratch(ngram, np.max(np.diff(starts)))
    for request in range(len(caps)):
        text, path = flat[starts[request] : starts[request + 1]], tokens[request]
        index_text(text, 0, len(text), scratch)
        for step in range(caps[request]):
            match, copied = find_copy(text, path, step, scratch)
            weight = copy_weights[match]
            touched, rest = static_distribution(ngram, text, path, step, scratch)
            best, best_probability = NO_TOKEN, 0.0
            for index in range(touched):
                token = scratch.touched[index]
                probability = scratch.sums[token] + rest * ngram.unigram[token]
                if probability > best_probability:
                    best, best_probability = token, probability
            probability = (1.0 - weight) * best_probability
            if weight > 0.0:
                copied_probability = weight + (1.0 - weight) * (scratch.sums[copied] + rest * ngram.unigram[copied])
                if copied_probability > probability:
                    best, probability = copied, copied_probability
            clear_static(scratch, touched)
            if best == NO_TOKEN:
                break
            path[step], confidences[request, step] = best, probability
            lengths[request] = step + 1
            if contains(ends, best):
                break
        clear_text(text, scratch)
    return lengths


@compiled
def learn_copying(text: Any, first: int, ngram: Any, copy_weights: Any, decay: float, right: Any, seen: Any) -> None:
    """Predict `text[first:]` token by token, and move `right` and `seen` (both [17], by match length) accordingly.

    A right copy counts by its share of the mixture's probability (expectation maximisation): a token that the n-gram
    model expects anyway says little about copying.
    """
    scratch = new_scratch(ngram, len(text))
    index_text(text, 0, first, scratch)
    for position in range(first, len(text)):
        before = text[:position]
        match, copied = find_copy(before, before, 0, scratch)
        if match > 0:
            credit = 0.0
            if copied == text[position]:
                touched, rest = static_distribution(ngram, before, before, 0, scratch)
                otherwise = scratch.sums[copied] + rest * ngram.unigram[copied]
                clear_static(scratch, touched)
                credit = copy_weights[match] / (copy_weights[match] + (1.0 - copy_weights[match]) * otherwise)
            right[match] = decay * right[match] + credit
            seen[match] = decay * seen[match] + 1.0
        index_text(text, position, position + 1, scratch)


class Search(NamedTuple):
    """What one beam search needs besides the texts and the causal model."""

    row_starts: NDArray[np.int64]  # [requests + 1]
    candidates: NDArray[np.int32]  # [rows, most candidates]
    widths: NDArray[np.int64]  # [rows]
    logits: NDArray[np.float32]  # [rows, drafter's vocabulary]
    log_normalisers: NDArray[np.float32]  # [rows]
    ends: NDArray[np.int32]
    beam_width: int
    lattice_weight: float
    log_floor: float  # nats
    most_successors: int  # of the n-gram model, joined to the lattice's candidates


class Found(NamedTuple):
    """Results of a search, filled by the kernel; [requests, longest] unless said otherwise."""

    tokens: NDArray[np.int32]
    details: NDArray[np.float64]  # [requests, longest, 3] log lattice, log causal, confidence
    lengths: NDArray[np.int64]  # [requests]
    scores: NDArray[np.float64]  # [requests, 2] nats per token: of the path, of the raw argmax path
    raw_lengths: NDArray[np.int64]  # [requests]


@compiled
def expand(
    search: Any, row: int, ngram: Any, copy_weights: Any, text: Any, path: Any, length: int, scratch: Any, options: Any
) -> int:
    """Fill `options` [5, most] with token, score, log lattice, log causal and confidence of each next token; their number.

    Candidates are the lattice's of this position, the copied token and the n-gram model's best successors of this path.
    A confidence is the candidate's share of the candidates' probability after mixing (a product of experts).
    """
    vocabulary = min(search.logits.shape[1], len(ngram.unigram))
    match, copied = 0, NO_TOKEN
    if copy_weights[MAX_MATCH] > 0.0:
        match, copied = find_copy(text, path, length, scratch)
    weight = copy_weights[match]
    touched, rest = static_distribution(ngram, text, path, length, scratch)
    count = 0
    for index in range(search.widths[row]):
        if search.candidates[row, index] < vocabulary:
            options[0, count] = search.candidates[row, index]
            count += 1
    if weight > 0.0 and copied < vocabulary and not contains(options[0, :count], copied):
        options[0, count] = copied
        count += 1
    best, best_sums = np.empty(search.most_successors, np.int64), np.empty(search.most_successors)
    known = 0
    for index in range(touched):
        token = scratch.touched[index]
        at = known
        while at > 0 and best_sums[at - 1] < scratch.sums[token]:
            at -= 1
        if at < search.most_successors and token < vocabulary:
            known = min(known + 1, search.most_successors)
            for later in range(known - 1, at, -1):
                best[later], best_sums[later] = best[later - 1], best_sums[later - 1]
            best[at], best_sums[at] = token, scratch.sums[token]
    for index in range(known):
        if not contains(options[0, :count], best[index]):
            options[0, count] = best[index]
            count += 1
    total = 0.0
    for index in range(count):
        token = np.int64(options[0, index])
        log_lattice = search.log_floor
        if search.widths[row] > 0:
            log_lattice = min(float(search.logits[row, token] - search.log_normalisers[row]), 0.0)
            log_lattice = log_lattice if log_lattice > search.log_floor else search.log_floor
        probability = (1.0 - weight) * (scratch.sums[token] + rest * ngram.unigram[token])
        if token == copied:
            probability += weight
        log_causal = max(np.log(max(probability, 1e-300)), search.log_floor)
        score = search.lattice_weight * log_lattice + (1.0 - search.lattice_weight) * log_causal
        options[1, index], options[2, index], options[3, index] = score, log_lattice, log_causal
        options[4, index] = np.exp(score)
        total += options[4, index]
    for index in range(count):
        options[4, index] /= total
    clear_static(scratch, touched)
    return count


@compiled
def raw_argmax(search: Any, first: int, stop: int, path: Any) -> int:
    """The lattice's first candidates, up to a row without any or an end token (which is included); their number."""
    for row in range(first, stop):
        if search.widths[row] == 0:
            return row - first
        path[row - first] = search.candidates[row, 0]
        if contains(search.ends, path[row - first]):
            return row - first + 1
    return stop - first


@compiled
def search_paths(flat: Any, starts: Any, ngram: Any, copy_weights: Any, search: Any, use_beams: bool, found: Any) -> None:
    """Beam search (Eq. 8) for every request; without `use_beams` the raw argmax path is only scored."""
    longest = found.tokens.shape[1]
    most = search.candidates.shape[1] + 1 + search.most_successors
    width = search.beam_width
    scratch = new_scratch(ngram, np.max(np.diff(starts)))
    options = np.empty((5, most))
    # Beams and their successors: tokens, and per token [log lattice, log causal, confidence].
    paths, new_paths = np.zeros((width, longest), np.int32), np.zeros((width, longest), np.int32)
    beam_details, new_details = np.zeros((width, longest, 3)), np.zeros((width, longest, 3))
    sums, new_sums = np.zeros(width), np.zeros(width)
    parents, picks = np.zeros(width, np.int64), np.zeros((width, 4))
    for request in range(len(starts) - 1):
        text = flat[starts[request] : starts[request + 1]]
        first, stop = search.row_starts[request], search.row_starts[request + 1]
        index_text(text, 0, len(text), scratch)
        # The raw argmax path is the first hypothesis, so that the search never ends below it.
        tokens, details = found.tokens[request], found.details[request]
        length = raw_argmax(search, first, stop, tokens)
        ended = length > 0 and contains(search.ends, tokens[length - 1])
        found.raw_lengths[request] = length - 1 if ended else length
        found.lengths[request] = length
        score = 0.0
        for step in range(length):
            count = expand(search, first + step, ngram, copy_weights, text, tokens, step, scratch, options)
            for index in range(count):
                if options[0, index] == tokens[step]:
                    score += options[1, index]
                    details[step] = options[2:, index]
        best_score = score / length if length > 0 else -np.inf
        found.scores[request] = best_score
        num_beams, length, sums[0] = 1, 0, 0.0
        for row in range(first, stop if use_beams else first):
            num_new = 0
            for beam in range(num_beams):
                count = expand(search, row, ngram, copy_weights, text, paths[beam], length, scratch, options)
                for index in range(count):
                    score = sums[beam] + options[1, index]
                    if contains(search.ends, options[0, index]):
                        if score / (length + 1) > best_score:
                            best_score = score / (length + 1)
                            found.lengths[request] = length + 1
                            tokens[:length], details[:length] = paths[beam, :length], beam_details[beam, :length]
                            tokens[length], details[length] = options[0, index], options[2:, index]
                        continue
                    at = num_new
                    while at > 0 and new_sums[at - 1] < score:
                        at -= 1
                    if at < width:
                        num_new = min(num_new + 1, width)
                        for later in range(num_new - 1, at, -1):
                            new_sums[later], parents[later] = new_sums[later - 1], parents[later - 1]
                            picks[later] = picks[later - 1]
                        new_sums[at], parents[at] = score, beam
                        picks[at, 0], picks[at, 1:] = options[0, index], options[2:, index]
            if num_new == 0:
                break
            for beam in range(num_new):
                parent = parents[beam]
                new_paths[beam, :length], new_details[beam, :length] = paths[parent, :length], beam_details[parent, :length]
                new_paths[beam, length], new_details[beam, length] = picks[beam, 0], picks[beam, 1:]
                sums[beam] = new_sums[beam]
            paths, new_paths, beam_details, new_details = new_paths, paths, new_details, beam_details
            num_beams, length = num_new, length + 1
        if length > 0 and sums[0] / length > best_score:
            best_score = sums[0] / length
            found.lengths[request] = length
            tokens[:length], details[:length] = paths[0, :length], beam_details[0, :length]
        found.scores[request, 0] = best_score
        clear_text(text, scratch)
