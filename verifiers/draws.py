"""The target's own tokens: the most probable ones, or draws keyed by (seed, absolute position, token) alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer.compiled import compiled
from transformer.noise import draw_tokens, noise_keys

NO_TOKEN = -1  # drawn where a row allows no token


def draw(weights: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Draw one token per row of `weights` `[rows, vocabulary]`, which need not sum to one: int64 `[rows]`.

    Seeds count modulo 2^64. A weight of zero is never drawn; NO_TOKEN where a row has no other.
    """
    words = np.array([seed % 2**64 for seed in seeds], np.uint64)
    keys = noise_keys(words, np.array(positions, np.int64))
    tokens = np.empty(len(keys), np.int64)
    draw_tokens(weights.float().cpu().contiguous().numpy(), keys, tokens)
    return torch.from_numpy(tokens)


def most_probable(logits: Tensor) -> list[int]:
    """The token with the largest of each row of `logits` `[rows, vocabulary]`, the first among equals.

    NO_TOKEN where the largest is not finite: not a number counts as such, and -inf only where everything is banned.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best = logits.max(dim=-1)
        return torch.where(best.values.isfinite(), best.indices, NO_TOKEN).tolist()
    tokens = np.empty(len(logits), np.int64)
    _most_probable(logits.numpy(), tokens)
    return tokens.tolist()


@compiled
def _most_probable(logits: Any, tokens: Any) -> None:
    for row in range(len(logits)):
        best, largest, doubt = np.int64(NO_TOKEN), -np.float32(np.inf), np.float32(0.0)
        for token in range(logits.shape[1]):
            value = logits[row, token]
            if value > largest:
                best, largest = np.int64(token), value
            if not value <= largest:
                doubt = value
        is_finite = largest < np.float32(np.inf) and doubt == doubt
        tokens[row] = best if is_finite else NO_TOKEN
