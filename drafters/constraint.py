"""Drafts that keep to a request's structure: what may not be written is not drafted, what must be written is."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.base import DraftRequest
from drafters.search.path_search import Path

FORCED_CONFIDENCE = 0.9  # of a token that the structure leaves no choice about, but for how its text is cut into tokens

Floats = NDArray[np.float64]


def mask_logits(logits: Tensor, requests: Sequence[DraftRequest], lengths: Sequence[int]) -> None:
    """Set what structures refuse to -inf, in place: `logits` `[sum of lengths, vocabulary]`.

    Each position is judged as if the drafter's best allowed tokens stood before it. That is exact for the first one,
    and for the others as long as the search takes those; a path that leaves them is cut by `keep_to_structure`.
    """
    if any(request.constraint is not None for request in requests):
        _mask_constrained(logits, requests, lengths)


@torch.inference_mode()
def _mask_constrained(logits: Tensor, requests: Sequence[DraftRequest], lengths: Sequence[int]) -> None:
    ends = list(accumulate(lengths))
    for request, length, end in zip(requests, lengths, ends, strict=True):
        if request.constraint is None:
            continue
        path: list[int] = []
        for row in range(end - length, end):
            allowed = request.constraint.next_allowed(path)
            if allowed is None or not allowed.any():
                break
            refused = torch.ones(logits.shape[1], dtype=torch.bool)
            width = min(len(allowed), logits.shape[1])
            refused[:width] = torch.from_numpy(~allowed[:width])
            logits[row].masked_fill_(refused.to(logits.device), -torch.inf)
            path.append(int(logits[row].argmax()))


def keep_to_structure(
    request: DraftRequest, tokens: tuple[int, ...], confidences: Floats, most: int
) -> tuple[tuple[int, ...], Floats]:
    """The draft's allowed beginning, and after it up to `most` tokens in all that the structure leaves no choice about.

    `confidences` `[tokens]` go with the tokens. A request without a structure keeps its draft.
    """
    if request.constraint is None:
        return tokens, confidences
    kept = request.constraint.complete(tokens, most)
    num_own = next(
        (i for i, (a, b) in enumerate(zip(kept, tokens, strict=False)) if a != b), min(len(kept), len(tokens))
    )
    forced = np.full(len(kept) - num_own, FORCED_CONFIDENCE)
    return kept, np.concatenate([confidences[:num_own], forced])


def keep_path_to_structure(request: DraftRequest, path: Path, most: int) -> Path:
    """The same for what a search has found."""
    if request.constraint is None:
        return path
    tokens, confidences = keep_to_structure(request, path.tokens, path.confidences, most)
    return path._replace(tokens=tokens, confidences=confidences)
