"""Cache writes and attention calls of one forward pass, prepared once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformer.cache import KeyValueCache

Indices = NDArray[np.int64]

MAX_PADDED = 64  # rows; a sequence with more gets its own call, so that a prefill does not pad every decode row
MAX_PADDING = 0.25  # padding of a call with `bounds_padding`, as a share of the needed pairs of rows and positions
MAX_SPREAD = 2  # slots that a call reads in place, as a multiple of those that it needs
FREE_PADDING = 4096  # pairs; less padding than this costs less than one more call


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Ragged rows of several sequences, flat."""

    tokens: Tensor  # int64 [rows], sequence after sequence
    slots: Sequence[int]  # cache slot per sequence, all different
    starts: Sequence[int]  # position of each sequence's first row
    counts: Sequence[int]  # rows per sequence, at least 1
    limits: Tensor | None = None  # int64 [rows]: a row sees the cached positions below its limit. None: causal
    bounds_padding: bool = False  # prefer more calls to much padding, for sequences of very unequal lengths


class Attention:
    """The cache writes and attention calls of one forward pass, by layer.

    group: number of query heads that share a key-value head.
    """

    def __init__(self, rows: RowBatch, cache: KeyValueCache, group: int) -> None:
        self._order: Tensor | None = None  # flat order of the calls' joined rows; None: they are in order
        if len(rows.counts) == 1:
            start, stop = rows.starts[0], rows.starts[0] + rows.counts[0]
            self.positions: slice | Tensor = slice(start, stop)
            self._targets = cache.entries[:, rows.slots[0], :, start:stop].transpose(1, 2).unbind(0)
            self._calls = [call_of_one(rows, cache, group)]
            return
        counts = np.array(rows.counts, dtype=np.int64)
        slots = np.array(rows.slots, dtype=np.int64)
        offsets = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) + np.repeat(np.array(rows.starts, dtype=np.int64) - offsets, counts)
        self.positions = torch.from_numpy(positions).to(cache.device)
        self._row_slots = torch.from_numpy(np.repeat(slots, counts)).to(cache.device)
        self._targets = cache.entries.unbind(0)
        limits = positions + 1 if rows.limits is None else rows.limits.cpu().numpy()
        if rows.bounds_padding:
            groups = bounded_groups(counts, np.maximum.reduceat(limits, offsets))
        else:
            groups = padded_groups(counts)
        spread = 1 if rows.bounds_padding else MAX_SPREAD
        self._calls = [padded_call(slots[g], counts[g], offsets[g], limits, cache, group, spread) for g in groups]
        if len(groups) > 1:
            joined = np.concatenate([np.arange(offsets[i], offsets[i] + counts[i]) for g in groups for i in g])
            self._order = torch.from_numpy(np.argsort(joined)).to(cache.device)

    def write(self, layer: int, keys_values: Tensor) -> None:
        """Store this pass's keys and values, [rows, 2 * kv_heads, head_dim]."""
        target = self._targets[layer]
        if isinstance(self.positions, slice):
            target.copy_(keys_values)
        else:
            target[self._row_slots, :, self.positions] = keys_values

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Return the attention result of every row, [rows, heads * head_dim], for queries [rows, heads, head_dim]."""
        if self._order is None:
            return self._calls[0].attend(layer, queries)
        return torch.cat([call.attend(layer, queries) for call in self._calls]).index_select(0, self._order)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One padded attention call.

    Heads that share a key-value head are folded into the query axis, [sequences, kv_heads, queries * group, head_dim],
    so that keys and values are never repeated.
    """

    num_sequences: int  # including gaps between the slots
    num_queries: int  # rows of the longest sequence
    keys: Sequence[Tensor]  # by layer, [sequences or all slots, kv_heads, length, head_dim]
    values: Sequence[Tensor]
    scattered: Tensor | None = None  # [sequences] slots to read, if `keys` has all slots; None: read all of `keys`
    gather: Tensor | None = None  # [sequences * queries] flat row of each padded row; None: they are the same
    scatter: Tensor | None = None  # [rows of the call] padded row of each flat row
    mask: Tensor | None = None  # added to the scores, [sequences, 1, queries * group, length]; None: every row sees all

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Return the results of this call's rows, in their order: [rows of the call, heads * head_dim]."""
        num_heads, head_dim = queries.shape[1:]
        keys, values = self.keys[layer], self.values[layer]
        if self.scattered is not None:
            keys, values = keys.index_select(0, self.scattered), values.index_select(0, self.scattered)
        sequences, count, shared = self.num_sequences, self.num_queries, keys.shape[1]
        if self.gather is not None:
            queries = queries.index_select(0, self.gather)
        if count == 1:
            folded = queries.view(sequences, shared, -1, head_dim)
        else:
            folded = queries.view(sequences, count, shared, -1, head_dim).transpose(1, 2).flatten(2, 3)
        result = scaled_dot_product_attention(folded, keys, values, self.mask)
        if count > 1:
            result = result.view(sequences, shared, count, -1, head_dim).transpose(1, 2)
        result = result.reshape(sequences * count, num_heads * head_dim)
        return result if self.scatter is None else result.index_select(0, self.scatter)


def call_of_one(rows: RowBatch, cache: KeyValueCache, group: int) -> AttentionCall:
    """Prepare the call of a single sequence, whose rows need no padding."""
    slot, start, count = rows.slots[0], rows.starts[0], rows.counts[0]
    row_limits = None
    if rows.limits is None:
        length = start + count
        if count > 1:
            row_limits = torch.arange(start + 1, length + 1, device=cache.device)
    else:
        lowest, length = (int(limit) for limit in rows.limits.aminmax())
        row_limits = None if lowest == length else rows.limits
    mask = None if row_limits is None else additive_mask(row_limits.unsqueeze(0), length, group, cache.dtype)
    keys, values = cache.keys[:, slot : slot + 1, :, :length], cache.values[:, slot : slot + 1, :, :length]
    return AttentionCall(1, count, keys.unbind(0), values.unbind(0), mask=mask)


def padded_call(
    slots: Indices, counts: Indices, offsets: Indices, limits: Indices, cache: KeyValueCache, group: int, spread: int
) -> AttentionCall:
    """Prepare one call for several sequences.

    Sequence i has the flat rows `offsets[i]` to `offsets[i] + counts[i]`. `limits` has an entry for every flat row.
    """
    places, chosen = slot_places(slots, spread)
    num_sequences = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
    num_queries = int(counts.max())
    padded = np.full((num_sequences, num_queries), offsets[0])  # a gap repeats some row; its result is dropped
    padded[places] = np.minimum(np.arange(num_queries), counts[:, None] - 1) + offsets[:, None]
    row_limits = limits[padded]
    length = int(row_limits.max())
    gather = scatter = mask = scattered = None
    if padded.size != len(limits) or (padded.ravel() != np.arange(padded.size)).any():
        gather = torch.from_numpy(padded.ravel()).to(cache.device)
        rows = [place * num_queries + np.arange(count) for place, count in zip(places, counts, strict=True)]
        scatter = torch.from_numpy(np.concatenate(rows)).to(cache.device)
    if (row_limits != length).any():
        mask = additive_mask(torch.from_numpy(row_limits).to(cache.device), length, group, cache.dtype)
    if not isinstance(chosen, slice):
        scattered, chosen = torch.from_numpy(chosen).to(cache.device), slice(None)
    keys, values = cache.keys[:, chosen, :, :length].unbind(0), cache.values[:, chosen, :, :length].unbind(0)
    return AttentionCall(num_sequences, num_queries, keys, values, scattered, gather, scatter, mask)


def padded_groups(counts: Indices) -> list[Indices]:
    """Return the sequences of each call: all short ones together, and each long one alone."""
    long = counts > MAX_PADDED
    if not long.any() or (counts == counts[0]).all():
        return [np.arange(len(counts))]
    short = [] if long.all() else [np.flatnonzero(~long)]
    return [*short, *np.flatnonzero(long).reshape(-1, 1)]


def bounded_groups(counts: Indices, lengths: Indices) -> list[Indices]:
    """Return the sequences of each call: those of similar size share one, so that little of it is padding.

    A call pads every sequence to the maximum number of rows and the maximum length. The padding, in pairs of a row and
    a position, is at most MAX_PADDING of the needed pairs, or FREE_PADDING.
    """
    order = np.lexsort((counts, lengths))[::-1].tolist()
    groups: list[list[int]] = []
    max_rows = needed = 0
    for index in order:
        rows, pairs = int(counts[index]), int(counts[index] * lengths[index])
        if groups:
            padded = (len(groups[-1]) + 1) * max(max_rows, rows) * int(lengths[groups[-1][0]])
            if padded - (needed + pairs) <= max(MAX_PADDING * (needed + pairs), FREE_PADDING):
                groups[-1].append(index)
                max_rows, needed = max(max_rows, rows), needed + pairs
                continue
        groups.append([index])
        max_rows, needed = rows, pairs
    return [np.array(sorted(group)) for group in groups]


def slot_places(slots: Indices, spread: int) -> tuple[Indices, slice | Indices]:
    """Return each sequence's index in the call, and the cache slots of the call.

    Slots that are close together are read in place, with the gaps: attending to a gap costs no more than copying the
    keys and values of another slot. Scattered slots are copied together.
    """
    first, last = int(slots.min()), int(slots.max())
    if last - first < spread * len(slots):
        return slots - first, slice(first, last + 1)
    return np.arange(len(slots)), slots


def additive_mask(limits: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return a mask that is 0 where a row may look and -inf elsewhere: [sequences, 1, queries * group, length].

    limits: [sequences, queries].
    """
    unseen = torch.arange(length, device=limits.device) >= limits.unsqueeze(-1)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=limits.device).masked_fill_(unseen, float("-inf"))
    return mask.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2).unsqueeze(1)
