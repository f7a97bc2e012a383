"""EfficientNet-Lite 0 to 4 (Tan & Le 2019, arXiv 1905.11946): the default model's trunk, and its ImageNet weights.

The Lite variants have no squeeze-excite and use ReLU6; the first stage, the last one, stem and head do not grow with
the variant. Parameters are called as timm calls those of `tf_efficientnet_lite0` and so on, and the numbers are timm's:
it is here because importing timm takes longer than importing torch.

Shapes: N images, (H, W) pixels.
"""

import copy
import math
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_gpt.errors import CheckpointError

VARIANTS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
"""How many times as wide and as deep as the first."""
STEM_WIDTH, HEAD_WIDTH = 32, 1280
STRIDE = 32
"""Pixels of a side that become one of the feature map, rounded up."""
# Blocks, kernel size, stride and width of each stage of Lite0.
_STAGES = ((1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320))
_EXPANSION = 6
_NORM_EPS = 1e-3  # TensorFlow's, with which the weights were trained


class EfficientNetLite(nn.Module):
    """Images (N, 3, H, W) to a feature map (N, 1280, H / 32, W / 32), sides rounded up. No pooling, no classifier."""

    num_features = HEAD_WIDTH

    def __init__(self, variant: int) -> None:
        super().__init__()
        widen, deepen = VARIANTS[variant]
        self.conv_stem, self.bn1 = _conv(3, STEM_WIDTH, 3, stride=2), _norm(STEM_WIDTH)
        before, stages = STEM_WIDTH, []
        for number, (repeats, kernel, stride, width) in enumerate(_STAGES):
            is_fixed = number in (0, len(_STAGES) - 1)
            width, blocks = _rounded(width * widen), list[nn.Module]()
            for i in range(repeats if is_fixed else math.ceil(repeats * deepen)):
                block = _SeparableBlock if number == 0 else _InvertedBlock
                blocks.append(block(before, width, kernel, stride if i == 0 else 1))
                before = width
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = _conv(before, HEAD_WIDTH, 1), _norm(HEAD_WIDTH)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.after(self.before(x, 1), 1)

    def before(self, x: Tensor, last: int) -> Tensor:
        """What the `last` blocks are given, of which the head convolution is one: (N, C, h, w)."""
        x = F.relu6(self.bn1(self.conv_stem(x)), inplace=True)
        return self.blocks[: len(self.blocks) + 1 - last](x)

    def named_before(self, last: int) -> list[tuple[str, Tensor]]:
        """The weights that `before` uses, all of them for 0."""
        own = [f"blocks.{n}." for n in range(len(self.blocks) + 1 - last, len(self.blocks))]
        own += ["conv_head.", "bn2."] if last else []
        return [(name, tensor) for name, tensor in self.state_dict().items() if not name.startswith(tuple(own))]

    def after(self, x: Tensor, last: int) -> Tensor:
        """The feature map, from what `before` gives."""
        x = self.blocks[len(self.blocks) + 1 - last :](x)
        return F.relu6(self.bn2(self.conv_head(x)), inplace=True)


class LastBlocks(nn.Module):
    """The `last` blocks of a trunk once more, with weights of their own: from what they are given to a feature map."""

    def __init__(self, trunk: EfficientNetLite, last: int) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(trunk.blocks[len(trunk.blocks) + 1 - last :])
        self.conv_head, self.bn2 = copy.deepcopy(trunk.conv_head), copy.deepcopy(trunk.bn2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn2(self.conv_head(self.blocks(x))), inplace=True)


class _SeparableBlock(nn.Module):
    """A depthwise convolution, and one of single pixels."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = _conv(width_in, width_in, kernel, stride=stride, groups=width_in), _norm(width_in)
        self.conv_pw, self.bn2 = _conv(width_in, width_out, 1), _norm(width_out)
        self.is_residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_dw(x)), inplace=True)
        y = self.bn2(self.conv_pw(y))
        return y + x if self.is_residual else y


class _InvertedBlock(nn.Module):
    """Wide in the middle (MobileNet v2; Sandler et al. 2018, arXiv 1801.04381): the depthwise convolution is there."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = _EXPANSION * width_in
        self.conv_pw, self.bn1 = _conv(width_in, wide, 1), _norm(wide)
        self.conv_dw, self.bn2 = _conv(wide, wide, kernel, stride=stride, groups=wide), _norm(wide)
        self.conv_pwl, self.bn3 = _conv(wide, width_out, 1), _norm(width_out)
        self.is_residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_pw(x)), inplace=True)
        y = F.relu6(self.bn2(self.conv_dw(y)), inplace=True)
        y = self.bn3(self.conv_pwl(y))
        return y + x if self.is_residual else y


class _SameConv(nn.Conv2d):
    """Pads as TensorFlow does where the stride is above 1: the output has side / stride pixels, rounded up, and what
    does not divide by two goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _conv(width_in: int, width_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    options = {"stride": stride, "groups": groups, "bias": False}
    if stride == 1:
        conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]
    else:
        conv = _SameConv(width_in, width_out, kernel, **options)  # type: ignore[arg-type]
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel**2 * width_out // groups)))  # He et al. 2015, 1502.01852
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=_NORM_EPS)


def _rounded(width: float) -> int:
    """The nearest multiple of 8 that is no more than a tenth less."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


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

    `EfficientNetLite`, the trunk of "timm/tf_efficientnet_lite2", loads them with strict=True; `with_classifier` keeps
    the 1000-way head for `timm.create_model("tf_efficientnet_lite2")`. Read with `weights_only`: no code runs.
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
