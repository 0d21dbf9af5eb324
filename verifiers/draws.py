"""Position-keyed draws: the noise of a sampled token depends on (seed, absolute position) alone.

However many tokens are drafted, whoever else is in the batch: position i of a request always meets the same uniform
number, so a seeded request gives the same tokens with speculation on or off.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: consecutive positions land far apart


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words, each input bit flipping every output bit half the time (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), in steps of 2^-52; seeds count modulo 2^64."""
    keys = mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + GOLDEN)
    words = mix(mix(keys + np.asarray(positions, dtype=np.uint64) * GOLDEN) ^ keys)
    # 52 bits, not 53: times any total, the product then stays below the total after rounding
    return (words >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(weights: Tensor, numbers: NDArray[np.float64]) -> Tensor:
    """Draw one token per row by inverse cumulative distribution, in the order of token ids: int64 [rows].

    `weights` [rows, vocabulary] need not sum to one; a weight of zero is never drawn. Summed in float64.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.from_numpy(numbers).to(weights.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)
