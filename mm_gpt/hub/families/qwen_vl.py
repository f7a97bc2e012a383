"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense), images only (arXiv:2409.12191, 2502.13923, 2511.21631).

A tower that takes images of any size, whose 2 x 2 patches become one token; Qwen2 or Qwen3, where image tokens have the
positions of their rows and columns. Qwen2.5-VL looks through windows; Qwen3-VL adds features of early layers of the
tower behind the first layers of the decoder.
"""

import math
from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.decoders import decoder_config, decoder_table, settle_tying, tied_left_over
from mm_gpt.hub.families import Import, read_images, read_template
from mm_gpt.hub.weights import Checkpoint, Table, read_json, same
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.native_vit import NativeViTConfig

IMAGE_TOKEN = "<|image_pad|>"
# What the tower's class takes where the file is silent.
_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4},
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_size": 3584,
        "out_hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "qwen3_vl": {
        "depth": 27,
        "hidden_size": 1152,
        "out_hidden_size": 3584,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
_COMMON = {"num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where, kind = f"{folder}/config.json", str(values["model_type"])
    checkpoint = Checkpoint(folder)
    new = any(name.startswith("model.visual.") for name in checkpoint.names)
    language, visual = ("model.language_model.", "model.visual.") if new else ("model.", "visual.")
    text = _text(kind, values)
    decoder = decoder_config(text, f"{where}: text_config" if values.get("text_config") else where)
    table = decoder_table(text["model_type"], prefix=language)
    decoder, table = settle_tying(decoder, table, checkpoint)
    vision = values.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{where}: no vision_config")
    tower, out_width = _tower(kind, vision, f"{where}: vision_config")
    if out_width != decoder.width:
        raise CheckpointError(f"{where}: the tower gives vectors of {out_width}, the decoder takes {decoder.width}")
    image, tiling = read_images(folder)
    if tiling is None or tiling.kind != "native":
        raise CheckpointError(f"{folder}: the image processor is not that of model type {kind!r}")
    _check_patches(folder, tower)
    if image.size != tower.image_size:
        raise CheckpointError(f"{where}: the model sees cells of {tower.image_size} pixels, not {image.size}")
    token_id, found = values.get("image_token_id", 151_655), tokenizer.special.get(IMAGE_TOKEN)
    if found != token_id:
        raise CheckpointError(f"{where}: image_token_id is {token_id}, but the tokenizer's {IMAGE_TOKEN} is {found}")
    template = read_template(folder, tokenizer)
    if template is None:
        raise CheckpointError(f"{folder}: no chat template (chat_template.jinja, chat_template.json)")
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size),
            connector=ConnectorConfig(kind="merger", norm=tower.norm, deepstack=len(tower.deepstack)),
            image_token_id=token_id,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=1,
            max_length=decoder.max_length,
            tiling=tiling,
            image_text=ImageTextConfig(token=IMAGE_TOKEN, kind="rows"),
            mrope=True,
            begin_of_text=True,
        ),
        tables={
            "decoder": table,
            "vision.tower": tower_table(kind, visual),
            "connector": merger_table(kind, visual),
        },
        template=template,
        left_over=tied_left_over(decoder),
    )


def _text(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The text half, which published files of Qwen2-VL and Qwen2.5-VL have between the keys of the whole."""
    whole = ("vision_config", "architectures", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    text = values.get("text_config") or {key: value for key, value in values.items() if key not in whole}
    tied = values.get("tie_word_embeddings", False) or (kind != "qwen3_vl" and text.get("tie_word_embeddings", False))
    return {**text, "model_type": f"{kind}_text", "tie_word_embeddings": tied}


def _tower(kind: str, values: dict[str, Any], where: str) -> tuple[NativeViTConfig, int]:
    """The tower, and the width of its tokens."""
    full = _checked(kind, values, where)
    width, patch, merge = full["embed_dim" if kind == "qwen2_vl" else "hidden_size"], full["patch_size"], full["merge"]
    side = math.isqrt(full.get("num_position_embeddings", 0))
    if side**2 != full.get("num_position_embeddings", 0):
        raise CheckpointError(f"{where}: num_position_embeddings {full['num_position_embeddings']} is not a square")
    window = full.get("window_size", 0)
    if kind == "qwen2_5_vl" and window < patch * merge:
        raise CheckpointError(f"{where}: window_size {window} is less than a cell of {patch * merge} pixels")
    tower = NativeViTConfig(
        patch_size=patch,
        merge=merge,
        width=width,
        num_layers=full["depth"],
        num_heads=full["num_heads"],
        mlp_width=full["mlp_ratio"] * width if kind == "qwen2_vl" else full["intermediate_size"],
        activation=_ACTIVATIONS[full["hidden_act"]],  # type: ignore[arg-type]
        gated_mlp=kind == "qwen2_5_vl",
        norm="rms" if kind == "qwen2_5_vl" else "layer",
        patch_bias=kind == "qwen3_vl",
        frames=full["temporal_patch_size"],
        position_side=side,
        window=window // merge // patch if window else 0,
        full_layers=tuple(full.get("fullatt_block_indexes", ())),
        deepstack=tuple(full.get("deepstack_visual_indexes", ())),
    )
    return tower, full["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"]


def _checked(kind: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a tower, those that the file leaves out as well. Raises CheckpointError naming the wrong one."""
    known = _COMMON | _TOWERS[kind]
    full = known | values
    for key, needed in (("in_chans", 3), ("in_channels", 3), ("spatial_patch_size", full["patch_size"])):
        if values.get(key, needed) != needed:
            raise CheckpointError(f"{where}: only {key} {needed} is supported, not {values[key]!r}")
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default") or rope.get("rope_theta", 10_000) != 10_000:
        raise CheckpointError(f"{where}: rope_parameters {rope!r} are not supported, only axial with theta 10000")
    for key, default in known.items():
        value = full[key]
        if isinstance(default, str):
            if value not in _ACTIVATIONS:
                raise CheckpointError(f"{where}: {key}: {unknown_name('activation', str(value), _ACTIVATIONS)}")
        elif isinstance(default, list):
            if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
                raise CheckpointError(f"{where}: {key} {value!r} is not a list of whole numbers")
        elif type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {key} {value!r} is not a whole number above 0")
    return full | {"merge": full["spatial_merge_size"]}


def _check_patches(folder: Path, tower: NativeViTConfig) -> None:
    """The processor's cells are as large as the model's; they must be made of the same patches."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        values = read_json(folder / name) if (folder / name).exists() else {}
        values = values.get("image_processor") or values
        for key, needed in (
            ("patch_size", tower.patch_size),
            ("merge_size", tower.merge),
            ("temporal_patch_size", tower.frames),
        ):
            if values.get(key, needed) != needed:
                raise CheckpointError(f"{folder / name}: {key} is {values[key]!r}, but the model has {needed}")


def tower_table(kind: str, prefix: str) -> Table:
    """The tower's parameters in the names of a model type."""
    block = prefix + "blocks.{i}."
    mlps: dict[str, dict[str, tuple[str, ...]]] = {
        "qwen2_vl": {"up": ("fc1",), "down": ("fc2",)},
        "qwen2_5_vl": {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)},
        "qwen3_vl": {"up": ("linear_fc1",), "down": ("linear_fc2",)},
    }
    names: dict[str, tuple[str, ...]] = {
        "patch_embedding": (prefix + "patch_embed.proj",),
        "blocks.{i}.attention_norm": (block + "norm1",),
        "blocks.{i}.attention.qkv": (block + "attn.qkv",),
        "blocks.{i}.attention.out": (block + "attn.proj",),
        "blocks.{i}.mlp_norm": (block + "norm2",),
        **{
            f"blocks.{{i}}.mlp.{ours}": tuple(f"{block}mlp.{part}" for part in theirs)
            for ours, theirs in mlps[kind].items()
        },
    }
    table = {
        f"{ours}.{part}": same(*(f"{name}.{part}" for name in theirs))
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }
    return table | {"position_embedding": same(prefix + "pos_embed.weight")}


def merger_table(kind: str, prefix: str) -> Table:
    """The connector's parameters in the names of a model type."""
    names = {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"}
    if kind == "qwen3_vl":
        names = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
    return {
        f"{ours_in}{ours}.{part}": same(f"{prefix}{theirs_in}{theirs}.{part}")
        for ours_in, theirs_in in (("", "merger."), ("deepstack.{i}.", "deepstack_merger_list.{i}."))
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }
