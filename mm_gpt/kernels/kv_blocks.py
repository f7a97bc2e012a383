"""Keys and values of running rows, in blocks of 16 tokens that rows take as they grow and share where they begin alike.

A block holds all layers of its tokens. In it keys lie transposed, (L, K, C, 16), so that sixteen scores are one
vector, and values as they are, (L, K, 16, C'), C' being C made up to whole vectors.
Shapes: L layers, K key-value heads, T tokens, C head size.
"""

import os

import numpy as np
import torch
from torch import Tensor

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.kernels.memory import huge

BLOCK = 16
"""Tokens in a block."""
LANES = 16
CHUNK_BYTES = 64 << 20


def padded_head(head_size: int) -> int:
    return (head_size + LANES - 1) // LANES * LANES


class BlockPool:
    """Blocks by number. Memory grows in chunks, and never moves."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        max_bytes: int | None = None,
    ):
        """`max_bytes`: None is a quarter of the machine's memory."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"keys and values are kept in float32 or bfloat16, not {dtype}")
        self.num_layers, self.num_kv_heads, self.head_size, self.dtype = num_layers, num_kv_heads, head_size, dtype
        self.key_values = num_kv_heads * head_size * BLOCK
        """Numbers of a layer's keys in a block; its values follow."""
        self.layer_values = self.key_values + num_kv_heads * padded_head(head_size) * BLOCK
        self.block_bytes = num_layers * self.layer_values * dtype.itemsize
        if max_bytes is None:
            max_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        self.max_blocks = max(1, max_bytes // self.block_bytes)
        self.addresses = np.zeros(0, dtype=np.int64)
        """Where each block begins, by number."""
        self._chunks: list[Tensor] = []
        self._chunk_blocks = max(1, min(self.max_blocks, CHUNK_BYTES // self.block_bytes))
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        return len(self.addresses) - len(self._free)

    def allocate(self) -> int:
        """A block for the caller alone; its content is anything. Raises MMGPTError when the memory is used up."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def release(self, block: int) -> None:
        self._free.append(block)

    def _grow(self) -> None:
        first = len(self.addresses)
        count = min(self._chunk_blocks, self.max_blocks - first)
        if count <= 0:
            used = self.max_blocks * self.block_bytes >> 20
            raise MMGPTError(f"no room for more keys and values: {self.max_blocks} blocks ({used} MiB) are in use")
        chunk = huge(count * self.block_bytes).view(self.dtype).view(count, self.num_layers, self.layer_values)
        self._chunks.append(chunk)
        new = chunk.data_ptr() + np.arange(count, dtype=np.int64) * self.block_bytes
        self.addresses = np.concatenate([self.addresses, new])
        self._free = list(range(first + count - 1, first - 1, -1))

    def _block(self, block: int) -> Tensor:
        return self._chunks[block // self._chunk_blocks][block % self._chunk_blocks]  # (L, layer_values)

    def _views(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys (L, K, C, 16) and values (L, K, 16, C) of a block."""
        flat = self._block(block)
        keys = flat[:, : self.key_values].view(self.num_layers, self.num_kv_heads, self.head_size, BLOCK)
        values = flat[:, self.key_values :].view(self.num_layers, self.num_kv_heads, BLOCK, -1)
        return keys, values[..., : self.head_size]

    def write(self, blocks: list[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Puts (L, K, T, C) into a row's tokens from `start` on; `blocks` are all of the row's."""
        end = start + keys.shape[2]
        for index in range(start // BLOCK, (end + BLOCK - 1) // BLOCK):
            first, last = max(start, index * BLOCK), min(end, (index + 1) * BLOCK)
            old_keys, old_values = self._views(blocks[index])
            inside, given = slice(first - index * BLOCK, last - index * BLOCK), slice(first - start, last - start)
            old_keys[..., inside] = keys[:, :, given].transpose(-1, -2)
            old_values[:, :, inside] = values[:, :, given]

    def read(self, blocks: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (L, K, S, C) of a row's first `length` tokens."""
        views = [self._views(block) for block in blocks[: (length + BLOCK - 1) // BLOCK]]
        if not views:
            empty = torch.zeros(self.num_layers, self.num_kv_heads, 0, self.head_size, dtype=self.dtype)
            return empty, empty
        keys = torch.cat([view[0].transpose(-1, -2) for view in views], dim=2)
        values = torch.cat([view[1] for view in views], dim=2)
        return keys[:, :, :length], values[:, :, :length]

    def copy(self, source: int, target: int) -> None:
        self._block(target).copy_(self._block(source))
