"""Products in bfloat16 on the CPU, for modules that stay as they are: connectors, towers of native resolution."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mm_gpt.errors import MMGPTError
from mm_gpt.kernels.full_attention import attend, room_for_heads
from mm_gpt.kernels.gemm import gemm, pack, to_bf16
from mm_gpt.vision import native_vit

WORTH_PACKING = 512
"""Tokens from which on attention in bfloat16 is faster than torch's: 1.3 times at 2,048, half as fast at 64."""


class Bf16Linear(nn.Module):
    """x (..., K) to (..., N) in float32, multiplied in bfloat16, for inference alone. It keeps the packed weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        self.packed = pack(linear.weight.detach().float().numpy(), bias, "bf16")

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
        y = torch.from_numpy(gemm(rows.numpy(), self.packed, threads=torch.get_num_threads()))
        return y.view(*x.shape[:-1], -1) if x.numel() else y.view(*x.shape[:-1], self.packed.rows)

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        raise MMGPTError("linear layers are packed in bf16: to save them, load the model in fp32")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` of (H, N, T, C) float32, all to all, C even."""
    if q.shape[2] < WORTH_PACKING:
        return F.scaled_dot_product_attention(q, k, v)
    qkv = rearrange(torch.stack([q, k, v]), "s h n t c -> (n t) (s h c)").contiguous()
    rows = room_for_heads(*qkv.shape)
    to_bf16(qkv.numpy(), 0, len(qkv), rows, 0)
    y = torch.from_numpy(attend(rows, q.shape[1], len(q), threads=torch.get_num_threads()))
    return rearrange(y, "(n t) (h c) -> h n t c", n=q.shape[1], h=len(q))


def use_bf16(module: nn.Module) -> None:
    """Every linear layer inside becomes a `Bf16Linear`, whose weights are freed when it is packed, and the attention of
    a NativeViT is multiplied in bfloat16 as well."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Bf16Linear(child))
        else:
            use_bf16(child)
    if isinstance(module, native_vit.Attention):
        module.attend = attention
