"""Masked blocks attached to clean text: many draft steps of one sequence in a single forward pass.

A draft of k tokens at anchor s is the clean row s (its logits give token s + 1) and k - 1 mask rows: mask j stands at
position s + j and gives token s + j + 1. Clean rows are causal; a mask row sees the clean rows up to its anchor and
every mask row of its own block, as it will when it drafts. Where contexts are bounded, a row sees the latest clean rows
(serving has windows, which begin somewhere and grow: nearly the same).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_SIZE = 32  # most tokens of a draft


@dataclass(frozen=True)
class BlockBatch:
    """Input of one pass: `length` clean rows per sequence, then its mask rows.

    `token_ids`, `positions` int64 `[sequences, rows]`; `visible` bool `[sequences, 1, rows, rows]`;
    `anchors`, `offsets` int64 `[sequences, mask rows]` (offset j of mask j, from 1).
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    anchors: torch.Tensor
    offsets: torch.Tensor


def attach_blocks(
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    offsets: torch.Tensor,
    blocks: torch.Tensor,
    mask_token_ids: torch.Tensor,
    contexts: torch.Tensor | None = None,
) -> BlockBatch:
    """Attach mask rows to `tokens` `[sequences, length]`.

    `anchors`, `offsets`, `blocks` `[sequences, mask rows]`: where each row's block hangs, its place in it, its number.
    `contexts` `[sequences, length + mask rows]`: how many clean tokens each row sees at most, up to its own place or
    its anchor; None: all.
    """
    length = tokens.shape[1]
    masks = mask_token_ids[(offsets - 1).clamp(min=0)]
    clean = torch.arange(length).expand(len(tokens), length)
    distances = torch.cat([clean, anchors], 1)[:, :, None] - torch.arange(length)
    sees_clean = distances >= 0
    if contexts is not None:
        sees_clean &= distances < contexts[:, :, None]
    own = torch.cat([torch.full_like(clean, -1), blocks], 1)
    sees_masks = own[:, :, None] == blocks[:, None, :]
    return BlockBatch(
        torch.cat([tokens, masks], 1),
        torch.cat([clean, anchors + offsets], 1),
        torch.cat([sees_clean, sees_masks], 2)[:, None],
        anchors,
        offsets,
    )


def draw_blocks(
    prompt_lengths: NDArray[np.int64],
    length: int,
    mask_rows: int,
    mean_masks: float,
    long_share: float,
    random: np.random.Generator,
    weights: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw blocks until `mask_rows` rows are full; anchors from the last prompt token on.

    Returns anchors, offsets, blocks, each `[sequences, mask_rows]`. Anchors are drawn by `weights`
    `[sequences, length]`, evenly without; those too near to the end are drawn evenly again.

    A block's number of masks is geometric, but uniform for `long_share` of them, so that long drafts are seen too.
    """
    sequences = len(prompt_lengths)
    shape = (sequences, mask_rows)
    most = BLOCK_SIZE - 1
    sizes = np.minimum(random.geometric(1 / mean_masks, shape), most)
    sizes = np.where(random.random(shape) < long_share, random.integers(1, most + 1, shape), sizes)
    ends = sizes.cumsum(1)
    rows = np.arange(mask_rows)
    blocks = (rows[None, :, None] >= ends[:, None, :]).sum(2)
    at = np.arange(sequences)[:, None]
    offsets = rows[None] - (ends - sizes)[at, blocks] + 1
    lowest = prompt_lengths[:, None] - 1
    anchors = lowest + np.floor(random.random(shape) * (length - 1 - sizes - lowest)).astype(np.int64)
    if weights is not None:
        sums = np.where(np.arange(length) >= lowest, weights, 0.0).cumsum(1)
        sums /= sums[:, -1:]
        wanted = np.stack([np.searchsorted(row, random.random(mask_rows)) for row in sums])
        anchors = np.where(wanted < length - 1 - sizes, wanted, anchors)
    return anchors[at, blocks], offsets, blocks


def hints_of(
    drafts: NDArray[np.int16],
    anchors: NDArray[np.int64],
    offsets: NDArray[np.int64],
    known: NDArray[np.int64],
) -> NDArray[np.int64]:
    """What a free draft says at each mask row: `[sequences, mask rows, 2]`, of the mask's own place and of the next.

    Taken from `drafts` `[sequences, anchors, longest]`; -1 where it says nothing, or no more than its first `known`
    `[sequences, mask rows]` tokens shall be known.
    """
    at = np.arange(len(drafts))[:, None]
    hints = np.full((*anchors.shape, 2), -1, np.int64)
    for side in range(2):
        index = offsets - 1 + side
        is_known = index < np.minimum(known, drafts.shape[2])
        hints[..., side] = np.where(is_known, drafts[at, anchors, np.minimum(index, drafts.shape[2] - 1)], -1)
    return hints
