"""Weight matrices. Small steps on a CPU multiply them with this project's kernels (`transformer.product`)."""

import torch
from torch import Tensor

from transformer.product import LANES, Kernel, has_fast_sums, product_kernels

MAX_KERNEL_ROWS = 48  # with more rows, the library gains from several threads
MAX_ROWS_ALONE = 256  # limit with only one thread, where the kernel stays faster for longer
MAX_PACKED_ENTRIES = 1 << 22  # larger matrices are bound by memory, and need several threads


class Matrix:
    """A weight `[in, out]` of any device and dtype."""

    def __init__(self, weight: Tensor) -> None:
        """Take over `weight`. Its panels, if it gets any, are a second copy."""
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
        """Address of the panels, for compiled callers; 0 if there are none."""
        return 0 if self._panels is None else self._panels.data_ptr()

    def multiply_first(self, rows: Tensor, num_outputs: int) -> Tensor:
        """Return the first columns of `rows [n, in] @ weight`: `[n, num_outputs]`."""
        if num_outputs % LANES or not self._takes(rows):
            return rows @ self._weight[:, :num_outputs]
        product = rows.new_empty(len(rows), num_outputs)
        self._run(self._kernels.store, rows, product)
        return product

    def multiply(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `rows [n, in] @ weight + bias`: `[n, out]`."""
        if bias is None:
            return self.multiply_first(rows, self._outputs)
        if not self._takes(rows):
            return torch.addmm(bias, rows, self._weight)
        return self.add_product(bias.expand(len(rows), -1).clone(memory_format=torch.contiguous_format), rows)

    def add_product(self, total: Tensor, rows: Tensor) -> Tensor:
        """Return `total + rows @ weight`. May overwrite `total`."""
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
    """Return whether these kernels multiply so many rows faster than the library does."""
    return num_rows <= MAX_KERNEL_ROWS or (num_rows <= MAX_ROWS_ALONE and torch.get_num_threads() == 1)


def is_plain(tensor: Tensor) -> bool:
    """Return whether compiled code can read the tensor in place: float32, on the CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
