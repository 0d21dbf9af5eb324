"""The sampling distribution, written a second time in slow numpy float64."""

import numpy as np
from numpy.typing import NDArray

from verifiers.base import SamplingRules


def exact_probabilities(logits: NDArray[np.float64], rules: SamplingRules) -> NDArray[np.float64]:
    """Apply temperature, then top-k, then top-p of the rest, then min-p. For logits without ties."""
    scaled = logits / rules.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if rules.top_k:
        probabilities[np.argsort(-probabilities)[rules.top_k :]] = 0
        probabilities /= probabilities.sum()
    if rules.top_p < 1:
        order, mass = np.argsort(-probabilities), 0.0
        for token in order:
            if mass >= rules.top_p:
                probabilities[token] = 0
            else:
                mass += probabilities[token]
        probabilities /= probabilities.sum()
    probabilities[probabilities < rules.min_p * probabilities.max()] = 0
    result: NDArray[np.float64] = probabilities / probabilities.sum()
    return result
