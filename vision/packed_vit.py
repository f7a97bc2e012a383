"""The plain vision transformer with packed weights: int8 or bfloat16 products on the CPU, for inference alone.

Tokens, norms and the softmax are float32; the patch embedding and the attention are multiplied in bfloat16.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.kernels.gemm import GELU, GELU_TANH, QUICK_GELU, Kind, PackedWeight, gemm, pack
from mm_gpt.kernels.vision_block import Norm, VisionBlock
from mm_gpt.vision.vit import Block, LayerScale, ViT

TILES = 2
"""How many images pass the blocks together: their queries, keys and values stay in the last cache."""
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
        blocks, vit.blocks = list(vit.blocks[: vit.config.depth]), nn.ModuleList()
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


def _pack(weight: Tensor, bias: Tensor | None, kind: Kind, scale: nn.Module | None = None) -> PackedWeight:
    """With the factors of a `LayerScale` behind it, which may as well be the weights'."""
    weight, bias = weight.detach().float(), None if bias is None else bias.detach().float()
    if isinstance(scale, LayerScale):
        factors = scale.factors.detach().float()
        weight, bias = weight * factors[:, None], None if bias is None else bias * factors
    return pack(weight.numpy(), None if bias is None else bias.numpy(), kind)


def _pack_block(block: Block, kind: Kind) -> VisionBlock:
    attention, mlp = block.attention, block.mlp

    def normalise_heads(qkv: np.ndarray) -> None:
        q, k, _ = torch.from_numpy(qkv).chunk(3, dim=-1)
        q.copy_(attention.q_norm(q))
        k.copy_(attention.k_norm(k))

    return VisionBlock(
        heads=attention.num_heads,
        activation=_ACTIVATIONS[mlp.activation],
        attention_norm=_norm(block.attention_norm),
        qkv=_pack(attention.qkv.weight, attention.qkv.bias, kind),
        normalise_heads=None if isinstance(attention.q_norm, nn.Identity) else normalise_heads,
        out=_pack(attention.out.weight, attention.out.bias, kind, block.attention_scale),
        mlp_norm=_norm(block.mlp_norm),
        up=_pack(mlp.up.weight, mlp.up.bias, kind),
        down=_pack(mlp.down.weight, mlp.down.bias, kind, block.mlp_scale),
    )


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    gain = norm.weight.detach().float().numpy()
    offset = norm.bias.detach().float().numpy() if isinstance(norm, nn.LayerNorm) else np.zeros_like(gain)
    return isinstance(norm, nn.LayerNorm), gain, offset, float(norm.eps or 0)
