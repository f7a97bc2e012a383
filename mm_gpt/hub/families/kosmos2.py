"""KOSMOS-2 (2306.14824): CLIP's 257 tokens, 64 queries that look at them once, and a Magneto decoder.

An image is written as `<image>`, its tokens, `</image>`. The published processor numbers the places of the tokens with
ordinary words of the vocabulary and marks them in a separate mask. Here `<mask>` stands in each of these places: no
prompt has another use for it, and what an id there means is never looked up.
"""

import math
from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.decoders import ACTIVATIONS, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_images
from mm_gpt.hub.vision_towers import tower_prefix, vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import Table, safetensors_index, same, times
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 65_037,
    "max_position_embeddings": 2048,
    "embed_dim": 2048,
    "layers": 24,
    "ffn_dim": 8192,
    "attention_heads": 32,
    "activation_function": "gelu",
    "layer_norm_eps": 1e-5,
    "scale_embedding": True,
    "pad_token_id": 1,
    "add_cross_attention": False,
}
"""What a key that is not in `text_config` stands for."""
MARKS = ("<image>", "</image>")
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts -%}
{{- mask_token if part['type'] == 'image' else ' ' + part['text'] -}}
{%- endfor -%}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""
"""Images and texts in order, with a space between them; `</s>` behind an answer."""


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    decoder = _decoder_config(values.get("text_config") or {}, f"{where}: text_config")
    tower = vit_config(values, where=where)
    image, tiling = read_images(folder)
    if tiling is not None or image.size != tower.image_size:
        raise CheckpointError(f"{folder}: images of {image.size} pixels are prepared for a tower of {tower.image_size}")
    mask = tokenizer.names.get("mask_token", "")
    if mask not in tokenizer.special:
        raise CheckpointError(f"{folder}: the tokenizer has no mask_token, which stands for an image's tokens")
    if missing := [mark for mark in MARKS if tokenizer.backend.token_to_id(mark) is None]:
        raise CheckpointError(f"{folder}: the tokenizer has no token {missing[0]}, which stands beside an image")
    queries = values.get("latent_query_num", 64)
    tower_names = tower_prefix(safetensors_index(folder), where=str(folder))
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size, include_class_token=True, l2_normalize=True),
            connector=ConnectorConfig(kind="xconnector", num_latents=queries, num_heads=decoder.num_heads),
            image_token_id=tokenizer.special[mask],
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=queries,
            max_length=decoder.max_length,
            image_text=ImageTextConfig(token=mask, before=MARKS[0], after=MARKS[1]),
            begin_of_text=True,
        ),
        tables={
            "decoder": _decoder_table(),
            "vision.tower": vit_table(tower_names),
            "connector": _connector_table(decoder.embedding_scale),
        },
        template=plain_template(TEMPLATE, folder, tokenizer),
        left_over=(
            *tied_left_over(decoder, "text_model.lm_head.weight"),
            *vit_left_over(tower_names),
            r"text_model\.model\.embed_positions\.weights",
        ),
    )


def _decoder_config(values: dict[str, Any], where: str) -> DecoderConfig:
    values = DEFAULTS | values
    if values["add_cross_attention"]:
        raise CheckpointError(f"{where}: add_cross_attention is not supported")
    if values["activation_function"] not in ACTIVATIONS:
        raise CheckpointError(f"{where}: {unknown_name('activation', values['activation_function'], ACTIVATIONS)}")
    width, heads = values["embed_dim"], values["attention_heads"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=width,
        num_layers=values["layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        mlp_width=values["ffn_dim"],
        max_length=values["max_position_embeddings"],
        norm="layer",
        norm_eps=float(values["layer_norm_eps"]),
        sub_norm=True,
        activation=ACTIVATIONS[values["activation_function"]],  # type: ignore[arg-type]
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        output_bias=True,
        positions="sinusoidal",
        position_offset=values["pad_token_id"] + 1,
        embedding_scale=math.sqrt(width) if values["scale_embedding"] else 1.0,
    )


def _decoder_table() -> Table:
    layer = "text_model.model.layers.{i}."
    names = {
        "norm": ("text_model.model.layer_norm",),
        "blocks.{i}.attention_norm": (layer + "self_attn_layer_norm",),
        "blocks.{i}.attention.qkv": tuple(f"{layer}self_attn.{p}_proj" for p in "qkv"),
        "blocks.{i}.attention.sub_norm": (layer + "self_attn.inner_attn_ln",),
        "blocks.{i}.attention.out": (layer + "self_attn.out_proj",),
        "blocks.{i}.mlp_norm": (layer + "final_layer_norm",),
        "blocks.{i}.mlp.up": (layer + "ffn.fc1",),
        "blocks.{i}.mlp.sub_norm": (layer + "ffn.ffn_layernorm",),
        "blocks.{i}.mlp.down": (layer + "ffn.fc2",),
    }
    table = {"embedding.weight": same("text_model.model.embed_tokens.weight")}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = same(*(f"{name}.{kind}" for name in theirs))
    return table


def _connector_table(scale: float) -> Table:
    """Theirs scales images along with words; ours scales words alone, so the last projection takes the factor."""
    prefix = "image_to_text_projection."
    table = {"latent_query": same(prefix + "latent_query")}
    for kind in ("weight", "bias"):
        table[f"dense.{kind}"] = same(f"{prefix}dense.{kind}")
        for part in "qkv":
            table[f"{part}_proj.{kind}"] = same(f"{prefix}x_attn.{part}_proj.{kind}")
        table[f"out_proj.{kind}"] = times(f"{prefix}x_attn.out_proj.{kind}", scale)
    return table
