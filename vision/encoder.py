"""Vision encoders: our plain ViT or any open_clip tower (ViT, ResNet, a timm trunk) as a source of patch tokens.

Shapes: N images, (H, W) pixels, P patch tokens, D_v the width of the tower.

Weights are never downloaded here: a tower is built with random ones and a state dict is loaded into it. The default
trunk is EfficientNet-Lite2 (Tan & Le 2019, arXiv 1905.11946; the Lite variants have no squeeze-excite and use ReLU6),
whose ImageNet weights `load_efficientnet_lite` reads.
"""

import difflib
import pickle
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import open_clip
import timm
import torch
from einops import rearrange
from open_clip.model import _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.vision.transforms import MAX_SIZE
from mm_gpt.vision.vit import ViT, ViTConfig

TIMM_PREFIX = "timm/"

Tower: TypeAlias = ViT | TimmModel | VisionTransformer | ModifiedResNet


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    model: str | ViTConfig
    """An open_clip model ("ViT-B-32", "RN50", "ViT-B-16-SigLIP", ...), "timm/" and the name of a timm trunk, or a
    complete config of the plain ViT, as the towers of Hugging Face checkpoints have it."""
    image_size: int
    """Height and width of the images, in pixels."""
    include_class_token: bool = False
    """Put the class token (and the registers, where there are some) before the patches, as KOSMOS-2 does. ViT only."""
    l2_normalize: bool = False
    """Divide each token by its L2 norm, as KOSMOS-2 does."""
    train_batch_norm: bool = False
    """Let BatchNorm use and update batch statistics in training. Off, a token never depends on the other images of
    the batch and pretrained statistics survive; on is for training a convolutional trunk from scratch."""

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= MAX_SIZE:
            raise ConfigError(f"image_size must be 1 to {MAX_SIZE}, not {self.image_size}")
        if isinstance(self.model, ViTConfig):
            if self.model.image_size != self.image_size:
                raise ConfigError(f"image_size is {self.image_size}, but that of model is {self.model.image_size}")
            return
        if self.model.startswith(TIMM_PREFIX):
            name, known = self.model.removeprefix(TIMM_PREFIX), timm.list_models()
        else:
            name, known = self.model, open_clip.list_models()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown vision model {self.model!r}{hint}")

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
        """The tower's weights before BatchNorm was folded, if it was."""
        self._packed: str | None = None
        """What the tower's weights are packed in, if they are."""
        self.tower, self.left_out = _build_tower(config)
        self.eval()
        self.num_patches, self.width = self._output_shape()
        self.train()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) to patch tokens (N, P, D_v), rows of the image from top to bottom.

        H = W = `config.image_size`; anything else raises ValueError, for P is fixed.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"expected pixel_values (N, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if isinstance(self.tower, ViT):
            tokens = self.tower(pixel_values)
            if self.tower.config.class_token and not self.config.include_class_token:
                tokens = tokens[:, 1:]
        elif isinstance(self.tower, TimmModel):
            tokens = self._timm_tokens(self.tower.trunk, pixel_values)
        elif isinstance(self.tower, VisionTransformer):
            tokens = self._vit_tokens(self.tower, pixel_values)
        else:
            output = self.tower.forward_intermediates(pixel_values, indices=1, intermediates_only=True)
            tokens = rearrange(output["image_intermediates"][-1], "n c h w -> n (h w) c")
        return F.normalize(tokens, dim=-1) if self.config.l2_normalize else tokens

    def _vit_tokens(self, tower: VisionTransformer, x: Tensor) -> Tensor:
        output = tower.forward_intermediates(
            x,
            indices=1,  # the last block
            intermediates_only=True,
            normalize_intermediates=True,  # ln_post
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches = output["image_intermediates"][-1]
        if not self.config.include_class_token:
            return patches
        return torch.cat([output["image_intermediates_prefix"][-1], patches], dim=1)

    def _timm_tokens(self, trunk: Any, x: Tensor) -> Tensor:
        if isinstance(trunk, EfficientNet):
            x = x.contiguous(memory_format=torch.channels_last)
        features = trunk.forward_features(x)
        if features.ndim == 4:
            if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
                return rearrange(features, "n h w c -> n (h w) c")
            return rearrange(features, "n c h w -> n (h w) c")
        if self.config.include_class_token:
            return features
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :]

    def _output_shape(self) -> tuple[int, int]:
        """(P, D_v): a ViT of ours knows, of the others a forward pass on the meta device tells."""
        if self.config.include_class_token and not _has_class_token(self.tower):
            raise ConfigError(f"{self.config.model_name} has no class token: include_class_token must be false")
        if isinstance(self.tower, ViT):
            return self.tower.config.num_patches + self.config.include_class_token, self.tower.config.width
        size = self.config.image_size
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
        if self._packed:
            raise ConfigError(f"{self.config.model_name} is packed in {self._packed}: to train it, load it in fp32")
        blocks = _blocks(self.tower)
        if num_blocks is not None and not 0 <= num_blocks <= len(blocks):
            raise ConfigError(f"cannot unfreeze {num_blocks} blocks: {self.config.model_name} has {len(blocks)}")
        self.requires_grad_(num_blocks is None)
        for block in blocks[len(blocks) - num_blocks :] if num_blocks else []:
            block.requires_grad_(True)

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """As `config` has it, also after `fold_batch_norm`. Raises MMGPTError where `prepare` has packed the weights."""
        if self._packed:
            raise MMGPTError(f"{self.config.model_name} is packed in {self._packed}: to save it, load it in fp32")
        state = super().state_dict(*args, prefix=prefix, **options)
        if self._unfolded:
            for name in [name for name in state if name.startswith(f"{prefix}tower.")]:
                del state[name]
            state |= {f"{prefix}tower.{name}": tensor for name, tensor in self._unfolded.items()}
        return state

    def prepare(self, dtype: Literal["fp32", "bf16", "int8", "int4"]) -> str | None:
        """Make ready for inference alone on the CPU, where the decoder's weights are stored in `dtype`.

        In fp32, and in all towers but the plain ViT, BatchNorm is folded and nothing else changes. A ViT's weights are
        packed for fast products in bf16, or in int8 for int8 and int4; nothing else keeps them, so that it can neither
        be saved nor trained any more. Returns why the tower stays in fp32, in a few words, if it does against `dtype`.
        """
        self.fold_batch_norm()
        if dtype == "fp32" or self._packed:
            return None
        if not isinstance(self.tower, ViT):
            return f"{self.config.model_name} has no products in {dtype}"
        # Imported here: numba takes a third of a second
        from mm_gpt.kernels.tiles import missing
        from mm_gpt.vision.packed_vit import PackedViT

        if lack := missing():
            return lack
        self._packed = "bf16" if dtype == "bf16" else "int8"
        self.tower = PackedViT(self.tower, self._packed)
        return None

    def fold_batch_norm(self) -> None:
        """Fold BatchNorm into the convolution before it, for inference only: same tokens up to rounding, in less time.

        The state dict stays the one before folding, so that the model can be saved; none can be loaded any more. Towers
        that are not an EfficientNet stay as they are.
        """
        if self._unfolded or not (isinstance(self.tower, TimmModel) and isinstance(self.tower.trunk, EfficientNet)):
            return
        self._unfolded = {name: tensor.clone() for name, tensor in self.tower.state_dict().items()}
        for module in list(self.tower.trunk.modules()):
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
        self.tower.trunk.to(memory_format=torch.channels_last)


def _build_tower(config: VisionConfig) -> tuple[Tower, frozenset[str]]:
    """The tower without its heads, and the names of the weights that the heads had."""
    if isinstance(config.model, ViTConfig):
        return ViT(config.model), frozenset()
    if config.model.startswith(TIMM_PREFIX):
        tower = TimmModel(config.model.removeprefix(TIMM_PREFIX), 0, config.image_size, pool="", proj="none")
    else:
        # Only the vision half of the model: its text tower would double the memory, and some fetch a hub tokenizer.
        model_config = open_clip.get_model_config(config.model)
        vision = model_config["vision_cfg"] | {"image_size": config.image_size, "timm_model_pretrained": False}
        tower = _build_vision_tower(model_config["embed_dim"], vision, model_config.get("quick_gelu", False))
    whole = set(tower.state_dict())
    _remove_heads(tower, config.image_size)
    return tower, frozenset(whole - set(tower.state_dict()))


def _remove_heads(tower: TimmModel | VisionTransformer | ModifiedResNet, image_size: int) -> None:
    if isinstance(tower, TimmModel):
        tower.head = nn.Identity()
        tower.trunk.reset_classifier(0, "")
        if hasattr(tower.trunk, "set_input_size"):
            tower.set_input_size(image_size)
        if hasattr(tower.trunk, "head"):  # ConvNeXt keeps a norm there that only pooled features pass
            tower.trunk.head = nn.Identity()
        if isinstance(tower.trunk, EfficientNet):
            # 1.6 times as fast on CPU. Only where it is tested: in torch 2.15, FastViT's backward corrupts memory.
            tower.trunk.to(memory_format=torch.channels_last)
    elif isinstance(tower, VisionTransformer):
        tower.proj = None
        if tower.attn_pool is not None:
            # CoCa: ln_post follows the pooling and has its width, so patch tokens come straight from the last block.
            tower.attn_pool = tower.attn_pool_contrastive = None
            tower.ln_post = nn.Identity()
    else:
        tower.attnpool = nn.Identity()


def _has_class_token(tower: Tower) -> bool:
    if isinstance(tower, ViT):
        return tower.config.class_token
    if isinstance(tower, TimmModel):
        # `num_prefix_tokens` counts registers as well, and some trunks have those alone
        trunk: Any = tower.trunk
        registers = getattr(trunk, "reg_token", None)
        count = getattr(trunk, "num_reg_tokens", None) or (0 if registers is None else registers.shape[1])
        return (getattr(trunk, "num_prefix_tokens", None) or 0) > count
    return isinstance(tower, VisionTransformer)


def _blocks(tower: Tower) -> list[nn.Module]:
    if isinstance(tower, ViT):
        return list(tower.blocks[: tower.config.depth])
    if isinstance(tower, VisionTransformer):
        return list(tower.transformer.resblocks)
    if isinstance(tower, ModifiedResNet):
        return [tower.layer1, tower.layer2, tower.layer3, tower.layer4]
    trunk: Any = tower.trunk
    for name in ("blocks", "stages", "layers"):
        if hasattr(trunk, name):
            blocks = list(getattr(trunk, name))
            break
    else:
        raise ConfigError(f"{type(trunk).__name__} has no list of blocks: unfreeze all of it or nothing")
    if isinstance(trunk, EfficientNet):
        blocks.append(nn.ModuleList([trunk.conv_head, trunk.bn2]))
    return blocks


# Blocks of each stage by the total number of blocks. The Lite models never repeat the first and the last stage.
_LITE_STAGES = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}
_LITE_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def rename_efficientnet_lite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite weights in the names of the first PyTorch port, to the names of timm's tf_efficientnet_lite*.

    Every key is translated or CheckpointError names it. The classifier (`classifier.*`) is included.
    """
    indices = {int(match[1]) for key in state if (match := re.match(r"_blocks\.(\d+)\.", key))}
    stages = _LITE_STAGES.get(len(indices))
    if stages is None or indices != set(range(len(indices))):
        raise CheckpointError(f"not an EfficientNet-Lite0/1/2: {len(indices)} blocks, expected 16 or 21")
    place = [f"blocks.{stage}.{i}" for stage, num in enumerate(stages) for i in range(num)]
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            table = _LITE_FIRST_BLOCK if parts[1] == "0" else _LITE_BLOCK
            prefix, module, rest = place[int(parts[1])] + ".", parts[2], parts[3:]
        else:
            table, prefix, module, rest = _LITE_TOP, "", parts[0], parts[1:]
        if module not in table or len(rest) != 1:
            raise CheckpointError(f"unexpected key {key!r} in EfficientNet-Lite weights")
        renamed[f"{prefix}{table[module]}.{rest[0]}"] = value
    return renamed


def load_efficientnet_lite(path: str | Path, *, with_classifier: bool = False) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0/1/2 from a .pth file, in timm's names.

    `VisionEncoder.tower.trunk` ("timm/tf_efficientnet_lite2") loads them with strict=True; `with_classifier` keeps the
    1000-way head for `timm.create_model("tf_efficientnet_lite2")`. Read with `weights_only`: no code runs.
    Pixels are normalised with mean = std = 0.5. Raises CheckpointError naming the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path}: cannot read weights ({reason})") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{path}: not a state dict of tensors")
    try:
        renamed = rename_efficientnet_lite(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if with_classifier:
        return renamed
    return {key: value for key, value in renamed.items() if not key.startswith("classifier.")}
