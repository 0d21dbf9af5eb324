"""Weight matrices, which small steps on a CPU multiply by kernels of our own (`transformer.product`)."""

import torch
from torch import Tensor

from transformer.product import LANES, Kernel, has_fast_sums, product_kernels

MAX_KERNEL_ROWS = 48  # beyond it the library can use several threads; where there is one, the kernel is faster
MAX_ROWS_ALONE = 256  # up to here
MAX_PACKED_ENTRIES = 1 << 22  # larger matrices wait for memory anyway, and want several threads


class Matrix:
    """A weight `[in, out]` of any device and dtype."""

    def __init__(self, weight: Tensor) -> None:
        """Take over `weight`; if it gets panels, they are a second copy of it."""
        self._weight = weight
        self._inputs, self._outputs = weight.shape
        self._panels: Tensor | None = None
        small = has_fast_sums() and weight.numel() <= MAX_PACKED_ENTRIES and self._outputs % LANES == 0
        if small and is_plain(weight):
            panels = weight.view(self._inputs, self._outputs // LANES, LANES)
            self._panels = panels.permute(1, 0, 2).contiguous()
            self._kernels = product_kernels()

    @property
    def panels_address(self) -> int:
        """Where the panels are, for compiled callers; 0 if there are none."""
        return 0 if self._panels is None else self._panels.data_ptr()

    def multiply_first(self, rows: Tensor, num_outputs: int) -> Tensor:
        """The first columns of `rows [n, in] @ weight`, as `[n, num_outputs]`."""
        if num_outputs % LANES or not self._takes(rows):
            return rows @ self._weight[:, :num_outputs]
        product = rows.new_empty(len(rows), num_outputs)
        self._run(self._kernels.store, rows, product)
        return product

    def multiply(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows [n, in] @ weight + bias`, as `[n, out]`."""
        if bias is None:
            return self.multiply_first(rows, self._outputs)
        if not self._takes(rows):
            return torch.addmm(bias, rows, self._weight)
        return self.add_product(bias.expand(len(rows), -1).clone(memory_format=torch.contiguous_format), rows)

    def add_product(self, total: Tensor, rows: Tensor) -> Tensor:
        """`total + rows @ weight`; `total` may be overwritten."""
        if not self._takes(rows):
            return torch.addmm(total, rows, self._weight)
        self._run(self._kernels.add, rows, total)
        return total

    def _takes(self, rows: Tensor) -> bool:
        return self._panels is not None and suits_kernels(len(rows))

    def _run(self, kernel: Kernel, rows: Tensor, out: Tensor) -> None:
        assert self._panels is not None
        assert rows.shape[1] == self._inputs
        assert len(out) == len(rows)
        assert out.shape[1] <= self._outputs
        assert rows.dtype == out.dtype == torch.float32
        assert out.is_contiguous()
        rows = rows.contiguous()
        kernel(rows.data_ptr(), self._panels.data_ptr(), out.data_ptr(), self._inputs, out.shape[1], len(rows))


def suits_kernels(num_rows: int) -> bool:
    """Whether a product with so many rows is better left to our kernels than to the library."""
    return num_rows <= MAX_KERNEL_ROWS or (num_rows <= MAX_ROWS_ALONE and torch.get_num_threads() == 1)


def is_plain(tensor: Tensor) -> bool:
    """Whether compiled code can read it where it is: float32, on the CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
