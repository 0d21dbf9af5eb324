"""Prompt lookup, a baseline without a model: copy what followed the latest earlier match of the text's end."""

import numpy as np

from drafters.base import Tokens

MAX_MATCH = 3  # tokens


def propose(history: Tokens, num_tokens: int, max_match: int = MAX_MATCH) -> tuple[int, ...]:
    """Return up to `num_tokens` tokens that follow the latest earlier match of the text's last `max_match` tokens.

    Without such a match, tries one token less, down to one; without any match, returns nothing. The copy ends where the
    text does: a match close to the end gives few tokens (Saxena's prompt lookup decoding).
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
