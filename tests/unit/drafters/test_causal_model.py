"""The causal model: copying, its learning and the free draft, compared with plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.search.causal_model import MAX_CHAIN, WINDOW, CausalModel, new_copying
from drafters.search.kernels.copying import MAX_MATCH, index_token
from drafters.search.kernels.copying import find_copy as compiled_find_copy
from drafters.search.kernels.copying import follow_copy as compiled_follow_copy
from drafters.search.kernels.copying import index_text as compiled_index_text
from drafters.search.kernels.ngram import new_workspace
from drafters.search.kernels.tokens import NO_TOKEN
from drafters.search.ngram import NgramModel
from models.training.ngram import fit_ngram

VOCABULARY = 12


def tokens(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def find_copy(text: list[int]) -> tuple[int, int]:
    """Find the longest earlier match of the end of `text`, and where it continues, by trying all."""
    best, place = 0, -1
    for position in range(len(text) - 1):
        match = 0
        while match < MAX_MATCH and match <= position and text[position - match] == text[len(text) - 1 - match]:
            match += 1
        if match and match >= best:
            best, place = match, position + 1
    return best, place


def mixture(model: CausalModel, text: list[int]) -> np.ndarray:
    match, place = find_copy(text)
    weight = float(model.copy_weights[match])
    distribution = model.ngram.distribution(tokens(text)).astype(np.float64) * (1 - weight)
    if match:
        distribution[text[place]] += weight
    return distribution


@pytest.fixture(scope="module")
def ngram() -> NgramModel:
    text = np.random.default_rng(0).integers(0, VOCABULARY, 3_000).cumsum() % VOCABULARY
    return fit_ngram([np.tile(text[:300], 4).astype(np.int32), text.astype(np.int32)], VOCABULARY, order=4)


@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(st.integers(0, 2), max_size=40),
    path=st.lists(st.integers(0, 2), max_size=8),
    period=st.integers(1, 5),
)
def test_the_longest_most_recent_match_is_copied(text: list[int], path: list[int], period: int) -> None:
    for history in (text, (text[:period] * 12)[:40]):
        work = new_workspace(VOCABULARY, WINDOW)
        compiled_index_text(tokens(history), 0, len(history), work)
        for num_indexed in range(len(path) + 1):
            found = compiled_find_copy(tokens(history), tokens(path), len(path), num_indexed, work)
            assert (int(found[0]), int(found[1])) == find_copy(history + path)
            if num_indexed < len(path):
                index_token(len(history) + num_indexed, path[num_indexed], work.last, work.previous)


@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(st.sampled_from([0, 1, 2, 2, VOCABULARY, -3]), max_size=20),
    path=st.lists(st.integers(0, 2), max_size=30),
    loops=st.booleans(),
    indexes=st.booleans(),
)
def test_following_a_copy_finds_the_same_as_a_search(
    text: list[int], path: list[int], loops: bool, indexes: bool
) -> None:
    """Also if the path is indexed on the way, and with ids outside the vocabulary."""
    if loops:
        path = (text[:4] * 30)[:30]
    followed, looked_up = new_workspace(VOCABULARY, WINDOW), new_workspace(VOCABULARY, WINDOW)
    compiled_index_text(tokens(text), 0, len(text), followed)
    compiled_index_text(tokens(text), 0, len(text), looked_up)
    match, place = 0, NO_TOKEN
    for length in range(len(path) + 1):
        num_indexed = length if indexes else 0
        match, place = compiled_follow_copy(tokens(text), tokens(path), length, num_indexed, match, place, followed)
        found = compiled_find_copy(tokens(text), tokens(path), length, 0, looked_up)
        assert (int(match), int(place)) == (int(found[0]), int(found[1]))
        if all(0 <= token < VOCABULARY for token in text):
            assert (int(match), int(place)) == find_copy(text + path[:length])
        if indexes and length < len(path):
            index_token(len(text) + length, path[length], followed.last, followed.previous)


@settings(deadline=None, max_examples=50)
@given(
    histories=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=30), min_size=1, max_size=4),
    length=st.integers(0, 6),
    use_copy=st.booleans(),
    use_ngram=st.booleans(),
)
def test_a_chain_follows_the_mixtures_most_probable_token(
    ngram: NgramModel, histories: list[list[int]], length: int, use_copy: bool, use_ngram: bool
) -> None:
    model = CausalModel(VOCABULARY, ngram if use_ngram else None, use_copy=use_copy)
    chains = model.draft([tokens(history) for history in histories], [length] * len(histories))
    for history, chain in zip(histories, chains, strict=True):
        assert len(chain.tokens) <= length
        text = list(history)
        for token, confidence in zip(chain.tokens, chain.confidences, strict=True):
            distribution = mixture(model, text)
            assert confidence == pytest.approx(distribution[token], rel=1e-3)
            assert confidence == pytest.approx(distribution.max(), rel=1e-3)
            text.append(token)
        if not use_copy and not use_ngram:
            assert chain.tokens == ()


def test_a_batch_gives_what_single_requests_give(ngram: NgramModel) -> None:
    model = CausalModel(VOCABULARY, ngram, end_tokens=(3,))
    random = np.random.default_rng(5)
    histories = [random.integers(0, VOCABULARY, int(size)).astype(np.int32) for size in (0, 1, 2, 50, 5_000)]
    caps = [4, 0, 7, 5, 3]
    together = model.draft(histories, caps)
    for history, cap, chain in zip(histories, caps, together, strict=True):
        (alone,) = model.draft([history], [cap])
        assert alone.tokens == chain.tokens
        np.testing.assert_array_equal(alone.confidences, chain.confidences)


def test_a_chain_ends_with_the_first_end_token() -> None:
    model = CausalModel(VOCABULARY, end_tokens=(9,))
    (chain,) = model.draft([tokens([1, 2, 9, 4, 5, 1])], [5])
    assert chain.tokens == (2, 9)


def test_a_repeating_text_is_continued_beyond_its_end() -> None:
    (chain,) = CausalModel(VOCABULARY).draft([tokens([1, 2, 3] * 4)], [7])
    assert chain.tokens == (1, 2, 3, 1, 2, 3, 1)


def test_ids_outside_the_vocabulary_are_never_copied() -> None:
    (chain,) = CausalModel(VOCABULARY).draft([tokens([1, 500, -4, 1])], [5])
    assert chain.tokens == ()
    (chain,) = CausalModel(VOCABULARY).draft([tokens([500, 1, 500])], [5])
    assert chain.tokens == ()


def test_text_before_the_window_is_not_copied() -> None:
    history = np.concatenate([tokens([1, 2]), np.zeros(WINDOW - 2, np.int32), tokens([1])])
    (chain,) = CausalModel(VOCABULARY).draft([history], [1])
    assert chain.tokens == ()
    (chain,) = CausalModel(VOCABULARY).draft([history[1:]], [1])
    assert chain.tokens == ()
    (chain,) = CausalModel(VOCABULARY).draft([np.delete(history, 5)], [1])
    assert chain.tokens == (2,)


def test_no_requests_no_chains() -> None:
    assert CausalModel(VOCABULARY).draft([], []) == []


def test_learning_moves_the_weight_towards_what_was_seen() -> None:
    repeating, random = tokens([1, 2, 3, 4, 5] * 100), np.random.default_rng(0).integers(0, 12, 500).astype(np.int32)
    model = CausalModel(VOCABULARY)
    before = model.copy_weights.copy()
    model.learn([repeating], [100])
    assert model.copy_weights[MAX_MATCH] > before[MAX_MATCH]
    model.learn([random], [0])
    assert model.copy_weights[1] < before[1]
    assert model.copy_weights[0] == 0.0


def test_copies_that_are_right_by_chance_earn_no_weight() -> None:
    """In random text one copy in twelve is right. The uniform rest explains that."""
    text = np.random.default_rng(1).integers(0, VOCABULARY, 4_000).astype(np.int32)
    copying = new_copying(prior_strength=1.0, decay=1.0)
    CausalModel(VOCABULARY, copying=copying).learn([text], [0])
    assert 0.0 <= copying.weights[1] < 0.04


def test_learning_only_what_is_new_equals_learning_all_at_once() -> None:
    text = np.random.default_rng(2).integers(0, 4, 400).astype(np.int32)
    at_once, by_parts = CausalModel(VOCABULARY), CausalModel(VOCABULARY)
    at_once.learn([text], [100])
    for end in range(103, 401, 3):
        by_parts.learn([text[:end]], [end - 3])
    np.testing.assert_allclose(at_once.copy_weights, by_parts.copy_weights, rtol=1e-6)


def test_learning_counts_and_forgets() -> None:
    copying = new_copying(prior_strength=4.0, decay=0.9)
    model = CausalModel(VOCABULARY, copying=copying)
    model.learn([np.tile(np.arange(5, dtype=np.int32), 100)], [100])
    assert copying.weights[MAX_MATCH] > 0.99
    for last in range(5, 10):  # the copied token is another one every time
        text = np.append(np.tile(np.arange(5, dtype=np.int32), 10), last).astype(np.int32)
        model.learn([text], [50])
        model.learn([text], [50])
    assert copying.weights[MAX_MATCH] < 0.5


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="17 values"):
        new_copying(prior_weights=(0.0, 0.5))
    with pytest.raises(ValueError, match="7 token ids, the target has 12"):
        CausalModel(VOCABULARY, NgramModel.uniform(7))


@pytest.mark.parametrize("history", [[], [3], [3, 4] * 20, [VOCABULARY + 5, 1, 2, 1], [1, 2, 3] * (WINDOW // 2)])
def test_nothing_of_a_text_or_its_draft_is_left_behind(ngram: NgramModel, history: list[int]) -> None:
    """All calls share one index of positions: leftovers would show up in the next text."""
    model = CausalModel(VOCABULARY, ngram, end_tokens=[0])
    for max_tokens in (0, 5, MAX_CHAIN + 50):
        (chain,) = model.draft([tokens(history)], [max_tokens], [0.0], num_learned=[len(history) // 2])
        assert len(chain.tokens) <= min(max_tokens, MAX_CHAIN)
        assert (model.workspace.last == NO_TOKEN).all()
        assert (model.workspace.sums == 0).all()


def test_the_longest_chain_copies_to_its_end() -> None:
    model = CausalModel(VOCABULARY)
    (chain,) = model.draft([tokens([3, 4, 5] * 10)], [MAX_CHAIN + 50])
    assert chain.tokens == tuple(([3, 4, 5] * MAX_CHAIN)[:MAX_CHAIN])
