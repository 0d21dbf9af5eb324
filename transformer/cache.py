"""The key-value cache: keys and values of every sequence, preallocated."""

import numpy as np
import torch
from torch import Tensor


class KeyValueCache:
    """One slot per sequence; position i of a slot holds the key and value of its token i.

    `keys` and `values` are views [layers, slots, kv_heads, length, head_dim] of one tensor, so that a layer writes both
    at once. On the CPU, memory is used only once it is written. The cache starts as zeros, because attention multiplies
    masked values by zero, and zero times NaN is NaN.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, num_slots, 2 * num_heads, length, head_dim)
        self.entries = lazy_zeros(shape, torch.device(device), dtype)
        self.keys = self.entries[:, :, :num_heads]
        self.values = self.entries[:, :, num_heads:]
        self.device = self.entries.device
        self.dtype = dtype
        self.num_slots = num_slots
        self.length = length

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another's."""
        with torch.inference_mode():
            self.entries[:, target, :, :length] = self.entries[:, source, :, :length]

    def clear_slot(self, slot: int, start: int = 0) -> None:
        """Zero a slot from position `start` on, so that a NaN cannot outlive its sequence."""
        with torch.inference_mode():
            self.entries[:, slot, :, start:] = 0


def lazy_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros. On the CPU, pages are allocated when they are first written (torch.zeros writes all at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
