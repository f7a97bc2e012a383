"""PaliGemma 1 and 2 (2407.07726, 2412.03555): a SigLIP tower, one linear layer, and Gemma reading in both directions.

The images stand before the text: their tokens, `<bos>`, the prompt and a line end. All of that is one prefix in which
every token sees every other; the answer behind it ends with `<eos>`.
"""

from pathlib import Path
from typing import Any

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.decoders import decoder_config, decoder_table, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_images
from mm_gpt.hub.vision_towers import tower_prefix, vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import safetensors_index, same
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig

TEXT_MODELS = ("gemma", "gemma2")
TEMPLATE = """\
{%- if messages | length > 2 or messages[0]['role'] != 'user' or messages[-1]['role'] not in ('user', 'assistant') -%}
{{- raise_exception('PaliGemma knows one prompt and its answer, no chats, examples or system messages') -}}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{{- bos_token -}}
{%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- '\\n' -}}
{%- for message in messages[1:] -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
{{- eos_token -}}
{%- endfor -%}
"""


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    text = {"model_type": TEXT_MODELS[0]} | (values.get("text_config") or {})
    if text["model_type"] not in TEXT_MODELS:
        kind = unknown_name("model type", str(text["model_type"]), TEXT_MODELS)
        raise CheckpointError(f"{where}: text_config: {kind}")
    text["tie_word_embeddings"] = values.get("tie_word_embeddings", True)
    for key in ("use_bidirectional_attention", "num_image_tokens"):  # always on; follows from the tower
        text.pop(key, None)
    decoder = decoder_config(text, f"{where}: text_config")
    tower = vit_config(values, where=where)
    image, tiling = read_images(folder)
    if tiling is not None or image.size != tower.image_size:
        raise CheckpointError(f"{folder}: images of {image.size} pixels are prepared for a tower of {tower.image_size}")
    image_id = values.get("image_token_index", values.get("image_token_id"))
    if tokenizer.special.get("<image>") != image_id:
        raise CheckpointError(f"{where}: image_token_index {image_id} is not the tokenizer's <image>")

    names = safetensors_index(folder)
    # "language_model.model." in the published files, "model.language_model." in newer ones
    prefix = next((n.removesuffix("embed_tokens.weight") for n in names if n.endswith("embed_tokens.weight")), "")
    projector = ("model." if prefix.startswith("model.") else "") + "multi_modal_projector.linear."
    head = "lm_head.weight" if prefix.startswith("model.") else "language_model.lm_head.weight"
    tower_names = tower_prefix(names, where=str(folder))
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size),
            connector=ConnectorConfig(kind="linear"),
            image_token_id=image_id,
            prefix_lm=True,
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tower.num_patches,
            max_length=decoder.max_length,
            image_text=ImageTextConfig(token="<image>"),
        ),
        tables={
            "decoder": decoder_table(text["model_type"], prefix=prefix, head=head),
            "vision.tower": vit_table(tower_names),
            "connector": {f"projection.{part}": same(projector + part) for part in ("weight", "bias")},
        },
        template=plain_template(TEMPLATE, folder, tokenizer),
        left_over=(*tied_left_over(decoder, head), *vit_left_over(tower_names)),
    )
