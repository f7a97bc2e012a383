"""A model as a Hugging Face folder: configuration, weights, tokenizer, chat template, and how images are prepared.

Each `Plan` is a family of `mm_gpt.hub.families` backwards. What is written is read again by that family, and must come
back as the model that it was.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.decoders import decoder_table, part_sizes
from mm_gpt.hub.export.decoders import CLASSES, decoder_values
from mm_gpt.hub.families import text
from mm_gpt.hub.weights import Table, write_json, written
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
"""A file of weights is not larger."""
CHATML = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception("roles are 'system', 'user' and 'assistant'") -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- IMAGE -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""What a Processor without a template writes. IMAGE: an expression for the text of an image."""
NO_IMAGE = "raise_exception('this model reads text alone, no images')"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model in another format."""

    values: dict[str, Any]
    """`config.json`."""
    tables: dict[str, Table]
    """Tables of names by the part of the model, as an `Import` has them."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further JSON files."""
    has_template: bool = True
    """The family's processor takes a chat template; others write the prompt themselves."""
    hidden_ids: tuple[int, ...] = ()
    """Ids that were no part of the vocabulary, and are never generated."""


def write_folder(model: MMGPT, processor: Processor, folder: Path, *, dtype: torch.dtype, decoder_only: bool) -> None:
    """Write into an existing empty folder. Raises CheckpointError for what no class of transformers computes."""
    from mm_gpt.hub.export import models as export_models

    if decoder_only or model.vision is None:
        plan = decoder_plan(model)
    else:
        model, processor, plan = export_models.whole_plan(model, processor)
    ends = list(processor.tokenizer.end_ids)
    names = _special_names(processor.tokenizer)
    ids = {f"{name}_id": processor.tokenizer.backend.token_to_id(token) for name, token in names.items()}
    begin_end = {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", plan.values | begin_end | stored)
    generation: dict[str, Any] = {**begin_end, "pad_token_id": ids.get("pad_token_id")}
    if plan.hidden_ids:
        generation["suppress_tokens"] = list(plan.hidden_ids)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(processor, folder, names, max_length=model.decoder.config.max_length)
    for name, values in plan.files.items():
        write_json(folder / name, values)
    template = template_source(processor)
    if plan.has_template and template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_weights(folder, tensors_of(model, plan.tables), dtype=dtype)
    if len(plan.tables) > 1:
        export_models.check(folder, plan.values, model, processor)


def decoder_plan(model: MMGPT) -> Plan:
    """The decoder alone."""
    if model.config.prefix_lm:
        raise CheckpointError("prefix_lm True has no counterpart in a decoder alone: those read from left to right")
    values = decoder_values(model.decoder.config)
    kind = values["model_type"]
    return Plan(values={"architectures": [CLASSES[kind]], **values}, tables={"decoder": decoder_table(kind)})


def template_source(processor: Processor, image: str = NO_IMAGE) -> str | None:
    """The chat template's source; None for a model that continues its prompt as it stands."""
    if processor.template is None:
        return CHATML.replace("IMAGE", image)
    return None if processor.template.source == text.PLAIN else processor.template.source


def tensors_of(model: MMGPT, tables: dict[str, Table]) -> Iterator[tuple[str, Tensor]]:
    """All parameters under their names in the other format."""
    config = model.decoder.config
    for part, table in tables.items():
        if part == "":
            own = model.named_parameters(recurse=False)
            yield from ((table[name].parts[0], table[name].write(value.detach())) for name, value in own)
        elif part == "decoder":
            yield from written(model.decoder, table, lambda name, num, rows: part_sizes(config, name, num, rows))
        else:
            yield from written(model.get_submodule(part), table, lambda _, num, rows: [rows // num] * num)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """`model.safetensors`, or shards with an index: matrices as `dtype`, vectors in float32, which costs nothing."""
    shards: list[dict[str, str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        name = f"part-{len(shards)}"
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # the library writes for the owner alone; a model is to be shared
        shards.append(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        kept = compact(tensor, dtype, name)
        num_bytes = kept.numel() * kept.element_size()
        if shard and size + num_bytes > shard_bytes:
            flush()
            size = 0
        shard[name] = kept
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def compact(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A matrix as `dtype`, a vector in float32. Raises CheckpointError when a value is beyond its range."""
    kept = tensor.to(dtype if tensor.dim() > 1 else torch.float32)
    if kept.dtype == torch.float16 and not kept.isfinite().all():
        raise CheckpointError(f"{name} holds values that float16 cannot store; --dtype bfloat16 can")
    return kept.clone(memory_format=torch.contiguous_format)


# ---- Tokenizer ----


def write_tokenizer(processor: Processor, folder: Path, names: dict[str, str], *, max_length: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    state = json.loads(processor.tokenizer.backend.to_str())
    if not processor.config.begin_of_text and any(processor.tokenizer.affixes):
        state["post_processor"] = None  # this model's texts begin without the ids that the file would add
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **names,
    }
    if processor.config.image_text is not None:
        config["extra_special_tokens"] = {"image_token": processor.config.image_text.token}
    write_json(folder / "tokenizer_config.json", config)


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`eos_token` and its like; a tokenizer of ours names none, but has its ends."""
    return {"eos_token": tokenizer.end_of_turn, "pad_token": tokenizer.end_of_text} | tokenizer.names


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """A copy of a tokenizer that knows further special tokens, behind all others."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    return Tokenizer(
        backend,
        end_of_text=tokenizer.end_of_text,
        end_of_turn=tokenizer.end_of_turn,
        more_ends=tokenizer.end_ids,
        names=tokenizer.names,
    )


def with_template(processor: Processor, source: str, tokenizer: Tokenizer, **changes: Any) -> Processor:
    """A processor with another template and tokenizer, and `changes` of its configuration."""
    template = ChatTemplate(
        source,
        special=tokenizer.names,
        where="the chat template",
        end_tokens=tokenizer.end_tokens,
        guarded=tokenizer.special,
    )
    config = dataclasses.replace(processor.config, **changes)
    vocab_size = max(processor.vocab_size, tokenizer.vocab_size)
    return Processor(tokenizer, config, vocab_size=vocab_size, template=template)
