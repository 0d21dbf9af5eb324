"""A row's candidates: its top tokens, and the log-sum-exp of all."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.search.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import allocating, compiled
from transformer.intrinsics import exponential

_LANES = 64  # a row is dealt out to them, token by token, and the largest key of each is kept: no token of another lane
# is looked at then. A constant, so that the loop is vectorised.
_NOTHING = np.int32(-0x80000000)  # the key of not-a-number, and of a token that was taken


class SelectRoom(NamedTuple):
    """Working memory of `select_row`."""

    keys: NDArray[np.int32]  # [vocabulary]
    lane_best: NDArray[np.int32]  # [_LANES]


@allocating
def new_select_room(vocabulary: int) -> Any:
    """For rows of that many logits."""
    return SelectRoom(np.empty(vocabulary, np.int32), np.empty(_LANES, np.int32))


@compiled
def _order_key(bits: np.int32) -> np.int32:
    """An integer in the order of the floats with these bits; not-a-number comes last."""
    is_number = (bits & 0x7FFFFFFF) <= 0x7F800000
    return np.int32((bits ^ ((bits >> 31) & 0x7FFFFFFF)) if is_number else _NOTHING)


@compiled
def _deal(bits: Any, keys: Any, lane_best: Any) -> None:
    """Fill the keys of a row, and the largest of each lane."""
    for lane in range(_LANES):
        lane_best[lane] = _NOTHING
    whole = len(bits) // _LANES
    for part in range(whole):
        for lane in range(_LANES):
            key = _order_key(bits[part * _LANES + lane])
            keys[part * _LANES + lane] = key
            lane_best[lane] = max(lane_best[lane], key)
    for token in range(whole * _LANES, len(bits)):
        key = _order_key(bits[token])
        keys[token] = key
        lane_best[token % _LANES] = max(lane_best[token % _LANES], key)


@compiled
def _log_sum(logits: Any, maximum: np.float32) -> np.float32:
    """Natural log of the sum of all exponentials."""
    total = np.float32(0.0)
    for index in range(len(logits)):
        total += exponential(logits[index] - maximum)
    return maximum + np.float32(np.log(total))


@compiled
def _take_largest(keys: Any, lane_best: Any) -> np.int64:
    """The token with the largest key, the lowest among equals, which is not found again; -1 if there is none."""
    largest = _NOTHING
    for lane in range(_LANES):
        largest = max(largest, lane_best[lane])
    if largest == _NOTHING:
        return np.int64(NO_TOKEN)
    token = len(keys)
    for lane in range(_LANES):
        if lane_best[lane] == largest:
            place = lane
            while keys[place] != largest:
                place += _LANES
            token = min(token, place)
    keys[token] = _NOTHING
    lane, left = token % _LANES, _NOTHING
    for place in range(lane, len(keys), _LANES):
        left = max(left, keys[place])
    lane_best[lane] = left
    return np.int64(token)


@compiled
def select_row(
    logits: Any, candidate_mass: float, most: int, ends: Any, room: Any, tokens: Any
) -> tuple[np.int64, np.float32]:
    """Fill `tokens` [most + len(ends)] with a row's candidates; return (their number, log normaliser).

    They are the smallest set of top tokens that reaches the mass, at most `most`, best first, then the end tokens. None
    for a row whose largest logit is no finite number.
    """
    keys, lane_best = room.keys, room.lane_best
    _deal(logits.view(np.int32), keys, lane_best)
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
        if width == most or mass >= candidate_mass:
            break
        token = _take_largest(keys, lane_best)
    for end in ends:
        if logits[end] > -np.inf and not contains(tokens, width, end):
            tokens[width] = end
            width += 1
    return width, log_normaliser


@compiled
def is_broken(logits: Any) -> bool:
    """Whether a row without candidates is a failure of the drafter; one all of -inf only ends a draft."""
    for value in logits:  # noqa: SIM110
        if value != -np.inf:
            return True
    return False


@allocating
def select_rows(logits: Any, candidate_mass: float, ends: Any, tokens: Any, widths: Any, log_normalisers: Any) -> None:
    """`select_row` of every row; `tokens` are NO_TOKEN behind the candidates."""
    room, most = new_select_room(logits.shape[1]), tokens.shape[1] - len(ends)
    for row in range(len(logits)):
        widths[row], log_normalisers[row] = select_row(logits[row], candidate_mass, most, ends, room, tokens[row])
        tokens[row, widths[row] :] = NO_TOKEN
