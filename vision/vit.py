"""A plain vision transformer: the towers of CLIP, SigLIP, SigLIP 2 (fixed resolution), Kosmos-2, Idefics3, InternVL.

Shapes: N images, (H, W) pixels, P patches, T tokens (P, one more with a class token), D width, h heads, c head size.

Vision-language models take their tokens from different places of the same network: LLaVA behind the last but one block,
LLaVA-OneVision behind the last, Kosmos-2, PaliGemma and SmolVLM behind the norm after it. `feature_layer` and
`post_norm` say where. What comes later is kept with its weights, but is not run.

Papers: ViT (2010.11929), CLIP (2103.00020), SigLIP (2303.15343), SigLIP 2 (2502.14786), Idefics3 (2408.12637),
InternVL (2312.14238).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ConfigError

MAX_LAYERS = 1000
"""Each takes memory and time, even without its weights."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    image_size: int
    """Height and width of the images, in pixels. What is left of them behind the last whole patch is not seen."""
    patch_size: int
    width: int
    """D, the size of a token."""
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """gelu_tanh: the tanh approximation (SigLIP). quick_gelu: x · sigmoid(1.702 x) (CLIP as OpenAI trained it)."""
    class_token: bool = False
    """A learned token before the patches (CLIP)."""
    pre_norm: bool = False
    """A norm before the first block (CLIP)."""
    patch_bias: bool = True
    """The patch embedding has a bias; CLIP's has none."""
    norm: Literal["layer", "rms"] = "layer"
    """Of the blocks. rms: InternViT-6B."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    """Queries and keys pass an RMSNorm over all their heads together (InternViT-6B)."""
    layer_scale: bool = False
    """What a block adds to the tokens is multiplied by learned factors, one per feature (InternViT)."""
    last_norm: bool = True
    """There is a norm behind the last block; InternViT has none."""
    feature_layer: int = -1
    """Which of the `num_layers` + 1 hidden states are the tokens: 0 is what enters the first block, i what leaves the
    i-th; negative ones count from the last, so that -2 is what leaves the last but one block."""
    post_norm: bool = True
    """The tokens pass the norm behind the last block, if there is one."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"num_layers {self.num_layers} is more than {MAX_LAYERS}")
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
            raise ConfigError(f"feature_layer {self.feature_layer}: there are {self.num_layers} layers")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def depth(self) -> int:
        """How many blocks the tokens pass."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


class Attention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        # Whatever `norm_eps` is, InternViT has this one here
        self.q_norm = nn.RMSNorm(config.width, 1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.width, 1e-6) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "n t (h c) -> n h t c", h=self.num_heads) for y in (self.q_norm(q), self.k_norm(k), v))
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t c -> n t (h c)"))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(x)


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.factors = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
        self.attention_norm = norm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.attention_scale = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.mlp_norm = norm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)
        self.mlp_scale = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_scale(self.attention(self.attention_norm(x)))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class ViT(nn.Module):
    """Normalised pixels (N, 3, H, W) to tokens (N, T, D): the class token, if there is one, then patches row by row.

    `post_norm` and all `blocks` are there whatever the config's `feature_layer`, so that a checkpoint stays complete.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches + config.class_token, width))
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, config.norm_eps) if config.last_norm else nn.Identity()
        for parameter in (self.class_token, self.position_embedding):
            if parameter is not None:
                nn.init.normal_(parameter, std=width**-0.5)  # as long as a normalised token is small: CLIP's scale

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = rearrange(self.patch_embedding(pixel_values), "n d h w -> n (h w) d")
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position_embedding)
        for block in self.blocks[: self.config.depth]:
            x = block(x)
        return self.post_norm(x) if self.config.post_norm else x
