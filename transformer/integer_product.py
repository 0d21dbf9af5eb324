"""Products of quantised weights with quantised rows, written in LLVM's intermediate language.

Weights and rows are in blocks of 32 inputs. A block's sum of products is an exact integer; blocks are added in order
in float32, for each row by itself. So a row's result is the same to the last bit whatever rows stand beside it, on
any processor. Weights are unpacked once for up to sixteen rows: more rows cost arithmetic, and no memory traffic.
"""

import ctypes
import functools
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from transformer.compiled import kept, kernel_cache
from transformer.integer_dots import WORD, Variant, call, possible_variants, spread, spread_constant
from transformer.panel_attention import write_attention
from transformer.product import rows_of_group

BLOCK = 32  # inputs that share a scale, as in GGUF files
LANES = 16  # outputs of a panel
STEPS = BLOCK // 4  # words of four bytes in a block
RECORD = STEPS + 3  # words of a block of a row: 32 int8; float32 scale; float32 scale * sum; int32 -128 * sum
ROUNDING = 12582912.0  # 1.5 * 2**23: a float32 plus this has the rounded number in its last bits

NUMBER, SIZE, BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(8).as_pointer()


@dataclass(frozen=True, slots=True)
class IntegerKernels:
    """Compiled functions of one variant, and their addresses for compiled callers.

    quantise(numbers, records, num_blocks, num_rows): round one row of float32 to 8 bit. `records` [blocks, rows, RECORD
    words] is the address of the row's first record.
    multiply_4, multiply_8(records, weights, scales, out, num_blocks, width, num_panels, num_rows, adds): fill the
    first LANES * num_panels columns of `out` [rows, width], or add to them. Weights are in panels, see
    `transformer.quantised`.
    """

    variant: Variant
    quantise: Callable[..., None]
    multiply_4: Callable[..., None]
    multiply_8: Callable[..., None]
    addresses: tuple[int, ...]  # of these three, and of the three of `transformer.panel_attention`
    engine: Any  # owns the machine code


def variants() -> list[Variant]:
    """Return what this processor can run, the fastest first; the last one runs anywhere."""
    return possible_variants(llvm.get_host_cpu_features(), platform.machine().lower() in ("arm64", "aarch64"))


@functools.cache
def integer_kernels(name: str | None = None) -> IntegerKernels:
    """Return the variant of this name, or the fastest, as machine code. It takes seconds once, and is kept on disk."""
    variant = next(variant for variant in variants() if name in (None, variant.name))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    processor = hashlib.sha256(f"{llvm.get_host_cpu_name()} {features} {llvm.llvm_version_info}".encode()).hexdigest()
    path = kernel_cache() / f"integer-{variant.name}-{processor[:16]}.o"
    code = kept(path, lambda: machine.emit_object(optimised(variant, machine)))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    names = ("quantise", "multiply_4", "multiply_8", "attend_scores", "attend_soften", "attend_values")
    addresses = tuple(engine.get_function_address(function) for function in names)
    quantise, multiply_4, multiply_8 = addresses[:3]
    size, address = ctypes.c_int64, ctypes.c_void_p
    product = ctypes.CFUNCTYPE(None, *[address] * 4, *[size] * 5)
    return IntegerKernels(
        variant,
        ctypes.CFUNCTYPE(None, address, address, size, size)(quantise),
        product(multiply_4),
        product(multiply_8),
        addresses,
        engine,
    )


def optimised(variant: Variant, machine: Any) -> Any:
    """Return the module of a variant, verified and optimised for a target machine."""
    module = ir.Module()
    _write_quantise(module)
    write_attention(module)
    for bits in (4, 8):
        columns = [_write_columns(module, variant, bits, rows) for rows in range(1, variant.rows + 1)]
        _write_product(module, variant, bits, columns)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def block_bytes(bits: int) -> int:
    """Return the size of a block of a panel, without its scales."""
    return BLOCK * LANES * bits // 8


def _write_quantise(module: ir.Module) -> None:
    """Write the rounding of one row. A number that is not finite makes its block's scale infinite or NaN."""
    vector, whole = ir.VectorType(NUMBER, LANES), ir.VectorType(WORD, LANES)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES, BYTES, SIZE, SIZE]), "quantise")
    numbers, records, num_blocks, num_rows = function.args
    entry, loop, end = (function.append_basic_block(name) for name in ("entry", "loop", "end"))
    ir.IRBuilder(entry).branch(loop)
    build = ir.IRBuilder(loop)
    block = build.phi(SIZE)
    block.add_incoming(SIZE(0), entry)
    source = build.gep(numbers, [build.mul(block, SIZE(4 * BLOCK))])
    target = build.gep(records, [build.mul(build.mul(block, num_rows), SIZE(4 * RECORD))])
    halves = [_load(build, source, 4 * LANES * half, vector) for half in range(2)]
    # Positive floats are ordered as their bits are; those of NaN are the largest.
    first, second = (build.and_(build.bitcast(half, whole), spread_constant(0x7FFFFFFF, LANES)) for half in halves)
    larger = build.select(build.icmp_unsigned(">", first, second), first, second)
    largest = build.bitcast(call(build, f"llvm.vector.reduce.umax.v{LANES}i32", WORD, larger), NUMBER)
    is_zero = build.fcmp_ordered("<", largest, NUMBER(1e-30))
    scale = build.select(is_zero, NUMBER(0.0), build.fdiv(largest, NUMBER(127.0)))
    inverse = build.select(is_zero, NUMBER(0.0), build.fdiv(NUMBER(127.0), largest))
    sums = spread_constant(0, LANES)
    for index, half in enumerate(halves):
        shifted = build.fadd(build.fmul(half, spread(build, inverse, LANES)), ir.Constant(vector, [ROUNDING] * LANES))
        bits = build.bitcast(shifted, whole)
        rounded = build.trunc(bits, ir.VectorType(ir.IntType(8), LANES))
        _store(build, rounded, target, LANES * index)
        sums = build.add(sums, build.sext(rounded, whole))
    total = call(build, f"llvm.vector.reduce.add.v{LANES}i32", WORD, sums)
    _store(build, scale, target, 4 * STEPS)
    _store(build, build.fmul(build.sitofp(total, NUMBER), scale), target, 4 * STEPS + 4)
    _store(build, build.mul(total, WORD(-128)), target, 4 * STEPS + 8)
    following = build.add(block, SIZE(1))
    block.add_incoming(following, loop)
    build.cbranch(build.icmp_unsigned("<", following, num_blocks), loop, end)
    ir.IRBuilder(end).ret_void()


def _write_product(module: ir.Module, variant: Variant, bits: int, functions: list[ir.Function]) -> None:
    """Write a product: for each few columns, all rows, at most `variant.rows` at a time. So memory is read once.

    functions: for one row, two rows, and so on.
    """
    kind = ir.FunctionType(ir.VoidType(), [BYTES] * 4 + [SIZE] * 5)
    function = ir.Function(module, kind, f"multiply_{bits}")
    records, weights, scales, out, num_blocks, width, num_panels, num_rows, adds = function.args
    entry, column_block, group_block, next_group, next_column, end = (
        function.append_basic_block(name) for name in ("entry", "column", "group", "next_group", "next_column", "end")
    )
    build = ir.IRBuilder(entry)
    num_columns = build.mul(num_panels, SIZE(LANES))
    build.branch(column_block)

    build = ir.IRBuilder(column_block)
    column = build.phi(SIZE, "column")
    column.add_incoming(SIZE(0), entry)
    lane = build.and_(column, SIZE(LANES - 1))
    block_number = build.mul(build.lshr(column, SIZE(LANES.bit_length() - 1)), num_blocks)
    panel_offset = build.add(build.mul(block_number, SIZE(block_bytes(bits))), build.mul(lane, SIZE(4)))
    scale_offset = build.add(build.mul(block_number, SIZE(_scale_bytes(bits))), build.mul(lane, SIZE(2)))
    panel, panel_scales = build.gep(weights, [panel_offset]), build.gep(scales, [scale_offset])
    build.branch(group_block)

    build = ir.IRBuilder(group_block)
    done = build.phi(SIZE, "done")
    done.add_incoming(SIZE(0), column_block)
    left = build.sub(num_rows, done)
    count = rows_of_group(build, left, variant.rows)
    group_records = build.gep(records, [build.mul(done, SIZE(4 * RECORD))])
    place = build.add(build.mul(done, width), column)
    group_out = build.gep(out, [build.mul(place, SIZE(4))])
    cases = build.switch(count, end)  # no rows: nothing to do
    for number, columns_function in enumerate(functions, start=1):
        case = function.append_basic_block(f"rows_{number}")
        cases.add_case(SIZE(number), case)
        build = ir.IRBuilder(case)
        arguments = [group_records, panel, panel_scales, group_out, num_blocks, width, num_rows, adds]
        build.call(columns_function, arguments)
        build.branch(next_group)

    build = ir.IRBuilder(next_group)
    now_done = build.add(done, count)
    done.add_incoming(now_done, next_group)
    build.cbranch(build.icmp_unsigned("<", now_done, num_rows), group_block, next_column)

    build = ir.IRBuilder(next_column)
    following = build.add(column, SIZE(variant.lanes))
    column.add_incoming(following, next_column)
    build.cbranch(build.icmp_unsigned("<", following, num_columns), column_block, end)
    ir.IRBuilder(end).ret_void()


def _write_columns(module: ir.Module, variant: Variant, bits: int, rows: int) -> ir.Function:
    """Write the product of `rows` rows and a panel's next `variant.lanes` columns, with all sums in registers.

    Meanwhile the next panel is fetched. After the last panel, the fetch has no effect.
    """
    kind = ir.FunctionType(ir.VoidType(), [BYTES] * 4 + [SIZE] * 4)
    function = ir.Function(module, kind, f"columns_{bits}_{rows}")
    function.linkage = "private"
    records, weights, scales, out, num_blocks, width, num_rows, adds = function.args
    vector = ir.VectorType(NUMBER, variant.lanes)
    entry, loop, end = (function.append_basic_block(name) for name in ("entry", "loop", "end"))

    build = ir.IRBuilder(entry)
    targets = [build.gep(out, [build.mul(width, SIZE(4 * row))]) for row in range(rows)]
    does_add = build.icmp_unsigned("!=", adds, SIZE(0))
    zero = ir.Constant(vector, [0.0] * variant.lanes)
    starts = [build.select(does_add, _load(build, target, 0, vector), zero) for target in targets]
    next_panel = build.mul(num_blocks, SIZE(block_bytes(bits)))
    stride = build.mul(num_rows, SIZE(4 * RECORD))
    build.branch(loop)

    build = ir.IRBuilder(loop)
    block = build.phi(SIZE, "block")
    block.add_incoming(SIZE(0), entry)
    totals = [build.phi(vector) for _ in range(rows)]
    for total, start in zip(totals, starts, strict=True):
        total.add_incoming(start, entry)
    source = build.gep(weights, [build.mul(block, SIZE(block_bytes(bits)))])
    factors = build.gep(scales, [build.mul(block, SIZE(_scale_bytes(bits)))])
    record = build.gep(records, [build.mul(block, stride)])
    ahead = build.gep(source, [next_panel])
    for line in range(0, block_bytes(bits), 64):
        _prefetch(build, build.gep(ahead, [SIZE(line)]))
    unpacked = [variant.prepare(build, word, bits) for word in _unpack(build, source, bits, variant.lanes)]
    scale = _load_halves(build, factors, 0, variant)
    least = _load_halves(build, factors, 2 * LANES, variant) if bits == 4 else None
    added = []
    for row, total in enumerate(totals):
        at = 4 * RECORD * row
        has_start = bits == 8 and variant.keeps_offset
        start = _load(build, record, at + 4 * STEPS + 8, WORD) if has_start else WORD(0)
        sums = spread(build, start, variant.lanes)
        for step in range(STEPS):
            sums = variant.dot(build, sums, unpacked[step], _load(build, record, at + 4 * step, WORD))
        factor = build.fmul(scale, spread(build, _load(build, record, at + 4 * STEPS, NUMBER), variant.lanes))
        total = call(build, f"llvm.fma.v{variant.lanes}f32", vector, build.sitofp(sums, vector), factor, total)
        if least is not None:
            row_sum = spread(build, _load(build, record, at + 4 * STEPS + 4, NUMBER), variant.lanes)
            total = call(build, f"llvm.fma.v{variant.lanes}f32", vector, least, row_sum, total)
        added.append(total)
    following = build.add(block, SIZE(1))
    block.add_incoming(following, loop)
    for total, value in zip(totals, added, strict=True):
        total.add_incoming(value, loop)
    build.cbranch(build.icmp_unsigned("<", following, num_blocks), loop, end)

    build = ir.IRBuilder(end)
    for value, target in zip(added, targets, strict=True):
        _store(build, value, target, 0)
    build.ret_void()
    return function


def _unpack(build: ir.IRBuilder, source: ir.Value, bits: int, lanes: int) -> list[ir.Value]:
    """Load a block's weights: a vector for each step, with the four inputs of a column in one word."""
    kind = ir.VectorType(WORD, lanes)
    if bits == 8:
        return [_load(build, source, 4 * LANES * step, kind) for step in range(STEPS)]
    packed = [_load(build, source, 4 * LANES * step, kind) for step in range(STEPS // 2)]
    mask = spread_constant(0x0F0F0F0F, lanes)
    high = [build.lshr(words, spread_constant(4, lanes)) for words in packed]
    return [build.and_(words, mask) for words in [*packed, *high]]


def _load_halves(build: ir.IRBuilder, address: ir.Value, offset: int, variant: Variant) -> ir.Value:
    """Load float16 numbers as float32. Without an instruction for it, move their bits and correct the exponent."""
    vector, words = ir.VectorType(NUMBER, variant.lanes), ir.VectorType(WORD, variant.lanes)
    if variant.has_halves:
        return build.fpext(_load(build, address, offset, ir.VectorType(ir.HalfType(), variant.lanes)), vector)
    bits = build.zext(_load(build, address, offset, ir.VectorType(ir.IntType(16), variant.lanes)), words)
    moved = build.shl(build.and_(bits, spread_constant(0x7FFF, variant.lanes)), spread_constant(13, variant.lanes))
    sign = build.shl(build.and_(bits, spread_constant(0x8000, variant.lanes)), spread_constant(16, variant.lanes))
    signed = build.bitcast(build.or_(moved, sign), vector)
    return build.fmul(signed, ir.Constant(vector, [2.0**112] * variant.lanes))


def _scale_bytes(bits: int) -> int:
    """Return the size of a block's scales: float16 scales, and for 4 bit the lowest values as well."""
    return 2 * LANES * (2 if bits == 4 else 1)


def _load(build: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    place = build.bitcast(build.gep(address, [SIZE(offset)]), kind.as_pointer())
    return build.load(place, align=2 if "half" in str(kind) or "i16" in str(kind) else 4)


def _store(build: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int) -> None:
    build.store(value, build.bitcast(build.gep(address, [SIZE(offset)]), value.type.as_pointer()), align=4)


def _prefetch(build: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch the cache line at `address` into the second-level cache. In the first it would displace the rows."""
    call_prefetch = build.module.globals.get("llvm.prefetch.p0") or ir.Function(
        build.module, ir.FunctionType(ir.VoidType(), [BYTES, WORD, WORD, WORD]), "llvm.prefetch.p0"
    )
    build.call(call_prefetch, [address, WORD(0), WORD(2), WORD(1)])
