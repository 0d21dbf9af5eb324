"""The n-gram model: a distribution in every context, the file format, and the promises of fitting."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.search.ngram import NgramError, NgramModel
from models.training.ngram import evaluate_ngram, fit_ngram

VOCABULARY = 40


def markov_text(length: int, seed: int = 0) -> np.ndarray:
    """Return text in which two tokens mostly, but not always, decide the next one."""
    random = np.random.default_rng(seed)
    table = np.random.default_rng(99).integers(0, VOCABULARY, (VOCABULARY, VOCABULARY))
    text = [1, 2]
    for _ in range(length - 2):
        text.append(int(table[text[-2], text[-1]] if random.random() < 0.8 else random.integers(VOCABULARY)))
    return np.array(text, np.int32)


@pytest.fixture(scope="module")
def model() -> NgramModel:
    return fit_ngram([markov_text(20_000)], VOCABULARY, order=4)


@settings(deadline=None, max_examples=80)
@given(context=st.lists(st.integers(0, VOCABULARY - 1), max_size=8))
def test_probabilities_sum_to_one_in_any_context(model: NgramModel, context: list[int]) -> None:
    distribution = model.distribution(np.array(context, np.int32))
    assert distribution.min() > 0
    assert distribution.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-4)


def test_probabilities_sum_to_one_in_contexts_of_the_text(model: NgramModel) -> None:
    text = markov_text(20_000)
    for position in range(5, 500):
        distribution = model.distribution(text[position - 5 : position])
        assert distribution.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-4)


def test_a_longer_order_predicts_held_out_text_better() -> None:
    held_out = markov_text(4_000, seed=1)
    quality = {
        order: evaluate_ngram(fit_ngram([markov_text(60_000)], VOCABULARY, order=order), held_out) for order in (1, 3)
    }
    assert quality[3].accuracy > 0.7  # the best possible is a little over 0.8, by construction
    assert quality[3].perplexity < 0.5 * quality[1].perplexity


def test_evaluation_agrees_with_the_distribution(model: NgramModel) -> None:
    text = markov_text(300, seed=2)
    logs = [model.log_probability(int(text[i]), text[:i]) for i in range(len(text))]
    best = [int(model.distribution(text[:i]).argmax()) == text[i] for i in range(1, len(text))]
    quality = evaluate_ngram(model, text)
    assert quality.perplexity == pytest.approx(float(np.exp(-np.mean(logs))), rel=1e-4)
    assert quality.accuracy == pytest.approx(sum(best) / len(text), abs=0.01)


def test_the_budget_of_bytes_holds() -> None:
    text = markov_text(60_000)
    sizes = [fit_ngram([text], VOCABULARY, order=4, max_bytes=limit).num_bytes for limit in (2_000, 20_000)]
    assert sizes[0] <= 2_000 + 4 * VOCABULARY + 100
    assert 10_000 < sizes[1] <= 20_000 + 4 * VOCABULARY + 100


def test_ngrams_do_not_cross_from_one_array_to_the_next() -> None:
    parts = [np.array([1, 2], np.int32), np.array([3, 4], np.int32)] * 50
    model = fit_ngram(parts, VOCABULARY, order=3)
    after_two = model.distribution(np.array([2], np.int32))
    np.testing.assert_allclose(after_two, model.arrays.unigram, rtol=1e-5)
    assert model.distribution(np.array([1], np.int32)).argmax() == 2


def test_fitting_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        fit_ngram([np.zeros(0, np.int32)], VOCABULARY)
    with pytest.raises(ValueError, match="outside a vocabulary of 40"):
        fit_ngram([np.array([40], np.int32)], VOCABULARY)
    with pytest.raises(ValueError, match="order"):
        fit_ngram([np.array([1], np.int32)], VOCABULARY, order=9)


def test_a_saved_model_is_mapped_and_the_same(model: NgramModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = NgramModel.load(tmp_path)
    assert isinstance(loaded.arrays.tokens.base, np.memmap)
    context = markov_text(50)[:20]
    np.testing.assert_array_equal(loaded.distribution(context), model.distribution(context))
    assert (loaded.order, loaded.vocabulary_size) == (4, VOCABULARY)


def test_the_uniform_model_is_uniform() -> None:
    model = NgramModel.uniform(7)
    np.testing.assert_allclose(model.distribution(np.array([1, 2], np.int32)), 1 / 7, rtol=1e-6)


@pytest.mark.parametrize("name", ["tokens", "levels", "fingerprints", "successor_counts", "bucket_contexts", "unigram"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "shorter", "other type"])
def test_damaged_files_are_refused_by_name(model: NgramModel, tmp_path: Path, name: str, damage: str) -> None:
    model.save(tmp_path)
    path = tmp_path / f"{name}.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "shorter":
        np.save(path, np.load(path)[:-3])
    else:
        np.save(path, np.load(path).astype(np.float64))
    with pytest.raises(NgramError, match=str(tmp_path)):
        NgramModel.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2, "order": 3}', '{"format": 1, "order": 30}', "[1]"])
def test_a_damaged_description_is_refused(model: NgramModel, tmp_path: Path, text: str) -> None:
    model.save(tmp_path)
    (tmp_path / "ngram.json").write_text(text)
    with pytest.raises(NgramError, match=str(tmp_path)):
        NgramModel.load(tmp_path)


def test_successors_outside_the_vocabulary_are_refused(model: NgramModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    tokens = np.load(tmp_path / "tokens.npy")
    tokens[3] = VOCABULARY
    np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(NgramError, match="outside the vocabulary"):
        NgramModel.load(tmp_path)


def test_large_vocabularies_are_stored_in_wider_integers() -> None:
    text = np.tile(np.array([69_999, 5, 66_000], np.int32), 200)
    model = fit_ngram([text], 70_000, order=3)
    assert model.arrays.tokens.dtype == np.uint32
    assert model.distribution(np.array([5], np.int32)).argmax() == 66_000
    assert model.distribution(np.array([5, 66_000], np.int32)).argmax() == 69_999
