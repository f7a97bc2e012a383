"""nanoVLM (github.com/huggingface/nanoVLM): SigLIP, pixel shuffle, SmolLM2, in a format of its own.

A repository holds `config.json` and `model.safetensors` alone: the tokenizer is that of another repository, which
`lm_tokenizer` names, with the tokens of `vlm_extra_tokens` behind it. There are four generations:

- 222M has no image token and no chat template: the image stands before "Question: ... Answer:".
- 450M has an image token, and soon a chat template in its configuration.
- those of July and August 2025 cut the image into tiles and say row and column of each, also of a single one.
- later models have the whole image, small, before the tiles, or alone.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub.decoders import decoder_config
from mm_gpt.hub.families import Import, plain_template
from mm_gpt.hub.fetching.repository import VOCABULARY_FILES, fetch_repository
from mm_gpt.hub.image_processors import read_nanovlm
from mm_gpt.hub.weights import Origin, Table, safetensors_index, same
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.vit import ViTConfig

CHATML_END = "<|im_end|>"
QUESTION = """
{%- for message in messages %}
    {%- for part in message['content'] if part['type'] == 'image' %}{{ 'IMAGE' }}{% endfor %}
    {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}
    {%- if message['role'] == 'user' %}{{ 'Question: ' + text + ' Answer:' }}
    {%- elif message['role'] == 'assistant' %}{{ text + eos_token }}
    {%- else %}{{ text + '\n' }}
    {%- endif %}
{%- endfor %}"""
"""How the models without a chat template were trained, with one question. IMAGE: the image token."""


def read_tokenizer(folder: Path, values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the language model, with the model's own tokens and template."""
    where = f"{folder}/config.json"
    if any((folder / name).exists() for name in VOCABULARY_FILES):
        base = Tokenizer.from_hf_folder(folder)
    elif isinstance(name := values.get("lm_tokenizer"), str):
        base = Tokenizer.from_hf_folder(fetch_repository(name, weights=False))
    else:
        raise CheckpointError(f"{where}: lm_tokenizer does not name a tokenizer, and there is none in the folder")
    extra = list(_extra_tokens(values, where).values())
    # One call each: the ids follow the order of the names.
    for token in extra:
        base.backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    template = values.get("lm_chat_template")
    ends = [*base.end_ids]
    if isinstance(template, str) and CHATML_END in template and CHATML_END in base.special:
        ends.append(base.special[CHATML_END])  # the end of a turn, whatever the tokenizer's own end is
    return Tokenizer(
        base.backend,
        end_of_text=base.end_of_text,
        end_of_turn=base.end_of_turn,
        more_ends=ends,
        names=base.names,
        chat_templates={"default": template} if isinstance(template, str) else {},
    )


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    where = f"{folder}/config.json"
    try:
        decoder, vit = _decoder(values, where), _vit(values, where)
        scale = values["mp_pixel_shuffle_factor"]
        connector = ConnectorConfig(kind="pixel_shuffle", scale=scale, bias=False)
    except KeyError as error:
        raise CheckpointError(f"{where}: lacks {error}") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    image, tiling = read_nanovlm(values, where)
    side = vit.image_size // vit.patch_size
    tokens = (side // scale) ** 2
    if side % scale or values.get("mp_image_token_length", tokens) != tokens:
        given = f"mp_pixel_shuffle_factor {scale} and mp_image_token_length {values.get('mp_image_token_length')}"
        raise CheckpointError(f"{where}: {given} do not fit {side} x {side} patches")
    extra = _extra_tokens(values, where)
    token = extra.get("image_token") or _unused(tokenizer, where)
    if tiling is None:
        text = ImageTextConfig(token=token)
    else:
        _check_marks(extra, tiling.longest_edge // image.size, where)
        text = ImageTextConfig(token=token, kind="nanovlm", whole=extra.get("global_image_token", ""))
    template = tokenizer.chat_template
    return Import(
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=vit, image_size=vit.image_size),
            connector=connector,
            image_token_id=tokenizer.special[token],
        ),
        processor=ProcessorConfig(
            image=image,
            tokens_per_image=tokens,
            max_length=decoder.max_length,
            tiling=tiling,
            image_text=text,
        ),
        tables=_tables(decoder, folder),
        template=(
            plain_template(QUESTION.replace("IMAGE", token), folder, tokenizer)
            if template is None
            else ChatTemplate.of(tokenizer, where=f"{where}: lm_chat_template")
        ),
        left_over=(r"decoder\.rotary_embd\.inv_freq", *((r"decoder\.head\.weight",) if decoder.tie_embeddings else ())),
    )


def _extra_tokens(values: dict[str, Any], where: str) -> dict[str, str]:
    extra = values.get("vlm_extra_tokens") or {}
    if not isinstance(extra, dict) or not all(isinstance(token, str) and token for token in extra.values()):
        raise CheckpointError(f"{where}: vlm_extra_tokens must map names to tokens")
    if extra and "image_token" not in extra:
        raise CheckpointError(f"{where}: vlm_extra_tokens has no image_token")
    if "boi_token" in extra:
        raise CheckpointError(f"{where}: vlm_extra_tokens: models with a boi_token are not supported")
    return extra


def _check_marks(extra: dict[str, str], most: int, where: str) -> None:
    for row in range(1, most + 1):
        for column in range(1, most + 1):
            if extra.get(f"r{row}c{column}") != f"<row_{row}_col_{column}>":
                raise CheckpointError(f"{where}: vlm_extra_tokens: r{row}c{column} must be <row_{row}_col_{column}>")


def _unused(tokenizer: Tokenizer, where: str) -> str:
    """A special token that no prompt contains. The first model simply put image and text one behind the other: in our
    prompts something must say where the image is, and its embedding is not looked at."""
    taken = {*tokenizer.names.values(), *tokenizer.end_tokens}
    free = [token for token in sorted(tokenizer.special, key=tokenizer.special.__getitem__) if token not in taken]
    if not free:
        raise CheckpointError(f"{where}: the tokenizer has no special token to spare for images")
    return free[-1]


def _decoder(values: dict[str, Any], where: str) -> DecoderConfig:
    if values.get("lm_attn_scaling", 1.0) != 1.0:
        raise CheckpointError(f"{where}: only lm_attn_scaling 1.0 is supported, not {values['lm_attn_scaling']!r}")
    names = {
        "vocab_size": "lm_vocab_size",
        "hidden_size": "lm_hidden_dim",
        "intermediate_size": "lm_inter_dim",
        "num_hidden_layers": "lm_n_blocks",
        "num_attention_heads": "lm_n_heads",
        "num_key_value_heads": "lm_n_kv_heads",
        "max_position_embeddings": "lm_max_position_embeddings",
        "rms_norm_eps": "lm_rms_eps",
        "rope_theta": "lm_re_base",
        "tie_word_embeddings": "lm_tie_weights",
    }
    llama = {ours: values[theirs] for ours, theirs in names.items()}
    return decoder_config({"model_type": "llama", **llama}, where)


def _vit(values: dict[str, Any], where: str) -> ViTConfig:
    if values.get("vit_cls_flag"):
        raise CheckpointError(f"{where}: vit_cls_flag: models that see the class token alone are not supported")
    return ViTConfig(
        image_size=values["vit_img_size"],
        patch_size=values["vit_patch_size"],
        width=values["vit_hidden_dim"],
        num_layers=values["vit_n_blocks"],
        num_heads=values["vit_n_heads"],
        mlp_width=values["vit_inter_dim"],
        activation="gelu_tanh",
        norm_eps=values["vit_ln_eps"],
    )


def _tables(decoder: DecoderConfig, folder: Path) -> dict[str, Table]:
    # safetensors writes a matrix that has two names under one of them, the alphabetically first.
    embedding = "decoder.token_embedding.weight"
    if decoder.tie_embeddings and embedding not in safetensors_index(folder):
        embedding = "decoder.head.weight"
    block = "decoder.blocks.{i}."
    text: Table = {
        "embedding.weight": same(embedding),
        "norm.weight": same("decoder.norm.weight"),
        "head.weight": same("decoder.head.weight"),
        "blocks.{i}.attention_norm.weight": same(block + "norm1.weight"),
        "blocks.{i}.attention.qkv.weight": same(*(f"{block}attn.{p}_proj.weight" for p in "qkv")),
        "blocks.{i}.attention.out.weight": same(block + "attn.out_proj.weight"),
        "blocks.{i}.mlp_norm.weight": same(block + "norm2.weight"),
        "blocks.{i}.mlp.gate_up.weight": same(block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"),
        "blocks.{i}.mlp.down.weight": same(block + "mlp.down_proj.weight"),
    }
    names = {
        "patch_embedding": "patch_embedding.conv",
        "blocks.{i}.attention_norm": "blocks.{i}.ln1",
        "blocks.{i}.attention.qkv": "blocks.{i}.attn.qkv_proj",
        "blocks.{i}.attention.out": "blocks.{i}.attn.out_proj",
        "blocks.{i}.mlp_norm": "blocks.{i}.ln2",
        "blocks.{i}.mlp.up": "blocks.{i}.mlp.fc1",
        "blocks.{i}.mlp.down": "blocks.{i}.mlp.fc2",
        "post_norm": "layer_norm",
    }
    vision: Table = {
        f"{ours}.{kind}": same(f"vision_encoder.{theirs}.{kind}")
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    positions = ("vision_encoder.patch_embedding.position_embedding",)  # (1, P, D)
    vision["position_embedding"] = Origin(positions, lambda t: t[0], lambda t: t[None])
    return {"decoder": text, "vision.tower": vision, "connector": {"projection.weight": same("MP.proj.weight")}}
