"""Matrix products with few rows, written in LLVM's intermediate language.

Libraries are made for many rows: on a CPU they take up to twice as long for four rows as for one, although both read
the same weights. Verification only pays if extra rows are nearly free. These kernels run up to six rows at a time
through sixteen columns, with all sums in registers, while the next columns are fetched into the cache. They are
compiled with llvmlite, which numba brings along, because numba itself does not keep the sums in registers. Every sum
runs over the inputs in order, whatever the number of rows: a row's result is the same to the last bit in any batch.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

LANES = 16  # columns at a time: one vector of AVX-512, two of AVX2, four of NEON
ROWS_AT_ONCE = 6  # sums and inputs fit into the sixteen registers of AVX2

Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Three products. Each takes (rows, weights, out, num_inputs, num_outputs, num_rows): float32 addresses and sizes.

    `store` and `add` read rows [rows, inputs] and weights in panels [outputs / LANES, inputs, LANES]. `store` writes
    the product [rows, outputs]; `add` adds it to `out`. `store_transposed` reads rows as the first lanes of
    [inputs, LANES], and plain weights [inputs, outputs].
    """

    store: Kernel
    add: Kernel
    store_transposed: Kernel
    addresses: tuple[int, int, int]  # of the three, for compiled callers
    engine: Any  # owns the machine code


@functools.cache
def has_fast_sums() -> bool:
    """Return whether this machine multiplies and adds in one instruction. Emulated, the kernels are too slow."""
    return bool(llvm.get_host_cpu_features().get("fma", True))  # only x86 has a feature of this name


@functools.cache
def product_kernels() -> Kernels:
    """Compile the kernels for this machine; takes about a second."""
    module = ir.Module()
    names = ("store", "add", "store_transposed")
    for name in names:
        adds, is_transposed = name == "add", name == "store_transposed"
        columns = [_write_columns(module, name, rows, adds, is_transposed) for rows in range(1, ROWS_AT_ONCE + 1)]
        _write_product(module, name, columns, is_transposed)
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
    addresses = [engine.get_function_address(name) for name in names]
    store, add, store_transposed = (signature(address) for address in addresses)
    return Kernels(store, add, store_transposed, (addresses[0], addresses[1], addresses[2]), engine)


NUMBER, SIZE = ir.FloatType(), ir.IntType(64)
VECTOR, ADDRESS = ir.VectorType(NUMBER, LANES), NUMBER.as_pointer()


def _write_product(module: ir.Module, name: str, functions: list[ir.Function], is_transposed: bool) -> None:
    """Write a product: for each LANES columns, all rows, at most ROWS_AT_ONCE at a time. So memory is read once.

    functions: for one row, two rows, and so on.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS] * 3 + [SIZE] * 3), name)
    rows, weights, out, num_inputs, num_outputs, num_rows = function.args
    entry, panel_block, group_block, next_group, next_panel, end_block = (
        function.append_basic_block(block) for block in ("entry", "panel", "group", "next_group", "next_panel", "end")
    )
    ir.IRBuilder(entry).branch(panel_block)

    build = ir.IRBuilder(panel_block)
    column = build.phi(SIZE, "column")
    column.add_incoming(SIZE(0), entry)
    panel = build.gep(weights, [column if is_transposed else build.mul(column, num_inputs)])
    build.branch(group_block)

    build = ir.IRBuilder(group_block)
    done = build.phi(SIZE, "done")
    done.add_incoming(SIZE(0), panel_block)
    left = build.sub(num_rows, done)
    count = rows_of_group(build, left, ROWS_AT_ONCE)
    group_rows = build.gep(rows, [done if is_transposed else build.mul(done, num_inputs)])
    group_out = build.gep(out, [build.add(build.mul(done, num_outputs), column)])
    cases = build.switch(count, end_block)  # no rows: nothing to do
    for number, columns_function in enumerate(functions, start=1):
        case = function.append_basic_block(f"rows_{number}")
        cases.add_case(SIZE(number), case)
        build = ir.IRBuilder(case)
        build.call(columns_function, [group_rows, panel, group_out, num_inputs, num_outputs])
        build.branch(next_group)

    build = ir.IRBuilder(next_group)
    now_done = build.add(done, count)
    done.add_incoming(now_done, next_group)
    build.cbranch(build.icmp_unsigned("<", now_done, num_rows), group_block, next_panel)

    build = ir.IRBuilder(next_panel)
    following = build.add(column, SIZE(LANES))
    column.add_incoming(following, next_panel)
    build.cbranch(build.icmp_unsigned("<", following, num_outputs), panel_block, end_block)
    ir.IRBuilder(end_block).ret_void()


def rows_of_group(build: ir.IRBuilder, left: ir.Value, max_rows: int) -> ir.Value:
    """Return how many of the rows that are left to run at a time.

    Two even groups are better than a full and a small one: every group reads the weights, whatever its rows.
    """
    half = build.lshr(build.add(left, SIZE(1)), SIZE(1))
    even = build.select(build.icmp_unsigned("<", half, SIZE(max_rows)), half, SIZE(max_rows))
    return build.select(build.icmp_unsigned("<=", left, SIZE(max_rows)), left, even)


def _write_columns(module: ir.Module, product: str, num_rows: int, adds: bool, is_transposed: bool) -> ir.Function:
    """Write `sums[row] += input[row, i] * weights[i]` over all inputs i, for LANES columns, with all sums in registers.

    Meanwhile the next panel is fetched, line by line. After the last panel, the fetch has no effect.
    """
    name = f"{product}_{num_rows}"
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
    next_panel_start = build.gep(panel, [build.mul(num_inputs, SIZE(LANES))])
    build.branch(input_block)

    build = ir.IRBuilder(input_block)
    position = build.phi(SIZE, "position")
    position.add_incoming(SIZE(0), entry)
    sums = [build.phi(VECTOR) for _ in range(num_rows)]
    for total, start in zip(sums, starts, strict=True):
        total.add_incoming(start, entry)
    offset = build.mul(position, num_outputs if is_transposed else SIZE(LANES))
    weights = build.load(build.bitcast(build.gep(panel, [offset]), VECTOR.as_pointer()), align=4)
    if not is_transposed:
        _prefetch(module, build, build.gep(next_panel_start, [offset]))
    added = []
    for row, total in enumerate(sums):
        row_start, step = (SIZE(row), SIZE(LANES)) if is_transposed else (build.mul(SIZE(row), num_inputs), SIZE(1))
        value = build.load(build.gep(rows, [build.add(row_start, build.mul(position, step))]))
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
    """Fetch the cache line at `address` (64 bytes: LANES numbers) into the second-level cache.

    In the first-level cache it would displace the rows.
    """
    word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    name = "llvm.prefetch.p0"
    known = module.globals.get(name)
    function = known or ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, word, word, word]), name)
    build.call(function, [build.bitcast(address, pointer), word(0), word(2), word(1)])


def _fused_multiply_add(module: ir.Module) -> ir.Function:
    name = f"llvm.fma.v{LANES}f32"
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(VECTOR, [VECTOR] * 3), name)


def _spread(build: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return a vector with `value` in every lane."""
    nothing, index = ir.Constant(VECTOR, ir.Undefined), ir.IntType(32)
    first = build.insert_element(nothing, value, index(0))
    return build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
