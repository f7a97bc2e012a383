"""LLaVA-1.5 (2310.03744), LLaVA-NeXT (1.6) and LLaVA-OneVision (2408.03326), images only, as llava-hf publishes them.

A CLIP or SigLIP tower, of which a layer before the last norm is taken, two linear layers, and Llama, Mistral or Qwen2.
1.5 sees one square of each image. NeXT and OneVision see tiles and end each row of features with a newline vector.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub.decoders import decoder_config, decoder_table, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_images, read_template
from mm_gpt.hub.vision_towers import tower_prefix, vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import Table, safetensors_index, same
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

TILINGS = {"llava": None, "llava_next": "anyres", "llava_onevision": "anyres_max"}
"""How each model type lays out the features of an image."""
_CLIP: dict[str, Any] = {
    "vision": "clip_vision_model",
    "text": "llama",
    "image_token_index": 32_000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": _CLIP,
    "llava_next": _CLIP,
    "llava_onevision": {
        "vision": "siglip_vision_model",
        "text": "qwen2",
        "image_token_index": 151_646,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}
"""What published configurations leave out; `vision` and `text` are the model types of their parts."""
TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- if message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}
{%- elif message['role'] == 'user' -%}{{- 'USER: ' -}}{%- endif -%}
{%- for part in parts if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""Vicuna's, for copies of LLaVA-1.5 that come without one. NeXT and OneVision differ from one decoder to the next."""


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where, kind = f"{folder}/config.json", str(values["model_type"])
    for key in ("text_config", "vision_config"):
        if not isinstance(values.get(key), dict):
            raise CheckpointError(f"{where}: no {key}; of LLaVA, only the layout of llava-hf on the hub is read")
    defaults = DEFAULTS[kind]
    full = defaults | values
    text = {"model_type": defaults["text"]} | values["text_config"]
    decoder = decoder_config(text, f"{where}: text_config")
    # The whole model's key counts, and the decoder's own except in NeXT
    tied = bool(full.get("tie_word_embeddings")) or (decoder.tie_embeddings and kind != "llava_next")
    decoder = dataclasses.replace(decoder, tie_embeddings=tied)
    tower = _tower(full, where)
    image, tiling = read_images(folder, vision_aspect_ratio=full.get("vision_aspect_ratio", "anyres_max_9"))
    _check_images(folder, full, tower, image, tiling)
    class_token = _keeps_class_token(full, tower, where)
    image_id = full.get("image_token_id", full["image_token_index"])
    token = next((name for name, id in tokenizer.special.items() if id == image_id), None)
    if token is None:
        raise CheckpointError(f"{where}: image_token_index {image_id!r} is no special token of the tokenizer")
    template = read_template(folder, tokenizer)
    if template is None and kind != "llava":
        raise CheckpointError(f"{folder}: no chat template (chat_template.jinja, chat_template.json)")

    names = safetensors_index(folder)
    new = any(name.startswith("model.") for name in names)  # as transformers 5 names them in memory
    top, language = ("model.", "model.language_model.") if new else ("", "language_model.model.")
    head = "lm_head.weight" if new else "language_model.lm_head.weight"
    tower_names = tower_prefix(names, where=str(folder))
    tables: dict[str, Table] = {
        "decoder": decoder_table(text["model_type"], prefix=language, head=head),
        "vision.tower": vit_table(tower_names),
        "connector": {
            f"fc{number}.{part}": same(f"{top}multi_modal_projector.linear_{number}.{part}")
            for number in (1, 2)
            for part in ("weight", "bias")
        },
    }
    if tiling is not None:
        tables[""] = {"image_newline": same(f"{top}image_newline")}
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size, include_class_token=class_token),
            connector=ConnectorConfig(kind="mlp", bias=bool(full.get("multimodal_projector_bias", True))),
            image_token_id=image_id,
            tiling=tiling,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tower.num_patches + class_token,
            max_length=decoder.max_length,
            tiling=tiling,
            image_text=ImageTextConfig(token=token, kind="plain" if tiling is None else "rows"),
            begin_of_text=True,
        ),
        tables=tables,
        template=template or plain_template(TEMPLATE, folder, tokenizer),
        left_over=(*tied_left_over(decoder, head), *vit_left_over(tower_names)),
    )


def _tower(values: dict[str, Any], where: str) -> ViTConfig:
    """The tower up to the layer whose output is taken; no norm follows it, not even behind the last block."""
    layer, activation = values["vision_feature_layer"], values.get("projector_hidden_act", "gelu")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise CheckpointError(f"{where}: vision_feature_layer {layer!r}: only the features of one layer are supported")
    if activation != "gelu":
        raise CheckpointError(f"{where}: projector_hidden_act {activation!r} is not supported, only 'gelu'")
    tower = vit_config({"vision_config": {"model_type": values["vision"]} | values["vision_config"]}, where=where)
    try:
        return dataclasses.replace(tower, feature_layer=layer, post_norm=False)
    except ConfigError as error:
        raise CheckpointError(f"{where}: vision_feature_layer {layer}: {error}") from None


def _keeps_class_token(values: dict[str, Any], tower: ViTConfig, where: str) -> bool:
    """`default` leaves out the first token, which must then be the class token, and `full` leaves out none."""
    strategy = values["vision_feature_select_strategy"]
    name = f"{where}: vision_feature_select_strategy {strategy!r}"
    if strategy not in ("default", "full"):
        raise CheckpointError(f"{name} is not supported, only 'default' and 'full'")
    if strategy == "default" and not tower.class_token:
        raise CheckpointError(f"{name} would leave out the first patch: this vision tower has no class token")
    keeps = strategy == "full" and tower.class_token
    if keeps and TILINGS[values["model_type"]] is not None:
        raise CheckpointError(f"{name} would put a class token into each tile's square of features")
    return keeps


def _check_images(
    folder: Path, values: dict[str, Any], tower: ViTConfig, image: ImageTransformConfig, tiling: TilingConfig | None
) -> None:
    """The image processor's settings against the model's: where they differ, prompt and features would."""
    kind = values["model_type"]
    if (tiling and tiling.kind) != TILINGS[kind]:
        raise CheckpointError(f"{folder}: the image processor is not that of model type {kind!r}")
    if image.size != tower.image_size:
        raise CheckpointError(f"{folder}: images of {image.size} pixels are prepared for a tower of {tower.image_size}")
    pinpoints = values.get("image_grid_pinpoints")
    if tiling and pinpoints is not None and [list(pair) for pair in tiling.pinpoints] != pinpoints:
        raise CheckpointError(f"{folder}: image_grid_pinpoints of config.json and of the image processor differ")
