"""A decoder's next token on the CPU by compiled code: `CompiledDecoder`. The torch decoder is its oracle.

Shapes: R rows, L layers, K key-value heads, C head size, D width, V vocabulary.
"""

import os
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm_gpt.errors import ConfigError
from mm_gpt.kernels.attention import HeadSpec, PatternSpec
from mm_gpt.kernels.kv_blocks import BLOCK, BlockPool
from mm_gpt.kernels.library import library
from mm_gpt.kernels.matmul import KINDS, callable_at, kernels, prepared_for, row_bytes
from mm_gpt.kernels.memory import Arena, huge
from mm_gpt.kernels.processor import isa as find_isa
from mm_gpt.kernels.step import (
    ARGUMENTS,
    LAYER,
    NORMS,
    PART,
    PRODUCTS,
    StepSpec,
    line_bytes,
    prepared_stride,
    write_step,
)
from mm_gpt.kernels.team import default_threads, team
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.packed import Matrix, PackedEmbedding, PackedLinear
from mm_gpt.model.positions import rotation, sinusoids, xpos_rotation

FLOAT_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TABLE_ROWS = 1024
"""Positions by which the tables of angles grow."""
CALL = ("num_rows", "ids", "positions", "lengths", "tables", "table_stride", "hidden", "logits")
"""The arguments that are a call's own; they come first."""
assert ARGUMENTS.names[: len(CALL)] == CALL


def missing(config: DecoderConfig) -> str | None:
    """Why a decoder cannot run here, in a few words; None if it can."""
    if os.name != "posix":
        return "compiled decoding needs Linux or macOS"
    if config.positions == "relative":
        return "relative positions"
    if not config.causal:
        return "attention that looks ahead"
    return None


class CompiledDecoder:
    """One token for each of several rows a call. A row's result does not depend, bit for bit, on the other rows.

    Keys and values are in `pool`; the caller allocates a row's blocks there, and fills them with its prompt's.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        isa: str | None = None,
        max_kv_bytes: int | None = None,
    ):
        """threads: None is what the machine has. isa: an instruction set below the machine's, by name.

        The decoder's matrices are moved into huge pages, one after the other, and used there by torch as well; it must
        not change its type afterwards. Raises ConfigError for a decoder that cannot run here.
        """
        config = decoder.config
        reason = missing(config)
        if reason is not None:
            raise ConfigError(f"the decoder cannot be compiled: {reason}")
        self.decoder, self.config = decoder, config
        self.num_threads = default_threads() if threads is None else threads
        if self.num_threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self.pool = BlockPool(
            config.num_layers, config.num_kv_heads, config.head_size, kv_dtype, max_bytes=max_kv_bytes
        )
        self._isa = find_isa(isa)
        self._kept: list[Any] = []  # what the records point to
        self._patterns, layer_patterns = _patterns(config)
        _move_matrices(decoder)
        products = self._products()
        forms = {name: sorted({part[1] for parts in products[name] for part in parts}) for name in PRODUCTS}
        self._num_forms = max(len(found) for found in forms.values())
        spec = self._spec(kv_dtype, forms)
        self._line = max(
            line_bytes(max(config.width, config.num_heads * config.head_size, config.mlp_width)),
            line_bytes(config.head_size) + line_bytes(max(spec.heads.tiles) * config.head_size),
        )
        self._step = library(f"step {spec!r}", self._isa, lambda module: write_step(module, spec)).address("step")
        self._records(products, forms, layer_patterns)
        self._rows = self._length = self._positions = 0
        self._reserve(1, BLOCK)
        self._cover(0)

    # ---- building ----

    def _spec(self, kv_dtype: torch.dtype, forms: dict[str, list[str]]) -> StepSpec:
        config = self.config
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        heads = HeadSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            scale=scale,
            softcap=config.attention_softcap,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rotary=config.positions in ("rope", "xpos"),
            rotary_scaled=config.positions == "xpos",
            kv_dtype=str(kv_dtype).removeprefix("torch."),
        )
        same = {f.name: getattr(config, f.name) for f in fields(StepSpec) if hasattr(config, f.name)}
        return StepSpec(
            **same, heads=heads, patterns=self._patterns, forms=tuple((name, tuple(forms[name])) for name in PRODUCTS)
        )

    def _products(self) -> dict[str, list[list[tuple[str, str, Tensor, int, int, Tensor | None]]]]:
        """For each product its layers' parts: kind, prepared form, weights, rows, columns, bias."""
        config, decoder = self.config, self.decoder
        blocks: list[Any] = list(decoder.blocks)
        up, ups = ("gate_up", 2) if config.gated_mlp else ("up", 1)
        D, M, inner = config.width, config.mlp_width, config.num_heads * config.head_size
        all_heads = inner + 2 * config.num_kv_heads * config.head_size
        head = decoder.embedding if decoder.head is None else decoder.head
        return {
            "qkv": [self._parts(block.attention.qkv, "attention.qkv", all_heads, D) for block in blocks],
            "out": [self._parts(block.attention.out, "attention.out", D, inner) for block in blocks],
            "up": [self._parts(getattr(block.mlp, up), f"mlp.{up}", ups * M, D) for block in blocks],
            "down": [self._parts(block.mlp.down, "mlp.down", D, M) for block in blocks],
            "head": [self._parts(head, "head", config.vocab_size, D)],
        }

    def _parts(
        self, module: nn.Module, name: str, num_outputs: int, num_inputs: int
    ) -> list[tuple[str, str, Tensor, int, int, Tensor | None]]:
        bias = getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight.detach()
            if weight.dtype not in FLOAT_KINDS or weight.device.type != "cpu":
                raise ConfigError(f"{name} cannot be compiled: its weights are {weight.dtype} on {weight.device}")
            found = [(FLOAT_KINDS[weight.dtype], weight, weight.shape[0], weight.shape[1])]
        elif isinstance(module, (PackedLinear, PackedEmbedding)):
            found = [(matrix.kind, matrix.data, matrix.rows, matrix.columns) for matrix in _matrices(module)]
        else:
            raise ConfigError(f"{name} cannot be compiled: it is a {type(module).__name__}")
        parts, first = [], 0
        for kind, data, rows, columns in found:
            if kind not in KINDS:
                raise ConfigError(f"{name} cannot be compiled: no kernel for {kind}")
            if columns != num_inputs:
                raise ConfigError(f"{name} has {columns} columns, not {num_inputs}")
            data = data.contiguous()
            part_bias = None if bias is None else bias.detach().float()[first : first + rows].contiguous()
            parts.append((kind, prepared_for(kind), data, rows, columns, part_bias))
            first += rows
        if first != num_outputs:
            raise ConfigError(f"{name} has {first} rows, not {num_outputs}")
        return parts

    def _records(
        self, products: dict[str, list[list[Any]]], forms: dict[str, list[str]], layer_patterns: list[int]
    ) -> None:
        tables: dict[str, list[int]] = {}
        for product, layers in products.items():
            tables[product] = []
            for parts in layers:
                records, first = [], 0
                for kind, form, data, rows, columns, bias in parts:
                    records += PART.values(
                        matmul=kernels(kind, self._isa).matmul,
                        weights=self._keep(data),
                        row_bytes=row_bytes(kind, columns),
                        columns=columns,
                        first=first,
                        rows=rows,
                        form=forms[product].index(form),
                        bias=0 if bias is None else self._keep(bias),
                    )
                    first += rows
                tables[product].append(self._keep(torch.tensor(records, dtype=torch.int64)))
        records = []
        for layer, block in enumerate(self.decoder.blocks):
            values = {}
            for name, module in zip(NORMS, _norms(block), strict=True):
                for what in ("weight", "bias"):
                    values[f"{name}_{what}"] = self._keep_norm(module, what)
            for name in ("q_norm", "k_norm"):
                values[name] = self._keep_norm(getattr(block.attention, name), "weight")
            for product in PRODUCTS[:-1]:
                values[f"{product}_parts"] = tables[product][layer]
                values[f"{product}_count"] = len(products[product][layer])
            records += LAYER.values(**values, pattern=layer_patterns[layer], is_local=int(self.config.is_local(layer)))
        self._arguments = dict.fromkeys(ARGUMENTS.names, 0)
        self._arguments |= {
            "layers": self._keep(torch.tensor(records, dtype=torch.int64)),
            "last_norm_weight": self._keep_norm(self.decoder.norm, "weight"),
            "last_norm_bias": self._keep_norm(self.decoder.norm, "bias"),
            "head_parts": tables["head"][0],
            "head_count": len(products["head"][0]),
        }
        self._head = products["head"][0]
        kind, _, data, _, columns, _ = self._parts(
            self.decoder.embedding, "embedding", self.config.vocab_size, self.config.width
        )[0]
        self._arguments |= {
            "expand": kernels(kind, self._isa).expand,
            "embedding": self._keep(data),
            "embedding_row": row_bytes(kind, columns),
        }
        if self.config.positions == "learned":
            places = self.decoder.position_embedding.weight.detach().float()[self.config.position_offset :]
            self._arguments["places"] = self._keep(places.contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _keep_norm(self, module: nn.Module | None, what: str) -> int:
        parameter = getattr(module, what, None)
        return 0 if parameter is None else self._keep(parameter.detach().float().contiguous())

    # ---- running ----

    def _reserve(self, rows: int, length: int) -> None:
        """Buffers for so many rows, and scores of so many tokens."""
        if rows <= self._rows and length <= self._length:
            return
        config = self.config
        rows, length = max(rows, self._rows), max(2 * length if length > self._length else 0, self._length)
        self._rows, self._length = rows, length
        H, K, C = config.num_heads, config.num_kv_heads, config.head_size
        sizes = {
            "qkv": (H + 2 * K) * C,
            "heads": H * C,
            "gates": config.mlp_width * (2 if config.gated_mlp else 1),
            "mlp": config.mlp_width,
            "added": config.width,
        }
        self._buffers = {name: _zeros(rows * line_bytes(size)) for name, size in sizes.items()}
        widest = max(config.width, H * C, config.mlp_width)
        form_stride = rows * prepared_stride(widest)
        line = rows * line_bytes(config.width)
        prepared = line + self._line + 64
        scores = prepared + self._num_forms * form_stride
        total = (scores + 4 * (length + 2 * BLOCK) * 4 + 4095) // 4096 * 4096
        self._buffers["scratch"] = _zeros(total * self.num_threads)
        self._arguments |= {name: buffer.data_ptr() for name, buffer in self._buffers.items()}
        self._arguments |= {
            "scratch_stride": total,
            "line": line,
            "prepared": prepared,
            "form_stride": form_stride,
            "scores": scores,
        }
        self._record = np.array(ARGUMENTS.values(**self._arguments), dtype=np.int64)

    def _cover(self, highest: int) -> None:
        """Tables of what goes by position, up to the highest one."""
        if highest < self._positions:
            return
        config = self.config
        self._positions = (highest // TABLE_ROWS + 1) * TABLE_ROWS
        if config.positions == "sinusoidal":
            places = torch.arange(self._positions) + config.position_offset
            self._places = sinusoids(places, config.width, torch.float32)
            self._arguments["places"] = self._places.data_ptr()
        elif config.positions in ("rope", "xpos"):
            self._angles = [_angle_table(config, self._positions, local=False)]
            if config.local_rope_theta is not None:
                self._angles.append(_angle_table(config, self._positions, local=True))
            self._arguments["angles"] = self._angles[0].data_ptr()
            self._arguments["local_angles"] = self._angles[-1].data_ptr()
        self._record = np.array(ARGUMENTS.values(**self._arguments), dtype=np.int64)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, V), float32: the end of a step, by the calling thread alone, for states from elsewhere."""
        rows, config = len(hidden), self.config
        hidden = hidden.float().contiguous()
        stride = prepared_stride(config.width)
        prepared, logits = _zeros(rows * stride), torch.empty(rows, line_bytes(config.vocab_size) // 4)
        first = 0
        for kind, _, data, count, columns, bias in self._head:
            made = kernels(kind, self._isa)
            prepare, multiply = callable_at(made.prepare, 3), callable_at(made.matmul, 11)
            for row in range(rows):
                prepare(hidden[row].data_ptr(), columns, prepared.data_ptr() + row * stride)
            where = (rows, logits.data_ptr() + first * 4, logits.shape[1] * 4, 0 if bias is None else bias.data_ptr())
            multiply(data.data_ptr(), row_bytes(kind, columns), columns, 0, count, prepared.data_ptr(), stride, *where)
            first += count
        cap = config.logit_softcap
        found = logits[:, : config.vocab_size]
        return found if cap is None else cap * torch.tanh(found / cap)

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, positions: Tensor, lengths: Tensor, tables: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (R, D) after the last norm and logits (R, V), float32, of one more token in each row.

        ids, positions, lengths (R,) int64: the new tokens, their positions, and how many tokens the row has already.
        tables: the numbers of each row's blocks, with room for the new token, whose key and value are written there.
        """
        rows, config = len(ids), self.config
        ids, positions, lengths = (numbers.to(torch.int64).contiguous() for numbers in (ids, positions, lengths))
        self._check(ids.tolist(), positions.tolist(), lengths.tolist(), tables)
        self._reserve(rows, int(lengths.max()) + 1)
        self._cover(int(positions.max()))
        width = max(len(table) for table in tables)
        numbers = np.zeros((rows, width), dtype=np.int64)
        for row, table in enumerate(tables):
            numbers[row, : len(table)] = table
        addresses = self.pool.addresses[numbers]
        hidden = torch.empty(rows, line_bytes(config.width) // 4)
        logits = torch.empty(rows, line_bytes(config.vocab_size) // 4)
        self._record[: len(CALL)] = (
            *(rows, ids.data_ptr(), positions.data_ptr(), lengths.data_ptr()),
            *(addresses.ctypes.data, width, hidden.data_ptr(), logits.data_ptr()),
        )
        team(self.num_threads).run(self._step, self._record.ctypes.data)
        return hidden[:, : config.width], logits[:, : config.vocab_size]

    def _check(self, ids: list[int], positions: list[int], lengths: list[int], tables: list[list[int]]) -> None:
        """What compiled code would read from wherever it is told to."""
        config = self.config
        learned = config.max_length if config.positions == "learned" else None
        for token, position, length, table in zip(ids, positions, lengths, tables, strict=True):
            if not 0 <= token < config.vocab_size:
                raise IndexError(f"there is no token {token}: the vocabulary has {config.vocab_size}")
            if position < 0 or (learned is not None and position >= learned):
                raise IndexError(f"there is no position {position}")
            if not 0 <= length < len(table) * BLOCK:
                raise ValueError(f"a row of {length} tokens has {len(table)} blocks, and no room for one more")


def _move_matrices(decoder: Decoder) -> None:
    """Into huge pages. What a matrix had before is given back before the next one is copied."""
    plain = [module for module in decoder.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    packed = [module for module in decoder.modules() if isinstance(module, (PackedLinear, PackedEmbedding))]
    size = sum(Arena.room(module.weight) for module in plain)
    arena = Arena(size + sum(Arena.room(matrix.data) for module in packed for matrix in _matrices(module)))
    for module in plain:
        module.weight.data = arena.take(module.weight.detach())
    for place in packed:
        moved = [replace(matrix, data=arena.take(matrix.data)) for matrix in _matrices(place)]
        if isinstance(place, PackedLinear):
            place.parts = moved
        else:
            place.matrix = moved[0]


def _matrices(module: PackedLinear | PackedEmbedding) -> list[Matrix]:
    return module.parts if isinstance(module, PackedLinear) else [module.matrix]


def _zeros(num_bytes: int) -> Tensor:
    """With a vector's room behind, that whole vectors may be read to the end."""
    return huge(num_bytes + 128)


def _norms(block: Any) -> list[nn.Module | None]:
    """In the order of NORMS."""
    return [
        block.attention_norm,
        getattr(block, "attention_post_norm", None),
        block.attention.sub_norm,
        block.mlp_norm,
        getattr(block, "mlp_post_norm", None),
        block.mlp.sub_norm,
    ]


def _patterns(config: DecoderConfig) -> tuple[tuple[tuple[PatternSpec, ...], ...], list[int]]:
    """The different patterns, and which of them each layer has."""
    found: list[tuple[PatternSpec, ...]] = []
    layers = []
    for layer in range(config.num_layers):
        pattern = config.pattern(layer)
        halves = tuple(
            PatternSpec(half.kind, half.window, half.stride, half.summary) for half in pattern.halves or (pattern,)
        )
        if len(halves) == 2 and config.num_heads % 2:
            raise ConfigError(f"{config.num_heads} heads cannot have a pattern for each half")
        if halves not in found:
            found.append(halves)
        layers.append(found.index(halves))
    return tuple(found), layers


def _angle_table(config: DecoderConfig, size: int, *, local: bool) -> Tensor:
    """(size, C) cosines and sines of each position, C/2 each; xPos: (size, 2C), those of queries and those of keys."""
    positions, like = torch.arange(size).unsqueeze(0), torch.zeros(1)
    half = config.head_size // 2
    if config.positions == "xpos":
        turn = xpos_rotation(positions, config.head_size, config.rope_theta, config.max_length // 2, like)
    elif local:
        assert config.local_rope_theta is not None
        turn = rotation(positions, config.head_size, config.local_rope_theta, None, like)
    else:
        turn = rotation(positions, config.head_size, config.rope_theta, config.rope_scaling, like)
    angles = torch.cat([turn.cos[0, 0, :, :half], turn.sin[0, 0, :, :half]], dim=-1)
    if turn.scale is None:
        return angles.contiguous()
    scale = turn.scale[0, 0]
    return torch.cat([angles * scale, angles / scale], dim=-1).contiguous()
