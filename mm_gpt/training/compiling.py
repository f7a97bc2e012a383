"""Compiled blocks for training."""

from collections.abc import Callable

import torch
from torch import Tensor

from mm_gpt.model.decoder import Block, Decoder


def compile_blocks(decoder: Decoder, *, backend: str = "inductor") -> None:
    """Run each block compiled while it trains; evaluation, with its many shapes, stays as it is.

    All blocks of a class share one compiled function, so that a deep decoder takes no longer to compile than a shallow
    one. It is the class's own forward: they differ in where the norms stand.
    """
    compiled = {
        cls: torch.compile(cls.forward, dynamic=False, backend=backend) for cls in set(map(type, decoder.blocks))
    }
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.forward = _while_training(block, compiled[type(block)])  # type: ignore[method-assign]


def _while_training(block: Block, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = type(block).forward

    def forward(*args: object, **kwargs: object) -> Tensor:
        return (compiled if block.training else plain)(block, *args, **kwargs)

    return forward
