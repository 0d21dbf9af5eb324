"""The key-value cache of quantised models: keys in panels of sixteen positions, as `transformer.panel_attention` reads.

Like `transformer.cache.KeyValueCache` otherwise.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from transformer.cache import lazy_zeros
from transformer.panel_attention import LANES, PANELS_AT_ONCE


class PanelCache:
    """One slot per sequence; position i of a slot holds the key and value of its token i.

    `keys` float32 [layers, slots, kv_heads, panels, head_dim, LANES], `values` [layers, slots, kv_heads, positions,
    head_dim]. There are a few more positions than `length`, which are never seen.
    """

    def __init__(self, num_layers: int, num_slots: int, num_heads: int, length: int, head_dim: int) -> None:
        panels = -(-length // (LANES * PANELS_AT_ONCE)) * PANELS_AT_ONCE
        device = torch.device("cpu")
        shape = num_layers, num_slots, num_heads
        self.keys = lazy_zeros((*shape, panels, head_dim, LANES), device, torch.float32).numpy()
        self.values = lazy_zeros((*shape, length, head_dim), device, torch.float32).numpy()
        self.num_slots = num_slots
        self.length = length

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another's, and the keys that share their last panel."""
        panels = -(-length // LANES)
        self.keys[:, target, :, :panels] = self.keys[:, source, :, :panels]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def clear_slot(self, slot: int, start: int = 0) -> None:
        """Zero a slot from position `start` on, so that a NaN cannot outlive its sequence."""
        panel, lane = divmod(start, LANES)
        self.keys[:, slot, :, panel : panel + 1, :, lane:] = 0
        self.keys[:, slot, :, panel + 1 :] = 0
        self.values[:, slot, :, start:] = 0

    def keys_of(self, slot: int, length: int) -> NDArray[np.float32]:
        """Return the first keys of a slot: [layers, kv_heads, length, head_dim]."""
        layers, _, heads, panels, head_dim, lanes = self.keys.shape
        by_position = self.keys[:, slot].swapaxes(-1, -2).reshape(layers, heads, panels * lanes, head_dim)
        return by_position[:, :, :length]
