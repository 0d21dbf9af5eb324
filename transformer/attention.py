"""Where the rows of one forward pass are written and what they see, worked out once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformer.cache import KeyValueCache

Indices = NDArray[np.int64]

LONGEST_PADDED = 64  # rows; sequences with more attend alone, so that a prefill does not pad everybody's decode row


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Ragged rows of several sequences, flat."""

    tokens: Tensor  # int64 [rows], sequence after sequence
    slots: Sequence[int]  # cache slot per sequence; no two alike
    starts: Sequence[int]  # position of each sequence's first row
    counts: Sequence[int]  # rows per sequence, at least 1
    limits: Tensor | None = None  # int64 [rows]: a row sees cached positions below its limit. None: causal


class Attention:
    """One forward pass's cache writes and attention calls, by layer."""

    def __init__(self, rows: RowBatch, cache: KeyValueCache) -> None:
        counts = np.asarray(rows.counts, dtype=np.int64)
        starts = np.asarray(rows.starts, dtype=np.int64)
        slots = np.asarray(rows.slots, dtype=np.int64)
        self.num_sequences = len(counts)
        if self.num_sequences == 1:
            start, stop = rows.starts[0], rows.starts[0] + rows.counts[0]
            self.positions: slice | Tensor = slice(start, stop)
            self._targets = cache.entries[:, rows.slots[0], :, start:stop].transpose(1, 2).unbind(0)
            positions = np.arange(start, stop, dtype=np.int64)
        else:
            offsets = np.cumsum(counts) - counts
            positions = np.arange(counts.sum(), dtype=np.int64) + np.repeat(starts - offsets, counts)
            device = cache.entries.device
            self.positions = torch.from_numpy(positions).to(device)
            self._row_slots = torch.from_numpy(np.repeat(slots, counts)).to(device)
            self._targets = cache.entries.unbind(0)
        limits = positions + 1 if rows.limits is None else rows.limits.cpu().numpy()
        self._calls, self._order = plan_calls(slots, counts, limits, cache)

    def write(self, layer: int, keys_values: Tensor) -> None:
        """Store this pass's keys and values, [rows, 2 * kv_heads, head_dim]."""
        target = self._targets[layer]
        if isinstance(self.positions, slice):
            target.copy_(keys_values)
        else:
            target[self._row_slots, :, self.positions] = keys_values

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """What every row reads from the cache: [rows, heads * head_dim] of queries [rows, heads, head_dim]."""
        if self._order is None:
            return self._calls[0].attend(layer, queries)
        return torch.cat([call.attend(layer, queries) for call in self._calls]).index_select(0, self._order)


class AttentionCall:
    """One padded attention call over neighbouring slots.

    The heads that share a key-value head are folded into the query axis, [sequences, kv_heads, queries * group,
    head_dim], so that keys and values are never repeated.
    """

    def __init__(
        self,
        slots: Indices,  # [sequences]
        counts: Indices,  # [sequences]
        offsets: Indices,  # [sequences] flat index of each sequence's first row
        limits: Indices,  # [all rows]
        cache: KeyValueCache,
    ) -> None:
        device = cache.entries.device
        places, chosen = slot_places(slots)
        self._num_sequences = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
        self._num_queries = int(counts.max())
        padded = np.minimum(np.arange(self._num_queries), counts[:, None] - 1) + offsets[:, None]
        gather = np.full((self._num_sequences, self._num_queries), offsets[0], dtype=np.int64)
        gather[places] = padded
        row_limits = limits[gather]  # gaps repeat some row: their result is dropped
        length = int(row_limits.max())
        scatter = np.concatenate([p * self._num_queries + np.arange(c) for p, c in zip(places, counts, strict=True)])
        in_place = len(limits) == gather.size and np.array_equal(gather.ravel(), np.arange(gather.size))
        self._gather = None if in_place else torch.from_numpy(gather.ravel()).to(device)
        self._scatter = None if in_place else torch.from_numpy(scatter).to(device)
        neighbours = chosen if isinstance(chosen, slice) else slice(None)
        self._keys = cache.keys[:, neighbours, :, :length].unbind(0)
        self._values = cache.values[:, neighbours, :, :length].unbind(0)
        self._scattered = None if isinstance(chosen, slice) else torch.from_numpy(chosen).to(device)
        self._mask: Tensor | None = None
        self._row_limits = None if (row_limits == length).all() else torch.from_numpy(row_limits).to(device)
        self._length = length

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Result of this call's rows, in their order: [rows of the call, heads * head_dim]."""
        num_heads, head_dim = queries.shape[1:]
        keys, values = self._keys[layer], self._values[layer]
        if self._scattered is not None:
            keys, values = keys.index_select(0, self._scattered), values.index_select(0, self._scattered)
        sequences, count, shared = self._num_sequences, self._num_queries, keys.shape[1]
        group = num_heads // shared
        if self._gather is not None:
            queries = queries.index_select(0, self._gather)
        if count == 1:
            folded = queries.view(sequences, shared, group, head_dim)
        else:
            folded = queries.view(sequences, count, shared, group, head_dim).transpose(1, 2).flatten(2, 3)
        if self._row_limits is not None and self._mask is None:
            self._mask = additive_mask(self._row_limits, self._length, group, queries.dtype)
        result = scaled_dot_product_attention(folded, keys, values, self._mask)
        if count == 1:
            result = result.view(sequences, num_heads * head_dim)
        else:
            unfolded = result.view(sequences, shared, count, group, head_dim).transpose(1, 2)
            result = unfolded.reshape(sequences * count, num_heads * head_dim)
        return result if self._scatter is None else result.index_select(0, self._scatter)


def plan_calls(
    slots: Indices, counts: Indices, limits: Indices, cache: KeyValueCache
) -> tuple[list[AttentionCall], Tensor | None]:
    """The attention calls of a pass, and how their joined rows go back into flat order (None: they are in order)."""
    offsets = np.cumsum(counts) - counts
    long = counts > LONGEST_PADDED
    if not long.any() or (counts == counts[0]).all():
        return [AttentionCall(slots, counts, offsets, limits, cache)], None
    groups = [np.array([index]) for index in np.flatnonzero(long)]
    if not long.all():
        groups.insert(0, np.flatnonzero(~long))
    calls = [AttentionCall(slots[group], counts[group], offsets[group], limits, cache) for group in groups]
    joined = np.concatenate([np.arange(offsets[i], offsets[i] + counts[i]) for group in groups for i in group])
    return calls, torch.from_numpy(np.argsort(joined)).to(cache.entries.device)


def slot_places(slots: Indices) -> tuple[Indices, slice | Indices]:
    """Each sequence's place in the call, and the cache slots of the call.

    Slots that stand close together are read in place, gaps included: attending to a gap costs no more than copying a
    neighbour's keys and values would. Scattered ones are copied together.
    """
    first, last = int(slots.min()), int(slots.max())
    if last - first < 2 * len(slots):
        return slots - first, slice(first, last + 1)
    return np.arange(len(slots)), slots


def additive_mask(limits: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """0 where a row may look and -inf elsewhere: [sequences, 1, queries * group, length].

    `limits` is [sequences, queries].
    """
    hidden = torch.arange(length, device=limits.device) >= limits.repeat_interleave(group, dim=1).unsqueeze(-1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=limits.device)
    return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)
