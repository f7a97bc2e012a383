"""Decoders and their tokenizers from GGUF files: blocks as they lie there, or expanded to float32.

Query, key and value (and gate and up) are separate matrices in the files of the Llama family; the decoder stores each
group as one.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.gguf.file import Fields, GGUFTensor, read_gguf
from mm_gpt.hub.packing import Rows, packing_of
from mm_gpt.hub.weights import Table, WeightLoader, naming, same, unfilled
from mm_gpt.kernels.formats import FORMATS, PLAIN
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import MAX_LAYERS, DecoderConfig
from mm_gpt.model.packed import PLAIN_DTYPES, Matrix, unfill
from mm_gpt.model.positions import RopeScaling
from mm_gpt.tokenizer import GGUF_CONTROL, GGUF_PRE_TOKENIZERS, Tokenizer

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


def load_gguf(path: Path, dtype: str = "fp32") -> tuple[Decoder, Fields]:
    """The decoder in a GGUF file, kept as `dtype` says (mm_gpt.hub.packing), and the file's metadata.

    In `fp32` all is expanded. With `stored`, which is `auto` for all files but those of float32, what lies in the file
    is mapped and used as it is. Raises CheckpointError naming the file when it is corrupt, of another architecture, or
    its tensors don't fit or are of a type that is not multiplied here.
    """
    file = read_gguf(path)
    fields, tensors = file.fields, file.tensors
    kind = fields.text("general.architecture", ARCHITECTURES)
    with naming(str(path)):
        config = (_gpt2_config if kind == "gpt2" else _llama_config)(kind, fields, tensors)

    def ordered(weight: Tensor, name: str) -> Tensor:
        """Rows of values or of blocks, in the order of the decoder's heads."""
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
            return rotary_halves(weight, config.head_size, name, str(path))
        return weight

    def read(name: str) -> Tensor:
        return ordered(_expanded(tensors[name], f"{path}: tensor {name}"), name)

    def rows(name: str) -> Rows:
        matrix = _as_stored(tensors[name], f"{path}: tensor {name}")
        return Matrix(matrix.kind, ordered(matrix.data, name))

    with naming(str(path)), unfilled():
        decoder = Decoder(config)
    matrices = {tensor.kind.name for tensor in tensors.values() if tensor.data.ndim > 1}
    if dtype == "auto" and matrices != {"F32"}:
        dtype = "stored"
    packing = packing_of(dtype, matrices)
    if packing is not None:
        unfill(decoder)
    account = WeightLoader(str(path), tensors)
    account.fill(decoder, ARCHITECTURES[kind], read, packing=packing, rows=rows)
    account.finish()
    return decoder, fields


def _expanded(tensor: GGUFTensor, name: str) -> Tensor:
    """In float32. Raises CheckpointError naming the tensor and its type where nothing here reads it."""
    if tensor.kind.name in FORMATS and tensor.data.ndim == 2:
        matrix = _as_stored(tensor, name)
        return matrix.values(0, matrix.rows)
    from gguf import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.kind))
    except NotImplementedError:
        raise CheckpointError(f"{name} has the unsupported quantisation {tensor.kind.name}") from None


def _as_stored(tensor: GGUFTensor, name: str) -> Matrix:
    """Raises CheckpointError naming the tensor and its type where nothing here multiplies it."""
    kind, data = tensor.kind.name, torch.from_numpy(tensor.data)
    if kind not in FORMATS:
        raise CheckpointError(f"{name} is stored as {kind}, which is not multiplied here; dtype fp32 expands it")
    if data.dim() != 2:
        raise CheckpointError(f"{name} has {data.dim()} dimensions, which is no matrix")
    return Matrix(kind, data.view(PLAIN_DTYPES[kind]) if kind in PLAIN else data)


SIZE = 1 << 24
"""More than any width, length or number of heads."""


def _sizes(kind: str, fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    """What all architectures say."""
    layers = fields.integer(f"{kind}.block_count", 1, MAX_LAYERS)
    # Each layer takes time, even without its weights
    stored = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    if layers > stored:
        raise CheckpointError(f"{fields.where}: {kind}.block_count is {layers}, but there are tensors of {stored}")
    return {
        "vocab_size": len(fields.texts("tokenizer.ggml.tokens")),
        "width": fields.integer(f"{kind}.embedding_length", 1, SIZE),
        "num_layers": layers,
        "num_heads": fields.integer(f"{kind}.attention.head_count", 1, SIZE),
        "mlp_width": fields.integer(f"{kind}.feed_forward_length", 1, SIZE),
        "max_length": fields.integer(f"{kind}.context_length", 1, SIZE),
        "tie_embeddings": "output.weight" not in tensors,
    }


def _llama_config(kind: str, fields: Fields, tensors: Collection[str]) -> DecoderConfig:
    sizes = _sizes(kind, fields, tensors)
    width, heads = sizes["width"], sizes["num_heads"]
    scaling = fields.text(f"{kind}.rope.scaling.type", ("none", "linear"), "none")
    rotated = fields.integer(f"{kind}.rope.dimension_count", 1, SIZE, max(1, width // heads))
    head_size = fields.integer(f"{kind}.attention.key_length", 1, SIZE, rotated)
    for name in ("rope.dimension_count", "attention.value_length"):
        if fields.integer(f"{kind}.{name}", 1, SIZE, head_size) != head_size:
            raise fields.error(f"{kind}.{name}", f"the size of a head, {head_size}")
    factor = fields.number(f"{kind}.rope.scaling.factor", 1e6) if scaling == "linear" else None
    return DecoderConfig(
        **sizes,
        num_kv_heads=fields.integer(f"{kind}.attention.head_count_kv", 1, SIZE, heads),
        head_size=head_size,
        norm_eps=fields.number(f"{kind}.attention.layer_norm_rms_epsilon", 1),
        qk_norm=kind == "qwen3",
        rope_theta=fields.number(f"{kind}.rope.freq_base", 1e12, 10_000.0),
        rope_scaling=None if factor is None else RopeScaling(kind="linear", factor=factor),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )


def _gpt2_config(kind: str, fields: Fields, tensors: Collection[str]) -> DecoderConfig:
    sizes = _sizes(kind, fields, tensors)
    return DecoderConfig(
        **sizes,
        num_kv_heads=sizes["num_heads"],
        head_size=sizes["width"] // sizes["num_heads"],
        norm="layer",
        norm_eps=fields.number(f"{kind}.attention.layer_norm_epsilon", 1),
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        output_bias=True,
        positions="learned",
    )


def read_tokenizer(fields: Fields) -> Tokenizer:
    """The tokenizer in the metadata, if it is byte-level BPE. Raises CheckpointError naming the file."""
    fields.text("tokenizer.ggml.model", ("gpt2",))
    pre = fields.text("tokenizer.ggml.pre", GGUF_PRE_TOKENIZERS, "gpt-2")
    tokens = fields.texts("tokenizer.ggml.tokens")
    merges = [merge.partition(" ")[::2] for merge in fields.texts("tokenizer.ggml.merges")]
    kinds = fields.integers("tokenizer.ggml.token_type", len(tokens))
    end_of_turn = tokens[fields.integer("tokenizer.ggml.eos_token_id", 0, len(tokens) - 1)]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{fields.where}: tokenizer.ggml.tokens has a token twice")
    if wrong := [pair for pair in merges if not all(pair)]:
        raise CheckpointError(
            f"{fields.where}: tokenizer.ggml.merges: {' '.join(wrong[0])[:40]!r} is not a pair of tokens"
        )
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL]
    return Tokenizer.from_bpe(
        {token: id for id, token in enumerate(tokens)},
        merges,
        pre_tokenizer=GGUF_PRE_TOKENIZERS[pre](),
        special=control,
        end_of_turn=end_of_turn,
        where=fields.where,
    )


def rotary_halves(weight: Tensor, head_size: int, name: str = "", where: str = "") -> Tensor:
    """GGUF's llama interleaves each head's rotary pairs (i, i+1); the decoder pairs (i, i + C/2).

    Raises CheckpointError, with the tensor's `name` and file, where its rows are no whole heads.
    """
    heads = weight.shape[0] // head_size
    if heads * head_size != weight.shape[0]:
        raise CheckpointError(f"{where}: {name} has {weight.shape[0]} rows, which are no heads of {head_size}")
    return weight.view(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def rotary_pairs(weight: Tensor, head_size: int) -> Tensor:
    """The way back of `rotary_halves`."""
    heads = weight.shape[0] // head_size
    return weight.reshape(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()
