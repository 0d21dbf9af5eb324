"""A row's candidates: its top tokens, and the log-sum-exp of all."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import compiled
from transformer.intrinsics import exponential

_BLOCK = 64  # logits whose largest is kept, so that the search for candidates skips most of a row
_NOTHING = np.int32(-0x80000000)  # the key of not-a-number, and of a token that was taken


class SelectRoom(NamedTuple):
    """Working memory of `select_row`."""

    keys: NDArray[np.int32]  # [vocabulary]
    block_best: NDArray[np.int32]  # [blocks]


@compiled
def new_select_room(vocabulary: int) -> Any:
    """For rows of that many logits."""
    blocks = (vocabulary + _BLOCK - 1) // _BLOCK
    return SelectRoom(np.empty(vocabulary, np.int32), np.empty(blocks, np.int32))


@compiled
def _order_keys(bits: Any, keys: Any) -> None:
    """Integers in the order of the floats with these bits; not-a-number comes last."""
    for index in range(len(bits)):
        value = bits[index]
        is_number = (value & 0x7FFFFFFF) <= 0x7F800000
        keys[index] = (value ^ ((value >> 31) & 0x7FFFFFFF)) if is_number else _NOTHING


@compiled
def _log_sum(logits: Any, maximum: np.float32) -> np.float32:
    """Natural log of the sum of all exponentials."""
    total = np.float32(0.0)
    for index in range(len(logits)):
        total += exponential(logits[index] - maximum)
    return maximum + np.float32(np.log(total))


@compiled
def _find_largest(keys: Any, block: int, block_best: Any) -> None:
    largest = _NOTHING
    for index in range(block * _BLOCK, min((block + 1) * _BLOCK, len(keys))):
        largest = max(largest, keys[index])
    block_best[block] = largest


@compiled
def _take_largest(keys: Any, block_best: Any) -> np.int64:
    """The token with the largest key, the lowest among equals, which is not found again; -1 if there is none."""
    block = 0
    for other in range(1, len(block_best)):
        if block_best[other] > block_best[block]:
            block = other
    if block_best[block] == _NOTHING:
        return np.int64(NO_TOKEN)
    token = block * _BLOCK
    while keys[token] != block_best[block]:
        token += 1
    keys[token] = _NOTHING
    _find_largest(keys, block, block_best)
    return np.int64(token)


@compiled
def select_row(
    logits: Any, candidate_mass: float, most: int, ends: Any, room: Any, tokens: Any
) -> tuple[np.int64, np.float32]:
    """Fill `tokens` [most + len(ends)] with a row's candidates; return (their number, log normaliser).

    They are the smallest set of top tokens that reaches the mass, at most `most`, best first, then the end tokens. None
    for a row whose largest logit is no finite number.
    """
    keys, block_best = room.keys, room.block_best
    _order_keys(logits.view(np.int32), keys)
    for block in range(len(block_best)):
        _find_largest(keys, block, block_best)
    token = _take_largest(keys, block_best)
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
        token = _take_largest(keys, block_best)
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


@compiled
def select_rows(logits: Any, candidate_mass: float, ends: Any, tokens: Any, widths: Any, log_normalisers: Any) -> None:
    """`select_row` of every row; `tokens` are NO_TOKEN behind the candidates."""
    room, most = new_select_room(logits.shape[1]), tokens.shape[1] - len(ends)
    for row in range(len(logits)):
        widths[row], log_normalisers[row] = select_row(logits[row], candidate_mass, most, ends, room, tokens[row])
        tokens[row, widths[row] :] = NO_TOKEN
