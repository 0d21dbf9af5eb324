"""Drafting with the noise that the target draws with.

A sampled request takes, at every position, the token with the largest `log p / temperature + noise`, and the noise
depends on (seed, position, token) alone: it is known before the target has run. A draft that takes the best token of
its own estimate of p PLUS the same noise agrees with the target more often than the estimate's most probable token, at
high temperatures above all. Exactness does not depend on it: verification compares with the target's own draw.
"""

from collections.abc import Sequence

import numpy as np

from drafters.base import DraftRequest
from drafters.kernels.chains import Noise

CAUSAL_TEMPERATURE = (
    1.1  # of the target's distribution that the causal model stands for; found by replaying held-out draws
)


def known_noise(requests: Sequence[DraftRequest], lattice_temperature: float = 1.0) -> Noise:
    """The noise of a batch; greedy requests, and those whose seed is unknown, have none.

    lattice_temperature: of the target's distribution that the diffusion model was trained on.
    """
    temperatures = np.array([0.0 if request.seed is None else request.temperature for request in requests])
    sharpness = np.where(temperatures > 0.0, 1.0 / np.maximum(temperatures, 0.01), 0.0)
    return Noise(
        seeds=np.array([(request.seed or 0) % 2**64 for request in requests], np.uint64),
        positions=np.array([len(request.tokens) for request in requests], np.int64),
        causal_scales=CAUSAL_TEMPERATURE * sharpness,
        lattice_scales=lattice_temperature * sharpness,
    )
