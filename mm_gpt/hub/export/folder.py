"""A model as a Hugging Face folder: configuration, weights, tokenizer, chat template, and how images are prepared.

Each `Export` is a family of `mm_gpt.hub.families` backwards. What is written is read again by that family, and must
come back as the model that it was.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.decoders import decoder_table, part_sizes
from mm_gpt.hub.export.decoders import CLASSES, decoder_values, for_text_alone
from mm_gpt.hub.export.layout import Export, template_source
from mm_gpt.hub.export.models import check, whole_export
from mm_gpt.hub.weights import Table, write_json, written
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.system.writing import whole_file, write_text
from mm_gpt.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
"""A file of weights is not larger."""


def write_folder(model: MMGPT, processor: Processor, folder: Path, *, dtype: torch.dtype, decoder_only: bool) -> None:
    """Write into an existing empty folder. Raises CheckpointError for what no class of transformers computes."""
    if decoder_only or model.vision is None:
        export = decoder_export(model)
    else:
        model, processor, export = whole_export(model, processor)
    ends = list(processor.tokenizer.end_ids)
    names = _special_names(processor.tokenizer)
    ids = {f"{name}_id": processor.tokenizer.backend.token_to_id(token) for name, token in names.items()}
    begin_end = {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", export.values | begin_end | stored)
    generation: dict[str, Any] = {**begin_end, "pad_token_id": ids.get("pad_token_id")}
    if export.hidden_ids:
        generation["suppress_tokens"] = list(export.hidden_ids)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(processor, folder, names, max_length=model.decoder.config.max_length, tokens=export.tokens)
    for name, values in export.files.items():
        write_json(folder / name, values)
    template = template_source(processor)
    if export.has_template and template is not None:
        write_text(folder / "chat_template.jinja", template)
    write_weights(folder, tensors_of(model, export.tables), dtype=dtype)
    if len(export.tables) > 1:
        check(folder, export.values, model, processor)


def decoder_export(model: MMGPT) -> Export:
    """The decoder alone."""
    if model.config.prefix_lm:
        raise CheckpointError("prefix_lm True has no counterpart in a decoder alone: those read from left to right")
    values = decoder_values(for_text_alone(model.decoder.config))
    kind = values["model_type"]
    return Export(values={"architectures": [CLASSES[kind]], **values}, tables={"decoder": decoder_table(kind)})


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
        name = f"part-{len(shards)}.safetensors" if shards else "model.safetensors"
        with whole_file(folder / name) as partial:
            save_file(shard, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # the library writes for the owner alone; a model is to be shared
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
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / next(iter(names.values()))).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def compact(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A matrix as `dtype`, a vector in float32. Raises CheckpointError when a value is beyond its range."""
    kept = tensor.to(dtype if tensor.dim() > 1 else torch.float32)
    if kept.dtype == torch.float16 and not kept.isfinite().all():
        raise CheckpointError(f"{name} holds values that float16 cannot store; --dtype bfloat16 can")
    return kept.clone(memory_format=torch.contiguous_format)


# ---- Tokenizer ----


def write_tokenizer(
    processor: Processor, folder: Path, names: dict[str, str], *, max_length: int, tokens: dict[str, str]
) -> None:
    """`tokenizer.json` and `tokenizer_config.json`. `tokens`: as an `Export` has them."""
    state = json.loads(processor.tokenizer.backend.to_str())
    if not processor.config.begin_of_text and any(processor.tokenizer.affixes):
        state["post_processor"] = None  # this model's texts begin without the ids that the file would add
    write_text(folder / "tokenizer.json", json.dumps(state, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **names,
    }
    if processor.config.image_text is not None:
        config["extra_special_tokens"] = tokens or {"image_token": processor.config.image_text.token}
    write_json(folder / "tokenizer_config.json", config)


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`eos_token` and its like; a tokenizer of ours names none, but has its ends."""
    return {"eos_token": tokenizer.end_of_turn, "pad_token": tokenizer.end_of_text} | tokenizer.names
