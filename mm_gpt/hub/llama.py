"""Decoder weights of the Llama family: from GGUF files and from Hugging Face folders.

Both formats keep query, key and value (and gate and up) as separate matrices; the decoder stores each group as one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.model.decoder import Decoder, DecoderConfig, rotary_table

# Our parameter -> the parts it is made of, stacked along the output dimension. {i} is the layer.
HF_NAMES = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "blocks.{i}.attention.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkv"),
    "blocks.{i}.attention.qkv.bias": tuple(f"model.layers.{{i}}.self_attn.{p}_proj.bias" for p in "qkv"),
    "blocks.{i}.attention.out.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "blocks.{i}.attention.out.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "blocks.{i}.mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "blocks.{i}.mlp.gate_up.weight": tuple(f"model.layers.{{i}}.mlp.{p}_proj.weight" for p in ("gate", "up")),
    "blocks.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}
GGUF_NAMES = {
    "embedding.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "head.weight": ("output.weight",),
    "blocks.{i}.attention_norm.weight": ("blk.{i}.attn_norm.weight",),
    "blocks.{i}.attention.qkv.weight": tuple(f"blk.{{i}}.attn_{p}.weight" for p in "qkv"),
    "blocks.{i}.attention.qkv.bias": tuple(f"blk.{{i}}.attn_{p}.bias" for p in "qkv"),
    "blocks.{i}.attention.out.weight": ("blk.{i}.attn_output.weight",),
    "blocks.{i}.attention.out.bias": ("blk.{i}.attn_output.bias",),
    "blocks.{i}.mlp_norm.weight": ("blk.{i}.ffn_norm.weight",),
    "blocks.{i}.mlp.gate_up.weight": ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    "blocks.{i}.mlp.down.weight": ("blk.{i}.ffn_down.weight",),
}


def load_gguf(path: Path) -> tuple[Decoder, dict[str, Any]]:
    """A float32 decoder from a GGUF file (quantised tensors are expanded) and the file's metadata fields.

    Raises CheckpointError naming the file when it is corrupt, of another architecture, or its tensors don't fit.
    """
    reader = open_gguf(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{path}: architecture {fields.get('general.architecture')!r} is not of the Llama family")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        heads = fields["llama.attention.head_count"]
        head_size = fields.get("llama.rope.dimension_count", fields["llama.embedding_length"] // heads)
        config = DecoderConfig(
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            width=fields["llama.embedding_length"],
            num_layers=fields["llama.block_count"],
            num_heads=heads,
            num_kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_size=head_size,
            mlp_width=fields["llama.feed_forward_length"],
            max_length=fields["llama.context_length"],
            norm_eps=_short(fields["llama.attention.layer_norm_rms_epsilon"]),
            rope_theta=fields.get("llama.rope.freq_base", 10_000.0),
            tie_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata lacks {error}") from None

    def read(name: str) -> Tensor:
        from gguf import dequantize

        tensor = tensors[name]
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{path}: tensor {name} has the unsupported quantisation {kind}") from None
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
            weight = _rotary_halves(weight, head_size)
        return weight

    return _fill(config, GGUF_NAMES, set(tensors), read, str(path)), fields


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader`; anything that it cannot parse becomes one CheckpointError."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """numpy's memmap runs Python at each of the 800,000 slices that a vocabulary takes; a plain view does not."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    try:
        return Reader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError, OverflowError, AssertionError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file ({error})") from None


def load_hf_folder(folder: Path) -> Decoder:
    """A decoder from a Hugging Face folder of the Llama family (`config.json` and safetensors, sharded or not).

    Raises CheckpointError naming the file that is missing, corrupt or of another architecture.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") not in ("llama",):
        raise CheckpointError(f"{folder}: model type {values.get('model_type')!r} is not of the Llama family")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # the newer and the older name
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{folder}/config.json: rope scaling {rope} is not supported")
    if values.get("mlp_bias") or values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder}/config.json: only silu without MLP bias is supported")
    try:
        heads = values["num_attention_heads"]
        config = DecoderConfig(
            vocab_size=values["vocab_size"],
            width=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_size=values.get("head_dim") or values["hidden_size"] // heads,
            mlp_width=values["intermediate_size"],
            max_length=values["max_position_embeddings"],
            norm_eps=values["rms_norm_eps"],
            rope_theta=float(values.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("attention_bias", False),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json lacks the key {error}") from None
    where = safetensors_index(folder)
    if config.tie_embeddings:
        where.pop("lm_head.weight", None)  # some exporters store the tied matrix twice

    def read(name: str) -> Tensor:
        with open_safetensors(where[name]) as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                raise CheckpointError(f"{where[name]}: lacks {name}, which the index says is here")
            return file.get_tensor(name)

    return _fill(config, HF_NAMES, set(where), read, str(folder))


def safetensors_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, for `model.safetensors` or its shards."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(f == Path(str(f)).name for f in files.values()):
            raise CheckpointError(f"{index}: no weight_map of tensor names to files in this folder")
        return {name: folder / file for name, file in files.items()}
    single = folder / "model.safetensors"
    with open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_safetensors(path: Path) -> Any:
    """An open safetensors file, mapped into memory. Raises CheckpointError when it is missing or corrupt."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file (weights are read from safetensors only)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _fill(
    config: DecoderConfig,
    names: dict[str, tuple[str, ...]],
    available: set[str],
    read: Callable[[str], Tensor],
    where: str,
) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config)
    state, used = {}, set()
    for ours, parameter in decoder.named_parameters():
        layer = ours.split(".")[1] if ours.startswith("blocks.") else ""
        template = ours.replace(f"blocks.{layer}.", "blocks.{i}.") if layer else ours
        parts = [part.format(i=layer) for part in names[template]]
        missing = [part for part in parts if part not in available]
        if missing:
            raise CheckpointError(f"{where}: missing tensor {missing[0]}")
        tensors = [read(part) for part in parts]
        tensor = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).float()
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{where}: {parts[0]} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        state[ours] = tensor
        used.update(parts)
    left_over = sorted(name for name in available - used if not name.endswith("rotary_emb.inv_freq"))
    if left_over:
        raise CheckpointError(f"{where}: {len(left_over)} tensors are not part of this architecture: {left_over[0]}, …")
    decoder.load_state_dict(state, assign=True, strict=False)
    decoder.cos, decoder.sin = rotary_table(config)  # those built above are on the meta device
    return decoder


def _rotary_halves(weight: Tensor, head_size: int) -> Tensor:
    """GGUF interleaves each head's rotary pairs (i, i+1); the decoder pairs (i, i + C/2)."""
    heads = weight.shape[0] // head_size
    return weight.view(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _short(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.6g}")
