"""Cut a text into pieces at arbitrary places, as tokens and network frames do."""

import itertools
from collections.abc import Iterable


def cut(text: str, places: Iterable[int]) -> list[str]:
    """Return the non-empty pieces; none for an empty text. Places beyond the text wrap around to its beginning."""
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]
