"""The plain vision transformer with packed weights: int8 or bfloat16 products on the CPU, for inference alone.

Tokens, norms and the softmax are float32; the patch embedding and the attention are multiplied in bfloat16.
"""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.kernels.gemm import GELU, GELU_TANH, QUICK_GELU, Kind, PackedWeight, gemm, pack
from mm_gpt.kernels.vision_block import Norm, VisionBlock
from mm_gpt.vision.vit import Block, LayerScale, ViT

TILES = 4
"""Images that pass the blocks together. More would save a little waiting among threads, and take more memory."""
_ACTIVATIONS = {"gelu": GELU, "gelu_tanh": GELU_TANH, "quick_gelu": QUICK_GELU}


class PackedViT(ViT):
    """Normalised pixels (N, 3, H, W) to tokens (N, T, D), as the `ViT` that it is made of, which it takes apart.

    An image's tokens do not depend, bit for bit, on the other images or the number of threads. There is nothing to
    train, and no state dict to save.
    """

    def __init__(self, vit: ViT, kind: Kind):
        nn.Module.__init__(self)
        self.config = vit.config
        self.patches = _pack(vit.patch_embedding.weight.flatten(1), vit.patch_embedding.bias, "bf16")
        self.class_token, self.position_embedding = vit.class_token, vit.position_embedding
        self.pre_norm, self.post_norm = vit.pre_norm, vit.post_norm
        self.float()
        self.packed: list[VisionBlock] = []
        blocks: list[Any] = list(vit.blocks[: vit.config.depth])
        vit.blocks = nn.ModuleList()
        while blocks:  # each is freed when it is packed
            self.packed.append(_pack_block(blocks.pop(0), kind))

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.cat([self._tokens(some) for some in pixel_values.float().split(TILES)])
        return self.post_norm(x) if self.config.post_norm else x

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        threads, size = torch.get_num_threads(), self.config.patch_size
        side = self.config.image_size // size
        pixels = pixel_values[..., : side * size, : side * size]
        patches = rearrange(pixels, "n c (h a) (w b) -> (n h w) (c a b)", a=size, b=size)
        x = torch.from_numpy(gemm(patches.numpy(), self.patches, threads=threads))
        x = rearrange(x, "(n p) d -> n p d", p=side * side)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position_embedding).contiguous()
        tokens = x.numpy()
        for block in self.packed:
            block(tokens, threads)
        return x


def _pack_block(block: Block, kind: Kind) -> VisionBlock:
    attention, mlp = block.attention, block.mlp

    def normalise_heads(qkv: np.ndarray) -> None:
        q, k, _ = torch.from_numpy(qkv).chunk(3, dim=-1)  # views
        q.copy_(attention.q_norm(q))
        k.copy_(attention.k_norm(k))

    attention_norm, qkv = _pack_norm(block.attention_norm, attention.qkv, kind)
    mlp_norm, up = _pack_norm(block.mlp_norm, mlp.up, kind)
    return VisionBlock(
        heads=attention.num_heads,
        activation=_ACTIVATIONS[mlp.activation],
        attention_norm=attention_norm,
        qkv=qkv,
        normalise_heads=None if isinstance(attention.q_norm, nn.Identity) else normalise_heads,
        out=_pack_scaled(attention.out, block.attention_scale, kind),
        mlp_norm=mlp_norm,
        up=up,
        down=_pack_scaled(mlp.down, block.mlp_scale, kind),
    )


def _pack_norm(norm: nn.Module, linear: nn.Linear, kind: Kind) -> tuple[Norm, PackedWeight]:
    """A norm and the product behind it.

    In int8, features whose gain stands out would leave the others few of the 256 steps: a part of their gain goes over
    to the weights, as in SmoothQuant (2211.10438), here by the gains alone, and never the other way round.
    """
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    gain, weight = norm.weight.detach().float(), linear.weight.detach().float()
    offset = norm.bias.detach().float() if isinstance(norm, nn.LayerNorm) else torch.zeros_like(gain)
    if kind == "int8":
        reach, size = gain.abs() + offset.abs(), weight.abs().amax(dim=0)
        balance = (reach / reach.median()) / (size / size.median()).clamp(min=1e-3)
        factors = balance.nan_to_num(1, 1, 1).clamp(min=1).sqrt()
        gain, offset, weight = gain / factors, offset / factors, weight * factors
    packed = _pack(weight, linear.bias, kind)
    return (isinstance(norm, nn.LayerNorm), gain.numpy(), offset.numpy(), float(norm.eps or 0)), packed


def _pack_scaled(linear: nn.Linear, scale: nn.Module, kind: Kind) -> PackedWeight:
    """A product and the `LayerScale` behind it, whose factors may as well be the weights'."""
    weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
    if isinstance(scale, LayerScale):
        factors = scale.factors.detach().float()
        weight, bias = weight * factors[:, None], bias * factors
    return _pack(weight, bias, kind)


def _pack(weight: Tensor, bias: Tensor | None, kind: Kind) -> PackedWeight:
    bias = None if bias is None else bias.detach().float()
    return pack(weight.detach().float().numpy(), None if bias is None else bias.numpy(), kind)
