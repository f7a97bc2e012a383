"""Compiled blocks for training."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mm_gpt.model.cache import ForwardContext
from mm_gpt.model.decoder import Block, Decoder
from mm_gpt.training.recompute import recomputed


def compile_blocks(
    decoder: Decoder,
    *,
    recompute: Literal["none", "selective", "full"] = "none",
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Run each block compiled while it trains; evaluation, with its many shapes, stays as it is.

    All blocks of a class share one compiled function, so that a deep decoder takes no longer to compile than a shallow
    one. It is the class's own forward: they differ in where the norms stand. `recompute` is compiled with it
    (`mm_gpt.training.recompute`).
    """
    plain = {type(block): type(block).forward for block in decoder.blocks}
    if recompute != "none":
        plain = {each: recomputed(forward, recompute) for each, forward in plain.items()}
    compiled = {each: torch.compile(forward, dynamic=False, backend=backend) for each, forward in plain.items()}
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.forward = _while_training(block, compiled[type(block)])  # type: ignore[method-assign]


def _while_training(block: Block, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = type(block).forward

    def forward(x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        return (compiled if block.training else plain)(block, x, step, memory)

    return forward
