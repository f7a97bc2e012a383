"""Activation checkpointing (1604.06174) of a decoder's blocks: memory for time.

A block keeps its input alone and runs again in the backward pass, with the same dropout. Selective checkpointing
(2205.05198) keeps the results of attention and of every second matrix product as well, which are most of the time, and
recomputes the rest, which is most of the memory. Parameters keep their names.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm_gpt.model.cache import ForwardContext
from mm_gpt.model.decoder import Block, Decoder

Forward = Callable[..., Tensor]
"""(block, x, step, memory) -> x"""

_OPS = torch.ops.aten
PRODUCTS = {_OPS.mm.default, _OPS.addmm.default, _OPS.linear.default}
ATTENTION = {
    _OPS._scaled_dot_product_flash_attention.default,
    _OPS._scaled_dot_product_efficient_attention.default,
    _OPS._scaled_dot_product_cudnn_attention.default,
    _OPS._scaled_dot_product_flash_attention_for_cpu.default,
}


def recomputed(forward: Forward, kind: Literal["selective", "full"]) -> Forward:
    """A block's forward that keeps little for its backward pass. Nothing changes where there is none."""
    options: dict[str, Any] = {"context_fn": _selective} if kind == "selective" else {}

    def run(block: Block, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        if not (block.training and torch.is_grad_enabled()):
            return forward(block, x, step, memory)
        if kind == "selective":
            step = dataclasses.replace(step, fused=None)  # whose products are written over where they lie
        inner = lambda x, memory: forward(block, x, step, memory)  # noqa: E731
        return checkpoint(inner, x, memory, use_reentrant=False, **options)

    return run


def recompute_blocks(decoder: Decoder, kind: Literal["none", "selective", "full"]) -> None:
    """Let each block of `decoder` compute again in the backward pass what it does not keep."""
    if kind == "none":
        return
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.forward = partial(recomputed(type(block).forward, kind), block)  # type: ignore[method-assign]


def _selective() -> Any:
    # Forward and recomputation count for themselves: one count for both would keep other products the second time
    # wherever a block has an odd number of them, and the gradient would be silently wrong.
    counts: Counter[bool] = Counter()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        else:
            keep = op in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
