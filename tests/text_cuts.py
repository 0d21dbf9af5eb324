"""Cutting a text into pieces at arbitrary places, as tokens and network frames do."""

import itertools
from collections.abc import Iterable


def cut(text: str, places: Iterable[int]) -> list[str]:
    """Pieces that are not empty (of an empty text: none); places beyond the text count from its beginning again."""
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]
