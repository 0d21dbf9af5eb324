"""Position-keyed draws: the noise of a sampled token depends on (seed, absolute position, token) alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
