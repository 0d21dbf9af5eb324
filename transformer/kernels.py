"""The layers of a small model as one compiled call.

A library call costs a microsecond or more, and a pass of a small model makes hundreds of them: half of its time, with
few rows. Here a pass is one call. A row's result does not depend on the other rows of the batch, to the last bit, as
long as all are finite: each row is computed by itself, here and in the products (`transformer.product`).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import allocating, compiled
from transformer.intrinsics import call_product, exponential
from transformer.product import LANES

Numbers = NDArray[np.float32]
Indices = NDArray[np.int64]


class LayerArrays(NamedTuple):
    """Weights in the form that the kernels read. An array has no rows if the model lacks that weight."""

    products: Indices  # [3] addresses of `transformer.product`'s kernels
    panels: Indices  # [layers, 4] addresses of the panels of q/k/v, output, gate/up and down
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


class Rows(NamedTuple):
    """Ragged rows of several sequences, flat."""

    firsts: Indices  # [sequences + 1] first row of each sequence
    slots: Indices  # [sequences] slot in the cache
    starts: Indices  # [sequences] position of each sequence's first row
    limits: Indices  # [rows]: a row sees cached positions below its limit


class AttentionWorkspace(NamedTuple):
    """Working memory of `attend`. Each lane holds one query."""

    panel: Numbers  # [head_dim, LANES] queries
    scores: Numbers  # [positions, LANES]
    read: Numbers  # [LANES, head_dim]
    limits: NDArray[np.int32]  # [LANES]
    highest: Numbers  # [LANES]
    totals: Numbers  # [LANES]


class PassWorkspace(NamedTuple):
    """Working memory of a pass."""

    qkv: Numbers  # [rows, (heads + 2 * kv_heads) * head_dim]
    normalized: Numbers  # [rows, hidden]
    attended: Numbers  # [rows, heads * head_dim]
    gate_up: Numbers  # [rows, 2 * intermediate]
    gated: Numbers  # [rows, intermediate]


@compiled
def copy(numbers: Any, out: Any) -> None:
    for index in range(len(out)):
        out[index] = numbers[index]


@compiled
def add_to(numbers: Any, out: Any) -> None:
    for index in range(len(out)):
        out[index] += numbers[index]


@compiled
def scale(factors: Any, out: Any) -> None:
    for index in range(len(out)):
        out[index] *= factors[index]


@compiled
def normalize(rows: Any, epsilon: float, out: Any) -> None:
    """Divide each row by its length. The next matrix holds the rest of the norm. `out` may be `rows`."""
    for row in range(len(rows)):
        total = np.float32(0.0)
        for index in range(rows.shape[1]):
            total += rows[row, index] * rows[row, index]
        inverse = np.float32(1.0) / np.sqrt(total + np.float32(epsilon))
        for index in range(rows.shape[1]):
            out[row, index] = rows[row, index] * inverse


@compiled
def turn(head: Any, rotation: Any) -> None:
    """Rotate a head's pairs in place (`transformer.rotary`)."""
    for pair in range(len(head) // 2):
        real, imaginary = head[2 * pair], head[2 * pair + 1]
        cosine, sine = rotation[2 * pair], rotation[2 * pair + 1]
        head[2 * pair] = real * cosine - imaginary * sine
        head[2 * pair + 1] = real * sine + imaginary * cosine


@compiled
def gate(gate_up: Any, out: Any) -> None:
    """Fill `out` with `silu(gate) * up`, of rows that hold gate and then up."""
    width = out.shape[1]
    for row in range(len(out)):
        for index in range(width):
            x = gate_up[row, index]
            out[row, index] = x / (np.float32(1.0) + exponential(-x)) * gate_up[row, width + index]


@compiled
def soften(scores: Any, num_positions: int, limits: Any, highest: Any, totals: Any) -> None:
    """Turn `scores[:num_positions]` [positions, LANES] into attention weights, still to be divided by `totals` [LANES].

    A lane that sees a score that is not finite gets a total of NaN.
    """
    for lane in range(LANES):
        highest[lane], totals[lane] = np.float32(-np.inf), np.float32(0.0)
    for position in range(num_positions):
        for lane in range(LANES):
            is_seen = position < limits[lane]
            score = scores[position, lane]
            highest[lane] = max(highest[lane], score if is_seen else np.float32(-np.inf))
            totals[lane] += (score if is_seen else np.float32(0.0)) * np.float32(0.0)
    for position in range(num_positions):
        for lane in range(LANES):
            share = exponential(scores[position, lane] - highest[lane])
            share = share if position < limits[lane] else np.float32(0.0)
            scores[position, lane] = share
            totals[lane] += share


@compiled
def attend(
    products: Any, qkv: Any, first: int, stop: int, keys_values: Any, limits: Any, group: int, work: Any, out: Any
) -> None:
    """Fill `out` with the attention results of rows `first` to `stop` of one sequence.

    keys_values: [2 * kv_heads, length, head_dim] of the sequence. Queries that share keys are the lanes of one panel,
    so the scores are a product of the keys with it.
    """
    num_shared, head_dim = keys_values.shape[0] // 2, keys_values.shape[2]
    panel, scores, read, lane_limits, highest, totals = work
    root = np.float32(1.0 / np.sqrt(head_dim))
    rows_at_once = LANES // group
    for shared in range(num_shared):
        for begin in range(first, stop, rows_at_once):
            count = min(rows_at_once, stop - begin) * group
            panel[:] = np.float32(0.0)
            lane_limits[:] = 0
            num_positions = 0
            for lane in range(count):
                row, head = begin + lane // group, shared * group + lane % group
                num_positions = max(num_positions, limits[row])
                lane_limits[lane] = limits[row]
                for index in range(head_dim):
                    panel[index, lane] = qkv[row, head * head_dim + index] * root
            call_product(
                products[0], keys_values[shared].ctypes.data, panel.ctypes.data, scores.ctypes.data,
                head_dim, LANES, num_positions,
            )  # fmt: skip
            soften(scores, num_positions, lane_limits, highest, totals)
            call_product(
                products[2], scores.ctypes.data, keys_values[num_shared + shared].ctypes.data, read.ctypes.data,
                num_positions, head_dim, count,
            )  # fmt: skip
            for lane in range(count):
                row, head = begin + lane // group, shared * group + lane % group
                for index in range(head_dim):
                    out[row, head * head_dim + index] = read[lane, index] / totals[lane]


@compiled
def fits(rows: Any, num_rows: int, arrays: Any, rotations: Any, entries: Any) -> bool:
    """Return whether the cache belongs to the model and all rows fit into it. The loops below do not check."""
    num_layers, num_slots, num_kept, length, head_dim = entries.shape
    if (num_layers, num_kept, head_dim) != (len(arrays.panels), 2 * arrays.num_shared, arrays.head_dim):
        return False
    return bool(rows_fit(rows, num_rows, len(rotations), num_slots, length))


@compiled
def rows_fit(rows: Any, num_rows: int, num_rotations: int, num_slots: int, length: int) -> Any:
    """Return whether all rows fit into `num_slots` slots of `length` positions."""
    sequences = len(rows.slots)
    if len(rows.firsts) != sequences + 1 or len(rows.starts) != sequences or num_rotations < length:
        return False
    if num_rows == 0 or rows.firsts[sequences] != num_rows or len(rows.limits) != num_rows:
        return False
    for sequence in range(sequences):
        first, stop, start = rows.firsts[sequence], rows.firsts[sequence + 1], rows.starts[sequence]
        if not (0 <= rows.slots[sequence] < num_slots and 0 <= first < stop and 0 <= start <= length - (stop - first)):
            return False
    for limit in rows.limits:  # noqa: SIM110
        if not 0 < limit <= length:
            return False
    return True


@allocating
def run_layers(hidden: Any, rows: Any, arrays: Any, rotations: Any, entries: Any) -> bool:
    """Carry `hidden` [rows, hidden] through all layers and the final norm, in place.

    Returns False, and does nothing, if the rows don't fit the cache.

    rotations: [positions, head_dim] cosine and sine of every pair. entries: the cache [layers, slots, 2 * kv_heads,
    length, head_dim]; receives all rows' keys and values.
    """
    num_rows, width = hidden.shape
    if not fits(rows, num_rows, arrays, rotations, entries):
        return False
    num_heads, head_dim = arrays.num_heads, arrays.head_dim
    work = PassWorkspace(
        np.empty((num_rows, (num_heads + 2 * arrays.num_shared) * head_dim), np.float32),
        np.empty((num_rows, width), np.float32),
        np.empty((num_rows, num_heads * head_dim), np.float32),
        np.empty((num_rows, 2 * arrays.intermediate), np.float32),
        np.empty((num_rows, arrays.intermediate), np.float32),
    )
    attention = AttentionWorkspace(
        np.empty((head_dim, LANES), np.float32),
        np.empty((rows.limits.max(), LANES), np.float32),
        np.empty((LANES, head_dim), np.float32),
        np.empty(LANES, np.int32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    for layer in range(len(entries)):
        _run_layer(layer, hidden, rows, arrays, rotations, entries[layer], work, attention)
    normalize(hidden, arrays.epsilon, hidden)
    for row in range(num_rows):
        scale(arrays.final_norm, hidden[row])
    return True


@compiled
def _run_layer(
    layer: int, hidden: Any, rows: Any, arrays: Any, rotations: Any, entries: Any, work: Any, attention: Any
) -> None:
    """Run one layer, whose share of the cache is `entries`."""
    num_rows, width = hidden.shape
    num_kept, head_dim, num_heads = entries.shape[1], arrays.head_dim, arrays.num_heads
    num_turned = num_heads + num_kept // 2
    store, add = arrays.products[0], arrays.products[1]
    qkv, normalized, attended, gate_up, gated = work
    normalize(hidden, arrays.epsilon, normalized)
    if len(arrays.qkv_bias):
        for row in range(num_rows):
            copy(arrays.qkv_bias[layer], qkv[row])
    call_product(
        add if len(arrays.qkv_bias) else store, normalized.ctypes.data, arrays.panels[layer, 0], qkv.ctypes.data,
        width, qkv.shape[1], num_rows,
    )  # fmt: skip
    for sequence in range(len(rows.slots)):
        first, stop, start = rows.firsts[sequence], rows.firsts[sequence + 1], rows.starts[sequence]
        kept = entries[rows.slots[sequence]]
        for row in range(first, stop):
            position = start + row - first
            heads = qkv[row].reshape((num_heads + num_kept, head_dim))
            for head in range(num_turned):
                if len(arrays.head_norms):
                    normalize(heads[head : head + 1], arrays.head_epsilon, heads[head : head + 1])
                    scale(arrays.head_norms[layer, head], heads[head])
                turn(heads[head], rotations[position])
            for head in range(num_kept):
                copy(heads[num_heads + head], kept[head, position])
        attend(arrays.products, qkv, first, stop, kept, rows.limits, num_heads * 2 // num_kept, attention, attended)
    call_product(
        add, attended.ctypes.data, arrays.panels[layer, 1], hidden.ctypes.data,
        num_heads * head_dim, width, num_rows,
    )  # fmt: skip
    if len(arrays.output_bias):
        for row in range(num_rows):
            add_to(arrays.output_bias[layer], hidden[row])
    normalize(hidden, arrays.epsilon, normalized)
    call_product(
        store, normalized.ctypes.data, arrays.panels[layer, 2], gate_up.ctypes.data,
        width, gate_up.shape[1], num_rows,
    )  # fmt: skip
    gate(gate_up, gated)
    call_product(
        add, gated.ctypes.data, arrays.panels[layer, 3], hidden.ctypes.data,
        arrays.intermediate, width, num_rows,
    )  # fmt: skip
