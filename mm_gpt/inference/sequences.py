"""Sequences of tokens that a decoder has read, each with its keys and values: read on, forked, stepped side by side.

Two ways to hold them, with the same methods. `TorchSequences`, here, works for every decoder on every device.
`block_sequences.BlockSequences` runs each step as one compiled function on the CPU.

Shapes: R sequences in one step, T new tokens, S tokens of a sequence, D width, V vocabulary, L layers, K key-value
heads, C head size.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.mmgpt import Embedded

ROOM = 64
"""Tokens for which a new cache has room beyond those that are there."""


class Sequence(Protocol):
    """What a decoder has read of one row."""

    length: int
    """Tokens read."""
    position: int
    """Of the next token. Not the length where images have positions of their own (M-RoPE)."""


class Sequences(Protocol):
    """The sequences of one decoder. Not for several threads at a time."""

    def read(
        self, before: Any, length: int, embedded: Embedded, positions: Tensor, masks: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """A new sequence: the first `length` tokens of `before` (None for 0), and T more.

        embedded: a row of T tokens; positions (1, T), with M-RoPE (1, T, 3); masks: of `Decoder.forward`.
        Returns it and the hidden states (T, D) of its T tokens. `before` stays as it is."""

    def step(self, rows: Many[Any], ids: Many[int]) -> Tensor:
        """One more token for each of R sequences: logits (R, V) of what follows, float32 or better."""

    def fork(self, row: Any) -> Any:
        """A second sequence of the same tokens."""

    def release(self, row: Any) -> None:
        """Let go of what only this sequence holds."""

    def own(self, row: Any) -> Any:
        """The sequence in memory that no others hold on to, to be kept; `row` is used no more."""

    def bytes(self, row: Any) -> int:
        """Memory that keeping a sequence takes, at most."""


@dataclass(eq=False)
class TorchSequence:
    cache: KVCache
    row: int
    """Its row of the cache."""
    end: int
    """The column behind its last token: they lie to the left of it."""
    length: int
    position: int


class TorchSequences:
    """Keys and values in batches whose rows end in the same column, as attention patterns need it.

    Nothing in a batch is written twice, so that forks and kept prompts are references. A step whose rows are not those
    of one batch copies them into a new one: when a row joins or leaves, or a batch is full.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def read(
        self, before: TorchSequence | None, length: int, embedded: Embedded, positions: Tensor, masks: dict[str, Any]
    ) -> tuple[TorchSequence, Tensor]:
        x = embedded.x
        cache = KVCache(self.decoder.config, 1, length + x.shape[1] + ROOM, dtype=x.dtype, device=x.device)
        if before is not None:
            _copy(before, cache, 0, length=length, at=0)
        cache.length = length
        hidden = self.decoder(x, positions, **masks, cache=cache, added=embedded.added)[0]
        return TorchSequence(cache, 0, cache.length, cache.length, int(positions.max()) + 1), hidden

    def step(self, rows: Many[TorchSequence], ids: Many[int]) -> Tensor:
        cache = self._together(rows)
        device = cache.keys.device
        limit = self.decoder.config.max_length - 1
        positions = torch.tensor([min(row.position, limit) for row in rows], device=device)[:, None]
        mask = None
        if len({row.length for row in rows}) > 1:
            starts = torch.tensor([row.end - row.length for row in rows], device=device)
            mask = (torch.arange(cache.length + 1, device=device) >= starts[:, None])[:, None, None]
        embedded = self.decoder.embed(torch.tensor(ids, device=device)[:, None])
        hidden = self.decoder(embedded, positions, mask=mask, cache=cache)[:, -1]
        for row in rows:
            row.end, row.length, row.position = cache.length, row.length + 1, row.position + 1
        return self.decoder.logits(hidden)

    def fork(self, row: TorchSequence) -> TorchSequence:
        return TorchSequence(row.cache, row.row, row.end, row.length, row.position)

    def release(self, row: TorchSequence) -> None:
        pass  # memory goes with the last reference

    def own(self, row: TorchSequence) -> TorchSequence:
        old = row.cache
        if old.keys.shape[1] > 1 or old.keys.shape[3] > row.length + ROOM:
            cache = KVCache(self.decoder.config, 1, row.length, dtype=old.keys.dtype, device=old.keys.device)
            _copy(row, cache, 0, length=row.length, at=0)
            cache.length = row.length
            return TorchSequence(cache, 0, row.length, row.length, row.position)
        return row

    def bytes(self, row: TorchSequence) -> int:
        keys = row.cache.keys
        return 2 * keys.numel() * keys.element_size()

    def _together(self, rows: Many[TorchSequence]) -> KVCache:
        """The batch whose rows these are, in order, with room for one token."""
        cache, end = rows[0].cache, rows[0].end
        if (
            end == cache.length < cache.keys.shape[3]
            and len(rows) == cache.keys.shape[1]
            and all(row.cache is cache and row.row == n and row.end == end for n, row in enumerate(rows))
        ):
            return cache
        longest = max(row.length for row in rows)
        new = KVCache(
            self.decoder.config,
            len(rows),
            longest + max(ROOM, longest // 2),
            dtype=cache.keys.dtype,
            device=cache.keys.device,
        )
        for n, row in enumerate(rows):
            _copy(row, new, n, length=row.length, at=longest - row.length)
            row.cache, row.row, row.end = new, n, longest
        new.length = longest
        return new


def _copy(row: TorchSequence, to: KVCache, number: int, *, length: int, at: int) -> None:
    """The first `length` tokens of a sequence into row `number` of another cache, from column `at` on."""
    start = row.end - row.length
    for mine, its in ((to.keys, row.cache.keys), (to.values, row.cache.values)):
        mine[:, number, :, at : at + length] = its[:, row.row, :, start : start + length]
    to.positions[number, at : at + length] = row.cache.positions[row.row, start : start + length]
