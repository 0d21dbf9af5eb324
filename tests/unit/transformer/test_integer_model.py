"""Quantised models: close to float32 on the same weights, and the same to the last bit in any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, TOKENIZER_LENGTH, Family, write_checkpoint
from transformer.checkpoint import load_weights
from transformer.config import TransformerConfig
from transformer.integer_model import IntegerTransformer, Weight, suits_integers
from transformer.integer_product import BLOCK, variants
from transformer.model import RowBatch, Transformer
from transformer.panel_cache import PanelCache
from transformer.quantised import QuantisedWeight
from transformer.sharing import Helpers, Share, enter, leave

LENGTH = 200


def quantised_weights(folder: Path, family: Family, **overrides: object) -> tuple[TransformerConfig, dict[str, Weight]]:
    """Write a tiny checkpoint; return its weights, with matrices of 4 and 8 bit."""
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 96} | overrides
    write_checkpoint(folder, family, **sizes)  # type: ignore[arg-type]
    config = TransformerConfig.from_folder(folder)
    weights: dict[str, Weight] = {}
    for name, weight in load_weights(folder, config, "cpu", torch.float32).items():
        is_matrix = weight.dim() == 2
        weights[name] = weight if not is_matrix else in_four_bits(weight) if "mlp" in name else in_eight_bits(weight)
    return config, weights


def in_eight_bits(weight: Tensor) -> QuantisedWeight:
    return QuantisedWeight.from_floats(weight.numpy())


def in_four_bits(weight: Tensor) -> QuantisedWeight:
    blocks = weight.numpy().reshape(len(weight), -1, BLOCK)
    least = blocks.min(axis=-1).astype(np.float16)
    scales = ((blocks.max(axis=-1) - least) / 15).astype(np.float16)
    integers = np.rint((blocks - least[..., None]) / scales[..., None]).clip(0, 15).astype(np.uint8)
    return QuantisedWeight(integers.reshape(weight.shape), scales, least)


def load(folder: Path, family: Family = "llama", threads: int = 1, variant: str | None = None) -> IntegerTransformer:
    return IntegerTransformer(*quantised_weights(folder, family), num_threads=threads, variant=variant)


def random_tokens(count: int) -> Tensor:
    return torch.randint(TOKENIZER_LENGTH, (count,), generator=torch.Generator().manual_seed(count))


def plain_pass(model: IntegerTransformer, text: Tensor) -> tuple[Tensor, PanelCache]:
    """Return hidden states and the cache of a text, run token by token."""
    cache = model.new_cache(1, LENGTH)
    rows = [model.forward(RowBatch(text[at : at + 1], [0], [at], [1]), cache) for at in range(len(text))]
    return torch.cat(rows), cache


def same_entries(first: PanelCache, second: PanelCache, length: int) -> bool:
    """Return whether the first keys and values of slot 0 are the same to the last bit."""
    same_keys = np.array_equal(first.keys_of(0, length), second.keys_of(0, length))
    return same_keys and np.array_equal(first.values[:, 0, :, :length], second.values[:, 0, :, :length])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_close_to_those_of_float32(tmp_path: Path, family: Family) -> None:
    config, weights = quantised_weights(tmp_path, family, tie_word_embeddings=family != "qwen2")
    floats = {n: torch.from_numpy(w.floats()) if isinstance(w, QuantisedWeight) else w for n, w in weights.items()}
    exact, model = Transformer(config, floats), IntegerTransformer(config, weights)
    text = random_tokens(60)
    cache, exact_cache = model.new_cache(1, LENGTH), exact.new_cache(1, LENGTH)
    hidden = model.forward(RowBatch(text, [0], [0], [60]), cache)
    expected = exact.forward(RowBatch(text, [0], [0], [60]), exact_cache)
    assert (hidden - expected).norm() < 0.05 * expected.norm()
    logits, expected_logits = model.logits(expected), exact.logits(expected)
    assert logits.shape == expected_logits.shape
    assert (logits - expected_logits).norm() < 0.02 * expected_logits.norm()
    assert torch.equal(model.logits(expected, 100), logits[:, :100])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_last_bit_for_1_to_64_rows(tmp_path: Path, family: Family, threads: int) -> None:
    model = load(tmp_path, family, threads)
    text = random_tokens(104)
    expected, plain = plain_pass(model, text)
    logits = torch.cat([model.logits(row) for row in expected.split(1)])
    for count in range(1, 65):
        cache = model.new_cache(1, LENGTH)
        cache.keys[:], cache.values[:, 0, :, :40] = plain.keys, plain.values[:, 0, :, :40]
        hidden = model.forward(RowBatch(text[40 : 40 + count], [0], [40], [count]), cache)
        assert torch.equal(hidden, expected[40 : 40 + count])
        assert torch.equal(model.logits(hidden), logits[40 : 40 + count])
        assert same_entries(cache, plain, 40 + count)


@pytest.mark.parametrize("sizes", [[180], [1, 179], [100, 3, 77], [64, 64, 52], [129, 51]])
def test_a_prompt_in_any_pieces_gives_the_same_bits(tmp_path: Path, sizes: list[int]) -> None:
    model = load(tmp_path, threads=2)
    text = random_tokens(180)
    expected, plain = plain_pass(model, text)
    cache, start, pieces = model.new_cache(1, LENGTH), 0, []
    for size in sizes:
        pieces.append(model.forward(RowBatch(text[start : start + size], [0], [start], [size]), cache))
        start += size
    assert torch.equal(torch.cat(pieces), expected)
    assert same_entries(cache, plain, 180)


def test_sequences_side_by_side_do_not_change_each_other(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3", threads=2)
    texts = [random_tokens(size) for size in (1, 30, 170, 7)]
    cache = model.new_cache(4, LENGTH)
    sizes = [len(text) for text in texts]
    together = model.forward(RowBatch(torch.cat(texts), [2, 0, 3, 1], [0] * 4, sizes), cache)
    assert torch.equal(together, torch.cat([plain_pass(model, text)[0] for text in texts]))


def test_all_variants_give_the_same_bits(tmp_path: Path) -> None:
    text = random_tokens(50)
    rows = RowBatch(text, [0], [0], [50])
    models = [load(tmp_path, variant=variant.name) for variant in variants()]
    results = [model.forward(rows, model.new_cache(1, LENGTH)) for model in models]
    assert all(torch.equal(result, results[0]) for result in results)


def test_helpers_that_never_come_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, model = load(tmp_path), load(tmp_path, threads=4)
    monkeypatch.setattr("transformer.sharing._Helper.give", lambda *_: None)
    rows = RowBatch(random_tokens(20), [0], [0], [20])
    expected = alone.forward(rows, alone.new_cache(1, LENGTH))
    assert torch.equal(model.forward(rows, model.new_cache(1, LENGTH)), expected)


def test_a_helper_that_comes_late_is_not_let_in() -> None:
    shares: list[Share] = []
    helpers = Helpers(1)

    def work(share: Share) -> None:
        assert enter(share)
        shares.append(share)
        leave(share)

    helpers.run(work, 1)
    helpers.run(work, 1)
    assert not enter(shares[0]._replace(thread=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_sequence(tmp_path: Path, value: float) -> None:
    model = load(tmp_path)
    cache, text = model.new_cache(2, LENGTH), random_tokens(50)
    for slot in (0, 1):
        model.forward(RowBatch(text[:40], [slot], [0], [40]), cache)
    cache.keys[0, 1, 0, 0, :, 7] = value
    rows = model.forward(RowBatch(text[40:].repeat(2), [0, 1], [40, 40], [10, 10]), cache)
    assert rows[:10].isfinite().all()
    assert not rows[10:].isfinite().all(dim=1).any()


def test_rows_beyond_the_cache_are_refused(tmp_path: Path) -> None:
    model = load(tmp_path)
    with pytest.raises(IndexError, match="2 slots of 200 positions"):
        model.forward(RowBatch(random_tokens(6), [0], [195], [6]), model.new_cache(2, LENGTH))


def test_models_of_odd_sizes_are_refused(tmp_path: Path) -> None:
    config, weights = quantised_weights(tmp_path, "llama")
    assert suits_integers(config)
    write_checkpoint(tmp_path, "llama", hidden_size=48, head_dim=16)
    odd = TransformerConfig.from_folder(tmp_path)
    assert not suits_integers(odd)
    with pytest.raises(ValueError, match="do not suit"):
        IntegerTransformer(odd, weights)


@pytest.mark.parametrize("start", [0, 5, 16, 37])
def test_a_cleared_slot_keeps_what_lies_before(start: int) -> None:
    cache = PanelCache(2, 2, 2, 50, 16)
    cache.keys[:], cache.values[:] = 1.0, 1.0
    cache.clear_slot(1, start)
    assert (cache.keys_of(1, 50)[:, :, :start] == 1).all()
    assert (cache.keys_of(1, 50)[:, :, start:] == 0).all()
    assert (cache.values[:, 1, :, :start] == 1).all()
    assert (cache.values[:, 1, :, start:] == 0).all()
    assert (cache.keys[:, 0] == 1).all()


def test_a_copied_slot_continues_like_its_source(tmp_path: Path) -> None:
    model = load(tmp_path)
    text, cache = random_tokens(60), model.new_cache(2, LENGTH)
    expected = model.forward(RowBatch(text, [0], [0], [60]), cache)
    cache.copy_slot(0, 1, 37)
    assert torch.equal(model.forward(RowBatch(text[37:], [1], [37], [23]), cache), expected[37:])
