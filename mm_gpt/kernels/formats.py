"""Storage formats of weights, byte for byte those of GGUF: plain floats, and blocks of small numbers with their scales.

A row of a matrix is a row of blocks; no block spans two rows. Q8_0, Q4_0 and Q5_0 store value = d · q with a half
precision scale d for 32 values, Q4_1 and Q5_1 value = d · q + m; the K formats give 256 values one such pair of scales
and each 16 or 32 of them small factors of it. `quantize` and `dequantize` give the bytes and bits of the package
`gguf`, the reference of the format; for K blocks, which it only reads, the search for scales is our own.
"""

from dataclasses import dataclass

import numpy as np

HALF = 65504.0
"""The largest number in half precision, which scales are stored in."""
SINGLE, BRAIN = 3.4028234663852886e38, 3.3895313892515355e38
"""The largest numbers in float32 and bfloat16."""


@dataclass(frozen=True)
class Format:
    """How values are stored."""

    name: str
    block: int
    """Values of one block."""
    block_bytes: int
    largest: float
    """Magnitude up to which any values can be stored without a scale, or a value, beyond its type's range."""

    @property
    def bits(self) -> float:
        """Of one value, on the average."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Raises ValueError for a row that is no whole number of blocks."""
        if columns % self.block:
            raise ValueError(f"rows of {columns} values are no whole blocks of {self.name}, which have {self.block}")
        return columns // self.block * self.block_bytes


FORMATS = {
    f.name: f
    for f in (
        Format("F32", 1, 4, SINGLE),
        Format("F16", 1, 2, HALF),
        Format("BF16", 1, 2, BRAIN),
        Format("Q8_0", 32, 34, 127 * HALF),
        Format("Q5_0", 32, 22, 16 * HALF),
        Format("Q5_1", 32, 24, HALF),
        Format("Q4_0", 32, 18, 8 * HALF),
        Format("Q4_1", 32, 20, HALF),
        Format("Q4_K", 256, 144, 15 * HALF),
        Format("Q5_K", 256, 176, 31 * HALF),
        Format("Q6_K", 256, 210, 32 * HALF),
    )
}
PLAIN = ("F32", "F16", "BF16")
"""The formats without blocks."""


def quantize(values: np.ndarray, name: str, *, fit: bool = False) -> np.ndarray:
    """Values (rows, columns) in float32 as bytes (rows, row_bytes).

    With `fit`, Q4_1 and Q5_1 have the scales of the least squared error, as K formats always do, instead of the
    reference's bytes. Values beyond `FORMATS[name].largest` make scales infinite, as in the reference: who calls looks
    first. Raises ValueError for rows that are no whole blocks.
    """
    rows, columns = values.shape
    format = FORMATS[name]
    size = format.row_bytes(columns)
    values = np.ascontiguousarray(values, np.float32)
    if name == "F32":
        return values.view(np.uint8).reshape(rows, size)
    if name == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8).reshape(rows, size)
    out = np.empty((rows, size), np.uint8)
    if name == "Q8_0":
        from mm_gpt.kernels import expand

        expand.encode_q8_0(values.reshape(-1, format.block), out.reshape(-1, format.block_bytes))
        return out
    from mm_gpt.kernels import blocks

    if name == "BF16":
        blocks.encode_bf16(values.view(np.uint32).reshape(-1), out.view(np.uint16).reshape(-1))
        return out
    if name.endswith("_K") or (fit and name in ("Q4_1", "Q5_1")):
        from mm_gpt.kernels import fitting

        fitting.encode(name, values.reshape(-1, format.block), out.reshape(-1, format.block_bytes))
    else:
        blocks.encode(name, values.reshape(-1, format.block), out.reshape(-1, format.block_bytes))
    return out


def dequantize(data: np.ndarray, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Bytes (rows, row_bytes) as values (rows, columns) in float32, into `out` if that is given."""
    format = FORMATS[name]
    rows, columns = len(data), data.shape[1] // format.block_bytes * format.block
    if out is None:
        out = np.empty((rows, columns), np.float32)
    data = np.ascontiguousarray(data)
    if name == "F32":
        out[:] = data.view(np.float32)
    elif name == "F16":
        out[:] = data.view(np.float16)
    elif name == "BF16":
        np.left_shift(data.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        from mm_gpt.kernels import expand

        expand.decode(name, data.reshape(-1, format.block_bytes), out.reshape(-1, format.block))
    return out


def expand_bf16(data: np.ndarray, name: str, out: np.ndarray) -> None:
    """Blocks (rows, row_bytes) as the bits of bfloat16 in `out`, (rows, columns) of uint16: `dequantize`, rounded."""
    from mm_gpt.kernels import expand

    format = FORMATS[name]
    expand.decode(name, np.ascontiguousarray(data).reshape(-1, format.block_bytes), out.reshape(-1, format.block))
