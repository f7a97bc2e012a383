"""Linear layers and embeddings whose weights stay as they are stored: bfloat16, or GGUF's blocks of small numbers.

Activations are float32. Here weights are expanded tile by tile, multiplied and forgotten, which suits prompts, where a
tile serves many rows. Where the processor multiplies bfloat16, blocks are expanded to it and meet activations of it;
the last product, to logits, is taken in float32 everywhere: bfloat16 has no room for their differences.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt.kernels.formats import FORMATS, PLAIN, dequantize, expand_bf16

TILE = 1 << 22
"""Values that are expanded at a time: 8 MB in bfloat16."""
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@functools.cache
def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has instructions that multiply bfloat16."""
    try:
        flags = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:  # no Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True)
class Matrix:
    """A weight (rows, columns) as it is stored."""

    kind: str
    """A name of `mm_gpt.kernels.formats.FORMATS`."""
    data: Tensor
    """F32, F16, BF16: (rows, columns) of that type. Blocks: (rows, bytes of a row), uint8. Contiguous."""

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        if self.kind in PLAIN:
            return self.data.shape[1]
        format = FORMATS[self.kind]
        return self.data.shape[1] // format.block_bytes * format.block

    @classmethod
    def of(cls, tensor: Tensor) -> "Matrix":
        """A tensor of floats (rows, columns), as it is where its type is one of the kinds, else in float32."""
        kind = next((kind for kind, dtype in PLAIN_DTYPES.items() if dtype == tensor.dtype), "F32")
        return cls(kind, tensor.to(PLAIN_DTYPES[kind]).contiguous())

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def values(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), (stop − start, columns), in float32. May share memory with the matrix."""
        data = self.data[start:stop]
        if self.kind in PLAIN:
            return data.float()
        return torch.from_numpy(dequantize(data.numpy(), self.kind))

    def _expand_shared(self, data: Tensor, out: Tensor) -> None:
        """`_expand` by all threads."""
        size = -(-len(data) // torch.get_num_threads())
        parts = [slice(at, at + size) for at in range(0, len(data), size)]
        if len(parts) < 2 or out.numel() < TILE // 64:
            self._expand(data, out)
        else:
            list(workers().map(lambda part: self._expand(data[part], out[part]), parts))

    def _expand(self, data: Tensor, out: Tensor) -> None:
        if out.dtype == torch.bfloat16:
            expand_bf16(data.numpy(), self.kind, out.view(torch.uint16).numpy())
        else:
            dequantize(data.numpy(), self.kind, out.numpy())

    def whole(self) -> "Matrix":
        return self

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, each of at most TILE values."""
        size = max(1, TILE // max(1, self.columns))
        for start in range(0, self.rows, size):
            yield start, min(start + size, self.rows)

    def product(self, x: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """x (R, columns) -> (R, rows), multiplied in `dtype`; both in float32. `out`: where it is written, if given."""
        x, y = x.to(dtype), torch.empty(len(x), self.rows) if out is None else out
        tiles = list(self.tiles())
        # One room for all tiles: the C library would not find that of the one before again, and memory would grow
        room = None if self.kind in PLAIN else torch.empty(tiles[0][1], self.columns, dtype=dtype)
        for start, stop in tiles:
            weights = self.data[start:stop]
            if room is None:
                weights = weights.to(dtype)
            else:
                self._expand_shared(weights, room[: stop - start])
                weights = room[: stop - start]
            y[:, start:stop] = F.linear(x, weights)
        return y


def workers() -> ThreadPoolExecutor:
    """As many threads as torch has, for loops that hold no lock. A job must not wait for another."""
    return _pool(os.getpid(), torch.get_num_threads())


@functools.lru_cache(1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")


class PackedLinear(nn.Module):
    """y = W x + b, with W as it is stored. No gradient flows through it."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.parts: list[Matrix] = []
        """One above the other they are W, (out_features, in_features); they may be stored in different ways."""
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) -> (…, out_features)."""
        flat = x.reshape(-1, self.in_features)
        y, first = torch.empty(len(flat), self.out_features), 0
        for part in self.parts:
            part.product(flat, product_dtype(part.kind), y[:, first : first + part.rows])
            first += part.rows
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}: {', '.join(f'{p.rows} {p.kind}' for p in self.parts)}"


class PackedEmbedding(nn.Module):
    """Rows of one matrix by their number."""

    matrix: Matrix

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) -> (…, embedding_dim) in float32. Raises IndexError for an id that there is no row of."""
        rows = self.matrix.data[ids.reshape(-1)]
        return Matrix(self.matrix.kind, rows).values(0, len(rows)).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}: {self.matrix.kind}"


def product_dtype(kind: str) -> torch.dtype:
    """What a weight stored as `kind` is multiplied in."""
    return torch.bfloat16 if kind not in ("F32", "F16") and multiplies_bf16() else torch.float32


def stacked_product(parts: Sequence[Matrix], x: Tensor) -> Tensor:
    """x (…, columns) -> (…, rows of all parts), multiplied in float32."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.cat([part.product(flat) for part in parts], dim=-1).view(*x.shape[:-1], -1)


def unfill(decoder: nn.Module) -> None:
    """Put packed modules without weights in the places of a decoder's linear layers and of its token embedding."""
    for name, child in list(decoder.named_children()):
        if isinstance(child, nn.Linear):
            packed = PackedLinear(child.in_features, child.out_features, bias=child.bias is not None)
            setattr(decoder, name, packed)
        elif isinstance(child, nn.Embedding) and name == "embedding":
            setattr(decoder, name, PackedEmbedding(child.num_embeddings, child.embedding_dim))
        else:
            unfill(child)
