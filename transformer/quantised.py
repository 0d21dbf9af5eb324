"""Weights as integers of 4 or 8 bit, in blocks of 32 inputs with a scale, as GGUF files store them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer.integer_product import BLOCK, LANES, RECORD, STEPS, IntegerKernels, block_bytes, integer_kernels

Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]

OFFSET = 128  # of 8-bit integers, which are stored without a sign
MAX_TILE_ROWS = 128  # rows of a product's tile: more would push the rows out of the second-level cache


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [outputs, inputs]: `scale * integer + least` with 4 bit, `scale * (integer - OFFSET)` with 8."""

    integers: Bytes  # [outputs, inputs], below 16 if `least` is given
    scales: Halves  # [outputs, blocks]
    least: Halves | None = None  # [outputs, blocks]

    @classmethod
    def from_floats(cls, weight: Floats) -> Self:
        """Round to 8 bit per block. The inputs must be a multiple of BLOCK."""
        blocks = weight.reshape(len(weight), -1, BLOCK)
        scales = (np.abs(blocks).max(axis=-1) / 127).astype(np.float16)
        divisors = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
        integers = np.clip(np.rint(blocks / divisors), -127, 127) + OFFSET
        return cls(integers.astype(np.uint8).reshape(weight.shape), scales)

    @classmethod
    def from_blocks(cls, kind: str, rows: Bytes) -> Self | None:
        """Take over a GGUF tensor [outputs, bytes of a row]; None if its kind is kept neither in 4 nor in 8 bit."""
        if kind == "Q8_0":
            blocks = rows.reshape(len(rows), -1, 2 + BLOCK)
            return cls((blocks[..., 2:] ^ np.uint8(OFFSET)).reshape(len(rows), -1), _halves(blocks[..., :2])[..., 0])
        if kind in ("Q4_0", "Q4_1"):
            header = 2 if kind == "Q4_0" else 4
            blocks = rows.reshape(len(rows), -1, header + BLOCK // 2)
            halves = _halves(blocks[..., :header])
            scales = np.ascontiguousarray(halves[..., 0])
            least = scales * np.float16(-8) if kind == "Q4_0" else np.ascontiguousarray(halves[..., 1])
            return cls(_nibbles(blocks[..., header:]).reshape(len(rows), -1), scales, least)
        if kind == "Q4_K":
            return cls(*_blocks_of_256(rows))
        return None

    @classmethod
    def joined(cls, parts: "Sequence[QuantisedWeight]") -> "QuantisedWeight":
        """Return one weight with the outputs of all parts. If they differ in bits, all are rounded to 8 bit."""
        if len({part.bits for part in parts}) > 1:
            parts = [part if part.bits == 8 else cls.from_floats(part.floats()) for part in parts]
        least = [part.least for part in parts if part.least is not None]
        return cls(
            np.concatenate([part.integers for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(least) if least else None,
        )

    @property
    def bits(self) -> int:
        return 8 if self.least is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.integers.shape
        return outputs, inputs

    def reordered(self, outputs: NDArray[np.int64]) -> "QuantisedWeight":
        """Return the weight with its outputs in this order."""
        least = None if self.least is None else self.least[outputs]
        return QuantisedWeight(self.integers[outputs], self.scales[outputs], least)

    def floats(self) -> Floats:
        """Return the weight as float32 [outputs, inputs]."""
        blocks = self.integers.reshape(*self.scales.shape, BLOCK).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.least is None:
            values = (blocks - OFFSET) * scales
        else:
            values = blocks * scales + self.least.astype(np.float32)[..., None]
        return values.reshape(self.shape)


class QuantisedMatrix:
    """A quantised weight in panels of LANES outputs, for products with few rows.

    `panels` uint8 [panels, blocks, steps, LANES, 4]: a step has four inputs of each output. With 4 bit, a byte holds an
    input of step i and of step i + 4. `scales` float16 [panels, blocks, 1 or 2, LANES]: the scales, and with 4 bit the
    lowest values.
    """

    def __init__(self, weight: QuantisedWeight, kernels: IntegerKernels | None = None) -> None:
        self._kernels = kernels or integer_kernels()
        self.bits = weight.bits
        self.num_outputs, self.num_inputs = weight.shape
        missing = -self.num_outputs % LANES
        self.num_panels, self.num_blocks = (self.num_outputs + missing) // LANES, self.num_inputs // BLOCK
        integers = np.pad(weight.integers, ((0, missing), (0, 0)))
        steps = integers.reshape(self.num_panels, LANES, self.num_blocks, STEPS, 4).transpose(0, 2, 3, 1, 4)
        if self.bits == 4:
            steps = steps[:, :, : STEPS // 2] | steps[:, :, STEPS // 2 :] << np.uint8(4)
        self.panels = np.ascontiguousarray(steps)
        factors = [weight.scales] if weight.least is None else [weight.scales, weight.least]
        padded = np.pad(np.stack(factors, axis=2), ((0, missing), (0, 0), (0, 0)))
        by_panel = padded.reshape(self.num_panels, LANES, self.num_blocks, len(factors)).transpose(0, 2, 3, 1)
        self.scales = np.ascontiguousarray(by_panel)

    @property
    def width(self) -> int:
        """Number of outputs, with those that fill the last panel."""
        return self.num_panels * LANES

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + self.scales.nbytes

    def multiply(self, rows: Tensor) -> Tensor:
        """Return the product of float32 rows [n, inputs], rounded to 8 bit: [n, outputs], with one thread."""
        rows = rows.contiguous()
        assert rows.shape[1] == self.num_inputs
        assert rows.dtype == torch.float32
        out = rows.new_empty(len(rows), self.width)
        kernel = self._kernels.multiply_4 if self.bits == 4 else self._kernels.multiply_8
        for first in range(0, len(rows), MAX_TILE_ROWS):
            count = min(MAX_TILE_ROWS, len(rows) - first)
            records = np.empty((self.num_blocks, count, RECORD), np.int32)
            for row in range(count):
                source, target = rows[first + row].data_ptr(), records[:, row:].ctypes.data
                self._kernels.quantise(source, target, self.num_blocks, count)
            kernel(
                records.ctypes.data, self.panels.ctypes.data, self.scales.ctypes.data, out[first].data_ptr(),
                self.num_blocks, self.width, self.num_panels, count, 0,
            )  # fmt: skip
        return out[:, : self.num_outputs]

    def lookup(self, outputs: NDArray[np.int64]) -> Floats:
        """Return the weights of these outputs, float32 [n, inputs]: the embeddings of tokens."""
        panels, lanes = outputs // LANES, outputs % LANES
        packed = self.panels[panels, :, :, lanes]
        scales = self.scales[panels, :, :, lanes].astype(np.float32)
        steps = np.concatenate([packed & 15, packed >> 4], axis=2) if self.bits == 4 else packed
        blocks = steps.reshape(len(outputs), self.num_blocks, BLOCK).astype(np.float32)
        values = blocks * scales[..., :1] + scales[..., 1:] if self.bits == 4 else (blocks - OFFSET) * scales
        return values.reshape(len(outputs), self.num_inputs)


assert block_bytes(8) == 2 * block_bytes(4) == STEPS * LANES * 4


def _halves(stored: Bytes) -> Halves:
    return np.ascontiguousarray(stored).view("<f2")


def _nibbles(stored: Bytes) -> Bytes:
    """Return 4-bit integers [..., 32] of [..., 16] bytes: the lower halves of all bytes come first."""
    return np.concatenate([stored & 15, stored >> 4], axis=-1)


def _blocks_of_256(rows: Bytes) -> tuple[Bytes, Halves, Halves]:
    """Return integers, scales and lowest values of Q4_K: blocks of 32 whose 6-bit scales share two factors."""
    blocks = rows.reshape(len(rows), -1, 144)
    factors = _halves(blocks[..., :4]).astype(np.float32)
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    least = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    integers = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)).reshape(len(rows), -1)
    shape = len(rows), -1
    return (
        integers,
        (factors[..., :1] * scales).astype(np.float16).reshape(shape),
        (-factors[..., 1:] * least).astype(np.float16).reshape(shape),
    )
