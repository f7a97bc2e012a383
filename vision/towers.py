"""The towers besides the plain ViT: EfficientNet-Lite, timm's trunks and open_clip's models, without their heads.

timm and open_clip are imported where one of their models is asked for: together they take three times as long as torch.

Shapes: N images, (H, W) pixels, P patch tokens, D_v the width of the tower.
"""

import difflib
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ConfigError
from mm_gpt.vision.efficientnet import VARIANTS, EfficientNetLite

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer
    from typing_extensions import TypeIs

TIMM_PREFIX = "timm/"
_LITE = re.compile(r"timm/tf_efficientnet_lite(\d)")


class Trunk(nn.Module):
    """A model of timm, or an EfficientNet-Lite of ours, whose features are the patch tokens."""

    def __init__(self, trunk: nn.Module, *, is_efficientnet: bool) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.is_efficientnet = is_efficientnet
        if is_efficientnet:
            # 1.6 times as fast on CPU. Only where it is tested: in torch 2.15, FastViT's backward corrupts memory.
            trunk.to(memory_format=torch.channels_last)

    @property
    def has_class_token(self) -> bool:
        """`num_prefix_tokens` counts registers as well, and some trunks have those alone."""
        registers = getattr(self.trunk, "reg_token", None)
        count = getattr(self.trunk, "num_reg_tokens", None) or (0 if registers is None else registers.shape[1])
        return (getattr(self.trunk, "num_prefix_tokens", None) or 0) > count

    def tokens(self, x: Tensor, *, with_class_token: bool) -> Tensor:
        """(N, 3, H, W) to (N, P, D_v), rows of the image from top to bottom."""
        if self.is_efficientnet:
            x = x.contiguous(memory_format=torch.channels_last)
        features = self.trunk.forward_features(x)
        if features.ndim == 4:
            if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
                return rearrange(features, "n h w c -> n (h w) c")
            return rearrange(features, "n c h w -> n (h w) c")
        if with_class_token:
            return features
        return features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]

    def block_list(self) -> list[nn.Module]:
        """What `VisionEncoder.unfreeze` calls blocks."""
        for name in ("blocks", "stages", "layers"):
            if hasattr(self.trunk, name):
                blocks = list(getattr(self.trunk, name))
                break
        else:
            raise ConfigError(f"{type(self.trunk).__name__} has no list of blocks: unfreeze all of it or nothing")
        if self.is_efficientnet:
            blocks.append(nn.ModuleList([self.trunk.conv_head, self.trunk.bn2]))
        return blocks


OpenClipTower: TypeAlias = Union["VisionTransformer", "ModifiedResNet"]


def check_name(model: str) -> None:
    """Raises ConfigError, with the closest name, where neither timm nor open_clip has such a model."""
    if _lite_variant(model) is not None:
        return
    known: Collection[str]
    if model.startswith(TIMM_PREFIX):
        import timm

        name, known = model.removeprefix(TIMM_PREFIX), timm.list_models()
    else:
        import open_clip

        name, known = model, open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown vision model {model!r}{hint}")


def build_tower(model: str, image_size: int) -> tuple[Trunk | OpenClipTower, frozenset[str]]:
    """The tower of that name without its heads, and the names of the weights that the heads had."""
    if (variant := _lite_variant(model)) is not None:
        return Trunk(EfficientNetLite(variant), is_efficientnet=True), frozenset()
    if model.startswith(TIMM_PREFIX):
        import timm

        trunk = timm.create_model(model.removeprefix(TIMM_PREFIX), num_classes=0, global_pool="")
        whole = {f"trunk.{name}" for name in trunk.state_dict()}
        return _left_of(_timm_trunk(trunk, image_size), whole)
    import open_clip
    from open_clip.model import _build_vision_tower
    from open_clip.timm_model import TimmModel

    # Only the vision half of the model: its text tower would double the memory, and some fetch a hub tokenizer.
    config = open_clip.get_model_config(model)
    vision = config["vision_cfg"] | {"image_size": image_size, "timm_model_pretrained": False}
    tower = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    whole = set(tower.state_dict())
    if isinstance(tower, TimmModel):
        return _left_of(_timm_trunk(tower.trunk, image_size), whole)
    if is_transformer(tower):
        tower.proj = None
        if tower.attn_pool is not None:
            # CoCa: ln_post follows the pooling and has its width, so patch tokens come straight from the last block.
            tower.attn_pool = tower.attn_pool_contrastive = None
            tower.ln_post = nn.Identity()
    else:
        tower.attnpool = nn.Identity()
    return _left_of(tower, whole)


def is_transformer(tower: OpenClipTower) -> "TypeIs[VisionTransformer]":
    """Of open_clip's two kinds; the other is its ResNet."""
    from open_clip.transformer import VisionTransformer

    return isinstance(tower, VisionTransformer)


def open_clip_tokens(tower: OpenClipTower, x: Tensor, *, with_class_token: bool) -> Tensor:
    """(N, 3, H, W) to (N, P, D_v), rows of the image from top to bottom."""
    if not is_transformer(tower):
        output = tower.forward_intermediates(x, indices=1, intermediates_only=True)
        return rearrange(output["image_intermediates"][-1], "n c h w -> n (h w) c")
    output = tower.forward_intermediates(
        x,
        indices=1,  # the last block
        intermediates_only=True,
        normalize_intermediates=True,  # ln_post
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches = output["image_intermediates"][-1]
    return torch.cat([output["image_intermediates_prefix"][-1], patches], dim=1) if with_class_token else patches


def open_clip_blocks(tower: OpenClipTower) -> list[nn.Module]:
    if is_transformer(tower):
        return list(tower.transformer.resblocks)
    return [tower.layer1, tower.layer2, tower.layer3, tower.layer4]


def _lite_variant(model: str) -> int | None:
    match = _LITE.fullmatch(model)
    return int(match[1]) if match and int(match[1]) in VARIANTS else None


def _timm_trunk(trunk: Any, image_size: int) -> Trunk:
    from timm.models.efficientnet import EfficientNet

    trunk.reset_classifier(0, "")
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(image_size)
    if hasattr(trunk, "head"):  # ConvNeXt keeps a norm there that only pooled features pass
        trunk.head = nn.Identity()
    return Trunk(trunk, is_efficientnet=isinstance(trunk, EfficientNet))


def _left_of(tower: Any, whole: set[str]) -> tuple[Any, frozenset[str]]:
    return tower, frozenset(whole - set(tower.state_dict()))
