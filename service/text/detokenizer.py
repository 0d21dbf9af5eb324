"""Turns tokens into text as they come, and finds stop strings in it."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from service.text.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """Turns tokens into text, holding back a character until all of its bytes are there.

    All returned pieces joined, `finish()` included, are `tokenizer.decode` of all tokens.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, kept: frozenset[int] = frozenset()
    ) -> None:
        """kept: special tokens that are shown all the same."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """Return U+FFFD for an unfinished character, if there is one."""
        return self._decoder.decode(b"", True)


@dataclass(frozen=True, slots=True)
class Matched:
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Holds back text that may be the beginning of a stop string. If several stop strings end at the same character, the
    longest counts.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        """`include`: whether the stop string itself is shown. No stop string may be empty."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> Matched:
        if not self._stops:
            return Matched(piece)
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return Matched(text[: end if self._include else start], stop)
        keep = self._length_to_hold(text)
        self._held = text[len(text) - keep :]
        return Matched(text[: len(text) - keep])

    def release(self, piece: str = "") -> str:
        """Give up matching so far. Returns the text that was held back, and `piece`."""
        text = self._held + piece
        self._held = ""
        return text

    def _length_to_hold(self, text: str) -> int:
        max_length = max(len(stop) for stop in self._stops) - 1
        for length in range(min(max_length, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
