"""Compiled blocks for training."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mm_gpt.model.cache import ForwardContext
from mm_gpt.model.decoder import Block, Decoder
from mm_gpt.model.fused import has_function
from mm_gpt.training.recompute import Forward, recompute_blocks, recomputed

logger = logging.getLogger(__name__)


def compile_blocks(
    decoder: Decoder,
    *,
    recompute: Literal["none", "selective", "full"] = "none",
    device: torch.device | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Run each block compiled while it trains; evaluation, with its many shapes, stays as it is.

    All blocks of a class share one compiled function, so that a deep decoder takes no longer to compile than a shallow
    one. It is the class's own forward: they differ in where the norms stand. `recompute` is compiled with it
    (`mm_gpt.training.recompute`). `device`: where the decoder will be, if it is not there yet.

    Blocks that the CPU has one function for (`mm_gpt.model.fused`) take that instead: it is faster, and at once.
    Without a C++ compiler a line says so, and blocks run as they are written.
    """
    device = decoder.device if device is None else device
    if backend == "inductor" and device.type == "cpu" and (lack := _no_compiler()):
        if not has_function(decoder.config):
            logger.warning("blocks are not compiled: %s", lack)
        if recompute != "none":
            recompute_blocks(decoder, recompute)
        return
    plain = {type(block): type(block).forward for block in decoder.blocks}
    if recompute != "none":
        plain = {each: recomputed(forward, recompute) for each, forward in plain.items()}
    compiled = {each: torch.compile(forward, dynamic=False, backend=backend) for each, forward in plain.items()}
    for block in decoder.blocks:
        assert isinstance(block, Block)
        kind = type(block)
        block.forward = _while_training(block, plain[kind], compiled[kind])  # type: ignore[method-assign]


def _while_training(block: Block, plain: Forward, compiled: Forward) -> Callable[..., Tensor]:
    def forward(x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        chosen = compiled if block.training and step.fused is None else plain
        return chosen(block, x, step, memory)

    return forward


def _no_compiler() -> str | None:
    """Why C++ cannot be compiled here, in a few words; None: it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (install g++)"
    return None
