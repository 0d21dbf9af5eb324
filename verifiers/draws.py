"""The target's own tokens: the most probable ones, or draws keyed by (seed, absolute position, token) alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer.compiled import allocating, compiled
from transformer.intrinsics import exponential
from transformer.matrix import is_plain
from transformer.noise import draw_tokens, noise_keys
from verifiers.base import SamplingRules
from verifiers.distribution import token_weights

NO_TOKEN = -1  # drawn if a row allows no token


def draw(weights: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Draw one token per row of `weights` `[rows, vocabulary]`, which need not sum to one: int64 `[rows]`.

    Seeds count modulo 2^64. A weight of zero is never drawn: a row of zeros gives NO_TOKEN.
    """
    keys = _keys(seeds, positions)
    tokens = np.empty(len(keys), np.int64)
    draw_tokens(weights.float().cpu().contiguous().numpy(), keys, tokens)
    return torch.from_numpy(tokens)


def draw_rows(
    logits: Tensor,
    rows: Sequence[int],
    rules: Sequence[SamplingRules],
    positions: Sequence[int],
    num_tokens: int | None = None,
) -> list[int]:
    """Draw a token by the rules from each of `logits[rows]` `[any, vocabulary]`, whose maxima must be finite.

    num_tokens: ids from here on are never drawn.
    On the CPU, rows with only a temperature are drawn in one compiled call. Whether a row is one of them depends on its
    own rules alone.
    """
    has_kernel = is_plain(logits)
    width = num_tokens or logits.shape[1]
    tokens = np.full(len(rows), NO_TOKEN, np.int64)
    simple: list[int] = []
    others: list[int] = []
    for index, rule in enumerate(rules):
        (simple if has_kernel and rule.temperature_alone else others).append(index)
    if simple:
        keys = _keys([rules[i].seed for i in simple], [positions[i] for i in simple])
        temperatures = np.array([rules[i].temperature for i in simple], np.float32)
        drawn = np.empty(len(simple), np.int64)
        chosen = np.array([rows[i] for i in simple])
        _draw_by_temperature(logits.contiguous().numpy(), width, chosen, temperatures, keys, drawn)
        tokens[simple] = drawn
    if others:
        weights = token_weights(logits[[rows[i] for i in others], :width], [rules[i] for i in others])
        tokens[others] = draw(weights, [rules[i].seed for i in others], [positions[i] for i in others]).numpy()
    return tokens.tolist()


def _keys(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.uint64]:
    """Return the noise keys of each seed (modulo 2^64) at each position."""
    keys: NDArray[np.uint64] = noise_keys(
        np.array([seed % 2**64 for seed in seeds], np.uint64), np.array(positions, np.int64)
    )
    return keys


@allocating
def _draw_by_temperature(logits: Any, width: int, rows: Any, temperatures: Any, keys: Any, tokens: Any) -> None:
    """Apply softmax with a temperature, then `draw_tokens`. A logit of -inf gets a weight too small to be drawn."""
    weights = np.empty((1, width), np.float32)
    for index in range(len(rows)):
        row, largest = logits[rows[index], :width], np.float32(-np.inf)
        for value in row:
            largest = max(largest, value)
        for token in range(len(row)):
            weights[0, token] = exponential((row[token] - largest) / temperatures[index])
        draw_tokens(weights, keys[index : index + 1], tokens[index : index + 1])


def most_probable(logits: Tensor, num_tokens: int | None = None) -> list[int]:
    """Return the token with the largest logit in each row of `logits` `[rows, vocabulary]`; the first among equals.

    num_tokens: only look at this many ids.
    NO_TOKEN if the largest is not finite: NaN counts as the largest, and -inf is the largest only if all is banned.
    """
    if not is_plain(logits):
        best = logits[:, :num_tokens].max(dim=-1)
        return torch.where(best.values.isfinite(), best.indices, NO_TOKEN).tolist()
    tokens = np.empty(len(logits), np.int64)
    _most_probable(logits.contiguous().numpy(), num_tokens or logits.shape[1], tokens)
    return tokens.tolist()


@compiled
def _most_probable(logits: Any, width: int, tokens: Any) -> None:
    for row in range(len(logits)):
        best, largest, doubt = np.int64(NO_TOKEN), -np.float32(np.inf), np.float32(0.0)
        for token in range(width):
            value = logits[row, token]
            if value > largest:
                best, largest = np.int64(token), value
            if not value <= largest:
                doubt = value
        is_finite = largest < np.float32(np.inf) and doubt == doubt
        tokens[row] = best if is_finite else NO_TOKEN
