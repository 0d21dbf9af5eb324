"""Grouping of sequences into attention calls."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from transformer.attention import FREE_PADDING, MAX_PADDING, bounded_groups

SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 2048)), min_size=1, max_size=40)


@given(SIZES)
def test_no_call_pads_more_than_its_bound(sizes: list[tuple[int, int]]) -> None:
    counts = np.array([rows for rows, _ in sizes])
    lengths = np.array([max(rows, length) for rows, length in sizes])
    groups = bounded_groups(counts, lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
    for group in groups:
        needed = int((counts[group] * lengths[group]).sum())
        padded = len(group) * int(counts[group].max()) * int(lengths[group].max())
        assert padded - needed <= max(MAX_PADDING * needed, FREE_PADDING)


def test_similar_sequences_share_one_call_and_a_long_one_has_its_own() -> None:
    counts = np.array([13, 14, 268, 15, 13])
    lengths = np.array([250, 260, 268, 240, 255])
    assert [group.tolist() for group in bounded_groups(counts, lengths)] == [[2], [0, 1, 3, 4]]
