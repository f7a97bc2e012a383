"""GGUF files as they lie on the disk: metadata and tensors, each length checked against the bytes that exist.

The format: magic, version, numbers of tensors and of fields; the fields (name, type, value); the tensors (name,
dimensions from the innermost, type, offset); padding; the data. Numbers are little-endian.
"""

import math
import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.errors import CheckpointError, unknown_name

SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "|b1"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
"""Numbers of the field types, as numpy names them."""
STRING, ARRAY = 8, 9
MAX_ARRAY = 1 << 24
"""Values in a field: the largest vocabularies have 2^18 tokens."""
MAX_NESTING = 4
MAX_DIMENSIONS = 4
LENGTH = struct.Struct("<Q")
"""Of a text, in bytes, before it."""
MAPPED_BYTES = 1 << 16
"""From this size on a tensor is mapped."""


class Fields(dict[str, Any]):
    """The metadata of a GGUF file. What is used of it is asked for by type and range: the rest may hold anything."""

    def __init__(self, values: dict[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def error(self, key: str, wanted: str) -> CheckpointError:
        if key not in self:
            return CheckpointError(f"{self.where}: the metadata lacks {key!r}")
        shown = repr(self[key])
        shown = shown if len(shown) <= 60 else f"{shown[:56]}..."
        return CheckpointError(f"{self.where}: {key} {shown} is not {wanted}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in [low, high]. Raises CheckpointError, as the other methods do."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, high: float, default: float | None = None) -> float:
        """A number in (0, high], as the shortest decimal that float32 rounds to it: 9.999999747378752e-06 is 1e-05."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise self.error(key, f"a number above 0, up to {high:g}")
        return float(f"{value:.6g}")

    def text(self, key: str, among: Collection[str], default: str | None = None) -> str:
        """One of the texts in `among`."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a text")
        if value not in among:
            raise CheckpointError(f"{self.where}: {unknown_name(key, value, among)}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of texts")
        return value

    def integers(self, key: str, length: int) -> list[int]:
        """As many whole numbers as `length` says."""
        value = self.get(key)
        whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if not whole or len(value) != length:  # type: ignore[arg-type]
            raise self.error(key, f"a list of {length} whole numbers")
        return value  # type: ignore[return-value]


@dataclass(frozen=True)
class GGUFTensor:
    data: np.ndarray
    """Values, rows outermost; of a quantised tensor the bytes of each row."""
    kind: Any
    """`gguf.GGMLQuantizationType`"""


@dataclass(frozen=True)
class GGUFFile:
    fields: Fields
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """The metadata, and the tensors mapped into memory, each by itself: its pages go when it does.

    Raises CheckpointError naming the file when it is broken.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data, str(path), stream.fileno()).file()
    except (OSError, ValueError) as error:  # ValueError: an empty file
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: not a readable GGUF file ({reason})") from None


class _Parser:
    """Reads from the beginning of a file to its tensors."""

    def __init__(self, data: mmap.mmap, where: str, descriptor: int):
        self.data, self.where, self.descriptor, self.at = data, where, descriptor, 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: not a readable GGUF file ({what})")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.error(f"{count} bytes at {self.at}, where {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        try:
            return self.take(self.unsigned(8)).decode()
        except UnicodeDecodeError:
            raise self.error(f"a text before {self.at} that is no UTF-8") from None

    def file(self) -> GGUFFile:
        if self.take(4) != b"GGUF":
            raise self.error("it does not begin with GGUF")
        if (version := self.unsigned(4)) not in (2, 3):
            raise self.error(f"version {version}, not 2 or 3")
        num_tensors, num_fields = self.unsigned(8), self.unsigned(8)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):  # a number that is too large ends at the end of the file
            name = self.text()
            if name in fields:
                raise self.error(f"two fields called {name[:80]!r}")
            fields[name] = self.value(self.unsigned(4))
        checked = Fields(fields, self.where)
        alignment = checked.integer("general.alignment", 1, 1 << 20, 32)
        entries: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name = self.text()
            if name in entries:
                raise self.error(f"two tensors called {name[:80]!r}")
            entries[name] = self.tensor_entry(name)
        start = -(-self.at // alignment) * alignment
        return GGUFFile(checked, {name: self.tensor(name, start, *entry) for name, entry in entries.items()})

    def piece(self, begin: int, count: int) -> np.ndarray:
        """Bytes of the data; what is written to them stays in memory."""
        if count < MAPPED_BYTES:
            return np.frombuffer(bytearray(self.data[begin : begin + count]), np.uint8)
        offset = begin % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self.descriptor, count + offset, access=mmap.ACCESS_COPY, offset=begin - offset)
        return np.frombuffer(pages, np.uint8, count, offset)

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind != ARRAY or depth == MAX_NESTING:
            raise self.error(f"a field of type {kind} before {self.at}")
        kind, length = struct.unpack("<IQ", self.take(12))
        if length > MAX_ARRAY:
            raise self.error(f"a field of {length} values before {self.at}")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize * length), dtype).tolist()
        if kind == STRING:
            return self.texts(length)
        return [self.value(kind, depth + 1) for _ in range(length)]

    def texts(self, count: int) -> list[str]:
        """`text`, so many times, in a fraction of the time: vocabularies have a hundred thousand."""
        data, size, length, texts = self.data, len(self.data), LENGTH.unpack_from, list[str]()
        try:
            for _ in range(count):
                start = self.at + LENGTH.size
                end = start + length(data, self.at)[0] if start <= size else start
                if end > size:
                    self.text()  # which says what is missing
                texts.append(data[start:end].decode())
                self.at = end
        except UnicodeDecodeError:
            raise self.error(f"a text before {end} that is no UTF-8") from None
        return texts

    def tensor_entry(self, name: str) -> tuple[Any, tuple[int, ...], int]:
        """Type, shape with the rows outermost, and offset in the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        dimensions = self.unsigned(4)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{name[:80]} has {dimensions} dimensions")
        shape = tuple(self.unsigned(8) for _ in range(dimensions))[::-1]
        number, offset = self.unsigned(4), self.unsigned(8)
        kind = next((kind for kind in GGML_QUANT_SIZES if kind == number), None)
        if kind is None:
            raise self.error(f"{name[:80]} has the unknown quantisation {number}")
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.error(f"rows of {shape[-1]} values of {name[:80]} are no whole blocks of {kind.name}")
        return GGMLQuantizationType(kind), shape, offset

    def tensor(self, name: str, start: int, kind: Any, shape: tuple[int, ...], offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        row = shape[-1] // block * size
        begin, count = start + offset, math.prod(shape[:-1]) * row
        if begin + count > len(self.data):
            raise self.error(f"{name[:80]} of shape {shape} reaches beyond the end")
        data = self.piece(begin, count)
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        if plain is not None:
            return GGUFTensor(data.view(plain).reshape(shape), kind)
        return GGUFTensor(data.reshape(*shape[:-1], row), kind)
