"""Read GGUF files, the format of llama.cpp: metadata, the list of tensors, and their values.

The package `gguf` dequantises, but the header is read here. Its reader makes an array of every string, which takes
seconds for a vocabulary, and a damaged length can keep it busy without end.
"""

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformer.folder import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counts in 32 bits, and no current program writes it
DEFAULT_ALIGNMENT = 32  # bytes
MAX_DIMENSIONS = 4  # ggml's own limit
STRING, ARRAY = 8, 9
SCALARS = {  # numpy's type by the number that a file gives a metadata value's type
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """The way a tensor's values are stored: in blocks along its rows."""

    name: str
    block_entries: int
    block_bytes: int


TENSOR_TYPES = {  # by their numbers in a file
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file. `shape` has the rows first, as in numpy; a file lists it the other way round."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int  # bytes from the file's begin

    @property
    def num_entries(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def num_bytes(self) -> int:
        return self.num_entries // self.type.block_entries * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file."""

    path: Path
    metadata: Mapping[str, Any]  # numbers, strings, and lists of them
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the header. Raises CheckpointError if the file is damaged, or holds a tensor of an unknown type."""
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist.") from None
        return _open(path, status.st_mtime_ns, status.st_size)

    def raw_blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor as it is stored: [rows, bytes of a row], mapped from the file."""
        tensor = self.tensors[name]
        stored = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        rows = tensor.num_entries // tensor.shape[-1]
        return stored.reshape(rows, -1)

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor's values. Raises CheckpointError if some are no numbers."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor, blocks = self.tensors[name], self.raw_blocks(name)
        kind = GGMLQuantizationType[tensor.type.name]
        values: npt.NDArray[np.float32]
        with np.errstate(all="ignore"):
            if tensor.type.name in ("F32", "F16"):
                values = blocks.view(f"<f{tensor.type.block_bytes}").astype(np.float32)
            else:
                values = dequantize(blocks, kind)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: the tensor {name} holds values that are no numbers.")
        return values.reshape(tensor.shape)


@functools.lru_cache(maxsize=2)  # a start asks for the same header several times
def _open(path: Path, changed: int, size: int) -> GgufFile:
    if size < len(MAGIC):
        raise CheckpointError(f"{path} is no GGUF file: it has {size} bytes.")
    content: Any = np.memmap(path, np.uint8, "r")
    if bytes(content[: len(MAGIC)]) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with 'GGUF'.")
    try:
        return _read(path, memoryview(content), size)
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from None


class _Reader:
    """Reads one value after the other. Raises ValueError at the file's end."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self.position = 0

    def number(self, layout: str) -> int:
        (value,) = struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))
        return int(value)

    def bytes(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._content):
            raise ValueError("its header goes on beyond its end: the download may have stopped early")
        data = self._content[self.position : end].tobytes()
        self.position = end
        return data

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.scalars(kind, 1)[0]

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        return self.scalars(kind, count)

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        values: list[Any] = np.frombuffer(self.bytes(dtype.itemsize * count), dtype).tolist()
        return values


def _read(path: Path, content: memoryview, size: int) -> GgufFile:
    reader = _Reader(content)
    reader.bytes(len(MAGIC))
    version = reader.number("I")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise CheckpointError(f"{path} is a GGUF file of version {version}; versions {known} are read.")
    num_tensors, num_values = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    if metadata.get("split.count", 1) > 1:
        part = f"{metadata.get('split.no', 0) + 1} of {metadata['split.count']}"
        raise CheckpointError(f"{path} is part {part} of a split file: join them with `llama-gguf-split --merge`.")
    tensors: dict[str, GgufTensor] = {}
    for _ in range(num_tensors):
        tensor = _read_tensor(path, reader)
        if tensor.name in tensors:
            raise ValueError(f"it holds the tensor {tensor.name} twice")
        tensors[tensor.name] = tensor
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}")
    begin = -(-reader.position // alignment) * alignment
    placed = {
        name: GgufTensor(name, tensor.type, tensor.shape, begin + tensor.offset) for name, tensor in tensors.items()
    }
    for tensor in placed.values():
        if tensor.offset % alignment:
            raise ValueError(f"the tensor {tensor.name} does not begin at a multiple of {alignment} bytes")
        if tensor.offset + tensor.num_bytes > size:
            raise CheckpointError(
                f"{path}: the tensor {tensor.name} ends at byte {tensor.offset + tensor.num_bytes}, and the file has "
                f"{size}: the download may have stopped early."
            )
    return GgufFile(path, metadata, placed)


def _read_tensor(path: Path, reader: _Reader) -> GgufTensor:
    """Read one entry of the list; its offset counts from the first tensor's byte."""
    name, num_dimensions = reader.string(), reader.number("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {num_dimensions} dimensions")
    shape = tuple(reversed([reader.number("Q") for _ in range(num_dimensions)]))
    number, offset = reader.number("I"), reader.number("Q")
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        known = ", ".join(known.name for known in TENSOR_TYPES.values())
        raise CheckpointError(f"{path}: the tensor {name} is {_type_name(number)}; supported are {known}.")
    if 0 in shape or shape[-1] % kind.block_entries:
        raise ValueError(f"the tensor {name} has the shape {list(shape)}, which {kind.name} does not allow")
    return GgufTensor(name, kind, shape, offset)


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        return f"of type {number}"
