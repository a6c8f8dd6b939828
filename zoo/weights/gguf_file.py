"""GGUF files: typed metadata and (quantised) tensors, without trusting a byte of them.

The header is parsed here, every length checked against the file's size before it is used (a damaged count must not
cost minutes or gigabytes); what the bytes of a block mean is the `gguf` package's knowledge.

Format: `docs/gguf.md` of the ggml project, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from zoo.weights.errors import WeightsFileError

_SCALARS = {  # GGUF value type -> numpy's
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_PLAIN_BITS = {"BF16": ("<u2", ml_dtypes.bfloat16)}
_MAX_AXES = 4


def _gguf() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading .gguf needs the gguf package: pip install 'zoo[gguf]'") from None
    return gguf


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor as stored.

    Attributes:
      kind: ggml's name of the type, such as "F32", "Q8_0", "Q4_K".
      shape: in the order of numpy and torch, the reverse of ggml's.
      data: the bytes, uint8, one axis.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The values: float32 for quantised types, the stored type for others (F16, BF16, I32, ...).

        Raises WeightsFileError for types that the installed gguf package cannot dequantise.
        """
        if self.kind in _PLAIN:
            return self.data.view(_PLAIN[self.kind]).reshape(self.shape)
        if self.kind in _PLAIN_BITS:
            bits, dtype = _PLAIN_BITS[self.kind]
            return self.data.view(bits).view(dtype).reshape(self.shape)
        gguf = _gguf()
        rows = self.data.reshape(math.prod(self.shape[:-1]), -1)
        try:
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError:
            raise WeightsFileError(f"the installed gguf package does not dequantise {self.kind} blocks") from None
        return values.reshape(self.shape)


class _Reader:
    """A position in the file's bytes that never leaves them."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.position = 0

    def left(self) -> int:
        return len(self.data) - self.position

    def bytes(self, count: int) -> np.ndarray:
        if count > self.left():
            raise WeightsFileError(f"{count} bytes expected at {self.position}, the file has {self.left()} more")
        self.position += count
        return self.data[self.position - count : self.position]

    def array(self, dtype: str, count: int) -> np.ndarray:
        return self.bytes(count * np.dtype(dtype).itemsize).copy().view(dtype)

    def integer(self, dtype: str) -> int:
        return int(self.array(dtype, 1)[0])

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take at least `smallest` bytes each."""
        number = self.integer("<u8")
        if number * smallest > self.left():
            raise WeightsFileError(f"{number} {what} announced, the file has {self.left()} bytes more")
        return number

    def string(self) -> str:
        raw = self.bytes(self.count(1, "characters")).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WeightsFileError(f"a string that is not UTF-8: {error}") from None

    def value(self) -> Any:
        kind = self.integer("<u4")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.array(_scalar(kind), 1)[0].item()
        element = self.integer("<u4")
        if element == _STRING:
            return [self.string() for _ in range(self.count(8, "strings"))]
        dtype = _scalar(element)
        return self.array(dtype, self.count(np.dtype(dtype).itemsize, "values"))


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise WeightsFileError(f"unknown or nested value type {kind}")
    return _SCALARS[kind]


def open_gguf(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Opens a GGUF file; the tensors' bytes stay on disk (memory-mapped) until they are used.

    Returns:
      metadata: {key: Python number, bool or str, list of str, or numpy array}.
      tensors: {name: GGUFTensor}.

    Raises:
      WeightsFileError: the file is damaged, of another version or byte order, or not a GGUF file.
      ModuleNotFoundError: the gguf package is not installed.
    """
    gguf = _gguf()
    path = pathlib.Path(path)
    if path.stat().st_size < 24:
        raise WeightsFileError(f"{path} is not a GGUF file: {path.stat().st_size} bytes")
    reader = _Reader(np.asarray(np.memmap(path, np.uint8, "r")))  # slices of a memmap itself are slow
    if reader.bytes(4).tobytes() != b"GGUF":
        raise WeightsFileError(f"{path} is not a GGUF file: it starts with {reader.data[:4].tobytes()!r}")
    try:
        return _parse(reader, gguf)
    except WeightsFileError as error:
        raise WeightsFileError(f"{path} is damaged, or not a GGUF file that the zoo reads: {error}") from None


def _parse(reader: _Reader, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    version = reader.integer("<u4")
    if version not in (2, 3):
        raise WeightsFileError(f"version {version} (2 and 3 are read, little-endian)")
    tensor_count = reader.count(32, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(13, "metadata entries")):
        key = reader.string()
        if key in metadata:
            raise WeightsFileError(f"metadata {key!r} occurs twice")
        metadata[key] = reader.value()
    table = []
    for _ in range(tensor_count):
        name = reader.string()
        axes = reader.integer("<u4")
        if not 1 <= axes <= _MAX_AXES:
            raise WeightsFileError(f"tensor {name!r} has {axes} axes")
        shape = tuple(int(size) for size in reader.array("<u8", axes)[::-1])
        table.append((name, shape, reader.integer("<u4"), reader.integer("<u8")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise WeightsFileError(f"general.alignment must be a power of two, got {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, code, offset in table:
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError:
            raise WeightsFileError(f"tensor {name!r} is of unknown type {code}") from None
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        values = math.prod(shape)
        if not values or shape[-1] % block_values:
            raise WeightsFileError(f"tensor {name!r} of shape {shape} is empty or not made of whole {kind.name} blocks")
        size = values // block_values * block_bytes
        if start + offset + size > len(reader.data):
            raise WeightsFileError(
                f"tensor {name!r} of shape {shape} ends at byte {start + offset + size}, the file at {len(reader.data)}"
            )
        if name in tensors:
            raise WeightsFileError(f"tensor {name!r} occurs twice")
        tensors[name] = GGUFTensor(kind.name, shape, reader.data[start + offset : start + offset + size])
    return metadata, tensors
