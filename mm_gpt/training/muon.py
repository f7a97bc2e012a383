"""Muon: momentum whose singular values are all made 1, for the matrices of a network's blocks.

Keller Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/, with the step length of Moonlight (2502.16982):
an orthogonalised (A, B) matrix has a root mean square of 1/√max(A, B), so 0.2 · √max(A, B) of it is as long as what
AdamW takes as a rule, and one learning rate and one weight decay serve both. torch.optim.Muon takes a matrix as it is;
here one that several maps are stacked in (queries, keys and values; gate and up) is taken apart, since each has
directions of its own, and one that is sharded is gathered.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mm_gpt.model.decoder import Attention
from mm_gpt.model.relative import RelativeAttention

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes singular values towards 1 (0.7 to 1.2 are reached): Jordan's, steepest at 0."""
ITERATIONS = 5
RMS = 0.2
"""Of an update, by the learning rate: AdamW's are 0.2 to 0.4 long (2502.16982)."""
IN_A_BLOCK = re.compile(r"(^|\.)(blocks|resblocks|layers)\.\d+\.")


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix to (A, B) `matrix`, about: U S V^T with S near 1. Zeros stay zeros.

    Newton-Schulz iterations, computed in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Of matrices (A, B), with Nesterov's momentum and decoupled weight decay.

    A group's `rows` say how many rows each part of its matrices has, None that they are one. A parameter's state is its
    `momentum_buffer`, like torch.optim.Muon's. Parameters may be DTensors: the momentum stays sharded like them, and
    each rank orthogonalises the whole of it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """`dtype`: what is orthogonalised in."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rows": None})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of what has a gradient. Raises ValueError for a closure: gradients are computed before."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(buffer, momentum)
        whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
        rows = group["rows"] or (whole.shape[0],)
        parts = [
            orthogonalised(part, self.dtype).to(parameter.dtype) * (RMS * max(part.shape) ** 0.5)
            for part in whole.split(list(rows))
        ]
        update = torch.cat(parts)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            spread = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
            update = spread.redistribute(placements=parameter.placements)  # each rank cuts out its part
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def block_matrices(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...] | None]:
    """The linear maps inside the blocks of `model`, of its decoder and its towers, with the rows of each that are maps
    of their own; None: all are one.

    Left out are embeddings, heads and linear connectors, whose rows or columns are no directions of the stream between
    blocks, convolutions, and low-rank factors, of which only the product is a map.
    """
    found: dict[nn.Parameter, tuple[int, ...] | None] = {}
    for name, module in model.named_modules():
        if not IN_A_BLOCK.search(f"{name}."):
            continue
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[module.in_proj_weight] = _equal(module.in_proj_weight, 3)
        elif isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            assert isinstance(module.weight, nn.Parameter)
            found[module.weight] = _parts(model.get_submodule(parent), own, module.weight)
    return found


def _parts(owner: nn.Module, name: str, weight: Tensor) -> tuple[int, ...] | None:
    if name == "qkv" and isinstance(owner, Attention | RelativeAttention):
        heads, shared, size = owner.config.num_heads, owner.config.num_kv_heads, owner.config.head_size
        return heads * size, shared * size, shared * size
    if name == "qkv":  # of a vision or text tower
        return _equal(weight, 3)
    if name in ("gate_up", "kv_proj"):
        return _equal(weight, 2)
    return None


def _equal(weight: Tensor, count: int) -> tuple[int, ...] | None:
    rows = weight.shape[0]
    return (rows // count,) * count if rows % count == 0 else None


def by_rows(
    parameters: Sequence[nn.Parameter], matrices: dict[nn.Parameter, tuple[int, ...] | None]
) -> dict[tuple[int, ...] | None, list[nn.Parameter]]:
    """The parameters that are `matrices`, those with equal parts together."""
    groups: dict[tuple[int, ...] | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter in matrices:
            groups.setdefault(matrices[parameter], []).append(parameter)
    return groups
