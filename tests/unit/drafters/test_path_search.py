"""The path search: compared with trying every path, and its properties."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.search.causal_model import CausalModel
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.ngram import NgramModel
from drafters.search.path_search import LOG_FLOOR, Path, PathSearch
from models.training.ngram import fit_ngram
from tests.unit.drafters.test_causal_model import mixture
from tests.unit.drafters.test_lattice import select

VOCABULARY = 5
END = 4


@pytest.fixture(scope="module")
def ngram() -> NgramModel:
    text = np.random.default_rng(0).choice(VOCABULARY, 2_000, p=[0.4, 0.3, 0.15, 0.1, 0.05]).astype(np.int32)
    text[::3] = (text[1::3][0] + text[2::3][0]) % VOCABULARY
    return fit_ngram([text], VOCABULARY, order=3)


def random_logits(seed: int, rows: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * 3


def mean_score(
    path: Sequence[int], history: list[int], log_probs: torch.Tensor, causal: CausalModel, weight: float
) -> float:
    total = 0.0
    for step, token in enumerate(path):
        probability = float(mixture(causal, history + list(path[:step]))[token])
        total += weight * max(float(log_probs[step, token]), LOG_FLOOR)
        total += (1 - weight) * max(float(np.log(probability)), LOG_FLOOR)
    return total / len(path)


def all_paths(length: int) -> list[tuple[int, ...]]:
    """Every path that ends with its first end token or at `length`."""
    others = [token for token in range(VOCABULARY) if token != END]
    whole = list(itertools.product(others, repeat=length))
    return whole + [(*path, END) for size in range(length) for path in itertools.product(others, repeat=size)]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    history=st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
    length=st.integers(1, 4),
    weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    use_copy=st.booleans(),
)
def test_a_wide_search_finds_the_best_of_all_paths(
    ngram: NgramModel, seed: int, history: list[int], length: int, weight: float, use_copy: bool
) -> None:
    logits = random_logits(seed, length)
    causal = CausalModel(VOCABULARY, ngram, use_copy=use_copy)
    search = PathSearch(causal, (END,), beam_width=4**4, lattice_weight=weight)
    lattice = DraftLattice.from_logits(logits, [length], LatticeOptions(1.0, VOCABULARY, (END,)))
    (path,) = search.search([np.array(history, np.int32)], lattice)
    log_probs = torch.log_softmax(logits.double(), -1)
    scores = {candidate: mean_score(candidate, history, log_probs, causal, weight) for candidate in all_paths(length)}
    assert path.score == pytest.approx(max(scores.values()), abs=1e-3)
    assert scores[path.tokens] == pytest.approx(path.score, abs=1e-3)
    mixed = weight * path.log_lattice + (1 - weight) * path.log_causal
    assert path.score == pytest.approx(mixed.mean(), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_without_a_causal_model_the_search_is_the_raw_argmax(seed: int, lengths: list[int]) -> None:
    logits = random_logits(seed, sum(lengths), 100)
    lattice = DraftLattice.from_logits(logits, lengths, LatticeOptions())
    search = PathSearch(CausalModel(100, use_copy=False), (), lattice_weight=1.0)
    paths = search.search([np.zeros(3, np.int32)] * len(lengths), lattice)
    expected = torch.split(logits.argmax(-1), lengths)
    for path, best in zip(paths, expected, strict=True):
        assert path.tokens == tuple(best.tolist())
        assert path.gain == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["search", "argmax"]))
def test_a_batch_gives_what_single_requests_give(ngram: NgramModel, seed: int, mode: str) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 8, 5).tolist()
    histories = [random.integers(0, VOCABULARY, int(size)).astype(np.int32) for size in random.integers(0, 60, 5)]
    logits = random_logits(seed, sum(lengths))
    causal = CausalModel(VOCABULARY, ngram)
    search = PathSearch(causal, (END,), mode="search" if mode == "search" else "argmax")
    options = LatticeOptions(0.8, 3, (END,))
    together = search.search(histories, DraftLattice.from_logits(logits, lengths, options))
    start = 0
    for history, length, path in zip(histories, lengths, together, strict=True):
        rows = logits[start : start + length]
        (alone,) = search.search([history], DraftLattice.from_logits(rows, [length], options))
        start += length
        assert_same(alone, path)
        assert len(path.tokens) <= length
        assert path.gain >= 0


def assert_same(one: Path, other: Path) -> None:
    assert (one.tokens, one.score, one.raw_score, one.raw_length) == (
        other.tokens, other.score, other.raw_score, other.raw_length,
    )  # fmt: skip
    assert one.lattice_width == pytest.approx(other.lattice_width)
    for name in ("confidences", "log_lattice", "log_causal"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(("value", "is_broken"), [(float("nan"), True), (float("inf"), True), (float("-inf"), False)])
def test_a_row_that_ends_the_draft_is_told_apart_from_a_broken_one(value: float, is_broken: bool) -> None:
    search, history = PathSearch(CausalModel(VOCABULARY)), [np.zeros(1, np.int32)]
    logits = torch.zeros(3, VOCABULARY)
    logits[1] = value
    for _ in range(2):
        lattice = DraftLattice.from_logits(logits, [3], LatticeOptions())
        if is_broken:
            with pytest.raises(ValueError, match="not numbers"):
                search.search(history, lattice)
        else:
            assert len(search.search(history, lattice)[0].tokens) == 1
        logits[1, :-1] = -torch.inf  # all but one token refused by a structure


def test_the_raw_length_counts_tokens_before_the_first_end_token() -> None:
    logits = torch.zeros(6, VOCABULARY)
    for row, token in enumerate([1, 2, 0, END, 1, END]):
        logits[row, token] = 9.0
    lattice = DraftLattice.from_logits(logits, [3, 3], LatticeOptions())
    paths = PathSearch(CausalModel(VOCABULARY), (END,), mode="argmax").search([np.zeros(0, np.int32)] * 2, lattice)
    assert [path.raw_length for path in paths] == [3, 0]
    assert [path.tokens for path in paths] == [(1, 2, 0), (END,)]


def test_an_improbable_end_token_does_not_end_the_draft_but_a_probable_one_does() -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[:, 1] = 4.0
    search = PathSearch(CausalModel(VOCABULARY, use_copy=False), (END,))
    options = LatticeOptions(end_tokens=(END,))
    history = [np.zeros(2, np.int32)]
    assert search.search(history, DraftLattice.from_logits(logits, [4], options))[0].tokens == (1, 1, 1, 1)
    logits[2, END] = 12.0
    assert search.search(history, DraftLattice.from_logits(logits, [4], options))[0].tokens == (1, 1, END)


def test_the_text_overrules_a_hesitant_drafter() -> None:
    """The copied token joins although it is no candidate of the lattice."""
    history = np.array([7, 8, 9, 10, 11] * 4, np.int32)
    logits = torch.zeros(3, 50)
    logits[:, 20] = 1.0
    lattice = DraftLattice.from_logits(logits, [3], LatticeOptions(0.01, 1))
    (path,) = PathSearch(CausalModel(50)).search([history], lattice)
    assert [select(lattice, row)[0] for row in range(3)] == [[20], [20], [20]]
    assert path.tokens == (7, 8, 9)
    assert path.gain > 1.0


def test_without_proposals_the_text_only_scores_the_candidates() -> None:
    """Of two equally likely candidates the copied one is taken; a token that is no candidate cannot be."""
    history = np.array([7, 8, 9, 10, 11] * 4, np.int32)
    logits = torch.zeros(3, 50)
    logits[:, 20] = 9.0
    logits[0, 7], logits[1, 8] = 9.0, 9.0
    lattice = DraftLattice.from_logits(logits, [3], LatticeOptions(0.9, 2))
    (path,) = PathSearch(CausalModel(50), use_proposals=False).search([history], lattice)
    assert path.tokens == (7, 8, 20)
    assert 9 not in select(lattice, 2)[0]
    (alone,) = PathSearch(CausalModel(50, use_copy=False), use_proposals=False).search([history], lattice)
    assert alone.gain == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 7), beam_width=st.integers(1, 3), joins=st.booleans())
def test_a_path_holds_the_causal_models_log_probabilities(
    ngram: NgramModel, seed: int, length: int, beam_width: int, joins: bool
) -> None:
    """For every beam, and however its copies were followed: equal to computing them token by token from the start."""
    random = np.random.default_rng(seed)
    history = np.tile(random.integers(0, VOCABULARY, 6), 3)[: int(random.integers(1, 19))].astype(np.int32)
    causal = CausalModel(VOCABULARY, ngram)
    search = PathSearch(causal, (END,), beam_width, lattice_weight=0.3, use_proposals=joins)
    lattice = DraftLattice.from_logits(random_logits(seed, length), [length], LatticeOptions(0.8, 3, (END,)))
    (path,) = search.search([history], lattice)
    for step, token in enumerate(path.tokens):
        probability = mixture(causal, [*history.tolist(), *path.tokens[:step]])[token]
        assert path.log_causal[step] == pytest.approx(max(float(np.log(probability)), LOG_FLOOR), abs=1e-4)
        assert joins or token in select(lattice, step)[0]


def test_confidences_are_shares_of_the_candidates() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    lattice = DraftLattice.from_logits(logits, [1], LatticeOptions(1.0, 3))
    search = PathSearch(CausalModel(3, use_copy=False), lattice_weight=1.0)
    (path,) = search.search([np.zeros(0, np.int32)], lattice)
    assert path.confidences[0] == pytest.approx(float(torch.softmax(logits[0], 0)[0]), abs=1e-5)


def test_a_path_ends_before_a_row_that_is_refused_altogether() -> None:
    logits = random_logits(0, 4, 20)
    logits[2:] = -torch.inf
    lattice = DraftLattice.from_logits(logits, [4], LatticeOptions())
    (path,) = PathSearch(CausalModel(20, use_copy=False)).search([np.zeros(2, np.int32)], lattice)
    assert path.tokens == tuple(logits[:2].argmax(-1).tolist())
    assert path.raw_length == 2
    assert np.isfinite(path.score)


def test_no_positions_give_an_empty_path() -> None:
    search = PathSearch(CausalModel(VOCABULARY))
    lattice = DraftLattice.from_logits(torch.zeros(0, VOCABULARY), [0], LatticeOptions())
    (path,) = search.search([np.zeros(3, np.int32)], lattice)
    assert (path.tokens, path.score, path.gain, path.raw_length, path.lattice_width) == ((), 0.0, 0.0, 0, 0.0)
    assert path.confidences.shape == (0,)
    nobody = DraftLattice.from_logits(torch.zeros(0, VOCABULARY), [], LatticeOptions())
    assert search.search([], nobody) == []


@pytest.mark.parametrize("drafter_vocabulary", [3, 9])
def test_the_drafters_logits_may_be_narrower_or_wider_than_the_target(drafter_vocabulary: int) -> None:
    logits = torch.zeros(2, drafter_vocabulary)
    logits[:, drafter_vocabulary - 1] = 5.0
    lattice = DraftLattice.from_logits(logits, [2], LatticeOptions(1.0, 15))
    (path,) = PathSearch(CausalModel(VOCABULARY)).search([np.array([4, 4, 4], np.int32)], lattice)
    assert len(path.tokens) == 2
    assert max(path.tokens) < min(VOCABULARY, drafter_vocabulary)


def test_values_out_of_range_are_refused() -> None:
    causal = CausalModel(VOCABULARY)
    with pytest.raises(ValueError, match="beam_width"):
        PathSearch(causal, beam_width=0)
    with pytest.raises(ValueError, match="lattice_weight"):
        PathSearch(causal, lattice_weight=1.1)
    lattice = DraftLattice.from_logits(torch.zeros(1, VOCABULARY), [1], LatticeOptions())
    with pytest.raises(ValueError, match="2 histories for a lattice of 1"):
        PathSearch(causal).search([np.zeros(1, np.int32)] * 2, lattice)
