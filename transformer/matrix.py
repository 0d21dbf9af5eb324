"""Weight matrices, multiplied with the few rows of a decoding step.

Library matrix products are made for many rows: on a CPU four rows cost them up to twice as much as one, though both
read the same weights. Verification lives from that not being so. Small float32 matrices on the CPU are therefore kept
in panels of 16 columns too, and multiplied by a kernel that takes up to six rows at a time through a panel, their sums
in registers, while the next panel is on its way to the cache. The kernel is written in LLVM's language, through the
compiler that numba brings along, since numba itself cannot be made to keep the sums in registers. Every sum runs over
the inputs in order, whatever the number of rows: a row's result is the same to the last bit in any batch.
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
MOST_KERNEL_ROWS = 48  # beyond it the library can use several threads; where there is one, the kernel is faster
MOST_ROWS_ALONE = 256  # up to here
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
        if not self._has_kernel(len(rows)):
            return rows @ self._weight if bias is None else torch.addmm(bias, rows, self._weight)
        if bias is None:
            product = rows.new_empty(len(rows), self._outputs)
            self._run(self._store, rows, product)
            return product
        return self.add_product(bias.expand(len(rows), -1).clone(memory_format=torch.contiguous_format), rows)

    def add_product(self, total: Tensor, rows: Tensor) -> Tensor:
        """`total + rows @ weight`; `total` may be overwritten."""
        if not self._has_kernel(len(rows)):
            return torch.addmm(total, rows, self._weight)
        self._run(self._add, rows, total)
        return total

    def _has_kernel(self, num_rows: int) -> bool:
        if self._panels is None or num_rows > MOST_ROWS_ALONE:
            return False
        return num_rows <= MOST_KERNEL_ROWS or torch.get_num_threads() == 1

    def _run(self, kernel: Kernel, rows: Tensor, out: Tensor) -> None:
        assert self._panels is not None
        assert rows.shape[1] == self._inputs
        assert out.is_contiguous()
        rows = rows.contiguous()
        kernel(rows.data_ptr(), self._panels.data_ptr(), out.data_ptr(), self._inputs, self._outputs, len(rows))


@functools.cache
def product_kernels() -> tuple[Kernel, Kernel]:
    """Compiled kernels: one that stores a product, and one that adds it to what is there. Takes about a second.

    Each takes (rows, panels, out, in, out width, number of rows): three addresses of float32 and three sizes.
    """
    module = ir.Module()
    names = ("store_product", "add_product")
    for name, adds in zip(names, (False, True), strict=True):
        _write_product(module, name, [_write_panel(module, rows, adds) for rows in range(1, ROWS_AT_ONCE + 1)])
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
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    store, add = (_keep(signature(engine.get_function_address(name)), engine) for name in names)
    return store, add


def _keep(function: Any, engine: Any) -> Kernel:
    """The machine code lives as long as its engine: tie the two together."""
    function.engine = engine
    return function  # type: ignore[no-any-return]


NUMBER, SIZE = ir.FloatType(), ir.IntType(64)
VECTOR, ADDRESS = ir.VectorType(NUMBER, LANES), NUMBER.as_pointer()


def _write_product(module: ir.Module, name: str, panel_functions: list[ir.Function]) -> None:
    """For each panel, all rows, in parts of at most ROWS_AT_ONCE: a panel is read from memory once."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS] * 3 + [SIZE] * 3), name)
    rows, panels, out, num_inputs, num_outputs, num_rows = function.args
    entry, panel_block, part_block, next_part, next_panel, end_block = (
        function.append_basic_block(block) for block in ("entry", "panel", "part", "next_part", "next_panel", "end")
    )
    ir.IRBuilder(entry).branch(panel_block)

    build = ir.IRBuilder(panel_block)
    column = build.phi(SIZE, "column")
    column.add_incoming(SIZE(0), entry)
    panel = build.gep(panels, [build.mul(column, num_inputs)])
    build.branch(part_block)

    build = ir.IRBuilder(part_block)
    done = build.phi(SIZE, "done")
    done.add_incoming(SIZE(0), panel_block)
    left = build.sub(num_rows, done)
    # Two even parts rather than a full and a small one: a part's time hardly depends on its rows.
    half = build.lshr(build.add(left, SIZE(1)), SIZE(1))
    even = build.select(build.icmp_unsigned("<", half, SIZE(ROWS_AT_ONCE)), half, SIZE(ROWS_AT_ONCE))
    count = build.select(build.icmp_unsigned("<=", left, SIZE(ROWS_AT_ONCE)), left, even)
    part_rows = build.gep(rows, [build.mul(done, num_inputs)])
    part_out = build.gep(out, [build.add(build.mul(done, num_outputs), column)])
    cases = build.switch(count, end_block)  # none: there is nothing to do
    for number, panel_function in enumerate(panel_functions, start=1):
        case = function.append_basic_block(f"rows_{number}")
        cases.add_case(SIZE(number), case)
        build = ir.IRBuilder(case)
        build.call(panel_function, [part_rows, panel, part_out, num_inputs, num_outputs])
        build.branch(next_part)

    build = ir.IRBuilder(next_part)
    now_done = build.add(done, count)
    done.add_incoming(now_done, next_part)
    build.cbranch(build.icmp_unsigned("<", now_done, num_rows), part_block, next_panel)

    build = ir.IRBuilder(next_panel)
    following = build.add(column, SIZE(LANES))
    column.add_incoming(following, next_panel)
    build.cbranch(build.icmp_unsigned("<", following, num_outputs), panel_block, end_block)
    ir.IRBuilder(end_block).ret_void()


def _write_panel(module: ir.Module, num_rows: int, adds: bool) -> ir.Function:
    """`sums[row] += input[row, i] * panel[i]` over all inputs i, with all sums in registers.

    Meanwhile the panel behind this one is fetched, line by line; behind the last one that comes to nothing.
    """
    name = f"{'add' if adds else 'store'}_panel_{num_rows}"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS] * 3 + [SIZE] * 2), name)
    function.linkage = "private"
    rows, panel, out, num_inputs, num_outputs = function.args
    entry, input_block, store_block = (function.append_basic_block(block) for block in ("entry", "input", "store"))

    build = ir.IRBuilder(entry)
    targets = [
        build.bitcast(build.gep(out, [build.mul(SIZE(row), num_outputs)]), VECTOR.as_pointer())
        for row in range(num_rows)
    ]
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    starts = [build.load(target, align=4) if adds else zero for target in targets]
    behind = build.gep(panel, [build.mul(num_inputs, SIZE(LANES))])
    build.branch(input_block)

    build = ir.IRBuilder(input_block)
    position = build.phi(SIZE, "position")
    position.add_incoming(SIZE(0), entry)
    sums = [build.phi(VECTOR) for _ in range(num_rows)]
    for total, start in zip(sums, starts, strict=True):
        total.add_incoming(start, entry)
    offset = build.mul(position, SIZE(LANES))
    weights = build.load(build.bitcast(build.gep(panel, [offset]), VECTOR.as_pointer()), align=4)
    _prefetch(module, build, build.gep(behind, [offset]))
    added = []
    for row, total in enumerate(sums):
        value = build.load(build.gep(rows, [build.add(build.mul(SIZE(row), num_inputs), position)]))
        added.append(build.call(_fused_multiply_add(module), [_spread(build, value), weights, total]))
    following = build.add(position, SIZE(1))
    position.add_incoming(following, input_block)
    for total, value in zip(sums, added, strict=True):
        total.add_incoming(value, input_block)
    build.cbranch(build.icmp_unsigned("<", following, num_inputs), input_block, store_block)

    build = ir.IRBuilder(store_block)
    for value, target in zip(added, targets, strict=True):
        build.store(value, target, align=4)
    build.ret_void()
    return function


def _prefetch(module: ir.Module, build: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at `address` (64 bytes: as many as LANES numbers), to be read soon."""
    word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    name = "llvm.prefetch.p0"
    known = module.globals.get(name)
    function = known or ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, word, word, word]), name)
    build.call(function, [build.bitcast(address, pointer), word(0), word(3), word(1)])


def _fused_multiply_add(module: ir.Module) -> ir.Function:
    name = f"llvm.fma.v{LANES}f32"
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(VECTOR, [VECTOR] * 3), name)


def _spread(build: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector with `value` in every lane."""
    nothing, index = ir.Constant(VECTOR, ir.Undefined), ir.IntType(32)
    first = build.insert_element(nothing, value, index(0))
    return build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
