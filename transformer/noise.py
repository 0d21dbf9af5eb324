"""The noise that sampled tokens are drawn with. It depends on (seed, absolute position, token) alone.

A token is drawn by the Gumbel-max rule: the token with the largest `log(weight) + noise` wins, which samples exactly
from the weights. A request meets the same noise at the same position, however many tokens are drafted and whatever else
is in the batch. So a seeded request gives the same tokens with speculation on or off. The noise is known before the
target runs, so a drafter can use it: if its distribution is near the target's, so is its draw (Daliri et al.,
2408.07978).

Verifiers and drafters both import this module, because they must never differ in it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import allocating, compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: consecutive numbers land far apart


@compiled
def mix(word: Any) -> Any:
    """Scramble 64 bits: each input bit flips every output bit half the time (splitmix64's finalizer)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled
def noise_key(seed: Any, position: int) -> Any:
    """Return the key of the noise of all tokens, at one position of one request."""
    key = mix(seed + GOLDEN)
    return mix(mix(key + np.uint64(position) * GOLDEN) ^ key)


@allocating
def noise_keys(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return `noise_key` of each pair: [pairs]."""
    keys = np.empty(len(seeds), np.uint64)
    for index in range(len(seeds)):
        keys[index] = noise_key(seeds[index], positions[index])
    return keys


@compiled
def uniform(key: Any, token: int) -> Any:
    """Return the token's uniform number in (0, 1), in steps of 2^-52."""
    word = mix(key + np.uint64(token) * GOLDEN)
    return (float(word >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def gumbel(key: Any, token: int) -> Any:
    """Return the token's Gumbel noise, in nats."""
    return -np.log(-np.log(uniform(key, token)))


@compiled
def draw_tokens(weights: NDArray[np.float32], keys: NDArray[np.uint64], tokens: NDArray[np.int64]) -> None:
    """Draw one token per row of `weights` `[rows, vocabulary]`, which need not sum to one; -1 if all are zero.

    `-log(uniform)` is an exponential waiting time; the token with the largest weight per time wins. The time is at
    least `1 - uniform`, so most tokens need no logarithm. A weight of zero is never drawn.
    """
    for row in range(len(weights)):
        best, best_rate = -1, 0.0
        for token in range(weights.shape[1]):
            weight = float(weights[row, token])
            number = uniform(keys[row], token)
            if weight > best_rate * (1.0 - number):
                rate = weight / -np.log(number)
                if rate > best_rate:
                    best, best_rate = token, rate
        tokens[row] = best
