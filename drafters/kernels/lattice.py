"""A row's candidates: its top tokens, and the log-sum-exp of all."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.kernels.tokens import NO_TOKEN, contains
from transformer.compiled import compiled
from transformer.intrinsics import exponential

_BLOCK = 64  # logits whose largest is kept, so that the search for candidates skips most of a row


class SelectRoom(NamedTuple):
    """Working memory of `select_row`."""

    keys: NDArray[np.int32]  # [vocabulary]
    block_best: NDArray[np.int32]  # [blocks]
    best: NDArray[np.int32]  # [most candidates]


@compiled
def new_select_room(vocabulary: int, most: int) -> Any:
    """For rows of that many logits, and at most so many top tokens."""
    blocks = (vocabulary + _BLOCK - 1) // _BLOCK
    return SelectRoom(np.empty(vocabulary, np.int32), np.empty(blocks, np.int32), np.empty(most, np.int32))


@compiled
def _order_keys(bits: Any, keys: Any) -> None:
    """Integers in the order of the floats with these bits; not-a-number comes last."""
    for index in range(len(bits)):
        value = bits[index]
        is_number = (value & 0x7FFFFFFF) <= 0x7F800000
        keys[index] = (value ^ ((value >> 31) & 0x7FFFFFFF)) if is_number else np.int32(-0x80000000)


@compiled
def _log_sum(logits: Any, maximum: np.float32) -> np.float32:
    """Natural log of the sum of all exponentials."""
    total = np.float32(0.0)
    for index in range(len(logits)):
        total += exponential(logits[index] - maximum)
    return maximum + np.float32(np.log(total))


@compiled
def _best_of_row(keys: Any, most: int, block_best: Any, best: Any, tokens: Any) -> int:
    """Fill `tokens` with the `most` largest keys, largest first, the lower token first among equals; their number."""
    vocabulary = len(keys)
    for block in range(len(block_best)):
        largest = np.int32(-0x80000000)
        for index in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
            largest = max(largest, keys[index])
        block_best[block] = largest
    count = 0
    for block in range(len(block_best)):
        if count == most and block_best[block] <= best[most - 1]:
            continue
        for index in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
            key = keys[index]
            if count == most and key <= best[most - 1]:
                continue
            at = min(count, most - 1)
            while at > 0 and best[at - 1] < key:
                best[at], tokens[at] = best[at - 1], tokens[at - 1]
                at -= 1
            best[at], tokens[at] = key, index
            count = min(count + 1, most)
    return count


@compiled
def select_row(logits: Any, candidate_mass: float, ends: Any, room: Any, tokens: Any) -> tuple[np.int64, np.float32]:
    """Fill `tokens` [len(room.best) + len(ends)] with a row's candidates; return (their number, log normaliser).

    They are the smallest set of top tokens that reaches the mass, best first, then the end tokens. None for a row whose
    largest logit is no finite number.
    """
    _order_keys(logits.view(np.int32), room.keys)
    count = _best_of_row(room.keys, len(room.best), room.block_best, room.best, tokens)
    maximum = logits[tokens[0]] if count > 0 else np.float32(-np.inf)
    if not -np.inf < maximum < np.inf:
        return np.int64(0), np.float32(0.0)
    log_normaliser = _log_sum(logits, maximum)
    mass, width = 0.0, np.int64(0)
    while width < count and (width == 0 or mass < candidate_mass) and logits[tokens[width]] > -np.inf:
        mass += np.exp(logits[tokens[width]] - log_normaliser)
        width += 1
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
    room = new_select_room(logits.shape[1], tokens.shape[1] - len(ends))
    for row in range(len(logits)):
        widths[row], log_normalisers[row] = select_row(logits[row], candidate_mass, ends, room, tokens[row])
        tokens[row, widths[row] :] = NO_TOKEN
