"""Prompt lookup: compared with its definition, and edge cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafters.search.prompt_lookup import propose


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 6))
def test_copies_what_followed_the_most_recent_longest_match(text: list[int], length: int) -> None:
    expected: list[int] = []
    for size in (3, 2, 1):
        starts = [at for at in range(len(text) - size) if len(text) > size and text[at : at + size] == text[-size:]]
        if starts:
            expected = text[starts[-1] + size :][:length]
            break
    assert list(propose(np.array(text, np.int32), length)) == expected


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]])
def test_nothing_is_proposed_without_a_match(text: list[int]) -> None:
    assert propose(np.array(text, np.int32), 5) == ()
