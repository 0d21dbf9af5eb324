"""Matrix products with few rows, in LLVM's language.

A library's products are made for many rows: on a CPU four rows cost them up to twice as much as one, though both read
the same weights. Verification lives from that not being so. These kernels take up to six rows at a time through sixteen
columns, their sums in registers, while the next columns are on their way to the cache. They are compiled by what numba
brings along, since numba itself cannot be made to keep the sums in registers. Every sum runs over the inputs in order,
whatever the number of rows: a row's result is the same to the last bit in any batch.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

LANES = 16  # columns at a time: one vector of AVX-512, two of AVX2, four of NEON
ROWS_AT_ONCE = 6  # sums and inputs still fit into the sixteen registers of AVX2

Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Three products; each takes (rows, weights, out, inputs, outputs, rows): addresses of float32, and sizes.

    `store` and `add` read rows [rows, inputs] and weights in panels [outputs / LANES, inputs, LANES]; one stores the
    product [rows, outputs], the other adds it to what is there. `store_transposed` reads rows that stand in lanes,
    [inputs, LANES] of which the first are taken, and weights [inputs, outputs] as they are.
    """

    store: Kernel
    add: Kernel
    store_transposed: Kernel
    addresses: tuple[int, int, int]  # of the same, for compiled callers
    engine: Any  # owns the machine code


@functools.cache
def has_fast_sums() -> bool:
    """Whether this machine multiplies and adds in one instruction; emulated, the kernels would be of no use."""
    return bool(llvm.get_host_cpu_features().get("fma", True))  # a feature's name on x86 alone


@functools.cache
def product_kernels() -> Kernels:
    """Compiled for this machine; takes about a second."""
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
    """For each LANES columns, all rows, in parts of at most ROWS_AT_ONCE: weights are read from memory once.

    functions: for one row, two rows, and so on.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS] * 3 + [SIZE] * 3), name)
    rows, weights, out, num_inputs, num_outputs, num_rows = function.args
    entry, panel_block, part_block, next_part, next_panel, end_block = (
        function.append_basic_block(block) for block in ("entry", "panel", "part", "next_part", "next_panel", "end")
    )
    ir.IRBuilder(entry).branch(panel_block)

    build = ir.IRBuilder(panel_block)
    column = build.phi(SIZE, "column")
    column.add_incoming(SIZE(0), entry)
    panel = build.gep(weights, [column if is_transposed else build.mul(column, num_inputs)])
    build.branch(part_block)

    build = ir.IRBuilder(part_block)
    done = build.phi(SIZE, "done")
    done.add_incoming(SIZE(0), panel_block)
    left = build.sub(num_rows, done)
    # Two even parts rather than a full and a small one: a part's time hardly depends on its rows.
    half = build.lshr(build.add(left, SIZE(1)), SIZE(1))
    even = build.select(build.icmp_unsigned("<", half, SIZE(ROWS_AT_ONCE)), half, SIZE(ROWS_AT_ONCE))
    count = build.select(build.icmp_unsigned("<=", left, SIZE(ROWS_AT_ONCE)), left, even)
    part_rows = build.gep(rows, [done if is_transposed else build.mul(done, num_inputs)])
    part_out = build.gep(out, [build.add(build.mul(done, num_outputs), column)])
    cases = build.switch(count, end_block)  # none: there is nothing to do
    for number, columns_function in enumerate(functions, start=1):
        case = function.append_basic_block(f"rows_{number}")
        cases.add_case(SIZE(number), case)
        build = ir.IRBuilder(case)
        build.call(columns_function, [part_rows, panel, part_out, num_inputs, num_outputs])
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


def _write_columns(module: ir.Module, product: str, num_rows: int, adds: bool, is_transposed: bool) -> ir.Function:
    """`sums[row] += input[row, i] * weights[i]` over all inputs i, for LANES columns, with all sums in registers.

    Meanwhile the panel behind this one is fetched, line by line; behind the last one that comes to nothing.
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
    behind = build.gep(panel, [build.mul(num_inputs, SIZE(LANES))])
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
        _prefetch(module, build, build.gep(behind, [offset]))
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
    """Ask for the cache line at `address` (64 bytes: as many as LANES numbers) to come to the second-level cache.

    In the first it would drive out the rows.
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
    """A vector with `value` in every lane."""
    nothing, index = ir.Constant(VECTOR, ir.Undefined), ir.IntType(32)
    first = build.insert_element(nothing, value, index(0))
    return build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
