"""Functions that kernels need and numba lacks."""

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
