"""Weights in the type that products are computed in, kept from step to step.

What is trained stays in float32: those are the master weights, which the optimizer, checkpoints and other ranks see.
Autocast rounds them for every micro-batch and forgets the result; here a copy is rounded once for each change of a weight,
into the same memory.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies = WeakTensorKeyDictionary()
_round = 0


def renew() -> None:
    """Weights may have changed in ways that their version does not tell, as sharded ones do."""
    global _round
    _round += 1


@torch.no_grad()
def computed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, without a gradient: itself where it has that type, else a copy. Only to be read."""
    if weight.dtype == dtype:
        return weight.detach()
    state = (weight._version, weight.data_ptr(), _round)
    known = _copies.get(weight)
    if known is not None and known[0] == state and known[1].dtype == dtype:
        return known[1]  # type: ignore[no-any-return]
    copy = known[1] if known is not None and known[1].dtype == dtype else torch.empty_like(weight, dtype=dtype)
    copy.copy_(weight)
    _copies[weight] = (state, copy)
    return copy
