"""The kernels for few rows, compared with the library's product."""

import pytest
import torch

from transformer.matrix import LANES, MAX_KERNEL_ROWS, MAX_ROWS_ALONE, Matrix


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "rows", [1, 2, 3, 5, 6, 7, 8, 12, 13, 31, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1, MAX_ROWS_ALONE]
)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, LANES), (40, 3 * LANES), (256, 512), (33, 17)])
def test_products_equal_the_librarys(rows: int, inputs: int, outputs: int) -> None:
    weight, given, bias, total = random(inputs, outputs), random(rows, inputs), random(outputs), random(rows, outputs)
    matrix = Matrix(weight.clone())
    expected = given.double() @ weight.double()
    for product, reference in (
        (matrix.multiply(given), expected),
        (matrix.multiply(given, bias), expected + bias),
        (matrix.add_product(total.clone(), given), expected + total),
    ):
        assert torch.allclose(product.double(), reference, atol=1e-4)


def test_a_row_is_the_same_to_the_last_bit_in_any_batch() -> None:
    matrix, given = Matrix(random(256, 640)), random(MAX_KERNEL_ROWS, 256)
    alone = torch.cat([matrix.multiply(row[None]) for row in given])
    for size in (2, 6, 7, 11, MAX_KERNEL_ROWS):
        assert torch.equal(torch.cat([matrix.multiply(part) for part in given.split(size)]), alone)


def test_rows_that_are_not_contiguous_are_read_correctly() -> None:
    wide = random(4, 512)
    matrix = Matrix(random(256, 32))
    assert torch.equal(matrix.multiply(wide[:, ::2]), matrix.multiply(wide[:, ::2].contiguous()))


def test_other_types_go_to_the_library() -> None:
    weight, given = random(32, 32).bfloat16(), random(3, 32).bfloat16()
    assert torch.equal(Matrix(weight).multiply(given), given @ weight)
