"""Contrastive image-text training (CLIP; Radford et al. 2021, arXiv 2103.00020).

Shapes: N image-text pairs, T text tokens, P patch tokens, D text width, E width of the shared space.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from mm_gpt.errors import ConfigError
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    vocab_size: int
    context_length: int = 77
    """Longest text, in tokens."""
    width: int = 256
    num_layers: int = 4
    num_heads: int = 4

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} does not divide by num_heads {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    vision: VisionConfig
    text: TextTowerConfig | None = None
    """None: no text tower, the captions arrive as features of `text_width` from somewhere else."""
    text_width: int | None = None
    """Width of precomputed text features. Exactly one of `text` and `text_width` is given."""
    embedding_width: int = 256
    """E, the width of the space that images and texts share."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.text_width is None):
            raise ConfigError("give exactly one of text (a text tower) and text_width (precomputed text features)")
        if self.embedding_width < 1:
            raise ConfigError(f"embedding_width must be at least 1, got {self.embedding_width}")


class TextTower(nn.Module):
    """A small causal transformer; the feature of a text is the state at its last token, after a LayerNorm."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context_length, config.width))
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids (N, T), padded on the right, and lengths (N,) in tokens to features (N, D).

        What stands at and after `lengths` has no influence. Raises ValueError if T exceeds the context or a length is
        not in 1..T.
        """
        num_tokens = input_ids.shape[1]
        if num_tokens > self.config.context_length:
            raise ValueError(f"text of {num_tokens} tokens, but the tower's context is {self.config.context_length}")
        if not ((lengths >= 1) & (lengths <= num_tokens)).all():
            raise ValueError(f"lengths must be in 1..{num_tokens}, got {lengths.tolist()}")
        x = self.token_embedding(input_ids) + self.positions[:num_tokens]  # (N, T, D)
        for layer in self.layers:
            x = layer(x)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]  # (N, D)
        return self.norm(last)


class TextLayer(nn.Module):
    """Pre-norm causal attention and feed-forward."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        # CLIP's initialisation: what is added to the residual stream shrinks with depth.
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.out.weight, std=(2 * config.num_layers * width) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=(2 * config.num_layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(attended, "n h t d -> n t (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ContrastiveModel(nn.Module):
    """A vision encoder (mean of its patch tokens) and texts, each projected into one space."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.image_projection = nn.Linear(self.vision.width, config.embedding_width, bias=False)
        self.text = TextTower(config.text) if config.text else None
        text_width = config.text.width if config.text else config.text_width
        assert text_width is not None
        self.text_projection = nn.Linear(text_width, config.embedding_width, bias=False)
        nn.init.normal_(self.image_projection.weight, std=self.vision.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to image features (N, E), not normalised."""
        return self.image_projection(self.vision(pixel_values).mean(dim=1))

    def encode_text(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids (N, T) and lengths (N,) to text features (N, E), not normalised."""
        assert self.text is not None, "this model has no text tower: call project_text with features"
        return self.text_projection(self.text(input_ids, lengths))

    def project_text(self, features: Tensor) -> Tensor:
        """Precomputed text features (N, text_width) to (N, E), not normalised."""
        return self.text_projection(features)

    def loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """`clip_loss` at the model's temperature. Call `clamp_logit_scale` after each optimizer step."""
        return clip_loss(image_features, text_features, self.logit_scale)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the learned temperature in 0 <= logit_scale <= ln 100, as CLIP does for stability."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy over cosine similarities: pair i belongs together, every other pair does not.

    Features are (N, E), of any length; `logit_scale` is a logarithm, and exp(logit_scale) is capped at 100. Where two
    captions of a batch are equal the loss still counts one of them as wrong, as CLIP's does. Returns a scalar.
    """
    if image_features.shape != text_features.shape:
        shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise ValueError(f"image and text features must have one shape (N, E), got {shapes}")
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    scale = torch.as_tensor(logit_scale, device=images.device).clamp(max=MAX_LOGIT_SCALE).exp()
    logits = scale * images @ texts.T  # (N, N), rows are images
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gather_features(features: Tensor) -> Tensor:
    """Features (N, E) of this rank to those of all ranks (world * N, E), in rank order, with gradients.

    Apply it to both sides before `clip_loss`, so that every text is a negative of every image. Each rank then computes
    the whole loss, and gradients averaged over ranks (DDP, FSDP) are those of one process with the whole batch. N must
    be the same on every rank. Without torch.distributed it returns `features`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return features
    return torch.cat(all_gather(features.contiguous()))
