"""The compiled inner loops of drafting: arrays in, arrays out, no Python objects.

Words: a `text` is the flat window of a request's committed tokens; positions past its end are the path under search.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import compiled
from transformer.noise import gumbel, noise_key

MAX_MATCH = 16  # tokens; longer matches of the request's own text count as this long
MAX_ORDER = 8
NO_TOKEN = -1
LEAST_SHARE = 1e-3  # of the most probable token's probability: less probable ones are not expected to be drawn
BEST_SUCCESSORS = 3  # of each of the two longest contexts, that join the lattice as the n-gram model's proposals


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


class Workspace(NamedTuple):
    """Working memory of the causal kernels, clean between calls: made once, so that a call allocates nothing."""

    sums: NDArray[np.float32]  # [vocabulary] of the context at hand: `p(t) = sums[t] + rest * unigram[t]`; else zero
    starts: NDArray[np.int64]  # [MAX_ORDER] first successor of each context found, shortest first
    stops: NDArray[np.int64]  # [MAX_ORDER]
    last: NDArray[np.int32]  # [vocabulary] last position of a token in the text at hand, or -1
    previous: NDArray[np.int32]  # [window] previous position of the same token, or -1


class Noise(NamedTuple):
    """What is known of the noise that the target draws with, per request of a batch.

    The target takes the token with the largest `log p / temperature + noise`; so does a draft, with its estimate of p.
    """

    seeds: NDArray[np.uint64]  # [requests]
    positions: NDArray[np.int64]  # [requests] absolute position of the first drafted token
    causal_scales: NDArray[np.float64]  # [requests] on the causal model's log probabilities; 0: no noise, as if greedy
    lattice_scales: NDArray[np.float64]  # [requests] on the lattice's log probabilities


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
def contains(values: Any, count: int, value: int) -> bool:
    """Whether `value` is among the first `count`."""
    for index in range(count):  # noqa: SIM110
        if values[index] == value:
            return True
    return False


@compiled
def _token_at(text: Any, path: Any, position: int) -> Any:
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
def enter_context(ngram: Any, text: Any, path: Any, length: int, work: Any) -> tuple[np.int64, np.float32]:
    """Sum the successors' shares after `text + path[:length]` into `work.sums`; return (contexts found, rest)."""
    end = len(text) + length
    state = np.uint64(0)
    found = np.int64(0)
    for width in range(1, min(ngram.order - 1, end) + 1):
        state = extend_hash(state, _token_at(text, path, end - width))
        bucket = bucket_of(state, len(ngram.bucket_successors))
        fingerprint = fingerprint_of(state)
        first = np.int64(ngram.bucket_successors[bucket])
        for context in range(np.int64(ngram.bucket_contexts[bucket]), np.int64(ngram.bucket_contexts[bucket + 1])):
            count = np.int64(ngram.successor_counts[context])
            if ngram.fingerprints[context] == fingerprint:
                work.starts[found], work.stops[found] = first, first + count
                found = np.int64(found + 1)
                break
            first += count
        if found < width:
            break  # a context is hardly ever kept without the shorter one: looking for it would only cost time
    sums, tokens, levels, shares = work.sums, ngram.tokens, ngram.levels, ngram.level_probabilities
    rest = np.float32(1.0)
    for index in range(found - 1, -1, -1):
        mass = np.float32(0.0)
        for successor in range(work.starts[index], work.stops[index]):
            share = shares[levels[successor]]
            mass += share
            sums[tokens[successor]] += rest * share
        rest *= np.float32(1.0) - mass
    return found, rest


@compiled
def leave_context(ngram: Any, found: int, work: Any) -> None:
    sums, tokens = work.sums, ngram.tokens
    for index in range(found):
        for successor in range(work.starts[index], work.stops[index]):
            sums[tokens[successor]] = np.float32(0.0)


@compiled
def index_text(text: Any, first: int, stop: int, work: Any) -> None:
    """Chain the positions of equal tokens, so that a match is looked for only where its last token stands."""
    for position in range(first, stop):
        token = text[position]
        if 0 <= token < len(work.last):
            work.previous[position] = work.last[token]
            work.last[token] = position


@compiled
def clear_text(text: Any, work: Any) -> None:
    for position in range(len(text)):
        if 0 <= text[position] < len(work.last):
            work.last[text[position]] = NO_TOKEN


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
def find_copy(text: Any, path: Any, length: int, work: Any) -> tuple[np.int64, np.int64]:
    """Longest earlier match of the end of `text + path[:length]`: (match length, token after it), or (0, -1).

    The most recent of equally long matches wins. A match may end, and its continuation lie, in the path itself.
    """
    end = len(text) + length
    if end < 2:
        return np.int64(0), np.int64(NO_TOKEN)
    last_token = _token_at(text, path, end - 1)
    if not 0 <= last_token < len(work.last):
        return np.int64(0), np.int64(NO_TOKEN)
    best, best_position = 0, -1
    for position in range(end - 2, len(text) - 1, -1):  # the path is short and not chained
        match = _match_length(text, path, position, end)
        if match > best:
            best, best_position = match, position
    position = work.last[last_token] if length > 0 else work.previous[len(text) - 1]
    while position >= 0 and best < MAX_MATCH:
        match = _match_length(text, path, position, end)
        if match > best:
            best, best_position = match, position
        position = work.previous[position]
    if best == 0:
        return np.int64(0), np.int64(NO_TOKEN)
    token = np.int64(_token_at(text, path, best_position + 1))
    if not 0 <= token < len(work.last):
        return np.int64(0), np.int64(NO_TOKEN)
    return np.int64(best), token


@compiled
def _most_probable(
    ngram: Any, found: int, rest: float, copied: int, weight: float, work: Any
) -> tuple[np.int64, float]:
    """The mixture's most probable token in the context at hand, and its probability."""
    best, best_probability = np.int64(NO_TOKEN), 0.0
    for index in range(found):
        for successor in range(work.starts[index], work.stops[index]):
            token = np.int64(ngram.tokens[successor])
            probability = (1.0 - weight) * (work.sums[token] + rest * ngram.unigram[token])
            if token == copied:
                probability += weight
            if probability > best_probability:
                best, best_probability = token, probability
    if weight > 0.0:
        probability = weight + (1.0 - weight) * (work.sums[copied] + rest * ngram.unigram[copied])
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
    least: float,
    scale: float,
    key: np.uint64,
    work: Any,
) -> tuple[np.int64, float]:
    """The token that the target would draw with this noise if the mixture were its distribution, and how surely.

    Tokens of a probability below `least` are left out. The confidence grows with the lead over the second.
    """
    best, first, second = np.int64(NO_TOKEN), -np.inf, -np.inf
    for index in range(-1, found):
        start, stop = (work.starts[index], work.stops[index]) if index >= 0 else (np.int64(0), np.int64(weight > 0.0))
        for successor in range(start, stop):
            token = np.int64(ngram.tokens[successor]) if index >= 0 else np.int64(copied)
            probability = (1.0 - weight) * (work.sums[token] + rest * ngram.unigram[token])
            if token == copied:
                probability += weight
            if probability < least or token == best:
                continue
            value = scale * np.log(probability) + gumbel(key, token)
            if value > first:
                best, first, second = token, value, first
            elif value > second:
                second = value
    return best, (1.0 - np.exp(second - first)) * (1.0 - (1.0 - weight) * rest)


@compiled
def greedy_chains(
    flat: Any, starts: Any, caps: Any, floors: Any, ends: Any, noise: Any, ngram: Any, copy_weights: Any, work: Any,
    lengths: Any, tokens: Any, confidences: Any,
) -> None:  # fmt: skip
    """Per text, follow the mixture's most probable token (or likely draw, where the noise is known).

    Up to `caps` times, to an end token, or until the product of the confidences falls below `floors`.
    """
    for request in range(len(caps)):
        text, path = flat[starts[request] : starts[request + 1]], tokens[request]
        index_text(text, 0, len(text), work)
        survival = 1.0
        for step in range(caps[request]):
            match, copied = find_copy(text, path, step, work)
            weight = copy_weights[match]
            found, rest = enter_context(ngram, text, path, step, work)
            best, confidence = _most_probable(ngram, found, rest, copied, weight, work)
            if noise.causal_scales[request] > 0.0 and best != NO_TOKEN:
                key = noise_key(noise.seeds[request], noise.positions[request] + step)
                scale, least = noise.causal_scales[request], confidence * LEAST_SHARE
                best, confidence = _likely_draw(ngram, found, rest, copied, weight, least, scale, key, work)
            leave_context(ngram, found, work)
            survival *= confidence
            if best == NO_TOKEN or survival < floors[request]:
                break
            path[step], confidences[request, step] = best, confidence
            lengths[request] = step + 1
            if contains(ends, len(ends), best):
                break
        clear_text(text, work)


@compiled
def copy_weight(right: float, seen: float) -> float:
    return min(right / seen, 0.995)  # never so sure that all else becomes impossible


@compiled
def learn_copying(
    text: Any, first: int, ngram: Any, copy_weights: Any, work: Any, decay: float, right: Any, seen: Any
) -> None:
    """Predict `text[first:]` token by token, and move `right`, `seen` and `copy_weights` (each
    [17], by match length) accordingly.

    A right copy counts by its share of the mixture's probability (expectation maximisation): a token that the n-gram
    model expects anyway says little about copying.
    """
    index_text(text, 0, first, work)
    for position in range(first, len(text)):
        before = text[:position]
        match, copied = find_copy(before, before, 0, work)
        if match > 0:
            credit = 0.0
            if copied == text[position]:
                found, rest = enter_context(ngram, before, before, 0, work)
                otherwise = work.sums[copied] + rest * ngram.unigram[copied]
                leave_context(ngram, found, work)
                credit = copy_weights[match] / (copy_weights[match] + (1.0 - copy_weights[match]) * otherwise)
            right[match] = decay * right[match] + credit
            seen[match] = decay * seen[match] + 1.0
            copy_weights[match] = copy_weight(right[match], seen[match])
        index_text(text, position, position + 1, work)
    clear_text(text, work)


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
    draw is known, it is part of the mixture, and the score is the confidence's logarithm.
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
            score += (1.0 - lattice_weight) * noise.causal_scales[request] * log_causal + gumbel(key, token)
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
