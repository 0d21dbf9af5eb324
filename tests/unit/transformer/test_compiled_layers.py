"""Passes as one compiled call: their promises beyond equal logits (which `test_model` checks)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, TOKENIZER_LENGTH, Family, write_checkpoint
from transformer.compiled import compiled
from transformer.intrinsics import exponential, logarithm
from transformer.matrix import MAX_KERNEL_ROWS, MAX_ROWS_ALONE
from transformer.model import RowBatch, Transformer
from transformer.product import LANES, product_kernels

LENGTH = 200


def load(folder: Path, family: Family, **overrides: object) -> Transformer:
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4} | overrides
    write_checkpoint(folder, family, **sizes)  # type: ignore[arg-type]
    model = Transformer.load(folder)
    assert model.is_compiled
    return model


def random_tokens(count: int) -> Tensor:
    return torch.randint(TOKENIZER_LENGTH, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[1, 2, 7, 30], [12] * 5, [MAX_KERNEL_ROWS, 1], [100, 3, 90]])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch(tmp_path: Path, family: Family, sizes: list[int]) -> None:
    model = load(tmp_path, family)
    together, alone = model.new_cache(len(sizes), LENGTH), model.new_cache(len(sizes), LENGTH)
    texts = [random_tokens(40 + size) for size in sizes]
    for slot, text in enumerate(texts):
        for cache in (together, alone):
            model.forward(RowBatch(text[:40], [slot], [0], [40]), cache)
    new = torch.cat([text[40:] for text in texts])
    at_once = model.forward(RowBatch(new, range(len(sizes)), [40] * len(sizes), sizes), together)
    single = [
        model.forward(RowBatch(text[at : at + 1], [slot], [at], [1]), alone)
        for slot, text in enumerate(texts)
        for at in range(40, len(text))
    ]
    assert torch.equal(at_once, torch.cat(single))
    assert torch.equal(together.entries, alone.entries)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 6, "hidden_size": 96},
    ],  # groups of 1, 4, 3
)
def test_any_number_of_heads_may_share_keys(tmp_path: Path, overrides: dict[str, object]) -> None:
    model = load(tmp_path, "llama", **overrides)
    text = random_tokens(MAX_ROWS_ALONE + 1)
    cache = model.new_cache(2, 300)
    by_layer = model.forward(RowBatch(text, [0], [0], [len(text)]), cache)  # too many rows: runs layer by layer
    compiled_rows = model.forward(RowBatch(text[:-1], [1], [0], [MAX_ROWS_ALONE]), cache)
    assert (by_layer[:-1] - compiled_rows).abs().max() < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_kept_and_stay_in_their_sequence(tmp_path: Path, value: float) -> None:
    model = load(tmp_path, "llama")
    cache, text = model.new_cache(2, LENGTH), random_tokens(50)
    for slot in (0, 1):
        model.forward(RowBatch(text[:40], [slot], [0], [40]), cache)
    cache.keys[0, 1, 0, 7] = value
    rows = model.forward(RowBatch(text[40:].repeat(2), [0, 1], [40, 40], [10, 10]), cache)
    assert rows[:10].isfinite().all()
    assert not rows[10:].isfinite().all(dim=1).any()


@pytest.mark.parametrize(
    ("slot", "start", "count", "limits"),
    [(0, 195, 6, None), (2, 0, 3, None), (-1, 0, 3, None), (0, -1, 3, None), (0, 0, 3, [1, 2, 201]), (0, 0, 3, [1, 2])],
)
def test_rows_beyond_the_cache_are_refused(
    tmp_path: Path, slot: int, start: int, count: int, limits: list[int] | None
) -> None:
    model = load(tmp_path, "llama")
    bounds = None if limits is None else torch.tensor(limits)
    with pytest.raises(IndexError, match="2 slots of 200 positions"):
        model.forward(RowBatch(random_tokens(count), [slot], [start], [count], bounds), model.new_cache(2, LENGTH))


def test_models_that_the_kernels_do_not_suit_run_layer_by_layer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", hidden_size=64, head_dim=16)
    assert not Transformer.load(tmp_path, dtype=torch.bfloat16).is_compiled
    write_checkpoint(tmp_path, "llama", hidden_size=64, head_dim=24)
    assert not Transformer.load(tmp_path).is_compiled
    write_checkpoint(tmp_path, "llama", hidden_size=288, head_dim=16, num_attention_heads=18, num_key_value_heads=1)
    assert not Transformer.load(tmp_path).is_compiled


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    model, deeper = load(tmp_path, "llama"), load(tmp_path, "llama", layers=3)
    with pytest.raises(IndexError, match="do not fit"):
        model.forward(RowBatch(random_tokens(3), [0], [0], [3]), deeper.new_cache(2, LENGTH))


def test_the_exponential_is_right_to_single_precision() -> None:
    @compiled
    def exponentials(numbers: np.ndarray, out: np.ndarray) -> None:
        for index in range(len(numbers)):
            out[index] = exponential(numbers[index])

    numbers = np.concatenate([np.linspace(-87, 87, 100_001), [0.0, -1e-8, 1e-8]]).astype(np.float32)
    out = np.empty_like(numbers)
    exponentials(numbers, out)
    assert np.allclose(out, np.exp(numbers.astype(np.float64)), rtol=3e-7, atol=0.0)
    edges = np.array([-np.inf, -1e9, np.inf, 1e9, np.nan], np.float32)
    out = np.empty_like(edges)
    exponentials(edges, out)
    assert (out[[0, 1, 4]] < 1e-37).all()
    assert (out[[2, 3]] > 1e37).all()


def test_the_logarithm_is_right_to_single_precision() -> None:
    @compiled
    def logarithms(numbers: np.ndarray, out: np.ndarray) -> None:
        for index in range(len(numbers)):
            out[index] = logarithm(numbers[index])

    numbers = np.concatenate([np.geomspace(1e-37, 1e37, 100_001), np.linspace(0.5, 2.0, 10_001)]).astype(np.float32)
    out = np.empty_like(numbers)
    logarithms(numbers, out)
    assert np.allclose(out, np.log(numbers.astype(np.float64)), rtol=3e-7, atol=5e-8)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, LANES])
@pytest.mark.parametrize("outputs", [LANES, 4 * LANES])
def test_rows_in_lanes_are_multiplied_correctly(rows: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    lanes, weights = torch.randn(37, LANES, generator=generator), torch.randn(37, outputs, generator=generator)
    out = torch.full((rows + 1, outputs), 7.0)
    product_kernels().store_transposed(lanes.data_ptr(), weights.data_ptr(), out.data_ptr(), 37, outputs, rows)
    assert torch.allclose(out[:rows], lanes.t()[:rows] @ weights, atol=1e-4)
    assert (out[rows] == 7.0).all()
