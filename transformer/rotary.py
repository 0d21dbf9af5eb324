"""Rotary positions as complex numbers: one multiplication turns queries and keys together.

In the hub's layout, a head pairs dimension i with i + head_dim / 2. `interleave` moves the two next to each other: then
a pair is one complex number, and its rotation is a complex factor of modulus one. Queries and keys only need the same
order of dimensions within a head, so the weights are reordered once, at load time.
"""

import math

import torch
from torch import Tensor

from transformer.config import TransformerConfig


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the outputs of a q or k weight or bias `[heads * head_dim, ...]` into rotation pairs."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotary_frequencies(config: TransformerConfig) -> Tensor:
    """Return the radians per position of every rotation pair, float64 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    # float32 as in transformers: with the same rounding, far positions agree
    frequencies = 1.0 / (config.rope_theta ** exponents.float())
    scaling = config.rotary_scaling
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, stays; 0: slow, stretched in full
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.double()


def rotary_table(config: TransformerConfig, length: int) -> Tensor:
    """Return the rotation of every position below `length`, complex64 [length, 1, head_dim / 2]."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rotary_frequencies(config))
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(1)
