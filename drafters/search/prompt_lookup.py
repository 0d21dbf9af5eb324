"""Prompt lookup, the model-free baseline: copy what followed the last occurrence of the text's final tokens."""

import numpy as np

from drafters.base import Tokens

MAX_MATCH = 3  # tokens


def propose(history: Tokens, num_tokens: int, max_match: int = MAX_MATCH) -> tuple[int, ...]:
    """Up to `num_tokens` tokens after the most recent earlier match of the last 3 tokens, else 2, else 1; else none.

    The copy ends where the text does: a match close to the end gives few tokens (Saxena's prompt lookup decoding).
    """
    for size in range(min(max_match, len(history) - 1), 0, -1):
        matches = np.ones(len(history) - size, np.bool_)
        for offset in range(size):
            matches &= history[offset : offset + len(matches)] == history[len(history) - size + offset]
        places = np.flatnonzero(matches)
        if len(places):
            start = int(places[-1]) + size
            return tuple(history[start : start + num_tokens].tolist())
    return ()
