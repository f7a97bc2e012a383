"""Gemma 3 with images (2503.19786): a SigLIP tower at 896 pixels, means of 4 x 4 patches, and Gemma 3.

An image is 256 tokens between marks, anywhere in the text. They see each other in both directions, everything else
looks back. Pan and scan, which adds crops of images that are no squares, is not read; the published models have it off.
"""

from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.decoders import decoder_config, decoder_table, settle_tying, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_images, read_template
from mm_gpt.hub.families.idefics3 import IMAGE_TOKEN, PLAIN
from mm_gpt.hub.vision_towers import tower_prefix, vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import Checkpoint, Table, plus_one, read_json, transposed
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import POOL_NORM_EPS, ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.vit import ViTConfig

TEXT_MODELS = ("gemma3_text",)
TOKEN_KEYS = {"image": 262_144, "boi": 255_999, "eoi": 256_000}
"""Of the tokens of an image and the marks before and behind them: `image_token_index` and so on."""


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    text = {"model_type": TEXT_MODELS[0]} | (values.get("text_config") or {})
    if text["model_type"] not in TEXT_MODELS:
        kind = unknown_name("model type", str(text["model_type"]), TEXT_MODELS)
        raise CheckpointError(f"{where}: text_config: {kind}")
    text["tie_word_embeddings"] = values.get("tie_word_embeddings", True)
    tower = vit_config(values, where=where)
    if tower.norm_eps != POOL_NORM_EPS:
        raise CheckpointError(f"{where}: vision_config: only layer_norm_eps {POOL_NORM_EPS} is supported")
    image, _ = read_images(folder)
    if image.size != tower.image_size:
        raise CheckpointError(f"{folder}: images of {image.size} pixels are prepared for a tower of {tower.image_size}")
    scale = _scale(values.get("mm_tokens_per_image", 256), tower, where)
    tokens = tower.num_patches // scale**2
    _check_length(folder, tokens)
    ids = {key: values.get(f"{key}_token_index", values.get(f"{key}_token_id", id)) for key, id in TOKEN_KEYS.items()}
    names = {id: name for name, id in tokenizer.special.items()}
    for key, id in ids.items():
        if id not in names:
            raise CheckpointError(f"{where}: {key}_token_index {id!r} is no special token of the tokenizer")
    token, begin, end = (names[ids[key]] for key in TOKEN_KEYS)

    checkpoint = Checkpoint(folder)
    new = any(name.startswith("model.") for name in checkpoint.names)  # as transformers 5 names them in memory
    top, language = ("model.", "model.language_model.") if new else ("", "language_model.model.")
    head = "lm_head.weight" if new else "language_model.lm_head.weight"
    decoder, table = settle_tying(
        decoder_config(text, f"{where}: text_config"),
        decoder_table(text["model_type"], prefix=language, head=head),
        checkpoint,
    )
    tower_names = tower_prefix(checkpoint.names, where=str(folder))
    plain = plain_template(PLAIN.replace(IMAGE_TOKEN, begin), folder, tokenizer)
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size),
            connector=ConnectorConfig(kind="pool", scale=scale),
            image_token_id=ids["image"],
            bidirectional_images=True,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tokens,
            max_length=decoder.max_length,
            image_text=ImageTextConfig(token=token, before=f"\n\n{begin}", after=f"{end}\n\n", written=begin),
            begin_of_text=True,
        ),
        tables={
            "decoder": table,
            "vision.tower": vit_table(tower_names),
            "connector": connector_table(f"{top}multi_modal_projector."),
        },
        template=read_template(folder, tokenizer) or plain,
        left_over=(*tied_left_over(decoder, head), *vit_left_over(tower_names)),
    )


def connector_table(prefix: str) -> Table:
    return {
        "norm.weight": plus_one(prefix + "mm_soft_emb_norm.weight"),
        "projection.weight": transposed(prefix + "mm_input_projection_weight"),
    }


def _scale(tokens: object, tower: ViTConfig, where: str) -> int:
    """How many patches a side go into one token."""
    side = tower.image_size // tower.patch_size
    for scale in range(1, side + 1):
        if side % scale == 0 and (side // scale) ** 2 == tokens:
            return scale
    raise CheckpointError(f"{where}: mm_tokens_per_image {tokens!r} does not fit the {side} patches of a side")


def _check_length(folder: Path, tokens: int) -> None:
    """The processor has its own number of tokens per image, which must be the model's."""
    path = folder / "processor_config.json"
    given = read_json(path).get("image_seq_length", tokens) if path.exists() else tokens
    if given != tokens:
        raise CheckpointError(f"{path}: image_seq_length is {given!r}, but the model makes {tokens} tokens of an image")
