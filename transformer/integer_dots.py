"""Integer dot products of four bytes, by the instructions of each kind of processor. All give the same sums.

A variant adds, to each lane of a vector of int32 sums, the products of four weights (one per byte of the lane's word)
and the four activations of one word. Sums of integers are exact, so it does not matter in which order a processor adds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

BYTE, HALF_WORD, WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)
SIGN_BITS = 0x80808080  # flips unsigned bytes with an offset of 128 to signed ones, four at once


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute.

    lanes: columns at a time, as many as a register has words. rows: rows at a time, so that their sums stay in
    registers. keeps_offset: 8-bit weights are multiplied as they are stored, 128 too high, and the sums start lower.
    has_halves: the processor converts float16.
    """

    name: str
    lanes: int
    rows: int
    keeps_offset: bool
    has_halves: bool

    def prepare(self, build: ir.IRBuilder, weights: ir.Value, bits: int) -> tuple[ir.Value, ...]:
        """Return what `dot` needs of one vector of weights, whatever the row."""
        if bits == 4 or self.keeps_offset:
            return (weights,)
        signed = build.xor(weights, spread_constant(SIGN_BITS, self.lanes))
        if self.name != "avx2":
            return (signed,)
        as_bytes = build.bitcast(signed, ir.VectorType(BYTE, 4 * self.lanes))
        absolute = call(build, f"llvm.abs.v{4 * self.lanes}i8", as_bytes.type, as_bytes, ir.IntType(1)(0))
        return absolute, as_bytes

    def dot(self, build: ir.IRBuilder, sums: ir.Value, weights: tuple[ir.Value, ...], word: ir.Value) -> ir.Value:
        """Return `sums` plus the products of `weights` with the four activations in `word` (int32)."""
        if self.name == "generic":
            return self._dot_plainly(build, sums, weights[0], word)
        activations = spread(build, word, self.lanes)
        if self.name == "avx2":
            return self._dot_in_pairs(build, sums, weights, activations)
        if self.name == "neon":
            as_bytes = ir.VectorType(BYTE, 4 * self.lanes)
            first, second = build.bitcast(weights[0], as_bytes), build.bitcast(activations, as_bytes)
            return call(build, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, sums, first, second)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        as_bytes = ir.VectorType(BYTE, 4 * self.lanes)
        first, second = build.bitcast(weights[0], as_bytes), build.bitcast(activations, as_bytes)
        return call(build, name, sums.type, sums, first, second)

    def _dot_in_pairs(
        self, build: ir.IRBuilder, sums: ir.Value, weights: tuple[ir.Value, ...], activations: ir.Value
    ) -> ir.Value:
        """Add pairs in 16 bits, then in 32. Weights from 0 to 128 and activations from -127 cannot overflow 16 bits."""
        as_bytes, as_pairs = ir.VectorType(BYTE, 32), ir.VectorType(HALF_WORD, 16)
        first, second = build.bitcast(weights[0], as_bytes), build.bitcast(activations, as_bytes)
        if len(weights) > 1:
            second = call(build, "llvm.x86.avx2.psign.b", as_bytes, second, weights[1])
        pairs = call(build, "llvm.x86.avx2.pmadd.ub.sw", as_pairs, first, second)
        ones = ir.Constant(as_pairs, [1] * 16)
        return build.add(sums, call(build, "llvm.x86.avx2.pmadd.wd", sums.type, pairs, ones))

    def _dot_plainly(self, build: ir.IRBuilder, sums: ir.Value, weights: ir.Value, word: ir.Value) -> ir.Value:
        """Multiply each byte as a word. 4-bit weights are signed bytes, too."""
        for index in range(4):
            left = spread_constant(24 - 8 * index, self.lanes)
            weight = build.ashr(build.shl(weights, left), spread_constant(24, self.lanes))
            activation = build.ashr(build.shl(word, WORD(24 - 8 * index)), WORD(24))
            sums = build.add(sums, build.mul(weight, spread(build, activation, self.lanes)))
        return sums


def possible_variants(features: Mapping[str, bool], is_arm: bool) -> list[Variant]:
    """Return the variants for a processor with these features (LLVM's names), the fastest first."""
    variants = []
    if features.get("avx512vnni"):
        variants.append(Variant("vnni512", 16, 16, keeps_offset=True, has_halves=True))
    if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
        variants.append(Variant("vnni256", 8, 6, keeps_offset=True, has_halves=bool(features.get("f16c"))))
    if features.get("avx2"):
        variants.append(Variant("avx2", 8, 4, keeps_offset=False, has_halves=bool(features.get("f16c"))))
    if is_arm and features.get("dotprod"):
        variants.append(Variant("neon", 4, 8, keeps_offset=False, has_halves=True))
    variants.append(Variant("generic", 4, 4, keeps_offset=False, has_halves=is_arm))
    return variants


def spread(build: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Return a vector with `value` in every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = build.insert_element(nothing, value, WORD(0))
    return build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(WORD, lanes), [0] * lanes))


def spread_constant(value: int, lanes: int) -> ir.Constant:
    """Return a vector of int32 with `value` in every lane."""
    return ir.Constant(ir.VectorType(WORD, lanes), [value] * lanes)


def call(build: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> ir.Value:
    """Call one of LLVM's intrinsics, declaring it first if need be."""
    known = build.module.globals.get(name)
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return build.call(known or ir.Function(build.module, kind, name), list(arguments))
