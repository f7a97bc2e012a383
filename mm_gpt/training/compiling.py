"""Compiled blocks for training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm_gpt.model.cache import ForwardContext
from mm_gpt.model.decoder import Block, Decoder


def compile_blocks(decoder: Decoder, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Run each block compiled while it trains; evaluation, with its many shapes, stays as it is.

    All blocks of a class share one compiled function, so that a deep decoder takes no longer to compile than a shallow
    one. It is the class's own forward: they differ in where the norms stand.
    """
    classes = {type(block) for block in decoder.blocks}
    compiled = {each: torch.compile(each.forward, dynamic=False, backend=backend) for each in classes}
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.forward = _while_training(block, compiled[type(block)])  # type: ignore[method-assign]


def _while_training(block: Block, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = type(block).forward

    def forward(x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        return (compiled if block.training else plain)(block, x, step, memory)

    return forward
