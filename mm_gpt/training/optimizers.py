"""Optimizers over the parameter groups of a stage."""

from collections.abc import Sequence

import torch

from mm_gpt.errors import ConfigError
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.train_config import TrainConfig


def make_optimizer(groups: Sequence[ParameterGroup], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay touches matrices only, never biases and norms."""
    settings = []
    for group in groups:
        for decay in (True, False):
            parameters = [p for p in group.parameters if p.requires_grad and (p.dim() >= 2) == decay]
            if parameters:
                weight_decay = config.weight_decay if decay else 0.0
                settings.append({"params": parameters, "lr_scale": group.lr_scale, "weight_decay": weight_decay})
    if not settings:
        raise ConfigError("nothing is trainable")
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)
