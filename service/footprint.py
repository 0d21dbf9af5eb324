"""Memory and minimum step times of a pair, computed from byte counts without running anything.

A decoding step reads every weight and every cached key and value once. Bytes divided by memory bandwidth are therefore
a lower bound on its time. The ratio of two such bounds is the acceptance length (tokens per step, the extra one
included) that a drafter must reach before it pays.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformer.config import TransformerConfig
from transformer.weights import weight_shapes

BYTES_OF_TYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelFootprint:
    """Bytes of one model in one number type."""

    weight_bytes: int  # held in memory
    read_bytes: int  # weights read in one pass
    cache_bytes: int  # keys and values of all requests


@dataclass(frozen=True, slots=True)
class PairFootprint:
    """Bytes and minimum seconds of a target and its drafter. `bandwidth` is in bytes per second."""

    target: ModelFootprint
    drafter: ModelFootprint | None
    bandwidth: float
    passes: int = 1  # drafter passes per draft

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and caches."""
        models = [self.target] if self.drafter is None else [self.target, self.drafter]
        return sum(model.weight_bytes + model.cache_bytes for model in models)

    @property
    def plain_seconds(self) -> float:
        """Minimum seconds of a plain step. Verifying a draft reads the same bytes."""
        return (self.target.read_bytes + self.target.cache_bytes) / self.bandwidth

    @property
    def draft_seconds(self) -> float:
        """Minimum seconds of a diffusion draft; 0 without a drafter."""
        if self.drafter is None:
            return 0.0
        return self.passes * (self.drafter.read_bytes + self.drafter.cache_bytes) / self.bandwidth

    @property
    def break_even(self) -> float:
        """Acceptance length at which drafting is as fast as plain decoding."""
        return (self.plain_seconds + self.draft_seconds) / self.plain_seconds


def model_footprint(config: TransformerConfig, dtype: str, on_cpu: bool, num_cached: int) -> ModelFootprint:
    """Return a model's footprint. num_cached: tokens with cached keys and values, over all requests."""
    size = BYTES_OF_TYPE[dtype]
    shapes = weight_shapes(config)
    stored = sum(int(np.prod(shape)) for shape in shapes.values()) * size
    embedding = config.vocabulary_size * config.hidden_size * size
    read = stored if config.tie_word_embeddings else stored - embedding  # a pass reads few rows of the embedding
    copies = (embedding if config.tie_word_embeddings else 0) + _packed_bytes(config, dtype) if on_cpu else 0
    per_token = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * size
    return ModelFootprint(stored + copies, read, per_token * num_cached)


def _packed_bytes(config: TransformerConfig, dtype: str) -> int:
    """Bytes of the packed copies of small matrices, which the CPU kernel reads."""
    from transformer.matrix import MAX_PACKED_ENTRIES
    from transformer.product import LANES

    if dtype != "float32":
        return 0
    heads = config.num_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    layer = (
        (config.hidden_size, heads + 2 * shared),
        (heads, config.hidden_size),
        (config.hidden_size, 2 * config.intermediate_size),
        (config.intermediate_size, config.hidden_size),
    )
    matrices = [*(layer * config.num_layers), (config.hidden_size, config.vocabulary_size)]
    packed = [rows * columns for rows, columns in matrices if columns % LANES == 0]
    return 4 * sum(entries for entries in packed if entries <= MAX_PACKED_ENTRIES)


def device_bytes(device: str) -> int:
    """Return the free memory of a torch device in bytes. Raises ValueError if there is no such device."""
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"model.device is {device}, but torch sees no CUDA device")
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_bandwidth(device: str) -> float:
    """Measure bytes per second, read plus written, of a large copy: the best of five."""
    if device.startswith("cuda"):
        import torch

        source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        target, seconds = torch.empty_like(source), []
        for _ in range(5):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return 2 * source.numel() / min(seconds)
    block = np.ones(1 << 27, np.uint8)
    copy, seconds = np.empty_like(block), []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(copy, block)
        seconds.append(time.perf_counter() - started)
    return 2 * block.nbytes / min(seconds)
