"""Stop strings are found where the first of them ends, however the text is cut."""

from service.text.detokenizer import StopMatcher
from tests.fuzz.reader import ByteReader, cut

SEEDS = [
    bytes([0, 1, 3, 97, 98, 99, 0, 2, 3, 5]) + b"xxabcabcyy",
    bytes([1, 3, 2, 97, 97, 3, 97, 97, 98, 1, 98, 4, 1, 2, 3, 4]) + b"aaabaab",
]


def expected(stops: list[str], text: str, *, include: bool) -> tuple[str, str | None]:
    """Search character by character for the first end of any stop string; of several, the longest counts."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def check(data: bytes) -> None:
    reader = ByteReader(data)
    include = reader.flag()
    stops = [reader.text(6) or "a" for _ in range(1 + reader.byte() % 4)]
    places = reader.take(8)
    text = reader.rest()[:200].decode("utf-8", "replace")
    final, stop = expected(stops, text, include=include)
    matcher, shown, found = StopMatcher(stops, include=include), "", None
    for piece in cut(text, ByteReader(places)):
        matched = matcher.push(piece)
        shown, found = shown + matched.text, matched.stop
        assert final.startswith(shown), "text was shown that is not part of the answer"
        if found is not None:
            break
    else:
        shown += matcher.release()
    assert (shown, found) == (final, stop)
