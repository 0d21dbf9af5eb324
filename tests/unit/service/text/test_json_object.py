"""The values of an object are found as they are written."""

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from service.text.json_object import parse_object, written_values

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PIECES = st.sampled_from(
    ['{"a":', '"b" :', "1e999", "-0.50", "{}", "[1,", "]", "}", ",", " ", '"\\ud800"', '"\\u0061"', "\n"]
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.text(" \n\r\t"))
def test_values_are_the_ones_that_were_written(content: Any, indent: int | None, ascii_only: bool, blanks: str) -> None:
    text = blanks + json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    assert {key: json.loads(value) for key, value in written_values(text).items()} == content
    assert all(value in text for value in written_values(text).values())


@given(st.lists(PIECES, max_size=9).map("".join))
@example('{"a":1e999}')
@example('{"a":1,"\\u0061":{"b" :-0.50}}')
def test_whatever_is_an_object_has_its_values(text: str) -> None:
    content = parse_object(text)
    if content is not None:
        assert {key: json.loads(value) for key, value in written_values(text).items()} == content


def test_numbers_keep_their_digits() -> None:
    digits = "1" * 5000
    assert written_values(f'{{"a": 1.10, "b": {digits}, "c": [1e999]}}') == {"a": "1.10", "b": digits, "c": "[1e999]"}
