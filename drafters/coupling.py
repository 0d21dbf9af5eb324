"""Drafting with the noise that the target draws with.

At every position, a sampled request takes the token with the largest `log p / temperature + noise`. The noise depends
on (seed, position, token) alone, so it is known before the target runs. A draft that adds the same noise to its own
estimate of log p agrees with the target more often than a draft of the most probable tokens does, above all at high
temperatures. Exactness does not depend on it: verification compares with the target's own draw.
"""

from collections.abc import Sequence

import numpy as np

from drafters.base import DraftRequest
from drafters.search.causal_model import no_noise
from drafters.search.kernels.chains import Noise

CAUSAL_TEMPERATURE = 1.1  # of the target's distribution that the causal model approximates; from replayed draws


def known_noise(requests: Sequence[DraftRequest], lattice_temperature: float = 1.0) -> Noise:
    """Return the noise of a batch. Greedy requests, and those whose seed is unknown, have none.

    lattice_temperature: temperature of the target's distribution that the diffusion model was trained on.
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
