"""Vision encoders: a tower (our plain ViT, EfficientNet-Lite, any of timm or open_clip) as a source of patch tokens.

Shapes: N images, (H, W) pixels, P patch tokens, D_v the width of the tower.

Weights are never downloaded here: a tower is built with random ones and a state dict is loaded into it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.vision.concepts import ConceptClassifier, ConceptsConfig
from mm_gpt.vision.efficientnet import STRIDE, EfficientNetLite
from mm_gpt.vision.native_vit import Grid, NativeViT, NativeViTConfig
from mm_gpt.vision.towers import (
    OpenClipTower,
    Trunk,
    build_tower,
    check_name,
    is_transformer,
    open_clip_blocks,
    open_clip_tokens,
)
from mm_gpt.vision.transforms import MAX_SIZE
from mm_gpt.vision.vit import ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    model: str | ViTConfig | NativeViTConfig
    """An open_clip model ("ViT-B-32", "RN50", "ViT-B-16-SigLIP", ...), "timm/" and the name of a timm trunk, or a
    complete config of the plain ViT or of one for images of any size, as towers of Hugging Face checkpoints have it."""
    image_size: int
    """Height and width of the images, in pixels; for images of any size those of a cell."""
    include_class_token: bool = False
    """Put the class token (and the registers, where there are some) before the patches, as KOSMOS-2 does. ViT only."""
    l2_normalize: bool = False
    """Divide each token by its L2 norm, as KOSMOS-2 does."""
    train_batch_norm: bool = False
    """Let BatchNorm use and update batch statistics in training. Off, a token never depends on the other images of
    the batch and pretrained statistics survive; on is for training a convolutional trunk from scratch."""
    concepts: ConceptsConfig | None = None
    """Tell the decoder what the tower's own classifier sees, in words."""

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= MAX_SIZE:
            raise ConfigError(f"image_size must be 1 to {MAX_SIZE}, not {self.image_size}")
        if isinstance(self.model, ViTConfig | NativeViTConfig):
            if self.model.image_size != self.image_size:
                raise ConfigError(f"image_size is {self.image_size}, but that of model is {self.model.image_size}")
            return
        check_name(self.model)

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else "the ViT"


class VisionEncoder(nn.Module):
    """Images to patch tokens.

    `tower` is the ViT or the open_clip module, without the pooling and projection heads that patch tokens do not pass
    through. Attributes: `width` (D_v), `num_patches` (P, for `config.image_size`), `left_out` (the names of the weights
    that went with the heads).
    Raises ConfigError when the model has no class token and `include_class_token` asks for it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self._unfolded: dict[str, Tensor] = {}
        """All weights as they were before BatchNorm was folded, if it was."""
        self._changed: str | None = None
        """What has become of the tower's weights, where they can be neither saved nor trained any more."""
        self.tower: ViT | NativeViT | Trunk | OpenClipTower
        if isinstance(config.model, ViTConfig):
            self.tower, self.left_out = ViT(config.model), frozenset[str]()
        elif isinstance(config.model, NativeViTConfig):
            self.tower, self.left_out = NativeViT(config.model), frozenset[str]()
        else:
            self.tower, self.left_out = build_tower(config.model, config.image_size)
        self.eval()
        self.num_patches, self.width = self._output_shape()
        self.concepts: ConceptClassifier | None = None
        if config.concepts is not None:
            self.add_concepts(config.concepts)
        self.train()

    def add_concepts(self, config: ConceptsConfig) -> None:
        """A classifier beside the tower's tokens, whose weights are to be loaded. Raises ConfigError."""
        self.config = dataclasses.replace(self.config, concepts=config)
        self.concepts = ConceptClassifier(config, self._trunk, self.width)

    @property
    def _trunk(self) -> nn.Module | None:
        return self.tower.trunk if isinstance(self.tower, Trunk) else None

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Tensor:
        """Normalised pixels (N, 3, H, W) to patch tokens (N, P, D_v), rows of the image from top to bottom.

        H = W = `config.image_size`; anything else raises ValueError, for P is fixed. A NativeViT needs `grids`, rows
        and columns of the cells that each image has: N is their sum.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"expected pixel_values (N, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if isinstance(self.tower, NativeViT):
            tokens = self.tower(pixel_values, grids)
        elif isinstance(self.tower, ViT):
            tokens = self.tower(pixel_values)
            if self.tower.config.class_token and not self.config.include_class_token:
                tokens = tokens[:, 1:]
        elif isinstance(self.tower, Trunk):
            tokens = self.tower.tokens(pixel_values, with_class_token=self.config.include_class_token)
        else:
            tokens = open_clip_tokens(self.tower, pixel_values, with_class_token=self.config.include_class_token)
        return F.normalize(tokens, dim=-1) if self.config.l2_normalize else tokens

    def see(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> tuple[Tensor, Tensor | None]:
        """The patch tokens as `forward` gives them, and the probabilities of the classes (N, C), if there are any."""
        if self.concepts is None or self.concepts.own is None:
            tokens = self(pixel_values, grids)
            return tokens, None if self.concepts is None else self.concepts(tokens)
        size, trunk = self.config.image_size, self._trunk
        assert isinstance(trunk, EfficientNetLite)
        assert self.config.concepts is not None
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"expected pixel_values (N, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        last = self.config.concepts.own_blocks
        shared = trunk.before(pixel_values.contiguous(memory_format=torch.channels_last), last)
        tokens = rearrange(trunk.after(shared, last), "n c h w -> n (h w) c")
        tokens = F.normalize(tokens, dim=-1) if self.config.l2_normalize else tokens
        return tokens, self.concepts(shared)

    def _output_shape(self) -> tuple[int, int]:
        """(P, D_v): of towers that are not ours, a forward pass on the meta device tells."""
        if self.config.include_class_token and not _has_class_token(self.tower):
            raise ConfigError(f"{self.config.model_name} has no class token: include_class_token must be false")
        if isinstance(self.tower, NativeViT):
            native = self.tower.config
            return native.num_patches, native.width * (1 + len(native.deepstack))
        if isinstance(self.tower, ViT):
            return self.tower.config.num_patches + self.config.include_class_token, self.tower.config.width
        size = self.config.image_size
        if isinstance(self.tower, Trunk) and isinstance(self.tower.trunk, EfficientNetLite):
            return math.ceil(size / STRIDE) ** 2, self.tower.trunk.num_features
        tensors = [*self.named_parameters(), *self.named_buffers()]
        state = {name: tensor.detach().to("meta") for name, tensor in tensors}
        pixels = torch.empty(1, 3, size, size, device="meta")
        _, num_patches, width = torch.func.functional_call(self, state, (pixels,)).shape
        return num_patches, width

    def train(self, mode: bool = True) -> "VisionEncoder":
        super().train(mode)
        if not self.config.train_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def unfreeze(self, num_blocks: int | None = None) -> None:
        """Train exactly the last `num_blocks` blocks (0: nothing, None: everything); freeze the rest.

        A block is a transformer block, or a stage of a convolutional trunk (the head convolution of an EfficientNet
        counts as one); blocks behind the layer that gives the tokens do not count. KOSMOS-1 trains the last block of
        its ViT only. Raises ConfigError if there are fewer blocks.
        """
        if self._changed:
            raise ConfigError(f"{self.config.model_name} is {self._changed}: to train it, load it in fp32")
        blocks = _blocks(self.tower)
        if num_blocks is not None and not 0 <= num_blocks <= len(blocks):
            raise ConfigError(f"cannot unfreeze {num_blocks} blocks: {self.config.model_name} has {len(blocks)}")
        if self.concepts is not None and self.config.concepts is not None:
            own = self.config.concepts.own_blocks
            if num_blocks is None or num_blocks > own:
                raise ConfigError(f"the concepts' classifier needs all but the last {own} blocks as they are")
        self.requires_grad_(num_blocks is None)
        for block in blocks[len(blocks) - num_blocks :] if num_blocks else []:
            block.requires_grad_(True)

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """As `config` has it, also after `fold_batch_norm`. Raises MMGPTError where `prepare` packed the weights."""
        if self._changed:
            raise MMGPTError(f"{self.config.model_name} is {self._changed}: to save it, load it in fp32")
        state = super().state_dict(*args, prefix=prefix, **options)
        if self._unfolded:
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
            state |= {f"{prefix}{name}": tensor for name, tensor in self._unfolded.items()}
        return state

    def prepare(self, dtype: Literal["fp32", "bf16", "int8", "int4"], connector: nn.Module | None = None) -> str | None:
        """Make ready for inference alone on the CPU, where the decoder's weights are stored in `dtype`.

        BatchNorm is folded; in fp32, and in towers of timm and open_clip, nothing else changes. An EfficientNet-Lite's
        convolutions run in bf16, in two thirds of the time, where the processor multiplies in it. A ViT's weights are
        packed for fast products in bf16, or in int8 for int8 and int4; those of a NativeViT and of the linear layers of
        `connector` in bf16. Nothing else keeps them, so that they can neither be saved nor trained any more.
        Returns why the tower stays in fp32, in a few words, if it does against `dtype`.
        """
        if self._changed:
            return None
        self.fold_batch_norm(keep=dtype == "fp32")
        if dtype == "fp32":
            return None
        if isinstance(self._trunk, EfficientNetLite):
            if not torch.cpu._is_avx512_bf16_supported():
                return "the processor has no products in bf16"
            self._changed = "in bf16"
            self.bfloat16()
            return None
        if not isinstance(self.tower, ViT | NativeViT):
            return f"{self.config.model_name} has no products in {dtype}"
        if self.tower.config.width // self.tower.config.num_heads % 2:
            return "the size of its heads is odd"
        # Imported here: numba takes a third of a second
        from mm_gpt.kernels.tiles import missing
        from mm_gpt.vision.bf16 import use_bf16
        from mm_gpt.vision.packed_vit import PackedViT

        if lack := missing():
            return lack
        if isinstance(self.tower, NativeViT):
            self._changed = "packed in bf16"
            use_bf16(self.tower)
        else:
            kind: Literal["bf16", "int8"] = "bf16" if dtype == "bf16" else "int8"
            self._changed = f"packed in {kind}"
            self.tower = PackedViT(self.tower, kind)
        if connector is not None:
            use_bf16(connector)
        return None

    def fold_batch_norm(self, *, keep: bool = True) -> None:
        """Fold BatchNorm into the convolution before it, for inference only: same tokens up to rounding, in less time.

        With `keep` the state dict stays the one before folding, so that the model can be saved; none can be loaded any
        more. Towers that are not an EfficientNet stay as they are.
        """
        if self._unfolded or not (isinstance(self.tower, Trunk) and self.tower.is_efficientnet):
            return
        if keep:
            self._unfolded = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        else:
            self._changed = "folded"
        own = [] if self.concepts is None else list(self.concepts.modules())
        for module in [*self.tower.trunk.modules(), *own]:
            children = list(module.named_children())  # in the order of execution, in every block of an EfficientNet
            for (_, conv), (norm_name, norm) in pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    mean, variance = norm.running_mean, norm.running_var
                    assert mean is not None
                    assert variance is not None
                    conv.weight, conv.bias = fuse_conv_bn_weights(
                        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                    )
                    setattr(module, norm_name, getattr(norm, "act", nn.Identity()))  # timm's norms hold the activation
        self.to(memory_format=torch.channels_last)


def _has_class_token(tower: ViT | NativeViT | Trunk | OpenClipTower) -> bool:
    if isinstance(tower, ViT):
        return tower.config.class_token
    if isinstance(tower, NativeViT):
        return False
    return tower.has_class_token if isinstance(tower, Trunk) else is_transformer(tower)


def _blocks(tower: ViT | NativeViT | Trunk | OpenClipTower) -> list[nn.Module]:
    if isinstance(tower, ViT):
        return list(tower.blocks[: tower.config.depth])
    if isinstance(tower, NativeViT):
        return list(tower.blocks)
    return tower.block_list() if isinstance(tower, Trunk) else open_clip_blocks(tower)
