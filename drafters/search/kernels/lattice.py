"""The candidates of one lattice row, and its log normaliser."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import allocating, compiled
from transformer.intrinsics import exponential

# Token t belongs to lane t % _LANES, and each lane keeps its largest key. Taking the best token then searches one lane
# only. The number is a constant so that the compiler vectorises the loop.
_LANES = 64
_NO_KEY = np.int32(-0x80000000)  # the key of NaN, and of a token that was taken


class SelectWorkspace(NamedTuple):
    """Working memory of `select_row`."""

    keys: NDArray[np.int32]  # [vocabulary]
    lane_best: NDArray[np.int32]  # [_LANES]


@allocating
def new_select_workspace(vocabulary: int) -> Any:
    """Return working memory for rows of `vocabulary` logits."""
    return SelectWorkspace(np.empty(vocabulary, np.int32), np.empty(_LANES, np.int32))


@compiled
def _order_key(bits: np.int32) -> np.int32:
    """Return an integer that sorts as the float with these bits does; NaN comes last."""
    is_number = (bits & 0x7FFFFFFF) <= 0x7F800000
    return np.int32((bits ^ ((bits >> 31) & 0x7FFFFFFF)) if is_number else _NO_KEY)


@compiled
def _fill_keys(bits: Any, keys: Any, lane_best: Any) -> None:
    """Fill in the keys of a row, and the largest key of each lane."""
    for lane in range(_LANES):
        lane_best[lane] = _NO_KEY
    whole = len(bits) // _LANES
    for stripe in range(whole):
        for lane in range(_LANES):
            key = _order_key(bits[stripe * _LANES + lane])
            keys[stripe * _LANES + lane] = key
            lane_best[lane] = max(lane_best[lane], key)
    for token in range(whole * _LANES, len(bits)):
        key = _order_key(bits[token])
        keys[token] = key
        lane_best[token % _LANES] = max(lane_best[token % _LANES], key)


@compiled
def _log_sum(logits: Any, maximum: np.float32) -> np.float32:
    """Return the natural log of the sum of all exponentials."""
    total = np.float32(0.0)
    for index in range(len(logits)):
        total += exponential(logits[index] - maximum)
    return maximum + np.float32(np.log(total))


@compiled
def _take_largest(keys: Any, lane_best: Any) -> np.int64:
    """Return the token with the largest key, and remove it; the lowest id among equals, NO_TOKEN if none is left."""
    largest = _NO_KEY
    for lane in range(_LANES):
        largest = max(largest, lane_best[lane])
    if largest == _NO_KEY:
        return np.int64(NO_TOKEN)
    token = len(keys)
    for lane in range(_LANES):
        if lane_best[lane] == largest:
            place = lane
            while keys[place] != largest:
                place += _LANES
            token = min(token, place)
    keys[token] = _NO_KEY
    lane, left = token % _LANES, _NO_KEY
    for place in range(lane, len(keys), _LANES):
        left = max(left, keys[place])
    lane_best[lane] = left
    return np.int64(token)


@compiled
def select_row(
    logits: Any, candidate_mass: float, max_candidates: int, ends: Any, work: Any, tokens: Any
) -> tuple[np.int64, np.float32]:
    """Fill `tokens` [max_candidates + len(ends)] with a row's candidates; return (their number, log normaliser).

    Candidates are the smallest set of top tokens that reaches the mass, at most `max_candidates`, best first, then the
    end tokens. A row whose largest logit is not finite has none.
    """
    keys, lane_best = work.keys, work.lane_best
    _fill_keys(logits.view(np.int32), keys, lane_best)
    token = _take_largest(keys, lane_best)
    maximum = logits[token] if token != NO_TOKEN else np.float32(-np.inf)
    if not -np.inf < maximum < np.inf:
        return np.int64(0), np.float32(0.0)
    log_normaliser = _log_sum(logits, maximum)
    mass, width = 0.0, np.int64(0)
    while token != NO_TOKEN and logits[token] > -np.inf:
        tokens[width] = token
        mass += np.exp(logits[token] - log_normaliser)
        width += 1
        if width == max_candidates or mass >= candidate_mass:
            break
        token = _take_largest(keys, lane_best)
    for end in ends:
        if logits[end] > -np.inf and not contains(tokens, width, end):
            tokens[width] = end
            width += 1
    return width, log_normaliser


@compiled
def is_broken(logits: Any) -> bool:
    """Return whether a row without candidates is a failure of the drafter. A row of -inf only ends the draft."""
    for value in logits:  # noqa: SIM110
        if value != -np.inf:
            return True
    return False
