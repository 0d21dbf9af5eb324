"""The lattice: candidates by mass against a plain sort, end tokens, rows without a usable number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.search.causal_model import CausalModel
from drafters.search.kernels.lattice import new_select_workspace, select_row
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.path_search import PathSearch


def random_logits(seed: int, rows: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * scale


def select(lattice: DraftLattice, row: int) -> tuple[list[int], float]:
    """Return a row's candidates and its log normaliser, from the kernel that the search uses."""
    logits = lattice.logits[row]
    tokens = np.empty(lattice.max_candidates + len(lattice.end_tokens), np.int32)
    width, log_normaliser = select_row(
        logits, lattice.candidate_mass, lattice.max_candidates, lattice.end_tokens, new_select_workspace(len(logits)),
        tokens,
    )  # fmt: skip
    return tokens[:width].tolist(), float(log_normaliser)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 300]),
    rows=st.integers(1, 5),
    mass=st.sampled_from([0.0, 0.5, 0.8, 0.99, 1.0]),
    max_candidates=st.integers(1, 20),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_candidates_are_the_smallest_top_set_that_reaches_the_mass(
    seed: int, vocabulary: int, rows: int, mass: float, max_candidates: int, scale: float
) -> None:
    logits = random_logits(seed, rows, vocabulary, scale)
    lattice = DraftLattice.from_logits(logits, [rows], LatticeOptions(mass, max_candidates))
    log_probs = torch.log_softmax(logits.double(), -1).numpy()
    for row in range(rows):
        order = np.argsort(-logits[row].numpy(), kind="stable")
        candidates, log_normaliser = select(lattice, row)
        width = len(candidates)
        assert candidates == order[:width].tolist()
        np.testing.assert_allclose(
            lattice.logits[row, candidates] - log_normaliser, log_probs[row, order[:width]], atol=2e-5
        )
        reached = np.exp(log_probs[row, order]).cumsum()
        assert 1 <= width <= min(max_candidates, vocabulary)
        if width < min(max_candidates, vocabulary):
            assert reached[width - 1] >= mass - 1e-5
        if width > 1:
            assert reached[width - 2] < mass + 1e-5


def test_the_log_probability_of_any_token_matches_log_softmax() -> None:
    """Also of tokens that are no candidates: here the causal model proposes them by copying the text."""
    logits = random_logits(0, 3, 1000)
    lattice = DraftLattice.from_logits(logits, [1, 2], LatticeOptions(0.0, 1))
    search = PathSearch(CausalModel(1000), lattice_weight=0.0)
    texts = [np.array(copied * 3, np.int32) for copied in ([0, 1, 2], [999, 500, 3])]
    first, second = search.search(texts, lattice)
    expected = torch.log_softmax(logits, -1)
    assert (first.tokens, second.tokens) == ((0,), (999, 500))
    found = [*first.log_lattice, *second.log_lattice]
    for row, token in ((0, 0), (1, 999), (2, 500)):
        assert token not in select(lattice, row)[0]
        assert found[row] == pytest.approx(float(expected[row, token]), abs=1e-5)


def test_end_tokens_are_always_candidates_with_their_own_log_probability() -> None:
    logits = random_logits(1, 4, 50)
    logits[:, 7] = -9.0
    logits[0, 7] = 30.0  # a top token already: not twice
    lattice = DraftLattice.from_logits(logits, [4], LatticeOptions(0.8, 3, end_tokens=(7, 9, 4000)))
    for row in range(4):
        kept, log_normaliser = select(lattice, row)
        assert kept.count(7) == 1
        assert kept.count(9) == 1
        expected = torch.log_softmax(logits[row], -1)[7]
        assert lattice.logits[row, 7] - log_normaliser == pytest.approx(float(expected), abs=1e-5)


def test_excluded_tokens_are_never_candidates() -> None:
    logits = torch.full((2, 40), float("-inf"))
    logits[:, 5], logits[:, 6] = 1.0, 0.0
    lattice = DraftLattice.from_logits(logits, [2], LatticeOptions(1.0, 10, end_tokens=(3,)))
    assert [select(lattice, row)[0] for row in range(2)] == [[5, 6], [5, 6]]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_rows_without_a_finite_maximum_have_no_candidates(value: float) -> None:
    logits = random_logits(2, 3, 130)
    logits[1] = value
    lattice = DraftLattice.from_logits(logits, [3], LatticeOptions(end_tokens=(0,)))
    assert select(lattice, 1)[0] == []
    assert select(lattice, 0)[0]
    assert select(lattice, 2)[0]


def test_not_a_number_among_numbers_is_no_candidate() -> None:
    logits = random_logits(3, 1, 130)
    logits[0, ::2] = float("nan")
    lattice = DraftLattice.from_logits(logits, [1], LatticeOptions(1.0, 100))
    kept, log_normaliser = select(lattice, 0)
    assert len(kept) == 65
    assert all(token % 2 == 1 for token in kept)
    expected = torch.logsumexp(logits[0, 1::2], 0)
    assert log_normaliser == pytest.approx(float(expected), abs=1e-5)


def test_lengths_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match="sum to 3 rows"):
        DraftLattice.from_logits(torch.zeros(2, 5), [1, 2], LatticeOptions())
    with pytest.raises(ValueError, match="candidate_mass"):
        LatticeOptions(candidate_mass=1.5)
    with pytest.raises(ValueError, match="max_candidates"):
        LatticeOptions(max_candidates=0)


def test_no_rows_give_an_empty_lattice() -> None:
    lattice = DraftLattice.from_logits(torch.zeros(0, 5), [0, 0], LatticeOptions())
    assert lattice.num_requests == 2
    assert lattice.max_length == 0
