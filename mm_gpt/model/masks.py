"""What may see what in packed rows: as a mask, or as blocks of one that flex attention computes from ids.

Tokens look back, inside their own document, in its shared part or their branch; models may read a prefix or an image in
both directions, and local layers see a window. A mask of that is (B, 1, T, T) booleans, and each kernel that takes one
scores all T² pairs. Flex attention (FlexAttention, 2412.05496) is given the rule instead, and which blocks of 128 × 128
pairs it empties, fills or divides: what is empty is not computed, and nothing is T² in memory.

Shapes: B rows, T tokens, Q = K = ⌈T / 128⌉ blocks of queries and of keys.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.processor import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block: flex attention's own size."""


def uses_blocks(config: DecoderConfig, device: torch.device) -> bool:
    """Whether flex attention serves a decoder that is trained on this device.

    It has no gradient on a CPU (torch 2.14), no dropout, and none of the sparse or relative patterns here; below a head
    size of 16 it has no kernel. Soft caps are left to the mask: where a block is computed again in the backward pass,
    torch's stand-in for the kernel gives gradients of 1e38 with them, and the kernel itself was not seen.
    """
    return (
        device.type == "cuda"
        and config.causal
        and config.dropout == 0.0
        and config.attention_softcap is None
        and config.positions != "relative"
        and config.head_size >= 16
        and set(config.attention) <= {"dense", "local"}
    )


def is_plain(batch: Batch) -> bool:
    """Whether every row is one document without branches or padding on its left."""
    documents = batch.document_ids
    # Padding on the right is seen by nobody before it, and nobody asks what it sees.
    follows = (documents[:, 1:] == documents[:, :-1]) | (documents[:, 1:] == 0)
    return not batch.branch_ids.any() and bool(follows.all()) and bool(documents[:, 0].all())


def attention_mask(
    batch: Batch, *, prefix_lm: bool = False, images: Tensor | None = None, window: int | None = None, past: int = 0
) -> Tensor | None:
    """True where a query (B, 1, T, past + T) may look: back, inside its own document, in the shared part or its branch.

    With `prefix_lm`, what stands before the first target of a document is seen by all of that part as well. `images`
    (B, T) is True at the tokens of images: those of one image, which are one run, see each other. `window`: how far
    back a query sees, itself included; a prefix is read whole nevertheless, and the end of an image's own run is always
    in sight, but not its beginning. `past`: tokens in the cache, all of them of the row's one document.
    None when every row is one document without branches or padding on its left: plain causal attention is faster, and
    sparse patterns are only then cheaper in all their forms.
    """
    documents, branches = batch.document_ids, batch.branch_ids
    if not prefix_lm and images is None and is_plain(batch):
        return None
    T = documents.shape[1]
    same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, query, key)
    visible = (branches.unsqueeze(1) == 0) | (branches.unsqueeze(2) == branches.unsqueeze(1))
    keys = torch.arange(past + T, device=documents.device)
    looks = keys[past:, None] >= keys  # (T, past + T)
    if images is not None:
        runs = _runs(images)
        together = images.unsqueeze(2) & (runs.unsqueeze(2) == runs.unsqueeze(1))
        looks = looks | F.pad(together, (past, 0))
    if window is not None:
        places = past + _places(batch)
        behind = torch.cat([keys[:past].expand(len(places), -1), places], dim=1)
        looks = looks & (places.unsqueeze(2) - behind.unsqueeze(1) < window)
    if prefix_lm:
        prefix = _before_targets(batch)
        looks = looks | F.pad(prefix.unsqueeze(2) & prefix.unsqueeze(1), (past, 0))
    # Padding sees padding only: a row of the mask without any True would make its softmax NaN.
    return (F.pad(same & visible, (past, 0), value=True) & looks).unsqueeze(1)


def block_mask(
    batch: Batch, *, prefix_lm: bool = False, images: Tensor | None = None, window: int | None = None
) -> "BlockMask | None":
    """`attention_mask` of a batch as blocks, for `attend`; None in the same cases."""
    from torch.nn.attention.flex_attention import BlockMask

    if not prefix_lm and images is None and window is None and is_plain(batch):
        return None
    documents, branches = batch.document_ids, batch.branch_ids
    runs = None if images is None else _runs(images)
    places = None if window is None else _places(batch)
    prefix = _before_targets(batch) if prefix_lm else None

    def may_look(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        looks = i >= j
        if runs is not None:
            looks = looks | ((runs[b, i] > 0) & (runs[b, i] == runs[b, j]))
        if places is not None and window is not None:
            looks = looks & (places[b, i] - places[b, j] < window)
        if prefix is not None:
            looks = looks | (prefix[b, i] & prefix[b, j])
        visible = (branches[b, j] == 0) | (branches[b, i] == branches[b, j])
        return (documents[b, i] == documents[b, j]) & visible & looks

    some, all_ = _blocks_in_sight(batch, both_ways=prefix_lm or images is not None, places=places, window=window)
    part = some & ~all_
    T = documents.shape[1]
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(all_), BLOCK_SIZE=BLOCK, mask_mod=may_look, seq_lengths=(T, T)
    )


def _blocks_in_sight(
    batch: Batch, *, both_ways: bool, places: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Blocks (B, Q, K) in which something may be seen, and those in which everything is: bounds, from each block's
    first and last document and place. `both_ways`: some tokens see what is ahead, in blocks where anything may be."""
    documents = batch.document_ids
    new = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    numbers = new.cumsum(dim=1)  # of the documents in their order, padding among them
    first, last = _bounds(numbers)
    at = torch.arange(first.shape[1], device=documents.device)
    overlap = (first.unsqueeze(2) <= last.unsqueeze(1)) & (first.unsqueeze(1) <= last.unsqueeze(2))
    ahead = at[None, :] > at[:, None]
    some = overlap & (overlap if both_ways else ~ahead)
    one = first == last
    whole = torch.ones_like(one)
    if documents.shape[1] % BLOCK:
        whole[:, -1] = False  # its end is beyond the row
    same = one.unsqueeze(2) & one.unsqueeze(1) & (first.unsqueeze(2) == first.unsqueeze(1))
    low, high = _bounds(batch.branch_ids)
    apart = (low.unsqueeze(2) > high.unsqueeze(1)) | (high.unsqueeze(2) < low.unsqueeze(1))
    some = some & ~(same & apart & (low > 0).unsqueeze(1))
    full = same & whole.unsqueeze(2) & whole.unsqueeze(1)
    all_ = full & (high == 0).unsqueeze(1) & (at[None, :] < at[:, None])
    if places is not None and window is not None:
        nearest, farthest = _bounds(places)
        seen = nearest.unsqueeze(2) - farthest.unsqueeze(1) < window
        some = some & (seen | seen.new_full((), both_ways))
        all_ = all_ & (farthest.unsqueeze(2) - nearest.unsqueeze(1) < window)
    return some, all_


def _bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each block's values: (B, T) to twice (B, Q)."""
    short = -values.shape[1] % BLOCK
    blocks = torch.cat([values, values[:, -1:].expand(-1, short)], dim=1).unflatten(1, (-1, BLOCK))
    return blocks.amin(dim=2), blocks.amax(dim=2)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has (B, 1, Q), and which, the others behind them (B, 1, Q, K)."""
    chosen = blocks.unsqueeze(1).to(torch.int32)
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _runs(images: Tensor) -> Tensor:
    """(B, T) the number of the run of image tokens that a token is in, from 1; 0 outside."""
    starts = images & ~F.pad(images[:, :-1], (1, 0))
    return starts.cumsum(dim=1).where(images, 0)


def _places(batch: Batch) -> Tensor:
    """(B, T) each token's place in its own text: a branch lies behind the shared part, whatever other branches stand
    between them in the row."""
    documents, branches = batch.document_ids, batch.branch_ids
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)

    def inside(new: Tensor) -> Tensor:
        return index - index.where(F.pad(new, (1, 0)), 0).cummax(dim=1).values

    new_document = documents[:, 1:] != documents[:, :-1]
    new_part = new_document | (branches[:, 1:] != branches[:, :-1])
    numbers = F.pad(new_document, (1, 0)).cumsum(dim=1)
    shared = torch.zeros_like(documents).scatter_add_(1, numbers, (branches == 0).long()).gather(1, numbers)
    return torch.where(branches == 0, inside(new_document), shared + inside(new_part))


def _before_targets(batch: Batch) -> Tensor:
    """(B, T), True at tokens of a document that are no target and stand before its first one."""
    learned = (batch.labels != IGNORE_INDEX).long()
    before = learned.cumsum(dim=1) - learned  # targets among the tokens up to this one: labels are those of the next
    starts = torch.zeros_like(before)
    new = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    starts[:, 1:] = torch.where(new, before[:, 1:], 0)
    return before == starts.cummax(dim=1).values
