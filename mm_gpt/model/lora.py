"""Low-rank adaptation of linear layers (LoRA, 2106.09685): y = W x + (alpha / rank) · B A x, with W frozen."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt.config import check_numbers


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "rank", at_least=1)
        check_numbers(self, "alpha", above=0)
        check_numbers(self, "dropout", at_least=0, below=1)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update; B starts at zero, so that nothing changes at first."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.enabled = True
        """False: the layer as it was before its adaptation."""
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.to(x.dtype))
        return self.base(x) + F.linear(low, (self.scale * self.lora_b).to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the update added into its weight."""
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        self.base.weight.copy_((self.base.weight.float() + update).to(self.base.weight.dtype))
        return self.base


def add_lora(module: nn.Module, config: LoRAConfig) -> None:
    """Replace every linear layer inside the blocks of `module` by its low-rank adapted form."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, LoRALinear(child, config))
        else:
            add_lora(child, config)


def merge_lora(module: nn.Module) -> None:
    """Fold every update into its base weight: inference then costs nothing more than without LoRA."""
    for name, child in list(module.named_children()):
        if isinstance(child, LoRALinear):
            setattr(module, name, child.merged())
        else:
            merge_lora(child)
