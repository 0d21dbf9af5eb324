"""Functions that kernels need and numba lacks."""

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from transformer.compiled import compiled


@intrinsic
def call_product(_: Any, address: Any, rows: Any, weights: Any, out: Any, inputs: Any, outputs: Any, count: Any) -> Any:
    """Call one of `transformer.product`'s kernels by its address; all arguments are int64."""
    signature = types.void(*[types.int64] * 7)

    def generate(context: Any, build: Any, signature: Any, arguments: Any) -> Any:
        size = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [size] * 6).as_pointer()
        build.call(build.inttoptr(arguments[0], kernel), arguments[1:])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def float_of_bits(_: Any, bits: Any) -> Any:
    """Return the float32 with the bits of an int32."""

    def generate(context: Any, build: Any, signature: Any, arguments: Any) -> Any:
        return build.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(_: Any, value: Any) -> Any:
    """Return the int32 with the bits of a float32."""

    def generate(context: Any, build: Any, signature: Any, arguments: Any) -> Any:
        return build.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@compiled
def exponential(x: Any) -> Any:
    """Return `exp(x)` in float32, with an error of 1e-7, clamped to 1e-38..1e38. NaN becomes 1e-38.

    Loops with this function vectorise; with the library's exponential they do not, and take ten times as long. Computes
    `2**whole` by its bits, times a Taylor series of the rest.
    """
    x = x if x > np.float32(-87.3) else np.float32(-87.3)
    x = x if x < np.float32(87.3) else np.float32(87.3)
    power = x * np.float32(1.44269504)
    whole = np.int32(power + (np.float32(0.5) if power > np.float32(0.0) else np.float32(-0.5)))
    x = (x - np.float32(whole) * np.float32(0.693359375)) + np.float32(whole) * np.float32(2.12194440e-4)  # ln 2, split
    series = np.float32(1 / 120) + x * np.float32(1 / 720)
    series = np.float32(1 / 6) + x * (np.float32(1 / 24) + x * series)
    series = np.float32(1.0) + x * (np.float32(1.0) + x * (np.float32(0.5) + x * series))
    return series * float_of_bits((whole + np.int32(127)) << np.int32(23))


@compiled
def logarithm(x: Any) -> Any:
    """Return the natural logarithm in float32 of a normal positive number, to a few units in the last place.

    Loops with this function vectorise. Takes the exponent from the bits; the rest lies between the roots of 1/2 and 2,
    where it uses the series of the inverse hyperbolic tangent.
    """
    bits = bits_of_float(x)
    whole = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    x = float_of_bits(bits - (whole << np.int32(23)))
    ratio = (x - np.float32(1.0)) / (x + np.float32(1.0))
    square = ratio * ratio
    series = np.float32(2 / 5) + square * (np.float32(2 / 7) + square * np.float32(2 / 9))
    series = np.float32(2.0) + square * (np.float32(2 / 3) + square * series)
    return np.float32(whole) * np.float32(0.69314718) + ratio * series


@intrinsic
def call_kernel(_: Any, address: Any, arguments: Any) -> Any:
    """Call a function of `transformer.integer_product` by its address, with a tuple of int64 arguments."""
    signature = types.void(types.int64, types.UniTuple(types.int64, arguments.count))

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        size = ir.IntType(64)
        kernel = ir.FunctionType(ir.VoidType(), [size] * arguments.count).as_pointer()
        values = [build.extract_value(given[1], index) for index in range(arguments.count)]
        build.call(build.inttoptr(given[0], kernel), values)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def call_plain(_: Any, address: Any) -> Any:
    """Call a function of the C library that takes nothing, by its address."""

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        kernel = ir.FunctionType(ir.IntType(32), []).as_pointer()
        build.call(build.inttoptr(given[0], kernel), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def atomic_add(_: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, and return what it was before. Other threads see it, and all writes before it."""

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        pointer = build.inttoptr(given[0], ir.IntType(64).as_pointer())
        return build.atomic_rmw("add", pointer, given[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(_: Any, address: Any) -> Any:
    """Return the int64 at an address, as other threads see it, and see all that they wrote before it."""

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        return build.load_atomic(build.inttoptr(given[0], ir.IntType(64).as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(_: Any) -> Any:
    """Tell the processor that this thread waits in a loop."""

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            name = "llvm.x86.sse2.pause"
            module = build.module
            kind = ir.FunctionType(ir.VoidType(), [])
            build.call(module.globals.get(name) or ir.Function(module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def atomic_store(_: Any, address: Any, value: Any) -> Any:
    """Set the int64 at an address, after all earlier writes of this thread."""

    def generate(context: Any, build: Any, signature: Any, given: Any) -> Any:
        pointer = build.inttoptr(given[0], ir.IntType(64).as_pointer())
        build.store_atomic(given[1], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
