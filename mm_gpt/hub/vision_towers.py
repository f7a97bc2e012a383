"""Vision towers of public checkpoints: Hugging Face configs and names for the plain ViT, and open_clip's tags.

Hugging Face stores query, key and value as three matrices, the ViT as one. Its CLIP, SigLIP, Kosmos-2, Idefics3 and
SmolVLM towers use one set of names, so one table serves them all; `tower_prefix` finds where a checkpoint keeps them.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mm_gpt.errors import CheckpointError, ConfigError, DownloadError
from mm_gpt.hub.fetching.download import _offline
from mm_gpt.hub.weights import Table, open_safetensors, read_json, same
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

_PATCHES = "embeddings.patch_embedding.weight"

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
# Published configs leave out what has its default value, so the defaults are part of the format.
_DEFAULTS = {
    "clip_vision_model": ((768, 3072, 12, 12, 224, 32), "quick_gelu", 1e-5),
    "kosmos_2_vision_model": ((1024, 4096, 24, 16, 224, 14), "quick_gelu", 1e-5),
    "siglip_vision_model": ((768, 3072, 12, 12, 224, 16), "gelu_pytorch_tanh", 1e-6),
    "idefics3_vision": ((1152, 3072, 12, 16, 224, 32), "gelu_pytorch_tanh", 1e-6),
    "smolvlm_vision": ((1152, 3072, 12, 16, 224, 32), "gelu_pytorch_tanh", 1e-6),
    "internvl_vision": ((1024, 4096, 24, 16, 448, 14), "gelu", 1e-6),
}
# The type of the whole model decides over its tower's: published Idefics3 towers call themselves idefics3_vision,
# idefics3 or even siglip_vision_model, and have the defaults of the first.
_TOWER_OF = {
    "clip": "clip_vision_model",
    "kosmos-2": "kosmos_2_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
}
MAX_SIDE = 1000
"""Patches in a row of an Idefics3 tower; the released ones have 32 at most."""
_CLIP_LIKE = ("clip_vision_model", "kosmos_2_vision_model")
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def vit_config(values: dict[str, Any], *, where: str) -> ViTConfig:
    """The ViT of a Hugging Face `config.json`: a vision config, or a whole model's with its `vision_config` inside.

    Give the whole one where there is one. The tokens are those after the last block and its norm: a model that takes
    others replaces `feature_layer` and `post_norm`. Raises CheckpointError naming `where` and the unsupported key.
    """
    kind = _TOWER_OF.get(values.get("model_type", ""))
    if "vision_config" in values:
        # Where the first CLIP checkpoints hold both, this one counts.
        inner = values.get("vision_config_dict") if kind == "clip_vision_model" else None
        values = (inner if inner is not None else values["vision_config"]) or {}
        where = f"{where}: vision_config"
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be an object, not {values!r}")
    kind = kind or _TOWER_OF.get(values.get("model_type", ""), values.get("model_type"))
    if kind == "siglip2_vision_model":
        raise CheckpointError(
            f"{where}: SigLIP 2 of variable resolution (naflex) is not supported; take a checkpoint of fixed resolution"
        )
    if kind not in _DEFAULTS:
        raise CheckpointError(f"{where}: vision model_type {kind!r} is not one of {', '.join(_DEFAULTS)}")
    sizes, activation, eps = _DEFAULTS[kind]
    given = {key: values.get(key, default) for key, default in zip(_SIZES, sizes, strict=True)}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{where}: {key} must be a whole number, not {value!r}")
    activation, eps = values.get("hidden_act", activation), values.get("layer_norm_eps", eps)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise CheckpointError(f"{where}: layer_norm_eps must be a number, not {eps!r}")
    for key, needed in (("num_channels", 3), ("attention_dropout", 0)):
        if values.get(key, needed) != needed:
            raise CheckpointError(f"{where}: only {key} {needed} is supported, not {values[key]!r}")
    try:
        config = ViTConfig(
            image_size=given["image_size"],
            patch_size=given["patch_size"],
            width=given["hidden_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            mlp_width=given["intermediate_size"],
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            class_token=kind in _CLIP_LIKE,
            pre_norm=kind in _CLIP_LIKE,
            patch_bias=kind not in _CLIP_LIKE,
            norm_eps=float(eps),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    side = config.image_size // config.patch_size
    if kind in ("idefics3_vision", "smolvlm_vision") and (side > MAX_SIDE or not _positions_in_order(side)):
        raise CheckpointError(
            f"{where}: image_size {config.image_size} and patch_size {config.patch_size} are not supported: "
            f"in a grid of {side} x {side} patches, Idefics3 gives some of them the position of their neighbour"
        )
    return config


def _positions_in_order(side: int) -> bool:
    """Whether Idefics3 gives the n-th of `side` patches in a row the n-th position.

    It sorts n · (1 / side) into buckets with the bounds k / side, and in float32 the product may come out below its
    bound: at 19, 25 or 29 patches, though at none of the released sizes (26, 27, 32).
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32)
    places = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side, dtype=torch.float32))
    return torch.equal(torch.bucketize(places, bounds, right=True), torch.arange(side))


def vit_table(prefix: str = "") -> Table:
    """The ViT's parameters in Hugging Face's names."""
    names = {
        "pre_norm": ("pre_layrnorm",),  # their spelling
        "blocks.{i}.attention_norm": ("encoder.layers.{i}.layer_norm1",),
        "blocks.{i}.attention.qkv": tuple(f"encoder.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"),
        "blocks.{i}.attention.out": ("encoder.layers.{i}.self_attn.out_proj",),
        "blocks.{i}.mlp_norm": ("encoder.layers.{i}.layer_norm2",),
        "blocks.{i}.mlp.up": ("encoder.layers.{i}.mlp.fc1",),
        "blocks.{i}.mlp.down": ("encoder.layers.{i}.mlp.fc2",),
        "post_norm": ("post_layernorm",),
    }
    table = {
        "class_token": same(prefix + "embeddings.class_embedding"),
        "patch_embedding.weight": same(prefix + _PATCHES),
        "patch_embedding.bias": same(prefix + "embeddings.patch_embedding.bias"),
        "position_embedding": same(prefix + "embeddings.position_embedding.weight"),
    }
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = same(*(f"{prefix}{name}.{kind}" for name in theirs))
    return table


def vit_left_over(prefix: str = "") -> tuple[str, ...]:
    """Patterns of what patch tokens have no use for inside a tower: a stored arange, and SigLIP's pooling head."""
    return tuple(re.escape(prefix) + pattern for pattern in (r"embeddings\.position_ids", r"head\..*"))


def tower_prefix(names: Iterable[str], *, where: str) -> str:
    """What the names of a checkpoint's one vision tower begin with: "", "vision_model.", "model.vision_model.", ..."""
    found = sorted(name.removesuffix(_PATCHES) for name in names if name.endswith(_PATCHES))
    if len(found) != 1:
        raise CheckpointError(f"{where}: expected one tensor named ...{_PATCHES}, found {len(found)}")
    return found[0]


# ---- open_clip ----

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"
_MODES = {"shortest": "crop", "squash": "squash"}


def load_open_clip(tag: str) -> tuple[VisionEncoder, ImageTransformConfig]:
    """The vision tower of an open_clip model with its weights, in float32 on the CPU, and how its images are prepared.

    `tag` is the model and one of open_clip's pretrained tags, as in "ViT-B-32/laion2b_s34b_b79k", or the model and a
    folder laid out as such a model's hub repository: open_clip_model.safetensors and open_clip_config.json.
    Only safetensors are read. Raises CheckpointError or DownloadError naming the tag or the file.
    """
    import open_clip

    name, _, pretrained = tag.partition("/")
    if pretrained and Path(pretrained).exists():
        path = Path(pretrained) / OPEN_CLIP_WEIGHTS if Path(pretrained).is_dir() else Path(pretrained)
        if name not in open_clip.list_models():
            raise CheckpointError(f"unknown open_clip model {name!r}{_closest(name, open_clip.list_models())}")
        preprocess, quick_gelu = _folder_settings(path.with_name(OPEN_CLIP_CONFIG))
    else:
        preprocess = open_clip.get_pretrained_cfg(name, pretrained)
        if not preprocess:
            known = ["/".join(pair) for pair in open_clip.list_pretrained()]
            raise CheckpointError(f"unknown open_clip tag {tag!r}{_closest(tag, known)}")
        quick_gelu = preprocess.get("quick_gelu")  # None: as the model has it
        path = _download(tag, preprocess.get("hf_hub", ""))
    model = _with_activation(name, quick_gelu)
    size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
    transform = _transform(preprocess, size, tag)
    encoder = VisionEncoder(VisionConfig(model=model, image_size=size))
    _fill_open_clip(encoder, path)
    return encoder.eval(), transform


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def _folder_settings(path: Path) -> tuple[dict[str, Any], bool]:
    """Preprocessing and whether the activation is QuickGELU. Neither can be told from the weights."""
    values = read_json(path)
    model, preprocess = values.get("model_cfg"), values.get("preprocess_cfg")
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise CheckpointError(f"{path}: expected the objects model_cfg and preprocess_cfg")
    return preprocess, bool(model.get("quick_gelu", False))


def _with_activation(name: str, quick_gelu: bool | None) -> str:
    """The model of this name that has the activation that the weights were trained with.

    open_clip only warns when they differ; the tokens are then wrong, and nothing else shows it.
    """
    import open_clip

    if quick_gelu is None or quick_gelu == open_clip.get_model_config(name).get("quick_gelu", False):
        return name
    other = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    if other == name or other not in open_clip.list_models():
        raise CheckpointError(f"open_clip has no {name} {'with' if quick_gelu else 'without'} QuickGELU")
    return other


def _transform(preprocess: dict[str, Any], size: int, where: str) -> ImageTransformConfig:
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in _MODES:
        raise CheckpointError(f"{where}: resize_mode {mode!r} is not one of {', '.join(_MODES)}")
    try:
        return ImageTransformConfig(
            size=size,
            mode=_MODES[mode],  # type: ignore[arg-type]
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            interpolation=preprocess.get("interpolation", "bicubic"),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: the preprocessing lacks {error}") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _download(tag: str, source: str) -> Path:
    """The weights in the hub repository that open_clip names as "owner/name/" or "owner/name/file"."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, file = source.rpartition("/")
    file = f"{file.rpartition('.')[0]}.safetensors" if file else OPEN_CLIP_WEIGHTS
    pickle = f"{tag}: its weights are published as a pickle only, which may run any code; only safetensors are read"
    if not repo:
        raise CheckpointError(pickle)
    try:
        return Path(hf_hub_download(repo, file, local_files_only=_offline()))
    except LocalEntryNotFoundError:
        raise DownloadError(
            f"cannot fetch {file} of {repo} (offline, or the hub is out of reach), and it is not in the cache; "
            f"give the folder of a copy instead: {tag.partition('/')[0]}/FOLDER"
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(f"{pickle} ({repo} has no {file})") from None
    except (OSError, httpx.HTTPError) as error:
        raise DownloadError(f"cannot fetch {file} of {repo}: {str(error).partition(chr(10))[0]}") from None


def _fill_open_clip(encoder: VisionEncoder, path: Path) -> None:
    """Copy the `visual.*` tensors into the tower: all of its own, none else but those of the heads it does without."""
    state = encoder.tower.state_dict()
    with open_safetensors(path) as file:
        stored = {n.removeprefix("visual.") for n in file.keys() if n.startswith("visual.")}  # noqa: SIM118
        if missing := sorted(state.keys() - stored):
            raise CheckpointError(f"{path}: lacks visual.{missing[0]} ({len(missing)} tensors are missing)")
        if unknown := sorted(stored - state.keys() - encoder.left_out):
            model = encoder.config.model_name
            raise CheckpointError(f"{path}: visual.{unknown[0]} is no part of {model} ({len(unknown)} such tensors)")
        for name, target in state.items():
            tensor = file.get_tensor(f"visual.{name}")
            if tensor.shape != target.shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(target.shape)}"
                raise CheckpointError(f"{path}: visual.{name} has shape {shapes}")
            target.copy_(tensor)  # a state dict is detached from autograd, but shares the memory
