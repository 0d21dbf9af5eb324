"""Tool calls are the same however the text is cut. Whole ones are JSON; everything else is content."""

import json
from collections.abc import Iterable
from typing import Any

from service.text.tool_calls import ToolCallParser, ToolCallStyle
from tests.fuzz.reader import ByteReader, cut

NAMES = ("get", "get_weather")
WORDS = (
    "<tool_call>",
    "</tool_call>",
    '{"name": "get", "arguments": ',
    '{"name":"get_weather","parameters":',
    '{"arguments": {"a": 1}, "name": "get"}',
    '{"a": [1, "}"]}',
    '"name"',
    '"arguments"',
    '"get"',
    '["get"]',
    "<|python_tag|>",
    *'{}[]":,; \n\\',
    "tru",
    "e",
    "1",
    "\x00",
    "é",
    "1e999",
)
SEEDS = [
    bytes([0, 0, 3, 5, 9, 60, 0, 2, 5, 11, 1]),
    bytes([1, 1, 4, 5, 9, 60, 7, 2, 5, 11, 16, 3, 5, 11]),
    bytes([2, 2, 1, 30, 0, 4, 1, 0, 10, 6, 14, 8, 15, 7, 14, 10, 11, 11, 1]),
]


def read(
    style: ToolCallStyle, pieces: Iterable[str], *, eager: bool = False, max_calls: int | None = None
) -> tuple[str, list[tuple[str, str]], int]:
    """Return the content, the calls, and how many of them are complete."""
    parser = ToolCallParser(style, NAMES, eager=eager, max_calls=max_calls)
    content, calls = "", list[tuple[str, str]]()
    for parsed in [*map(parser.push, pieces), parser.finish()]:
        content += parsed.content
        for call in parsed.calls:
            if call.name is not None:
                assert call.index == len(calls)
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.arguments)
    return content, calls, parser.num_calls


def refuse(constant: str) -> Any:
    """Refuse Infinity and NaN, which Python's parser accepts."""
    raise AssertionError(f"{constant} is not JSON")


def check_told(style: ToolCallStyle, text: str, max_calls: int | None = None) -> None:
    """Assert that whole calls are JSON, that texts without calls are content, and that a stream gives the same."""
    content, calls, num_complete = read(style, [text], max_calls=max_calls)
    assert num_complete == len(calls)
    for name, arguments in calls:
        assert name in NAMES
        assert isinstance(json.loads(arguments, parse_constant=refuse), dict)
    if not calls:
        assert content == text
    eager = read(style, [text], eager=True, max_calls=max_calls)
    if eager[2] == len(eager[1]):  # no call is broken
        assert eager == (content, calls, num_complete)


def check(data: bytes) -> None:
    reader = ByteReader(data)
    style: ToolCallStyle = reader.pick(("hermes", "llama3_json"))
    eager, max_calls = reader.flag(), reader.pick((None, 1))
    places = reader.take(reader.byte() % 12)
    words = []
    while not reader.is_empty:
        number = reader.byte()
        words.append(WORDS[number] if number < len(WORDS) else chr(number))
    text = "".join(words)[:300]
    whole = read(style, [text], eager=eager, max_calls=max_calls)
    assert read(style, cut(text, ByteReader(places)), eager=eager, max_calls=max_calls) == whole
    assert read(style, list(text), eager=eager, max_calls=max_calls) == whole
    check_told(style, text, max_calls)
