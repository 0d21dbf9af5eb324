"""Rotary positions as complex numbers: one multiplication turns queries and keys together.

A head of the hub's layout pairs dimension i with i + head_dim / 2. Reordered so that the two stand side by side
(`interleave`), a pair is one complex number and its rotation a complex factor of modulus one. The order of dimensions
within a head is free as long as queries and keys share it, so the weights are reordered once, at load time.
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
    """Radians per position of every rotation pair, float64 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    # transformers computes these in float32; the same rounding keeps far positions in agreement
    frequencies = 1.0 / (config.rope_theta ** exponents.float())
    scaling = config.rotary_scaling
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast enough to stay, 0: slow, fully stretched
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.double()


def rotary_table(config: TransformerConfig, length: int) -> Tensor:
    """The rotation of every position below `length`, complex64 [length, 1, head_dim / 2]."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rotary_frequencies(config))
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(1)
