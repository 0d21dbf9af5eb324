"""Masked blocks attached to clean text: many draft steps of one sequence in a single forward pass.

A draft of k tokens at anchor s is the clean row s (its logits give token s + 1) and k - 1 mask rows: mask j is at
position s + j and gives token s + j + 1. Clean rows are causal. A mask row sees the clean rows up to its anchor and
every mask row of its own block, as in drafting. With bounded contexts, a row sees only the latest clean rows. (Windows
in serving are nearly the same: they begin somewhere, and grow.)
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_SIZE = 32  # maximum tokens of a draft


@dataclass(frozen=True)
class BlockBatch:
    """The input of one pass: `length` clean rows per sequence, then its mask rows.

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

    `anchors`, `offsets`, `blocks` `[sequences, mask rows]`: the anchor of each row's block, the row's offset in the
    block, and the block's number. `contexts` `[sequences, length + mask rows]`: the maximum number of clean tokens that
    each row sees, up to its own place or its anchor; None: all.
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
    """Draw blocks until `mask_rows` rows are full, with anchors from the last prompt token on.

    Returns anchors, offsets, blocks, each `[sequences, mask_rows]`. Anchors are drawn with `weights`
    `[sequences, length]`, or evenly if None. Anchors too near to the end are drawn evenly again.
    The number of masks per block is geometric; for `long_share` of the blocks it is uniform, so that the drafter also
    learns long drafts.
    """
    sequences = len(prompt_lengths)
    shape = (sequences, mask_rows)
    max_masks = BLOCK_SIZE - 1
    sizes = np.minimum(random.geometric(1 / mean_masks, shape), max_masks)
    sizes = np.where(random.random(shape) < long_share, random.integers(1, max_masks + 1, shape), sizes)
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
    """Return the free draft's tokens for each mask row: `[sequences, mask rows, 2]`, at its own place and the next.

    Taken from `drafts` `[sequences, anchors, max tokens]`. -1 if the draft has no token there, or if that is not among
    the draft's first `known` `[sequences, mask rows]` tokens.
    """
    at = np.arange(len(drafts))[:, None]
    hints = np.full((*anchors.shape, 2), -1, np.int64)
    for side in range(2):
        index = offsets - 1 + side
        is_known = index < np.minimum(known, drafts.shape[2])
        hints[..., side] = np.where(is_known, drafts[at, anchors, np.minimum(index, drafts.shape[2] - 1)], -1)
    return hints
