"""JSON objects: finds where one ends in a text that comes in pieces, and reads its values as they are written."""

import json
import re
from typing import Any

import pydantic_core

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string
_BETWEEN = re.compile(r"[ \t\r\n:,0-9+\-.eEtrufalsn]*")  # between strings and brackets
_CLOSING = {"{": "}", "[": "]"}
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # numbers are not looked at


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object of bounded nesting; None if the text is no such object."""
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def written_values(text: str) -> dict[str, str]:
    """Return the values of an object that `parse_object` accepts, as they are written: numbers keep all digits."""
    values = {}
    position = _end(_BLANK, text, 0) + 1
    while text[position := _end(_BLANK, text, position)] != "}":
        key, position = _DECODER.raw_decode(text, position)
        begin = _end(_BLANK, text, _end(_BLANK, text, position) + 1)  # after the colon
        _, end = _DECODER.raw_decode(text, begin)
        values[key] = text[begin:end]
        position = _end(_BLANK, text, end)
        position += text[position] == ","
    return values


class JsonObjectScanner:
    """Finds the end of an object by its strings and brackets alone. A parser must check the rest."""

    def __init__(self) -> None:
        self.position = 0  # of the next character to look at
        self.is_broken = False  # the character at `position` cannot be part of an object
        self._open: list[str] = []  # closing brackets that are missing
        self._is_in_string = False
        self._is_escaped = False

    def scan(self, text: str, begin: int) -> int:
        """Return where the object that begins at `begin` ends; -1 if it has not ended yet, or is broken.

        Call it again with the same text and more of it.
        """
        position = max(self.position, begin)
        while position < len(text) and not self.is_broken:
            if self._is_escaped:
                self._is_escaped = False
                self.is_broken = text[position] < " "
                position += not self.is_broken
            elif self._is_in_string:
                position = _end(_PLAIN, text, position)
                if position < len(text):
                    position = self._leave_string(text[position], position)
            else:
                position = _end(_BETWEEN, text, position) if self._open else position
                if position < len(text):
                    position = self._bracket(text[position], position)
                    if not self._open and not self.is_broken:
                        self.position = position
                        return position
        self.position = position
        return -1

    def _leave_string(self, character: str, position: int) -> int:
        if character == '"':
            self._is_in_string = False
        elif character == "\\":
            self._is_escaped = True
        else:
            self.is_broken = True  # a control character
            return position
        return position + 1

    def _bracket(self, character: str, position: int) -> int:
        if character in _CLOSING and (self._open or character == "{"):
            self._open.append(_CLOSING[character])
        elif character == '"' and self._open:
            self._is_in_string = True
        elif self._open and character == self._open[-1]:
            self._open.pop()
        else:
            self.is_broken = True
            return position
        return position + 1


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return position if found is None else found.end()
