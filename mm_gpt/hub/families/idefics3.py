"""Idefics3 and SmolVLM, 1 and 2: an image cut into tiles, pixel shuffle, Llama (arXiv:2408.12637, 2504.05299).

The two model types differ in their names alone. Each tile is written between marks that say its row and column, which
are special tokens in the small SmolVLMs and ordinary text in the others; the text is the same.
"""

from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub.decoders import decoder_config, decoder_table, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_images, read_template
from mm_gpt.hub.vision_towers import vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import read_json, same
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig

IMAGE_TOKEN = "<image>"
PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}"
)
"""For a model without a chat template: what people write, with its images."""
# The text config is that of the code which trained the models: these keys say nothing about the released architecture,
# or turn on what it does not have.
_TRAINING_KEYS = ("perceiver_config", "neftune_noise_alpha", "pixel_shuffle_factor", "transformers.js_config")
_MUST_BE = {"is_llama_config": True, "qk_layer_norms": False, "rope_interleaved": False, "use_resampler": False}


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    decoder = _decoder(values, where)
    vit = vit_config(values, where=where)
    image, tiling = read_images(folder)
    if image.size != vit.image_size:
        raise CheckpointError(f"{where}: the model sees {vit.image_size} pixels, but tiles have {image.size}")
    scale = values.get("scale_factor", 2)
    side = vit.image_size // vit.patch_size
    if not isinstance(scale, int) or scale < 1 or side % scale:
        raise CheckpointError(f"{where}: scale_factor {scale!r} does not divide the {side} patches of a side")
    tokens = (side // scale) ** 2
    _check_length(folder, tokens)
    token_id = values.get("image_token_id", 128_257)
    if tokenizer.special.get(IMAGE_TOKEN) != token_id:
        found = tokenizer.special.get(IMAGE_TOKEN)
        raise CheckpointError(f"{where}: image_token_id is {token_id}, but the tokenizer's {IMAGE_TOKEN} is {found}")
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=vit, image_size=vit.image_size),
            connector=ConnectorConfig(kind="pixel_shuffle", scale=scale, bias=False),
            image_token_id=token_id,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tokens,
            max_length=decoder.max_length,
            tiling=tiling,
            image_text=ImageTextConfig(token=IMAGE_TOKEN, kind="idefics3"),
            begin_of_text=True,
        ),
        tables={
            "decoder": decoder_table("llama", prefix="model.text_model."),
            "vision.tower": vit_table("model.vision_model."),
            "connector": {"projection.weight": same("model.connector.modality_projection.proj.weight")},
        },
        template=read_template(folder, tokenizer) or plain_template(PLAIN, folder, tokenizer),
        left_over=(*tied_left_over(decoder), *vit_left_over("model.vision_model.")),
    )


def _decoder(values: dict[str, Any], where: str) -> DecoderConfig:
    text = values.get("text_config")
    # A config without its text half means Llama as it is, but for the norm's epsilon.
    text = {"model_type": "llama", **({"rms_norm_eps": 1e-5} if text is None else text)}
    for key, needed in _MUST_BE.items():
        if text.pop(key, needed) is not needed:
            raise CheckpointError(f"{where}: text_config: {key} must be {needed}")
    for key in _TRAINING_KEYS:
        text.pop(key, None)
    if text["model_type"] != "llama":
        raise CheckpointError(f"{where}: text_config: model_type {text['model_type']!r} is not supported, only 'llama'")
    # The whole model's key decides, whatever the text half says.
    text["tie_word_embeddings"] = values.get("tie_word_embeddings", False)
    try:
        return decoder_config(text, f"{where}: text_config")
    except ConfigError as error:
        raise CheckpointError(f"{where}: text_config: {error}") from None


def _check_length(folder: Path, tokens: int) -> None:
    """The processor has its own number of tokens per tile, which must be the model's."""
    path = folder / "processor_config.json"
    given = read_json(path).get("image_seq_len", tokens) if path.exists() else tokens
    if given != tokens:
        raise CheckpointError(f"{path}: image_seq_len is {given!r}, but the model makes {tokens} tokens of a tile")
