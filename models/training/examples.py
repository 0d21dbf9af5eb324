"""The inputs of the drafter's training steps: rows of text with masked blocks attached, as in drafting.

Each clean row also gets the target's final hidden state that its token was predicted from. The target has computed it
anyway when the token is committed (as in EAGLE, arXiv 2401.15077). Each mask also gets the free draft's tokens
(`models.training.hints`), so that the drafter improves on that draft. Labels are the target's own distributions,
sharpened; each continuation stores their most probable tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.training.blocks import BlockBatch, attach_blocks, draw_blocks, hints_of
from models.training.drafter import DrafterRecipe
from models.training.hints import MAX_HINT, Lessons


@dataclass(frozen=True)
class Example:
    """The input of one step; for every row from the first labelled one on, its label distribution and its weight."""

    batch: BlockBatch
    features: torch.Tensor
    hints: torch.Tensor
    label_ids: torch.Tensor
    label_shares: torch.Tensor
    weights: torch.Tensor


def examples(
    lessons: Lessons,
    recipe: DrafterRecipe,
    mask_token_ids: torch.Tensor,
    first_step: int,
    seed: int,
) -> Iterator[Example]:
    """Yield the inputs of the steps from `first_step` on, forever. Each depends on the seed and the step alone."""
    rows = len(lessons.data.tokens)
    per_epoch = rows // recipe.sequences
    step = first_step
    while True:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        chosen = np.sort(order[at * recipe.sequences : (at + 1) * recipe.sequences])
        yield _example(lessons, chosen, recipe, mask_token_ids, np.random.default_rng([seed, 1, step]))
        step += 1


def _example(
    lessons: Lessons,
    chosen: np.ndarray,
    recipe: DrafterRecipe,
    mask_token_ids: torch.Tensor,
    random: np.random.Generator,
) -> Example:
    data, drafts = lessons.data, lessons.drafts
    length = data.tokens.shape[1]
    prompt_lengths = data.prompt_lengths[chosen].astype(np.int64)
    weakness = (1 - recipe.weak_share) + recipe.weak_share * 2 / (1.0 + drafts.promised[chosen].astype(float)) ** 2
    drawn = draw_blocks(
        prompt_lengths, length, recipe.mask_rows, recipe.mean_masks, recipe.long_share, random, weakness
    )
    hints = torch.from_numpy(hints_of(drafts.tokens[chosen], *drawn[:2], known_hints(drawn[2], recipe, random)))
    anchors, offsets, blocks = map(torch.from_numpy, drawn)
    tokens = torch.from_numpy(data.tokens[chosen].astype(np.int64))
    contexts = torch.from_numpy(drawn_contexts(length, drawn[2], recipe, random))
    batch = attach_blocks(tokens, anchors, offsets, blocks, mask_token_ids, contexts)
    first = recipe.first_labelled
    labels = (batch.positions[:, first:] + 1).clamp(max=length - 1)[:, :, None].expand(-1, -1, data.candidates.shape[2])
    ids = torch.from_numpy(data.candidates[chosen].astype(np.int64)).gather(1, labels)
    logs = torch.from_numpy(data.log_probabilities[chosen].astype(np.float32)).gather(1, labels)
    clean = torch.arange(first, length - 1) + 1 >= torch.from_numpy(prompt_lengths)[:, None]
    clean_weights = torch.where(clean, 1.0, recipe.prompt_weight)
    mask_weights = recipe.offset_decay**offsets
    clean_weights = clean_weights / clean_weights.sum()
    mask_weights = mask_weights / mask_weights.sum() * recipe.mask_weight
    weights = torch.cat([clean_weights, torch.zeros(len(chosen), 1), mask_weights], 1)
    features = torch.from_numpy(data.features[chosen].astype(np.float32))
    missing = missing_features(len(chosen), length, recipe.unconditioned_share, random)
    features.masked_fill_(torch.from_numpy(missing)[:, :, None], 0.0)
    return Example(batch, features, hints, ids, (logs / recipe.label_temperature).softmax(-1), weights)


def missing_features(sequences: int, length: int, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the hidden states to withhold, `[sequences, length]`: none, those up to a random token, or all.

    In serving they are missing for a prefix that the verifier did not compute itself.
    """
    chosen = random.random(sequences) < share
    ends = np.where(random.random(sequences) < 0.5, length, random.integers(length, size=sequences))
    return np.arange(length) < np.where(chosen, ends, 0)[:, None]


def drawn_contexts(
    length: int, blocks: NDArray[np.int64], recipe: DrafterRecipe, random: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the number of clean tokens that each row sees: the maximum for clean rows, any for each block."""
    min_context, max_context = recipe.contexts
    clean = np.full((len(blocks), length), max_context)
    of_block = random.integers(min_context, max_context + 1, blocks.shape)
    contexts = np.concatenate([clean, np.take_along_axis(of_block, blocks, 1)], 1)
    contexts[random.random(len(blocks)) < recipe.whole_share] = length
    return contexts


def known_hints(blocks: NDArray[np.int64], recipe: DrafterRecipe, random: np.random.Generator) -> NDArray[np.int64]:
    """Draw how many tokens of the free draft each row's block gets: none, a random number, or (mostly) all."""
    chance = random.random(blocks.shape)
    cut = random.integers(1, MAX_HINT + 1, blocks.shape)
    counts = np.where(chance < 2 * recipe.unhinted_share, cut, MAX_HINT)
    counts = np.where(chance < recipe.unhinted_share, 0, counts)
    return np.take_along_axis(counts, blocks, 1)
