"""Integer products: exact sums, and the same bits whatever the rows, the processor's instructions and the threads."""

import numpy as np
import pytest
import torch
from torch import Tensor

from transformer.integer_product import BLOCK, RECORD, STEPS, integer_kernels, variants
from transformer.quantised import MAX_TILE_ROWS, QuantisedMatrix, QuantisedWeight

INPUTS, OUTPUTS = 96, 40  # three blocks; two panels and a half


def random_weight(bits: int, outputs: int = OUTPUTS, inputs: int = INPUTS) -> QuantisedWeight:
    """Return a weight with every integer that the format has, the extremes included."""
    random = np.random.default_rng(bits)
    integers = random.integers(0, 16 if bits == 4 else 256, (outputs, inputs), dtype=np.uint8)
    integers[0] = 0
    integers[1] = 15 if bits == 4 else 255
    blocks = outputs, inputs // BLOCK
    scales = random.uniform(-0.1, 0.1, blocks).astype(np.float16)
    return QuantisedWeight(integers, scales, random.normal(0, 0.1, blocks).astype(np.float16) if bits == 4 else None)


def random_rows(count: int, inputs: int = INPUTS) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, inputs, generator=generator) * torch.logspace(-3, 3, count).unsqueeze(1)


def rounded(rows: Tensor) -> Tensor:
    """Return the rows as the products see them: rounded to 127 steps on each side, per block."""
    blocks = rows.double().view(len(rows), -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales).round() * scales).view_as(rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_is_that_of_the_rounded_rows(bits: int) -> None:
    weight, rows = random_weight(bits), random_rows(20)
    exact = rounded(rows) @ torch.from_numpy(weight.floats()).double().t()
    product = QuantisedMatrix(weight).multiply(rows)
    assert (product - exact).abs().amax(1).div(exact.abs().amax(1)).max() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", [variant.name for variant in variants()])
def test_all_variants_give_the_same_bits_for_any_number_of_rows(bits: int, variant: str) -> None:
    weight, rows = random_weight(bits), random_rows(64)
    reference = QuantisedMatrix(weight, integer_kernels("generic")).multiply(rows)
    matrix = QuantisedMatrix(weight, integer_kernels(variant))
    for count in range(1, 65):
        assert torch.equal(matrix.multiply(rows[:count]), reference[:count])
        assert torch.equal(matrix.multiply(rows[count - 1 : count]), reference[count - 1 : count])


def test_more_rows_than_a_tile_holds_make_no_difference() -> None:
    weight, rows = random_weight(4), random_rows(2 * MAX_TILE_ROWS + 3)
    matrix = QuantisedMatrix(weight)
    assert torch.equal(matrix.multiply(rows)[MAX_TILE_ROWS:], matrix.multiply(rows[MAX_TILE_ROWS:]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_number_that_is_not_finite_has_no_finite_output_and_others_do(value: float) -> None:
    rows = random_rows(3)
    rows[1, 40] = value
    product = QuantisedMatrix(random_weight(8)).multiply(rows)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


def test_zero_and_tiny_rows_give_zero() -> None:
    rows = torch.zeros(2, INPUTS)
    rows[1] = 1e-38
    assert (QuantisedMatrix(random_weight(8)).multiply(rows) == 0).all()


def test_rounding_is_to_the_nearest_integer_within_a_block() -> None:
    kernels, rows = integer_kernels(), random_rows(1)
    records = np.empty((INPUTS // BLOCK, 1, RECORD), np.int32)
    kernels.quantise(rows.data_ptr(), records.ctypes.data, INPUTS // BLOCK, 1)
    integers = records[:, 0, :STEPS].copy().view(np.int8).reshape(-1)
    scales, sums = (records[:, 0, index : index + 1].copy().view(np.float32) for index in (STEPS, STEPS + 1))
    assert np.abs(integers).reshape(-1, BLOCK).max(axis=1).tolist() == [127] * (INPUTS // BLOCK)
    errors = integers.reshape(-1, BLOCK) * scales - rows.numpy().reshape(-1, BLOCK)
    assert (np.abs(errors) <= 0.5001 * scales).all()
    assert np.allclose(sums[:, 0], integers.reshape(-1, BLOCK).sum(axis=1) * scales[:, 0], rtol=1e-6)
    assert (records[:, 0, STEPS + 2] == -128 * integers.reshape(-1, BLOCK).astype(np.int32).sum(axis=1)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_files_keep_their_values(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    kinds = pytest.importorskip("gguf").GGMLQuantizationType
    random = np.random.default_rng(0)
    if kind == "Q4_K":  # the package cannot write it
        blocks = random.integers(0, 256, (OUTPUTS, 2, 144), dtype=np.uint8)
        blocks[..., :4] = np.array([0.001, 0.02], np.float16).view(np.uint8)
        rows = blocks.reshape(OUTPUTS, -1)
    else:
        rows = quants.quantize(random.standard_normal((OUTPUTS, INPUTS), np.float32), kinds[kind])
    weight, exact = QuantisedWeight.from_blocks(kind, rows), quants.dequantize(rows, kinds[kind])
    assert weight is not None
    assert weight.bits == (8 if kind == "Q8_0" else 4)
    assert np.allclose(weight.floats(), exact, rtol=1e-3 if kind == "Q4_K" else 0, atol=1e-3 if kind == "Q4_K" else 0)
    matrix = QuantisedMatrix(weight)
    assert np.array_equal(matrix.lookup(np.arange(OUTPUTS)), weight.floats())


def test_other_kinds_are_left_to_be_rounded() -> None:
    assert QuantisedWeight.from_blocks("Q6_K", np.zeros((1, 210), np.uint8)) is None


def test_floats_are_rounded_to_half_a_step() -> None:
    values = np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS), np.float32)
    values[3] = 0
    weight = QuantisedWeight.from_floats(values)
    steps = np.repeat(weight.scales.astype(np.float32), BLOCK, axis=1)
    assert (np.abs(weight.floats() - values) <= 0.6 * steps).all()


def test_parts_of_different_bits_are_joined_with_eight() -> None:
    joined = QuantisedWeight.joined([random_weight(4), random_weight(8)])
    assert joined.bits == 8
    expected = np.concatenate([random_weight(4).floats(), random_weight(8).floats()])
    assert np.abs(joined.floats() - expected).max() < 0.01
