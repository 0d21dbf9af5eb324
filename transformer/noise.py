"""The noise that sampled tokens are drawn with: it depends on (seed, absolute position, token) alone.

A token is drawn by the Gumbel-max rule: the largest `log(weight) + noise` wins, which follows the weights exactly.
However many tokens are drafted, whoever else is in the batch: a request meets the same noise at the same position, so a
seeded request gives the same tokens with speculation on or off. And since the noise is known before the target has run,
a drafter can guess with it: where its distribution is near the target's, so is its draw (Daliri et al., 2408.07978).

This stands below both verifiers and drafters because they must never differ in it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import allocating, compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: consecutive numbers land far apart


@compiled
def mix(word: Any) -> Any:
    """Scramble 64 bits, each input bit flipping every output bit half the time (splitmix64's finalizer)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled
def noise_key(seed: Any, position: int) -> Any:
    """What the noise of all tokens at one position of one request is made from."""
    key = mix(seed + GOLDEN)
    return mix(mix(key + np.uint64(position) * GOLDEN) ^ key)


@allocating
def noise_keys(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """`noise_key` of each pair."""
    keys = np.empty(len(seeds), np.uint64)
    for index in range(len(seeds)):
        keys[index] = noise_key(seeds[index], positions[index])
    return keys


@compiled
def uniform(key: Any, token: int) -> Any:
    """The token's number in (0, 1), in steps of 2^-52."""
    word = mix(key + np.uint64(token) * GOLDEN)
    return (float(word >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def gumbel(key: Any, token: int) -> Any:
    """The token's Gumbel noise, nats."""
    return -np.log(-np.log(uniform(key, token)))


@compiled
def draw_tokens(weights: NDArray[np.float32], keys: NDArray[np.uint64], tokens: NDArray[np.int64]) -> None:
    """Draw one token per row of `weights` `[rows, vocabulary]`, which need not sum to one; -1 where all are zero.

    `-log(uniform)` is an exponential waiting time: the largest weight per time wins. Most tokens need no logarithm, for
    the time is at least `1 - uniform`. A weight of zero is never drawn.
    """
    for row in range(len(weights)):
        best, most = -1, 0.0
        for token in range(weights.shape[1]):
            weight = float(weights[row, token])
            number = uniform(keys[row], token)
            if weight > most * (1.0 - number):
                rate = weight / -np.log(number)
                if rate > most:
                    best, most = token, rate
        tokens[row] = best
