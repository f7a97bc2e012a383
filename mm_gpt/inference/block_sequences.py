"""Sequences on the CPU whose steps are one compiled function each. What they have in common they share, by blocks.

Shapes: R sequences in one step, T new tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_gpt.errors import MMGPTError
from mm_gpt.inference.compiled import CompiledDecoder
from mm_gpt.kernels.kv_blocks import BLOCK
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.mmgpt import Embedded


@dataclass(eq=False)
class BlockSequence:
    blocks: list[int]
    length: int
    position: int


class BlockSequences:
    """Keys and values in blocks of 16 tokens, which several sequences may share, and steps that are compiled."""

    def __init__(self, decoder: Decoder, *, make_room: Callable[[], bool], threads: int | None = None):
        """`make_room` lets go of a sequence that nobody needs, when memory is used up; False when there is none.
        threads: None is what the machine has."""
        self.decoder, config = decoder, decoder.config
        is_exact = isinstance(decoder.embedding, nn.Embedding) and decoder.embedding.weight.dtype == torch.float32
        kv_dtype = torch.float32 if is_exact else torch.bfloat16
        self.compiled = CompiledDecoder(decoder, kv_dtype=kv_dtype, threads=threads)
        self.pool, self.make_room = self.compiled.pool, make_room
        self._users: dict[int, int] = {}
        """How many sequences hold each block."""
        self._bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_size * kv_dtype.itemsize

    def read(
        self, before: BlockSequence | None, length: int, embedded: Embedded, positions: Tensor, masks: dict[str, Any]
    ) -> tuple[BlockSequence, Tensor]:
        x, T = embedded.x, embedded.x.shape[1]
        cache = KVCache(self.decoder.config, 1, length + T, dtype=x.dtype, device=x.device)
        new = BlockSequence([], 0, int(positions.max()) + 1)
        if before is not None and length:
            new = self.fork(before, length)
            new.position = int(positions.max()) + 1
            keys, values = self.pool.read(new.blocks, length)
            cache.keys[:, 0, :, :length], cache.values[:, 0, :, :length] = keys, values
            cache.positions[:, :length] = torch.arange(length)  # for patterns that go by them
            cache.length = length
        try:
            hidden = self.decoder(x, positions, **masks, cache=cache, added=embedded.added)[0]
            self._extend(new, cache.keys[:, 0, :, length:], cache.values[:, 0, :, length:])
        except BaseException:
            self.release(new)
            raise
        return new, hidden

    def begin(self, keys: Tensor, values: Tensor, position: int) -> BlockSequence:
        """A sequence of T tokens that were read elsewhere: their keys and values (L, K, T, C), and the position of the
        next one."""
        new = BlockSequence([], 0, position)
        try:
            self._extend(new, keys, values)
        except BaseException:
            self.release(new)
            raise
        return new

    def _extend(self, row: BlockSequence, keys: Tensor, values: Tensor) -> None:
        length = row.length + keys.shape[2]
        while len(row.blocks) * BLOCK < length:
            row.blocks.append(self._fresh())
        self.pool.write(row.blocks, row.length, keys, values)
        row.length = length

    def step(self, rows: Many[BlockSequence], ids: Many[int]) -> Tensor:
        for row in rows:
            if len(row.blocks) * BLOCK == row.length:
                row.blocks.append(self._fresh())
        limit = self.decoder.config.max_length - 1
        _, logits = self.compiled(
            torch.tensor(ids),
            torch.tensor([min(row.position, limit) for row in rows]),
            torch.tensor([row.length for row in rows]),
            [row.blocks for row in rows],
        )
        for row in rows:
            row.length, row.position = row.length + 1, row.position + 1
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        return self.compiled.logits(hidden)

    def fork(self, row: BlockSequence, length: int | None = None) -> BlockSequence:
        """A second sequence of the same tokens, or of the first `length` of them."""
        length = row.length if length is None else length
        new = BlockSequence([], length, row.position)
        for block in row.blocks[: -(-length // BLOCK)]:
            self._users[block] += 1
            new.blocks.append(block)
        if length % BLOCK:  # the last one will be written to
            try:
                old, own = new.blocks[-1], self._fresh()
            except MMGPTError:
                self.release(new)
                raise
            self.pool.copy(old, own)
            new.blocks[-1] = own
            self._release(old)
        return new

    def release(self, row: BlockSequence) -> None:
        for block in row.blocks:
            self._release(block)
        row.blocks = []

    def own(self, row: BlockSequence) -> BlockSequence:
        return row

    def bytes(self, row: BlockSequence) -> int:
        return len(row.blocks) * BLOCK * self._bytes_per_token

    @property
    def blocks_in_use(self) -> int:
        return len(self._users)

    def _fresh(self) -> int:
        while True:
            try:
                block = self.pool.allocate()
            except MMGPTError:
                if not self.make_room():
                    raise
                continue
            self._users[block] = 1
            return block

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            del self._users[block]
            self.pool.release(block)
