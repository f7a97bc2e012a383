"""Optimizers over the parameter groups of a stage.

What they have in common: `lr` of each group is set before each step, decoupled weight decay is multiplied by it and
touches matrices only, and a parameter without a gradient stays as it is, decay and all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_gpt.errors import ConfigError
from mm_gpt.training.muon import Muon, block_matrices, by_rows
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.train_config import TrainConfig, use_bf16

FUSED = ("cpu", "cuda")
"""Devices for which torch has AdamW in one kernel: one pass over the memory, and nothing kept beside it."""


def make_optimizer(
    groups: Sequence[ParameterGroup], config: TrainConfig, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over what is trainable in `groups`.

    `model`: whose parameters they are; Muon must know where each belongs. Raises ConfigError when nothing is trainable,
    or nothing that Muon is for.
    """
    if config.optimizer == "muon":
        if model is None:
            raise ConfigError("muon needs the model, to tell the matrices of its blocks from the others")
        return _muon(groups, config, model)
    settings = _settings(groups, config)
    if not settings:
        raise ConfigError("nothing is trainable")
    if config.optimizer == "adafactor":
        return _adafactor(settings, config)
    return _adamw(settings, config)


def _settings(
    groups: Sequence[ParameterGroup], config: TrainConfig, but: frozenset[nn.Parameter] = frozenset()
) -> list[dict[str, Any]]:
    """Of each group its matrices, which decay, and the rest."""
    settings = []
    for group in groups:
        for decay in (True, False):
            parameters = [p for p in group.parameters if p.requires_grad and p not in but and (p.dim() >= 2) == decay]
            if parameters:
                weight_decay = config.weight_decay if decay else 0.0
                settings.append({"params": parameters, "lr_scale": group.lr_scale, "weight_decay": weight_decay})
    return settings


def _adamw(settings: list[dict[str, Any]], config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for group in settings for p in group["params"]]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    kernel: dict[str, bool] = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, **kernel)


def _adafactor(settings: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Adafactor:
    """One parameter at a time: all at once would need as much memory as the second moments that are saved."""
    if any(isinstance(p, DTensor) for group in settings for p in group["params"]):
        raise ConfigError("optimizer=adafactor needs whole parameters in each process: take shard=1, or another")
    return torch.optim.Adafactor(settings, lr=config.lr, foreach=False)


def _muon(groups: Sequence[ParameterGroup], config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    matrices = block_matrices(model)
    ours: list[dict[str, Any]] = [
        {"params": parameters, "rows": rows, "lr_scale": group.lr_scale, "weight_decay": config.weight_decay}
        for group in groups
        for rows, parameters in by_rows([p for p in group.parameters if p.requires_grad], matrices).items()
    ]
    if not ours:
        raise ConfigError("optimizer=muon is for the matrices of blocks, and none of them is trained here: take adamw")
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if use_bf16(config.precision, device) else torch.float32
    muon = Muon(ours, lr=config.lr, dtype=dtype)
    rest = _settings(groups, config, but=frozenset(p for group in ours for p in group["params"]))
    return Together([muon, _adamw(rest, config)]) if rest else muon


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one: the same groups, one state, one step."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` has read goes to the parts as well."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("several optimizers take no closure")
        for part in self.parts:
            part.step()
