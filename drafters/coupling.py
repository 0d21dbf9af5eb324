"""Drafting with the noise that the target draws with.

A sampled request takes, at every position, the token with the largest `log p / temperature + noise`, and the noise
depends on (seed, position, token) alone: it is known before the target has run. A draft that takes the best token of
its own estimate of p PLUS the same noise agrees with the target more often than the estimate's most probable token, at
high temperatures above all. Exactness does not depend on it: verification compares with the target's own draw.
"""

from collections.abc import Sequence

import numpy as np

from drafters.base import DraftRequest
from drafters.search.causal_model import no_noise
from drafters.search.kernels.chains import Noise

CAUSAL_TEMPERATURE = 1.1  # of the target's distribution that the causal model stands for; from replayed draws


def known_noise(requests: Sequence[DraftRequest], lattice_temperature: float = 1.0) -> Noise:
    """The noise of a batch; greedy requests, and those whose seed is unknown, have none.

    lattice_temperature: of the target's distribution that the diffusion model was trained on.
    """
    known = [request.seed is not None and request.temperature > 0.0 for request in requests]
    if not any(known):
        return no_noise(len(requests))
    places, scales = [], []
    for request, is_known in zip(requests, known, strict=True):
        sharpness = 1.0 / max(request.temperature, 0.01) if is_known else 0.0
        places.append(((request.seed or 0) % 2**64, len(request.tokens)))
        scales.append((CAUSAL_TEMPERATURE * sharpness, lattice_temperature * sharpness))
    return Noise(np.array(places, np.uint64), np.array(scales, np.float64))
