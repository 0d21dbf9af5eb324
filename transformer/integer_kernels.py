"""A pass through the layers of a quantised model, shared by several threads.

Products have integer sums (`transformer.integer_product`); norms, rotations, attention and gates are those of
`transformer.kernels`, in float32. Each row is computed by itself, in a fixed order: its result is the same to the last
bit in any batch, with any number of rows and threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import allocating, compiled
from transformer.integer_product import BLOCK, LANES, RECORD
from transformer.intrinsics import call_kernel, exponential
from transformer.kernels import Indices, Numbers, add_to, copy, normalize, scale, turn
from transformer.panel_attention import PANELS_AT_ONCE, QUERIES_AT_ONCE
from transformer.quantised import MAX_TILE_ROWS
from transformer.sharing import claim, enter, finish, leave, wait

STAGES = 10  # of a layer
GATE_ITEMS = 4  # parts of a row in which gates are computed
PRODUCT_ITEMS = 8  # items of a product per thread: more balance better, and cost more claims
MAX_ITEM_PANELS = 32


class IntegerArrays(NamedTuple):
    """A model's weights in the form that the kernels read. An array has no rows if the model lacks that weight."""

    kernels: Indices  # [6] addresses of `IntegerKernels`
    panels: Indices  # [layers, 4, 3] of q/k/v, output, gate/up and down: addresses of panels and scales; bits
    norms: Numbers  # [layers, 2, hidden] before attention and before the gates, times the root of hidden
    qkv_bias: Numbers  # [layers, (heads + 2 * kv_heads) * head_dim]
    head_norms: Numbers  # [layers, heads + kv_heads, head_dim] of queries and keys, times the root of head_dim
    output_bias: Numbers  # [layers, hidden]
    final_norm: Numbers  # [hidden]
    num_heads: int
    num_shared: int  # key-value heads
    head_dim: int
    intermediate: int
    epsilon: float  # of the norms, times the hidden size
    head_epsilon: float  # times head_dim


class IntegerWorkspace(NamedTuple):
    """Working memory of a pass."""

    records: NDArray[np.int32]  # [tiles, blocks, rows of a tile, RECORD] flat: quantised inputs of a product
    qkv: Numbers  # [rows, (heads + 2 * kv_heads) * head_dim]
    normalized: Numbers  # [rows, hidden]
    attended: Numbers  # [rows, heads * head_dim]
    gate_up: Numbers  # [rows, 2 * intermediate]
    gated: Numbers  # [rows, intermediate]
    queries: Numbers  # [threads, QUERIES_AT_ONCE, head_dim]
    scores: Numbers  # [threads, QUERIES_AT_ONCE, positions]
    totals: Numbers  # [threads, QUERIES_AT_ONCE]
    read: Numbers  # [threads, QUERIES_AT_ONCE, head_dim]


@allocating
def plan_attention(rows: Any, rows_at_once: int, num_shared: int) -> Any:
    """Return the items of attention, int64 [items, 4]: sequence, first row, number of rows, key-value head."""
    count = 0
    for sequence in range(len(rows.slots)):
        held = rows.firsts[sequence + 1] - rows.firsts[sequence]
        count += (held + rows_at_once - 1) // rows_at_once * num_shared
    items = np.empty((count, 4), np.int64)
    index = 0
    for sequence in range(len(rows.slots)):
        stop = rows.firsts[sequence + 1]
        for shared in range(num_shared):
            for begin in range(rows.firsts[sequence], stop, rows_at_once):
                items[index, 0], items[index, 1] = sequence, begin
                items[index, 2], items[index, 3] = min(rows_at_once, stop - begin), shared
                index += 1
    return items


@compiled
def quantise_row(kernels: Any, numbers: Any, row: int, num_rows: int, first: int, records: Any) -> None:
    """Round a row's numbers [count], a multiple of BLOCK from input `first` on, to the records of a product.

    The product has `num_rows` rows of `len(records) / num_rows / RECORD` blocks.
    """
    blocks = len(records) // num_rows // RECORD
    tile = row // MAX_TILE_ROWS
    tile_rows = min(MAX_TILE_ROWS, num_rows - tile * MAX_TILE_ROWS)
    block = first // BLOCK
    place = (tile * MAX_TILE_ROWS * blocks + block * tile_rows + row % MAX_TILE_ROWS) * RECORD
    target = records.ctypes.data + 4 * place
    call_kernel(kernels[0], (numbers.ctypes.data, target, len(numbers) // BLOCK, tile_rows))


@compiled
def product_items(num_panels: int, num_rows: int, num_threads: int) -> Any:
    """Return the number of a product's items, and the panels of an item."""
    panels = min(max(num_panels // (PRODUCT_ITEMS * num_threads), 1), MAX_ITEM_PANELS)
    tiles = (num_rows + MAX_TILE_ROWS - 1) // MAX_TILE_ROWS
    return tiles * ((num_panels + panels - 1) // panels), panels


@compiled
def share_product(
    share: Any, stage: int, kernels: Any, matrix: Any, inputs: int, records: Any, out: Any, adds: int
) -> None:
    """Fill `out` [rows, outputs] with the product of quantised rows, or add to it."""
    num_rows, width = out.shape
    num_panels, num_blocks = width // LANES, inputs // BLOCK
    bits = matrix[2]
    num_items, panels_at_once = product_items(num_panels, num_rows, share.num_threads)
    per_tile = (num_panels + panels_at_once - 1) // panels_at_once
    kernel = kernels[1] if bits == 4 else kernels[2]
    panel_bytes = num_blocks * BLOCK * LANES * bits // 8
    scale_bytes = num_blocks * 2 * LANES * (2 if bits == 4 else 1)
    item = claim(share, stage, num_items)
    while item >= 0:
        tile, panel = item // per_tile, item % per_tile * panels_at_once
        first_row = tile * MAX_TILE_ROWS
        call_kernel(
            kernel,
            (
                records.ctypes.data + 4 * RECORD * first_row * num_blocks,
                matrix[0] + panel * panel_bytes,
                matrix[1] + panel * scale_bytes,
                out.ctypes.data + 4 * (first_row * width + panel * LANES),
                num_blocks,
                width,
                min(panels_at_once, num_panels - panel),
                min(MAX_TILE_ROWS, num_rows - first_row),
                adds,
            ),
        )
        finish(share, stage)
        item = claim(share, stage, num_items)
    wait(share, stage, num_items)


@compiled
def run_integer_layers(
    share: Any, hidden: Any, rows: Any, items: Any, arrays: Any, rotations: Any, keys: Any, values: Any, work: Any
) -> None:
    """Do one thread's share of carrying `hidden` [rows, hidden] through all layers and the final norm, in place.

    rotations: [positions, head_dim] cosine and sine of every pair. keys, values: of the `PanelCache`; receive those of
    all rows. items: of `plan_attention`.
    """
    if not enter(share):
        return
    num_rows = len(hidden)
    for layer in range(len(keys)):
        _run_layer(share, layer, hidden, rows, items, arrays, rotations, keys[layer], values[layer], work)
    stage = STAGES * len(keys)
    row = claim(share, stage, num_rows)
    while row >= 0:
        normalize(hidden[row : row + 1], arrays.epsilon, hidden[row : row + 1])
        scale(arrays.final_norm, hidden[row])
        finish(share, stage)
        row = claim(share, stage, num_rows)
    wait(share, stage, num_rows)
    leave(share)


@compiled
def _run_layer(
    share: Any, layer: int, hidden: Any, rows: Any, items: Any, arrays: Any, rotations: Any, keys: Any, values: Any,
    work: Any,
) -> None:  # fmt: skip
    """Run one layer, whose share of the cache is `keys` and `values`."""
    num_rows, width = hidden.shape
    stage, kernels, panels = STAGES * layer, arrays.kernels, arrays.panels[layer]
    heads_width = arrays.num_heads * arrays.head_dim
    _share_norms(share, stage, hidden, arrays.norms[layer, 0], arrays.epsilon, kernels, work)
    records = work.records[: num_rows * width // BLOCK * RECORD]
    share_product(share, stage + 1, kernels, panels[0], width, records, work.qkv, 0)
    _share_positions(share, stage + 2, layer, rows, arrays, rotations, keys, values, work.qkv)
    _share_attention(share, stage + 3, rows, items, arrays, keys, values, work)

    records = work.records[: num_rows * heads_width // BLOCK * RECORD]
    row = claim(share, stage + 4, num_rows)
    while row >= 0:
        quantise_row(kernels, work.attended[row], row, num_rows, 0, records)
        if len(arrays.output_bias):
            add_to(arrays.output_bias[layer], hidden[row])
        finish(share, stage + 4)
        row = claim(share, stage + 4, num_rows)
    wait(share, stage + 4, num_rows)
    share_product(share, stage + 5, kernels, panels[1], heads_width, records, hidden, 1)

    _share_norms(share, stage + 6, hidden, arrays.norms[layer, 1], arrays.epsilon, kernels, work)
    records = work.records[: num_rows * width // BLOCK * RECORD]
    share_product(share, stage + 7, kernels, panels[2], width, records, work.gate_up, 0)
    _share_gates(share, stage + 8, arrays.intermediate, kernels, work)
    records = work.records[: num_rows * arrays.intermediate // BLOCK * RECORD]
    share_product(share, stage + 9, kernels, panels[3], arrays.intermediate, records, hidden, 1)


@compiled
def _share_norms(share: Any, stage: int, hidden: Any, norm: Any, epsilon: float, kernels: Any, work: Any) -> None:
    """Fill the records with normalized rows."""
    num_rows, width = hidden.shape
    records = work.records[: num_rows * width // BLOCK * RECORD]
    row = claim(share, stage, num_rows)
    while row >= 0:
        normalize(hidden[row : row + 1], epsilon, work.normalized[row : row + 1])
        scale(norm, work.normalized[row])
        quantise_row(kernels, work.normalized[row], row, num_rows, 0, records)
        finish(share, stage)
        row = claim(share, stage, num_rows)
    wait(share, stage, num_rows)


@compiled
def _share_positions(
    share: Any, stage: int, layer: int, rows: Any, arrays: Any, rotations: Any, keys: Any, values: Any, qkv: Any
) -> None:
    """Add biases, norm and turn queries and keys, and write keys and values into the cache."""
    num_rows, num_heads, num_shared = len(qkv), arrays.num_heads, arrays.num_shared
    row = claim(share, stage, num_rows)
    while row >= 0:
        sequence = 0
        while rows.firsts[sequence + 1] <= row:
            sequence += 1
        slot, position = rows.slots[sequence], rows.starts[sequence] + row - rows.firsts[sequence]
        if len(arrays.qkv_bias):
            add_to(arrays.qkv_bias[layer], qkv[row])
        heads = qkv[row].reshape((num_heads + 2 * num_shared, arrays.head_dim))
        for head in range(num_heads + num_shared):
            if len(arrays.head_norms):
                normalize(heads[head : head + 1], arrays.head_epsilon, heads[head : head + 1])
                scale(arrays.head_norms[layer, head], heads[head])
            turn(heads[head], rotations[position])
        panel, lane = position // LANES, position % LANES
        for head in range(num_shared):
            for index in range(arrays.head_dim):
                keys[slot, head, panel, index, lane] = heads[num_heads + head, index]
            copy(heads[num_heads + num_shared + head], values[slot, head, position])
        finish(share, stage)
        row = claim(share, stage, num_rows)
    wait(share, stage, num_rows)


@compiled
def _share_attention(
    share: Any, stage: int, rows: Any, items: Any, arrays: Any, keys: Any, values: Any, work: Any
) -> None:
    item = claim(share, stage, len(items))
    while item >= 0:
        slot, shared = rows.slots[items[item, 0]], items[item, 3]
        attend_rows(
            arrays, work.qkv, items[item, 1], items[item, 2], shared, keys[slot, shared], values[slot, shared],
            rows.limits, work, share.thread, work.attended,
        )  # fmt: skip
        finish(share, stage)
        item = claim(share, stage, len(items))
    wait(share, stage, len(items))


@compiled
def attend_rows(
    arrays: Any, qkv: Any, begin: int, num_rows: int, shared: int, keys: Any, values: Any, limits: Any, work: Any,
    thread: int, out: Any,
) -> None:  # fmt: skip
    """Fill `out` with the attention results of a sequence's rows from `begin` on, for the queries of one shared head.

    keys [panels, head_dim, LANES], values [positions, head_dim]: of this head.
    """
    head_dim, group, kernels = arrays.head_dim, arrays.num_heads // arrays.num_shared, arrays.kernels
    root = np.float32(1.0 / np.sqrt(head_dim))
    queries, scores, totals, read = work.queries[thread], work.scores[thread], work.totals[thread], work.read[thread]
    stride = scores.shape[1]
    num_queries = num_rows * group
    done = 0
    while done < num_queries:
        count = min(QUERIES_AT_ONCE, num_queries - done)
        num_positions = 0
        for index in range(count):
            row, head = begin + (done + index) // group, shared * group + (done + index) % group
            num_positions = max(num_positions, limits[row])
            for dimension in range(head_dim):
                queries[index, dimension] = qkv[row, head * head_dim + dimension] * root
        at_once = LANES * PANELS_AT_ONCE
        num_panels = (num_positions + at_once - 1) // at_once * PANELS_AT_ONCE
        call_kernel(
            kernels[3],
            (queries.ctypes.data, keys.ctypes.data, scores.ctypes.data, head_dim, num_panels, stride, count),
        )
        for index in range(count):
            limit = limits[begin + (done + index) // group]
            total = totals.ctypes.data + 4 * index
            call_kernel(kernels[4], (scores.ctypes.data + 4 * index * stride, limit, num_panels, total))
        call_kernel(
            kernels[5],
            (
                scores.ctypes.data, values.ctypes.data, totals.ctypes.data, read.ctypes.data,
                head_dim, num_positions, stride, count,
            ),
        )  # fmt: skip
        for index in range(count):
            row, head = begin + (done + index) // group, shared * group + (done + index) % group
            for dimension in range(head_dim):
                out[row, head * head_dim + dimension] = read[index, dimension]
        done += count


@compiled
def _share_gates(share: Any, stage: int, intermediate: int, kernels: Any, work: Any) -> None:
    """Fill the records with `silu(gate) * up`."""
    num_rows, blocks = len(work.gated), intermediate // BLOCK
    records = work.records[: num_rows * blocks * RECORD]
    num_items = GATE_ITEMS * num_rows
    item = claim(share, stage, num_items)
    while item >= 0:
        row, part = item // GATE_ITEMS, item % GATE_ITEMS
        first, stop = part * blocks // GATE_ITEMS * BLOCK, (part + 1) * blocks // GATE_ITEMS * BLOCK
        for index in range(first, stop):
            x = work.gate_up[row, index]
            value = x / (np.float32(1.0) + exponential(-x)) * work.gate_up[row, intermediate + index]
            work.gated[row, index] = value
        if first < stop:
            quantise_row(kernels, work.gated[row, first:stop], row, num_rows, first, records)
        finish(share, stage)
        item = claim(share, stage, num_items)
    wait(share, stage, num_items)


@compiled
def run_product(share: Any, rows: Any, kernels: Any, matrix: Any, records: Any, out: Any) -> None:
    """Do one thread's share of a product of float32 rows [rows, inputs]: `out` [rows, outputs]. Takes two stages."""
    if not enter(share):
        return
    num_rows, inputs = rows.shape
    row = claim(share, 0, num_rows)
    while row >= 0:
        quantise_row(kernels, rows[row], row, num_rows, 0, records)
        finish(share, 0)
        row = claim(share, 0, num_rows)
    wait(share, 0, num_rows)
    share_product(share, 1, kernels, matrix, inputs, records, out, 0)
    leave(share)
