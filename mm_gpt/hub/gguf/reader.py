"""Decoder weights from GGUF files: quantised tensors are expanded to float32. `gguf_writer` is the way back.

Query, key and value (and gate and up) are separate matrices in the files of the Llama family; the decoder stores each
group as one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.weights import Account, Table, same, unfilled
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.positions import RopeScaling

GGUF_TABLE: Table = {
    "embedding.weight": same("token_embd.weight"),
    "norm.weight": same("output_norm.weight"),
    "head.weight": same("output.weight"),
    "blocks.{i}.attention_norm.weight": same("blk.{i}.attn_norm.weight"),
    "blocks.{i}.attention.qkv.weight": same(*(f"blk.{{i}}.attn_{p}.weight" for p in "qkv")),
    "blocks.{i}.attention.qkv.bias": same(*(f"blk.{{i}}.attn_{p}.bias" for p in "qkv")),
    "blocks.{i}.attention.q_norm.weight": same("blk.{i}.attn_q_norm.weight"),
    "blocks.{i}.attention.k_norm.weight": same("blk.{i}.attn_k_norm.weight"),
    "blocks.{i}.attention.out.weight": same("blk.{i}.attn_output.weight"),
    "blocks.{i}.attention.out.bias": same("blk.{i}.attn_output.bias"),
    "blocks.{i}.mlp_norm.weight": same("blk.{i}.ffn_norm.weight"),
    "blocks.{i}.mlp.gate_up.weight": same("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    "blocks.{i}.mlp.down.weight": same("blk.{i}.ffn_down.weight"),
}
_GPT2_NAMES = {
    "norm": "output_norm",
    "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attention.qkv": "blk.{i}.attn_qkv",
    "blocks.{i}.attention.out": "blk.{i}.attn_output",
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_up",
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down",
}
_GPT2_TABLE: Table = {
    "embedding.weight": same("token_embd.weight"),
    "position_embedding.weight": same("position_embd.weight"),
    "head.weight": same("output.weight"),
    **{f"{ours}.{part}": same(f"{its}.{part}") for ours, its in _GPT2_NAMES.items() for part in ("weight", "bias")},
}
ARCHITECTURES = {"llama": GGUF_TABLE, "qwen2": GGUF_TABLE, "qwen3": GGUF_TABLE, "gpt2": _GPT2_TABLE}


def load_gguf(path: Path) -> tuple[Decoder, dict[str, Any]]:
    """A float32 decoder from a GGUF file (quantised tensors are expanded) and the file's metadata fields.

    Raises CheckpointError naming the file when it is corrupt, of another architecture, or its tensors don't fit.
    """
    reader = open_gguf(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    try:
        vocab_size = len(fields["tokenizer.ggml.tokens"])
        config = (_gpt2_config if kind == "gpt2" else _llama_config)(kind, own, tensors, vocab_size)
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata lacks {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None

    def read(name: str) -> Tensor:
        from gguf import dequantize

        tensor = tensors[name]
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:
            quantisation = tensor.tensor_type.name
            raise CheckpointError(f"{path}: tensor {name} has the unsupported quantisation {quantisation}") from None
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
            weight = rotary_halves(weight, config.head_size)
        return weight

    with unfilled():
        decoder = Decoder(config)
    account = Account(str(path), tensors)
    account.fill(decoder, ARCHITECTURES[kind], read)
    account.finish()
    return decoder, fields


def _llama_config(kind: str, own: dict[str, Any], tensors: dict[str, Any], vocab_size: int) -> DecoderConfig:
    heads = own["attention.head_count"]
    default = own.get("rope.dimension_count", own["embedding_length"] // heads)
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{kind}.rope.scaling.type {scaling!r} is not supported, only none and linear")
    return DecoderConfig(
        vocab_size=vocab_size,
        width=own["embedding_length"],
        num_layers=own["block_count"],
        num_heads=heads,
        num_kv_heads=own.get("attention.head_count_kv", heads),
        head_size=own.get("attention.key_length", default),
        mlp_width=own["feed_forward_length"],
        max_length=own["context_length"],
        norm_eps=_short(own["attention.layer_norm_rms_epsilon"]),
        qk_norm=kind == "qwen3",
        rope_theta=own.get("rope.freq_base", 10_000.0),
        rope_scaling=RopeScaling(kind="linear", factor=own["rope.scaling.factor"]) if scaling == "linear" else None,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )


def _gpt2_config(kind: str, own: dict[str, Any], tensors: dict[str, Any], vocab_size: int) -> DecoderConfig:
    heads = own["attention.head_count"]
    return DecoderConfig(
        vocab_size=vocab_size,
        width=own["embedding_length"],
        num_layers=own["block_count"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=own["embedding_length"] // heads,
        mlp_width=own["feed_forward_length"],
        max_length=own["context_length"],
        norm="layer",
        norm_eps=_short(own["attention.layer_norm_epsilon"]),
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        tie_embeddings="output.weight" not in tensors,
    )


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


def rotary_halves(weight: Tensor, head_size: int) -> Tensor:
    """GGUF's llama interleaves each head's rotary pairs (i, i+1); the decoder pairs (i, i + C/2)."""
    heads = weight.shape[0] // head_size
    return weight.view(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def rotary_pairs(weight: Tensor, head_size: int) -> Tensor:
    """The way back of `rotary_halves`."""
    heads = weight.shape[0] // head_size
    return weight.reshape(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _short(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.6g}")
