"""Keep drafts to a request's structure: draft no token that it refuses, and every token that it forces."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.base import DraftRequest, num_common
from drafters.search.path_search import Path

FORCED_CONFIDENCE = 0.9  # of a token that the structure forces; below 1, as the target may cut the same text otherwise

Floats = NDArray[np.float64]


def mask_logits(logits: Tensor, requests: Sequence[DraftRequest], lengths: Sequence[int]) -> None:
    """Set tokens that structures refuse to -inf, in place: `logits` `[sum of lengths, vocabulary]`.

    Each position assumes that the drafter's best allowed tokens come before it. That is exact for the first position,
    and for the others as long as the search takes those tokens. `keep_to_structure` cuts a path that leaves them.
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
    request: DraftRequest, tokens: tuple[int, ...], confidences: Floats, max_tokens: int
) -> tuple[tuple[int, ...], Floats]:
    """Return the draft's allowed beginning, followed by the tokens that the structure forces; `max_tokens` in all.

    Also return their confidences, given those of the draft `[tokens]`. A request without a structure keeps its draft.
    """
    if request.constraint is None:
        return tokens, confidences
    kept = request.constraint.complete(tokens, max_tokens)
    num_own = num_common(kept, tokens)
    forced = np.full(len(kept) - num_own, FORCED_CONFIDENCE)
    return kept, np.concatenate([confidences[:num_own], forced])


def keep_path_to_structure(request: DraftRequest, path: Path, max_tokens: int) -> Path:
    """Do the same for a path of the search."""
    if request.constraint is None:
        return path
    tokens, confidences = keep_to_structure(request, path.tokens, path.confidences, max_tokens)
    return path._replace(tokens=tokens, confidences=confidences)
