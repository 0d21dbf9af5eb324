"""Turn a fuzzer's bytes into values, deterministically, so that an input can be replayed without the fuzzer."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class ByteReader:
    """Reads bytes from the front; zeros once nothing is left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def is_empty(self) -> bool:
        return self._position >= len(self._data)

    def byte(self) -> int:
        if self.is_empty:
            return 0
        self._position += 1
        return self._data[self._position - 1]

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def pick(self, choices: Sequence[Item]) -> Item:
        return choices[self.byte() % len(choices)]

    def take(self, count: int) -> bytes:
        taken = self._data[self._position : self._position + count]
        self._position += len(taken)
        return taken

    def text(self, max_bytes: int) -> str:
        return self.take(self.byte() % (max_bytes + 1)).decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.take(len(self._data))


def cut(text: str, reader: ByteReader, max_pieces: int = 12) -> list[str]:
    """Cut `text` into pieces at the places that the bytes name."""
    places = sorted(reader.byte() % (len(text) + 1) for _ in range(reader.byte() % max_pieces))
    bounds = [0, *places, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]
