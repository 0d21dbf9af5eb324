"""Free drafts at every place of the continuations, as serving makes them: what a drafter with hints learns to improve.

A row's draft at anchor s is what copying and n-grams propose after its first s + 1 tokens; for sampled rows with the
noise that the row was drawn with, which serving knows too (`drafters.coupling`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafters.base import DraftRequest
from drafters.coupling import known_noise
from drafters.policy.policy import MIN_SURVIVAL
from drafters.search.causal_model import CausalModel
from models.training.continuations import Continuations

MAX_HINT = 16  # tokens; blocks are rarely longer
NO_HINT = -1
LEARN_ROWS = 64  # rows that the weights of copying are learned from before the first draft


@dataclass(frozen=True)
class FreeDrafts:
    """`tokens` int16 `[rows, anchors, MAX_HINT]`, NO_HINT behind each draft's end and at anchors inside prompts;
    `promised` float16 `[rows, anchors]`: how many of its tokens it expects to be accepted, by its own confidences.
    """

    tokens: NDArray[np.int16]
    promised: NDArray[np.float16]


@dataclass(frozen=True)
class Lessons:
    """Rows to learn from, and the free drafts at their anchors."""

    data: Continuations
    drafts: FreeDrafts


def free_drafts(causal: CausalModel, data: Continuations) -> FreeDrafts:
    """The free drafts of all anchors from each prompt's last token on."""
    rows, length = data.tokens.shape
    tokens = np.full((rows, length, MAX_HINT), NO_HINT, np.int16)
    promised = np.zeros((rows, length), np.float16)
    texts = data.tokens.astype(np.int32)
    for text in texts[:: max(rows // LEARN_ROWS, 1)]:
        causal.learn([text], [1])
    for row, text in enumerate(texts):
        first, temperature = int(data.prompt_lengths[row]) - 1, float(data.temperatures[row])
        seed = int(data.seeds[row]) or None
        requests = [
            DraftRequest("", text[: anchor + 1], MAX_HINT, None, temperature, seed)
            for anchor in range(first, length - 1)
        ]
        chains = causal.draft(
            [request.tokens for request in requests],
            [MAX_HINT] * len(requests),
            [MIN_SURVIVAL] * len(requests),
            known_noise(requests),
        )
        for anchor, chain in enumerate(chains, start=first):
            tokens[row, anchor, : len(chain.tokens)] = chain.tokens
            promised[row, anchor] = chain.confidences.cumprod().sum()
    return FreeDrafts(tokens, promised)
