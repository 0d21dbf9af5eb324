"""Weight matrices, multiplied with the few rows of a decoding step.

Library matrix products are made for many rows: on a CPU four rows cost them up to twice as much as one, though both
read the same weights. Verification lives from that not being so. Small float32 matrices on the CPU are therefore kept
in panels of 16 columns too, and multiplied by a kernel that reads each panel once for up to six rows, its sums in
registers. The kernel is written in LLVM's language, through the compiler that numba brings along, since numba itself
cannot be made to keep the sums in registers. Every sum runs over the inputs in order, whatever the number of rows: a
row's result is the same to the last bit in any batch.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

LANES = 16  # columns of a panel: one vector of AVX-512, two of AVX2, four of NEON
ROWS_AT_ONCE = 6  # sums and inputs still fit into the sixteen registers of AVX2
MOST_KERNEL_ROWS = 48  # beyond it the library is as fast, and can use several threads
MOST_PACKED_ENTRIES = 1 << 22  # larger matrices wait for memory anyway, and want several threads

Kernel = Callable[..., None]


class Matrix:
    """A weight `[in, out]` of any device and dtype."""

    def __init__(self, weight: Tensor) -> None:
        """Take over `weight`; if it gets panels, they are a second copy of it."""
        self._weight = weight
        self._inputs, self._outputs = weight.shape
        self._panels: Tensor | None = None
        small = weight.numel() <= MOST_PACKED_ENTRIES and self._outputs % LANES == 0
        if small and weight.device.type == "cpu" and weight.dtype == torch.float32:
            panels = weight.view(self._inputs, self._outputs // LANES, LANES)
            self._panels = panels.permute(1, 0, 2).contiguous()
            self._store, self._add = product_kernels()

    def multiply(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows [n, in] @ weight + bias`, as `[n, out]`."""
        if self._panels is None or len(rows) > MOST_KERNEL_ROWS:
            return rows @ self._weight if bias is None else torch.addmm(bias, rows, self._weight)
        if bias is None:
            product = rows.new_empty(len(rows), self._outputs)
            self._run(self._store, rows, product)
            return product
        return self.add_product(bias.repeat(len(rows), 1), rows)

    def add_product(self, total: Tensor, rows: Tensor) -> Tensor:
        """`total + rows @ weight`; `total` may be overwritten."""
        if self._panels is None or len(rows) > MOST_KERNEL_ROWS:
            return torch.addmm(total, rows, self._weight)
        self._run(self._add, rows, total)
        return total

    def _run(self, kernels: tuple[Kernel, ...], rows: Tensor, out: Tensor) -> None:
        assert self._panels is not None
        assert rows.shape[1] == self._inputs
        assert out.is_contiguous()
        rows = rows.contiguous()
        panels, read, written = self._panels.data_ptr(), rows.data_ptr(), out.data_ptr()
        left = len(rows)
        while left:
            # Two even parts rather than a full and a small one: a kernel's time hardly depends on its rows.
            count = left if left <= ROWS_AT_ONCE else min(ROWS_AT_ONCE, (left + 1) // 2)
            kernels[count - 1](read, panels, written, self._inputs, self._outputs)
            read += 4 * count * self._inputs
            written += 4 * count * self._outputs
            left -= count


@functools.cache
def product_kernels() -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Compiled kernels for 1 to ROWS_AT_ONCE rows: those that store a product, and those that add it to what is there.

    Each takes (rows, panels, out, in, out width): three addresses of float32 and two sizes. Takes about a second.
    """
    module = ir.Module()
    for adds in (False, True):
        for rows in range(1, ROWS_AT_ONCE + 1):
            _write_kernel(module, _name(rows, adds), rows, adds)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    compiled = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(compiled, passes)
    engine = llvm.create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)

    def kernels(adds: bool) -> tuple[Kernel, ...]:
        addresses = (engine.get_function_address(_name(rows, adds)) for rows in range(1, ROWS_AT_ONCE + 1))
        return tuple(_keep(signature(address), engine) for address in addresses)

    return kernels(False), kernels(True)


def _keep(function: Any, engine: Any) -> Kernel:
    """The machine code lives as long as its engine: tie the two together."""
    function.engine = engine
    return function  # type: ignore[no-any-return]


def _name(rows: int, adds: bool) -> str:
    return f"{'add' if adds else 'store'}_product_{rows}"


def _write_kernel(module: ir.Module, name: str, num_rows: int, adds: bool) -> None:
    """Per panel: `sums[row] += input[row, i] * panel[i]` over all inputs i, with all sums in registers."""
    number, size = ir.FloatType(), ir.IntType(64)
    vector, address = ir.VectorType(number, LANES), number.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [address, address, address, size, size]), name)
    rows, panels, out, num_inputs, num_outputs = function.args
    entry, panel_block, input_block, store_block, end_block = (
        function.append_basic_block(block) for block in ("entry", "panel", "input", "store", "end")
    )
    ir.IRBuilder(entry).branch(panel_block)

    build = ir.IRBuilder(panel_block)
    column = build.phi(size, "column")
    column.add_incoming(size(0), entry)
    panel = build.gep(panels, [build.mul(column, num_inputs)])
    targets = [
        build.bitcast(build.gep(out, [build.add(build.mul(size(row), num_outputs), column)]), vector.as_pointer())
        for row in range(num_rows)
    ]
    zero = ir.Constant(vector, [0.0] * LANES)
    starts = [build.load(target, align=4) if adds else zero for target in targets]
    build.branch(input_block)

    build = ir.IRBuilder(input_block)
    position = build.phi(size, "position")
    position.add_incoming(size(0), panel_block)
    sums = [build.phi(vector) for _ in range(num_rows)]
    for total, start in zip(sums, starts, strict=True):
        total.add_incoming(start, panel_block)
    weights_at = build.gep(panel, [build.mul(position, size(LANES))])
    weights = build.load(build.bitcast(weights_at, vector.as_pointer()), align=4)
    added = []
    for row, total in enumerate(sums):
        value = build.load(build.gep(rows, [build.add(build.mul(size(row), num_inputs), position)]))
        added.append(build.call(_fused_multiply_add(module, vector), [_spread(build, value, vector), weights, total]))
    following = build.add(position, size(1))
    position.add_incoming(following, input_block)
    for total, value in zip(sums, added, strict=True):
        total.add_incoming(value, input_block)
    build.cbranch(build.icmp_signed("<", following, num_inputs), input_block, store_block)

    build = ir.IRBuilder(store_block)
    for value, target in zip(added, targets, strict=True):
        build.store(value, target, align=4)
    following_column = build.add(column, size(LANES))
    column.add_incoming(following_column, store_block)
    build.cbranch(build.icmp_signed("<", following_column, num_outputs), panel_block, end_block)
    ir.IRBuilder(end_block).ret_void()


def _fused_multiply_add(module: ir.Module, vector: ir.VectorType) -> ir.Function:
    name = f"llvm.fma.v{LANES}f32"
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(vector, [vector] * 3), name)


def _spread(build: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A vector with `value` in every lane."""
    nothing, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    first = build.insert_element(nothing, value, index(0))
    return build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
