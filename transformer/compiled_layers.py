"""A small model's layers as one compiled call."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from transformer.attention import RowBatch
from transformer.cache import KeyValueCache
from transformer.config import TransformerConfig
from transformer.kernels import LayerArrays, Numbers, Rows, run_layers
from transformer.layer import Layer
from transformer.matrix import suits_kernels
from transformer.product import LANES, product_kernels


class CompiledLayers:
    """Layers whose matrices all have panels (see `Matrix`), for passes with few rows."""

    def __init__(self, config: TransformerConfig, layers: Sequence[Layer], final_norm: Tensor) -> None:
        self._layers = layers  # keeps the memory alive that the addresses point to
        self._arrays = LayerArrays(
            products=np.array(product_kernels().addresses),
            panels=np.array([[matrix.panels_address for matrix in layer.matrices] for layer in layers]),
            **common_arrays(config, layers, final_norm),
        )

    @classmethod
    def where_possible(cls, config: TransformerConfig, layers: Sequence[Layer], final_norm: Tensor) -> Self | None:
        """Return compiled layers; None if the kernels do not suit the model (GPU, other dtype, large or odd sizes)."""
        has_panels = all(matrix.panels_address for layer in layers for matrix in layer.matrices)
        group = config.num_heads // config.num_key_value_heads
        if not has_panels or config.head_dim % LANES or group > LANES:
            return None
        return cls(config, layers, final_norm)

    def takes(self, rows: RowBatch) -> bool:
        """Return whether `rows` are few enough for the compiled call."""
        return suits_kernels(len(rows.tokens))

    def run(self, hidden: Tensor, rows: RowBatch, cache: KeyValueCache, rotations: Tensor) -> Tensor:
        """Carry `hidden` [rows, hidden] through the layers and the final norm, in place; see `Transformer.forward`.

        rotations: complex64 [positions, 1, head_dim / 2]. Raises IndexError if rows or cache do not fit.
        """
        places = ragged_rows(rows)
        turns = torch.view_as_real(rotations).view(len(rotations), -1).numpy()
        if not run_layers(hidden.numpy(), places, self._arrays, turns, cache.entries.numpy()):
            raise IndexError(f"rows that do not fit the cache of {cache.num_slots} slots of {cache.length} positions")
        return hidden


def ragged_rows(rows: RowBatch) -> Rows:
    """Return `rows` in the form that the kernels read."""
    counts, starts = np.array(rows.counts, np.int64), np.array(rows.starts, np.int64)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    if rows.limits is None:
        limits = np.arange(1, len(rows.tokens) + 1) + np.repeat(starts - firsts[:-1], counts)
    else:
        limits = rows.limits.numpy()
    return Rows(firsts, np.array(rows.slots, np.int64), starts, limits)


def common_arrays(config: TransformerConfig, layers: Sequence[Any], final_norm: Tensor) -> dict[str, Any]:
    """Return the entries that `LayerArrays` and `IntegerArrays` share: all but the matrices."""
    return {
        "qkv_bias": joined([layer.qkv_bias for layer in layers], 2),
        "head_norms": joined([layer.query_key_norm for layer in layers], 3) * np.float32(config.head_dim**0.5),
        "output_bias": joined([layer.output_bias for layer in layers], 2),
        "final_norm": final_norm.numpy(),
        "num_heads": config.num_heads,
        "num_shared": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate_size,
        "epsilon": config.rms_norm_eps * config.hidden_size,
        "head_epsilon": config.rms_norm_eps * config.head_dim,
    }


def joined(weights: Sequence[Tensor | None], num_dimensions: int) -> Numbers:
    """Stack all layers' weights in one array; it has no rows if the layers have no such weight."""
    known = [weight for weight in weights if weight is not None]
    stacked = torch.stack(known) if known else torch.empty([0] * num_dimensions)
    return stacked.numpy()
