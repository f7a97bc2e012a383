"""InternVL 2.5 to 3.5 as transformers has them (the repositories ending in -hf), images only (arXiv:2404.16821).

An InternViT of 300M or 6B, whose blocks scale what they add; squares of 2 x 2 patches side by side, a norm and two
linear layers; Qwen2, Qwen3 or Llama. An image is cut into the grid of tiles that comes closest to its shape.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.decoders import decoder_config, decoder_table, settle_tying, tied_left_over
from mm_gpt.hub.families import Import, read_images, read_template
from mm_gpt.hub.vision_towers import vit_config
from mm_gpt.hub.weights import Checkpoint, Origin, Table, read_json, same
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.vit import ViTConfig

IMAGE_TOKEN = "<IMG_CONTEXT>"
_MUST_BE: dict[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    for key in ("text_config", "vision_config"):
        if not isinstance(values.get(key), dict):
            raise CheckpointError(f"{where}: no {key}; of InternVL, only the repositories ending in -hf are read")
    for key, needed in _MUST_BE.items():
        if values.get(key, needed) != needed:
            raise CheckpointError(f"{where}: {key} {values[key]!r} is not supported, only {needed!r}")
    checkpoint = Checkpoint(folder)
    new = any(name.startswith("model.") for name in checkpoint.names)  # as transformers 5 names them in memory
    top, language = ("model.", "model.language_model.") if new else ("", "language_model.model.")
    head = "lm_head.weight" if new else "language_model.lm_head.weight"
    text = {"model_type": "qwen2"} | values["text_config"]
    # The whole model's key decides, and is true where it is not written, whatever the text half says
    text["tie_word_embeddings"] = values.get("tie_word_embeddings", True)
    decoder = _decoder(text, f"{where}: text_config")
    decoder, table = settle_tying(decoder, decoder_table(text["model_type"], prefix=language, head=head), checkpoint)
    tower = _tower(values["vision_config"], f"{where}: vision_config")
    image, tiling = read_images(folder)
    if tiling is None or tiling.kind != "internvl":
        raise CheckpointError(f"{folder}: the image processor is not that of model type 'internvl'")
    if image.size != tower.image_size:
        raise CheckpointError(f"{where}: the model sees {tower.image_size} pixels, but tiles have {image.size}")
    scale = _scale(values.get("downsample_ratio", 0.5), tower, where)
    tokens = tower.num_patches // scale**2
    path = folder / "processor_config.json"
    given = read_json(path).get("image_seq_length", 256) if path.exists() else tokens
    if given != tokens:
        raise CheckpointError(f"{path}: image_seq_length is {given!r}, but the model makes {tokens} tokens of a tile")
    token_id, found = values.get("image_token_id", 151_667), tokenizer.special.get(IMAGE_TOKEN)
    if found != token_id:
        raise CheckpointError(f"{where}: image_token_id is {token_id}, but the tokenizer's {IMAGE_TOKEN} is {found}")
    template = read_template(folder, tokenizer)
    if template is None:
        raise CheckpointError(f"{folder}: no chat template (chat_template.jinja, chat_template.json)")
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size),
            connector=ConnectorConfig(kind="pixel_shuffle_mlp", scale=scale),
            image_token_id=token_id,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tokens,
            max_length=decoder.max_length,
            tiling=tiling,
            image_text=ImageTextConfig(token=IMAGE_TOKEN, before="<img>", after="</img>"),
            begin_of_text=True,
        ),
        tables={
            "decoder": table,
            "vision.tower": _tower_table(f"{top}vision_tower."),
            "connector": {
                f"{ours}.{part}": same(f"{top}multi_modal_projector.{theirs}.{part}")
                for ours, theirs in (("norm", "layer_norm"), ("projection", "linear_1"), ("fc2", "linear_2"))
                for part in ("weight", "bias")
            },
        },
        template=template,
        left_over=(*tied_left_over(decoder, head), r".*vision_tower\.embeddings\.mask_token"),
    )


def _decoder(values: dict[str, Any], where: str) -> DecoderConfig:
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
            # It changes nothing up to max_position_embeddings, where our context ends
            values = values | {key: rope | {"rope_type": "default"}}
    return decoder_config(values, where)


def _tower(values: dict[str, Any], where: str) -> ViTConfig:
    values = values | {"model_type": "internvl_vision"}
    for key in ("image_size", "patch_size"):
        sides = values.get(key)
        if isinstance(sides, list):
            if len(sides) != 2 or sides[0] != sides[1]:
                raise CheckpointError(f"{where}: {key} {sides!r} is not supported, only squares")
            values[key] = sides[0]
    if values.get("use_absolute_position_embeddings", True) is not True:
        raise CheckpointError(f"{where}: use_absolute_position_embeddings must be true")
    norm = values.get("norm_type", "layer_norm")
    if norm not in _NORMS:
        raise CheckpointError(f"{where}: norm_type {norm!r} is not one of {', '.join(_NORMS)}")
    return dataclasses.replace(
        vit_config(values, where=where),
        class_token=True,
        norm=_NORMS[norm],  # type: ignore[arg-type]
        qkv_bias=bool(values.get("attention_bias", False)),
        qk_norm=bool(values.get("use_qk_norm", False)),
        layer_scale=True,
        last_norm=not values.get("use_mean_pooling", True),
    )


def _scale(ratio: object, tower: ViTConfig, where: str) -> int:
    """How many patches a side go into one token."""
    side = tower.image_size // tower.patch_size
    scale = 1 / ratio if isinstance(ratio, int | float) and ratio > 0 else 0.5
    if not scale.is_integer() or side % scale:
        raise CheckpointError(f"{where}: downsample_ratio {ratio!r} does not fit the {side} patches of a side")
    return int(scale)


def _tower_table(prefix: str) -> Table:
    layer = "encoder.layer.{i}."
    names = {
        "patch_embedding": ("embeddings.patch_embeddings.projection",),
        "blocks.{i}.attention_norm": (layer + "layernorm_before",),
        "blocks.{i}.attention.qkv": tuple(f"{layer}attention.{part}_proj" for part in "qkv"),
        "blocks.{i}.attention.q_norm": (layer + "attention.q_norm",),
        "blocks.{i}.attention.k_norm": (layer + "attention.k_norm",),
        "blocks.{i}.attention.out": (layer + "attention.projection_layer",),
        "blocks.{i}.mlp_norm": (layer + "layernorm_after",),
        "blocks.{i}.mlp.up": (layer + "mlp.fc1",),
        "blocks.{i}.mlp.down": (layer + "mlp.fc2",),
        "post_norm": ("layernorm",),
    }
    table = {
        "class_token": Origin((prefix + "embeddings.cls_token",), lambda t: t[0, 0], lambda t: t[None, None]),
        "position_embedding": Origin((prefix + "embeddings.position_embeddings",), lambda t: t[0], lambda t: t[None]),
        "blocks.{i}.attention_scale.factors": same(f"{prefix}{layer}lambda_1"),
        "blocks.{i}.mlp_scale.factors": same(f"{prefix}{layer}lambda_2"),
    }
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = same(*(f"{prefix}{name}.{kind}" for name in theirs))
    return table
