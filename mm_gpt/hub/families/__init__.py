"""Public model families: one short file each that says what a checkpoint of it is made of.

A family's `read` turns the folder's configuration into an `Import`: our configuration, tables of names, and how prompts
and images are written. Everything else (loading, checking, saving, training, answering) is the same for all.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.decoders import DEFAULTS as DECODERS
from mm_gpt.hub.image_processors import read_image_processor
from mm_gpt.hub.packing import packing_of
from mm_gpt.hub.weights import Checkpoint, Table, naming, read_json, unfilled
from mm_gpt.model.decoder_config import MAX_LAYERS
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.packed import unfill
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig


@dataclass(frozen=True, kw_only=True)
class Import:
    """What a checkpoint of another format is, in our terms."""

    model: ModelConfig
    processor: ProcessorConfig
    tables: dict[str, Table]
    """Tables of names by the part of the model: `decoder`, `vision`, `connector`, and `` for its own parameters."""
    template: ChatTemplate | None
    left_over: tuple[str, ...] = ()
    """Patterns of tensors that are known and not needed."""
    skip: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters of ours, by part, that the checkpoint has no tensor for and that keep their initial value."""


Reader = Callable[[Path, dict[str, Any], Tokenizer], Import]

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2"), "text"),
    "kosmos-2": "kosmos2",
    "paligemma": "paligemma",
    "gemma3": "gemma3",
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "llava"),
    **dict.fromkeys(("idefics3", "smolvlm"), "idefics3"),
    "internvl": "internvl",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "qwen_vl"),
    "nanovlm": "nanovlm",
}
"""`model_type` of a Hugging Face configuration -> the module here that reads it."""
_LLAVA = "of LLaVA, only the layout of llava-hf on the hub is read, not that of the original code"
OTHER_LAYOUTS = {
    "internvl_chat": "the original layout of InternVL is not read, only the repositories ending in -hf",
    **dict.fromkeys(("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen"), _LLAVA),
}
"""Model types that have the weights of a family, but other names and files."""
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of GPTQ, AWQ and ModelOpt, where `config.json` says nothing."""


def is_foreign(values: dict[str, Any]) -> bool:
    """Whether a `config.json` is of Hugging Face's form, not ours."""
    return "model_type" in values or "architectures" in values or _is_nanovlm(values)


def _is_nanovlm(values: dict[str, Any]) -> bool:
    """nanoVLM's configuration does not say its type."""
    return "vit_hidden_dim" in values and "lm_hidden_dim" in values


def check_foreign(folder: Path, values: dict[str, Any]) -> None:
    """Whether a Hugging Face folder, whose weights need not be there yet, is of a kind that is read here.

    Raises CheckpointError naming the file, for a model type, quantisation or tokenizer that is not."""
    _read_tokenizer(folder, values, _family(folder, values))


def load_foreign(
    folder: Path, values: dict[str, Any], *, dtype: torch.dtype, decoder_dtype: str
) -> tuple[MMGPT, Processor]:
    """The model in a Hugging Face folder, on the CPU; its decoder is kept as `decoder_dtype` says.

    Raises CheckpointError naming the file for an unknown architecture, missing or left-over tensors, or a tokenizer
    that does not fit.
    """
    family = _family(folder, values)
    tokenizer = _read_tokenizer(folder, values, family)
    read: Reader = family.read
    with naming(f"{folder}/config.json"):
        plan = read(folder, values, tokenizer)
        with unfilled():
            model = MMGPT(plan.model)
    vocab_size = model.decoder.config.vocab_size
    if tokenizer.vocab_size > vocab_size and (plan.model.image_token_id or 0) < vocab_size:
        tokenizer = tokenizer.without_ids_from(vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the decoder {vocab_size}")
    checkpoint = Checkpoint(folder)
    packing = packing_of(decoder_dtype, checkpoint.kinds(model.decoder, plan.tables["decoder"]))
    if packing is not None:
        unfill(model.decoder)
    for part, table in plan.tables.items():
        module = model.get_submodule(part)
        if part == "":
            own = {name for name, _ in model.named_parameters(recurse=False)}
            others = {name for name, _ in model.named_parameters()} - own
            checkpoint.load(model, table, dtype=dtype, skip=others)
        else:
            skip, ours = plan.skip.get(part, ()), packing if part == "decoder" else None
            checkpoint.load(module, table, dtype=dtype, skip=skip, packing=ours)
    checkpoint.finish(plan.left_over)
    return model.eval(), Processor(tokenizer, plan.processor, vocab_size=vocab_size, template=plan.template)


def _family(folder: Path, values: dict[str, Any]) -> Any:
    """The module that reads a folder. Raises CheckpointError for what none of them reads."""
    where = f"{folder}/config.json"
    kind = "nanovlm" if _is_nanovlm(values) else str(values.get("model_type"))
    if kind not in FAMILIES:
        problem = unknown_name("model type", kind, FAMILIES) if "model_type" in values else "has no model_type"
        raise CheckpointError(f"{where}: {OTHER_LAYOUTS.get(kind, problem)}")
    parts = {"": values, **{f"{key}: ": part for key, part in values.items() if isinstance(part, dict)}}
    for name, part in parts.items():
        for key in QUANTISATION_KEYS:
            if part.get(key) is not None:
                method = _method(part[key])
                raise CheckpointError(f"{where}: {name}quantised weights ({key}{method}) are not supported")
    for file in QUANTISATION_FILES:
        if (folder / file).exists():
            raise CheckpointError(f"{folder / file}: quantised weights are not supported")
    text = values.get("text_config")
    if isinstance(text, dict) and kind != "kosmos-2" and text.get("model_type", "llama") not in DECODERS:
        raise CheckpointError(f"{where}: text_config: {unknown_name('model type', str(text['model_type']), DECODERS)}")
    with naming(where):
        _check_layers(values)
    return importlib.import_module(f"mm_gpt.hub.families.{FAMILIES[kind]}")


def _method(settings: Any) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return f": {method}" if isinstance(method, str) else ""


def _read_tokenizer(folder: Path, values: dict[str, Any], family: Any) -> Tokenizer:
    if hasattr(family, "read_tokenizer"):  # for a family whose folders have none of the usual files
        tokenizer: Tokenizer = family.read_tokenizer(folder, values)
        return tokenizer
    return Tokenizer.from_hf_folder(folder)


_LAYERS = ("num_hidden_layers", "n_layer", "layers", "depth", "lm_n_blocks", "vit_n_blocks")


def _check_layers(values: dict[str, Any]) -> None:
    """Before anything is built: each layer needs memory, even without its weights."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_layers(value)
        elif key in _LAYERS and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(f"{key} {value} is more than {MAX_LAYERS}")


def read_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a folder, if it has one."""
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate.of(tokenizer, where=f"{folder}: its chat template")


def plain_template(source: str, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """A template of ours for a family that has none."""
    return ChatTemplate(
        source,
        special=tokenizer.names,
        where=str(folder),
        end_tokens=tokenizer.end_tokens,
        guarded=tokenizer.special,
    )


def read_images(folder: Path, **settings: object) -> tuple[ImageTransformConfig, TilingConfig | None]:
    """How a folder prepares its images, from the file that transformers would read, and `settings` from elsewhere."""
    path = folder / "processor_config.json"
    if not path.exists() or "image_processor" not in (values := read_json(path)):
        path = folder / "preprocessor_config.json"
        values = read_json(path)
    return read_image_processor({**values, **settings}, str(path))
