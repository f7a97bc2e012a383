"""Norms of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt.model.decoder_config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 (or better) inside. Root Mean Square Layer Normalization, 1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.weight.shape, self.weight.to(precise), self.eps).to(x.dtype)


def make_norm(config: DecoderConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)
