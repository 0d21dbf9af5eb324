"""Compare two vocabularies, from their files alone.

Sizes say nothing: Qwen's 151936 and 152064 differ only in padding. Nor do ids: Dream's mask is a real token of Qwen3.
So the comparison is by the token that each id means.

- `identical`: every token of the target has the same id in the drafter, which may have more tokens. Ids pass through.
- `overlapping`: the drafter drafts in the tokens both have (`drafters.diffusion.vocabulary.MappedDrafter`).
- `disjoint`: drafted text is tokenized again for the target (`drafters.diffusion.vocabulary.RetokenizingDrafter`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

VocabularyRelation = Literal["identical", "overlapping", "disjoint"]

MIN_OVERLAP = 0.5  # share of the smaller vocabulary; with less, most of a draft would be cut, so text is better


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """The ids of two vocabularies that mean the same token."""

    relation: VocabularyRelation
    num_target: int  # tokens
    num_drafter: int
    num_shared: int  # tokens in both, under any id
    num_same_id: int  # tokens in both under the same id
    to_drafter: NDArray[np.int32]  # [largest target id + 1] -1: the drafter has no such token
    to_target: NDArray[np.int32]  # [largest drafter id + 1] -1: the target has no such token

    @property
    def overlap(self) -> float:
        """Share of the target's tokens that the drafter has."""
        return self.num_shared / max(self.num_target, 1)


def compare_vocabularies(target: Mapping[str, int], drafter: Mapping[str, int]) -> VocabularyMap:
    """Compare two maps from tokens to ids, added tokens included. Raises ValueError if one is empty."""
    if not target or not drafter:
        raise ValueError("a vocabulary without tokens cannot be compared")
    to_drafter = np.full(max(target.values()) + 1, -1, np.int32)
    to_target = np.full(max(drafter.values()) + 1, -1, np.int32)
    num_same_id = 0
    for token, index in target.items():
        image = drafter.get(token)
        if image is not None:
            to_drafter[index], to_target[image] = image, index
            num_same_id += image == index
    num_shared = int((to_drafter >= 0).sum())
    relation: VocabularyRelation = "disjoint"
    if num_same_id == len(target):
        relation = "identical"
    elif num_shared >= MIN_OVERLAP * min(len(target), len(drafter)):
        relation = "overlapping"
    return VocabularyMap(relation, len(target), len(drafter), num_shared, num_same_id, to_drafter, to_target)
