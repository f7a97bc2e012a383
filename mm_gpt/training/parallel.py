"""Fully sharded training (FSDP2, 2304.11277): ranks share one copy of a model, each holds a slice of every weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_gpt.training.distributed import ranks


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are slices, and what saves them must gather them first."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole `state_dict` by its names, on the CPU of rank 0; the other ranks get nothing. All ranks call it.

    One weight at a time is whole on each device. A model that is not sharded gives what it has, without a copy.
    """
    leads = ranks()[0] == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if leads:
            state[name] = whole.detach().cpu() if isinstance(tensor, DTensor) else whole.detach()
    return state


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While inside, `model.state_dict()` holds whole tensors on rank 0, for what saves a model. All ranks enter it."""
    if not is_sharded(model):
        yield
        return
    whole = full_state(model)

    def put(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, tensor in whole.items():
            state[prefix + name] = tensor

    handle = model.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()
