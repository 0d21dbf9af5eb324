"""Attention of few queries over many positions, written in LLVM's intermediate language.

Keys lie in panels of sixteen positions (`transformer.panel_cache`): a vector holds one dimension of sixteen keys, so
that scores need no sums across lanes, for one query as for many. Each query is computed by itself, in an order that
depends on its own positions alone: its result is the same to the last bit whatever queries stand beside it.
"""

import struct
from collections.abc import Callable

from llvmlite import ir

from transformer.integer_dots import WORD, call, spread, spread_constant

LANES = 16  # positions of a panel
PANELS_AT_ONCE = 4  # of scores: enough sums to keep the processor busy with three queries
QUERIES_AT_ONCE = 6  # 24 sums, and 4 keys, in the 32 registers of AVX-512
WIDE = 4  # vectors of a value at once, if a head has a multiple of so many

NUMBER, SIZE, BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(8).as_pointer()
VECTOR, WHOLE = ir.VectorType(NUMBER, LANES), ir.VectorType(WORD, LANES)


def write_attention(module: ir.Module) -> None:
    """Write three functions of addresses and sizes, for 1 to QUERIES_AT_ONCE queries.

    attend_scores(queries, keys, scores, head_dim, num_panels, stride, num_queries): the products of float32 queries
    [queries, head_dim] with all keys [panels, head_dim, LANES], as scores [queries, stride].
    attend_soften(scores, limit, num_panels, total): turn one query's scores into weights, which are 0 from `limit` on,
    and store their sum; it is NaN if a score is not finite.
    attend_values(scores, values, totals, out, head_dim, num_positions, stride, num_queries): the means of values
    [positions, head_dim], as [queries, head_dim].

    num_panels is a multiple of PANELS_AT_ONCE.
    """
    _write_choice(module, "attend_scores", 3, 3, lambda queries: [_write_scores(module, queries)] * 2)
    _write_soften(module)
    _write_choice(
        module, "attend_values", 4, 3, lambda queries: [_write_values(module, queries, wide) for wide in (1, WIDE)]
    )


def _write_choice(
    module: ir.Module, name: str, addresses: int, sizes: int, write: Callable[[int], list[ir.Function]]
) -> None:
    """Write a function that calls one for its number of queries, and for narrow or wide heads (the first size)."""
    kind = ir.FunctionType(ir.VoidType(), [BYTES] * addresses + [SIZE] * (sizes + 1))
    function = ir.Function(module, kind, name)
    entry, end = function.append_basic_block("entry"), function.append_basic_block("end")
    ir.IRBuilder(end).ret_void()
    build = ir.IRBuilder(entry)
    is_narrow = build.icmp_unsigned("!=", build.and_(function.args[addresses], SIZE(WIDE * LANES - 1)), SIZE(0))
    cases = build.switch(function.args[-1], end)
    for queries in range(1, QUERIES_AT_ONCE + 1):
        narrow, wide = write(queries)
        case = function.append_basic_block()
        cases.add_case(SIZE(queries), case)
        build = ir.IRBuilder(case)
        with build.if_else(is_narrow) as (then, otherwise):
            with then:
                build.call(narrow, function.args[:-1])
            with otherwise:
                build.call(wide, function.args[:-1])
        build.branch(end)


def _write_scores(module: ir.Module, queries: int) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES] * 3 + [SIZE] * 3), f"scores_{queries}")
    function.linkage = "private"
    sources, keys, scores, head_dim, num_panels, stride = function.args
    entry, panel_block, loop, store, end = (
        function.append_basic_block(name) for name in ("entry", "panel", "loop", "store", "end")
    )
    ir.IRBuilder(entry).branch(panel_block)
    build = ir.IRBuilder(panel_block)
    panel = build.phi(SIZE)
    panel.add_incoming(SIZE(0), entry)
    panel_bytes = build.mul(head_dim, SIZE(4 * LANES))
    starts = [
        build.gep(keys, [build.mul(build.add(panel, SIZE(index)), panel_bytes)]) for index in range(PANELS_AT_ONCE)
    ]
    build.branch(loop)

    build = ir.IRBuilder(loop)
    dimension = build.phi(SIZE)
    dimension.add_incoming(SIZE(0), panel_block)
    sums = [[build.phi(VECTOR) for _ in range(PANELS_AT_ONCE)] for _ in range(queries)]
    offset = build.mul(dimension, SIZE(4 * LANES))
    loaded = [_load(build, build.gep(start, [offset]), VECTOR) for start in starts]
    added = []
    for query in range(queries):
        place = build.add(build.mul(head_dim, SIZE(query)), dimension)
        factor = spread(build, _load(build, build.gep(sources, [build.mul(place, SIZE(4))]), NUMBER), LANES)
        added.append([_multiply_add(build, key, factor, total) for key, total in zip(loaded, sums[query], strict=True)])
    following = build.add(dimension, SIZE(1))
    dimension.add_incoming(following, loop)
    for old, new in zip(_flat(sums), _flat(added), strict=True):
        old.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), panel_block)
        old.add_incoming(new, loop)
    build.cbranch(build.icmp_unsigned("<", following, head_dim), loop, store)

    build = ir.IRBuilder(store)
    for query in range(queries):
        for index, value in enumerate(added[query]):
            column = build.mul(build.add(panel, SIZE(index)), SIZE(LANES))
            place = build.add(build.mul(stride, SIZE(query)), column)
            _store(build, value, build.gep(scores, [build.mul(place, SIZE(4))]))
    next_panel = build.add(panel, SIZE(PANELS_AT_ONCE))
    panel.add_incoming(next_panel, store)
    build.cbranch(build.icmp_unsigned("<", next_panel, num_panels), panel_block, end)
    ir.IRBuilder(end).ret_void()
    return function


def _write_values(module: ir.Module, queries: int, wide: int) -> ir.Function:
    kind = ir.FunctionType(ir.VoidType(), [BYTES] * 4 + [SIZE] * 3)
    function = ir.Function(module, kind, f"values_{queries}_{wide}")
    function.linkage = "private"
    scores, values, totals, out, head_dim, num_positions, stride = function.args
    entry, column_block, loop, store, end = (
        function.append_basic_block(name) for name in ("entry", "column", "loop", "store", "end")
    )
    ir.IRBuilder(entry).branch(column_block)
    build = ir.IRBuilder(column_block)
    column = build.phi(SIZE)
    column.add_incoming(SIZE(0), entry)
    build.branch(loop)

    build = ir.IRBuilder(loop)
    position = build.phi(SIZE)
    position.add_incoming(SIZE(0), column_block)
    sums = [[build.phi(VECTOR) for _ in range(wide)] for _ in range(queries)]
    place = build.add(build.mul(position, head_dim), column)
    source = build.gep(values, [build.mul(place, SIZE(4))])
    loaded = [_load(build, build.gep(source, [SIZE(4 * LANES * index)]), VECTOR) for index in range(wide)]
    added = []
    for query in range(queries):
        share_place = build.add(build.mul(stride, SIZE(query)), position)
        share = spread(build, _load(build, build.gep(scores, [build.mul(share_place, SIZE(4))]), NUMBER), LANES)
        added.append(
            [_multiply_add(build, value, share, total) for value, total in zip(loaded, sums[query], strict=True)]
        )
    following = build.add(position, SIZE(1))
    position.add_incoming(following, loop)
    for old, new in zip(_flat(sums), _flat(added), strict=True):
        old.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), column_block)
        old.add_incoming(new, loop)
    build.cbranch(build.icmp_unsigned("<", following, num_positions), loop, store)

    build = ir.IRBuilder(store)
    for query in range(queries):
        total = spread(build, _load(build, build.gep(totals, [SIZE(4 * query)]), NUMBER), LANES)
        start = build.add(build.mul(head_dim, SIZE(query)), column)
        target = build.gep(out, [build.mul(start, SIZE(4))])
        for index, value in enumerate(added[query]):
            _store(build, build.fdiv(value, total), build.gep(target, [SIZE(4 * LANES * index)]))
    next_column = build.add(column, SIZE(LANES * wide))
    column.add_incoming(next_column, store)
    build.cbranch(build.icmp_unsigned("<", next_column, head_dim), column_block, end)
    ir.IRBuilder(end).ret_void()
    return function


def _write_soften(module: ir.Module) -> None:
    """Write the softmax of one query, without the division. Two rounds: the highest score, then the weights."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES, SIZE, SIZE, BYTES]), "attend_soften")
    scores, limit, num_panels, total = function.args
    entry, first, between, second, end = (
        function.append_basic_block(name) for name in ("entry", "first", "between", "second", "end")
    )
    zero, lowest = ir.Constant(VECTOR, [0.0] * LANES), ir.Constant(VECTOR, [float("-inf")] * LANES)
    build = ir.IRBuilder(entry)
    end_position = spread(build, build.trunc(limit, WORD), LANES)
    build.branch(first)

    def load_panel(build: ir.IRBuilder, panel: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return the address of a panel's scores, the scores, and whether the query sees them."""
        start = build.mul(panel, SIZE(LANES))
        address = build.gep(scores, [build.mul(start, SIZE(4))])
        lanes = ir.Constant(WHOLE, list(range(LANES)))
        positions = build.add(spread(build, build.trunc(start, WORD), LANES), lanes)
        return address, _load(build, address, VECTOR), build.icmp_signed("<", positions, end_position)

    build = ir.IRBuilder(first)
    panel, highest, faults = build.phi(SIZE), build.phi(VECTOR), build.phi(VECTOR)
    _, values, seen = load_panel(build, panel)
    values = build.select(seen, values, lowest)
    higher = build.select(build.fcmp_ordered(">", values, highest), values, highest)
    known = build.select(seen, values, zero)
    faulty = build.fadd(faults, build.fmul(known, zero))  # NaN if a score is not finite
    following = build.add(panel, SIZE(1))
    for phi, start, new in ((panel, SIZE(0), following), (highest, lowest, higher), (faults, zero, faulty)):
        phi.add_incoming(start, entry)
        phi.add_incoming(new, first)
    build.cbranch(build.icmp_unsigned("<", following, num_panels), first, between)

    build = ir.IRBuilder(between)
    best = spread(build, call(build, f"llvm.vector.reduce.fmax.v{LANES}f32", NUMBER, higher), LANES)
    build.branch(second)

    build = ir.IRBuilder(second)
    panel, sums = build.phi(SIZE), build.phi(VECTOR)
    address, values, seen = load_panel(build, panel)
    shares = build.select(seen, _exponential(build, build.fsub(values, best)), zero)
    _store(build, shares, address)
    added = build.fadd(sums, shares)
    following = build.add(panel, SIZE(1))
    for phi, start, new in ((panel, SIZE(0), following), (sums, faulty, added)):
        phi.add_incoming(start, between)
        phi.add_incoming(new, second)
    build.cbranch(build.icmp_unsigned("<", following, num_panels), second, end)
    build = ir.IRBuilder(end)
    _store(build, call(build, f"llvm.vector.reduce.fadd.v{LANES}f32", NUMBER, NUMBER(0.0), added), total)
    build.ret_void()


def _exponential(build: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return `exp(x)` for x up to 0, as `transformer.intrinsics.exponential` does; NaN becomes nearly 0."""

    def constant(value: float) -> ir.Constant:
        return ir.Constant(VECTOR, [value] * LANES)

    x = build.select(build.fcmp_ordered(">", x, constant(-87.0)), x, constant(-87.0))
    whole = build.fptosi(build.fsub(build.fmul(x, constant(SINGLE["log2e"])), constant(0.5)), WHOLE)
    power = build.sitofp(whole, VECTOR)
    rest = _multiply_add(build, power, constant(-SINGLE["ln2_high"]), x)
    rest = _multiply_add(build, power, constant(SINGLE["ln2_low"]), rest)
    series = constant(SINGLE["1/720"])
    for name in ("1/120", "1/24", "1/6", "1/2", "1", "1"):
        series = _multiply_add(build, series, rest, constant(SINGLE[name]))
    exponent = build.shl(build.add(whole, spread_constant(127, LANES)), spread_constant(23, LANES))
    return build.fmul(series, build.bitcast(exponent, VECTOR))


def _single(value: float) -> float:
    """Return a number rounded to float32: LLVM's text takes no other constants."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


SINGLE = {
    name: _single(value)
    for name, value in {
        "log2e": 1.4426950408889634, "ln2_high": 0.693359375, "ln2_low": 2.12194440e-4,
        "1/720": 1 / 720, "1/120": 1 / 120, "1/24": 1 / 24, "1/6": 1 / 6, "1/2": 0.5, "1": 1.0,
    }.items()
}  # fmt: skip


def _multiply_add(build: ir.IRBuilder, first: ir.Value, second: ir.Value, total: ir.Value) -> ir.Value:
    return call(build, f"llvm.fma.v{LANES}f32", VECTOR, first, second, total)


def _flat(rows: list[list[ir.Value]]) -> list[ir.Value]:
    return [value for row in rows for value in row]


def _load(build: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return build.load(build.bitcast(address, kind.as_pointer()), align=4)


def _store(build: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    build.store(value, build.bitcast(address, value.type.as_pointer()), align=4)
