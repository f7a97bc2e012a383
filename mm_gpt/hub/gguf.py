"""Decoder weights of the Llama family from GGUF files: quantised tensors are expanded to float32.

Query, key and value (and gate and up) are separate matrices there; the decoder stores each group as one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.weights import Account, Table, same
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig

GGUF_TABLE: Table = {
    "embedding.weight": same("token_embd.weight"),
    "norm.weight": same("output_norm.weight"),
    "head.weight": same("output.weight"),
    "blocks.{i}.attention_norm.weight": same("blk.{i}.attn_norm.weight"),
    "blocks.{i}.attention.qkv.weight": same(*(f"blk.{{i}}.attn_{p}.weight" for p in "qkv")),
    "blocks.{i}.attention.qkv.bias": same(*(f"blk.{{i}}.attn_{p}.bias" for p in "qkv")),
    "blocks.{i}.attention.out.weight": same("blk.{i}.attn_output.weight"),
    "blocks.{i}.attention.out.bias": same("blk.{i}.attn_output.bias"),
    "blocks.{i}.mlp_norm.weight": same("blk.{i}.ffn_norm.weight"),
    "blocks.{i}.mlp.gate_up.weight": same("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    "blocks.{i}.mlp.down.weight": same("blk.{i}.ffn_down.weight"),
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
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
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

    with torch.device("meta"):
        decoder = Decoder(config)
    account = Account(str(path), tensors)
    account.fill(decoder, GGUF_TABLE, read)
    account.finish()
    return decoder, fields


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


def _rotary_halves(weight: Tensor, head_size: int) -> Tensor:
    """GGUF interleaves each head's rotary pairs (i, i+1); the decoder pairs (i, i + C/2)."""
    heads = weight.shape[0] // head_size
    return weight.view(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _short(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.6g}")
