"""One token for each of several rows, through the whole decoder, in one call of compiled code.

Every thread of the team runs the function that `write_step` writes. Each keeps its own copy of the rows' states, and
prepares the input of a product for itself: both are cheap, and leave five barriers to a layer:

    queries, keys, values | attention | output projection | gate and up, activation | down

Rows of a product's output are split evenly; attention is split by rows and heads. What a row gets is computed by the
same operations in the same order, whoever else is there and however many threads there are.

The code is written for one configuration, with its sizes as constants; weights, and the kinds in which they are
stored, come as records of addresses and numbers (i64), whose layout is below.
Shapes: R rows, D width, H heads, K key-value heads, G = H / K, C head size, M the MLP's width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from mm_gpt.kernels.attention import HeadSpec, PatternSpec, write_attend, write_keep, write_turn
from mm_gpt.kernels.elementwise import FLOATS, LANES, activate, norm, softcap
from mm_gpt.kernels.kv_blocks import BLOCK, padded_head
from mm_gpt.kernels.matmul import Prepared, write_prepare
from mm_gpt.kernels.simd import F32, Code, Module, Value
from mm_gpt.kernels.team import BASE, write_barrier


class Record:
    """Named i64 fields in memory."""

    def __init__(self, *names: str):
        self.names = names
        self.index = {name: index for index, name in enumerate(names)}
        self.size = 8 * len(names)

    def values(self, **fields: int) -> list[int]:
        """In memory's order; all must be there."""
        assert fields.keys() == set(self.names), fields.keys() ^ set(self.names)
        return [fields[name] for name in self.names]

    def get(self, code: Code, address: Value, name: str) -> Value:
        return code.load_i64(address, 8 * self.index[name])


NORMS = ("attention", "attention_post", "attention_sub", "mlp", "mlp_post", "mlp_sub")
PRODUCTS = ("qkv", "out", "up", "down", "head")
PART = Record("matmul", "weights", "row_bytes", "columns", "first", "rows", "form", "bias")
"""One matrix of a product: its rows are the outputs from `first` on; `form` counts the prepared forms of its input."""
LAYER = Record(
    *(f"{name}_{what}" for name in NORMS for what in ("weight", "bias")),
    *("q_norm", "k_norm", "pattern", "is_local"),
    *(f"{name}_{what}" for name in PRODUCTS[:-1] for what in ("parts", "count")),
)
ARGUMENTS = Record(
    *("num_rows", "ids", "positions", "lengths", "tables", "table_stride", "hidden", "logits"),
    *("expand", "embedding", "embedding_row", "places", "angles", "local_angles"),
    *("qkv", "heads", "gates", "mlp", "added"),
    *("scratch", "scratch_stride", "line", "prepared", "form_stride", "scores"),
    *("layers", "last_norm_weight", "last_norm_bias", "head_parts", "head_count"),
)
"""ids, positions, lengths: R numbers each. tables: (R, table_stride) addresses of blocks. expand: the function for rows
of `embedding`. places: D floats for each position, to be added, or 0. angles: a row for each position. hidden, logits
and the five shared buffers have rows of whole vectors. scratch: for each thread the rows' states, then, so many bytes
from its beginning, one row of anything, prepared inputs (a form after the other) and scores."""


@dataclass(frozen=True)
class StepSpec:
    """What the code depends on. Names are those of `DecoderConfig`."""

    width: int
    num_layers: int
    mlp_width: int
    vocab_size: int
    norm: str
    norm_eps: float
    norm_place: str
    sub_norm: bool
    activation: str
    gated_mlp: bool
    logit_softcap: float | None
    residual_scale: float
    embedding_scale: float
    heads: HeadSpec
    patterns: tuple[tuple[PatternSpec, ...], ...]
    """The different ones of the layers; each of all heads, or of their first and second half."""
    forms: tuple[tuple[str, tuple[Prepared, ...]], ...]
    """In which forms each product wants its input."""


def line_bytes(size: int) -> int:
    """A row of floats, of whole vectors."""
    return (size + LANES - 1) // LANES * LANES * 4


def prepared_stride(columns: int) -> int:
    """A row of prepared activations, in any form, of whole cache lines."""
    return (columns + 63) // 64 * 256


def _share(total: Value, unit: int, thread: Value, num_threads: Value) -> tuple[Value, Value]:
    """A thread's part of `total` things that are handed out by `unit`."""
    units = (total + (unit - 1)) // unit
    start, end = units * thread // num_threads * unit, units * (thread + 1) // num_threads * unit
    return start, (end < total).where(end, total)


class _Step:
    """The function that is being written."""

    def __init__(self, module: Module, spec: StepSpec):
        self.module, self.spec = module, spec
        self.forms = dict(spec.forms)
        heads = spec.heads
        used = sorted({form for forms in self.forms.values() for form in forms})
        self.prepare = {form: write_prepare(module, form) for form in used}
        self.barrier_function = write_barrier(module)
        self.keep, self.turn = write_keep(module, heads), write_turn(module, heads)
        self.attend = {
            (pattern, size): write_attend(module, f"attend_{index}_{size}", heads, pattern, size)
            for index, pattern in enumerate(sorted({p for halves in spec.patterns for p in halves}, key=repr))
            for size in heads.tiles
        }
        self.multiply = self._write_multiply()

    def _write_multiply(self) -> ir.Function:
        """`multiply(parts, count, start, end, prepared, form_stride, num_rows, out, out_stride)`: outputs start…end."""
        with self.module.function("multiply", 9, inline=False) as (code, args):
            parts, count, start, end, prepared, form_stride, num_rows, out, out_stride = args
            with code.loop(0, count) as index:
                part = parts + index * PART.size
                kernel, weights, row_bytes, columns, first, rows, form, bias = (
                    PART.get(code, part, name) for name in PART.names
                )
                low, high = start - first, end - first
                low, high = (low > 0).where(low, 0), (high < rows).where(high, rows)
                with code.when(low < high):
                    inputs, stride = prepared + form * form_stride, (columns + 63) // 64 * 256
                    target = out + first * 4
                    code.call_address(
                        kernel,
                        weights,
                        row_bytes,
                        columns,
                        low,
                        high,
                        inputs,
                        stride,
                        num_rows,
                        target,
                        out_stride,
                        bias,
                    )
        return self.module.ir.globals["multiply"]

    def write(self) -> None:
        with self.module.function("step", 4, exported=True) as (code, (arguments, thread, num_threads, team)):
            self.code, self.arguments, self.thread, self.num_threads, self.team = (
                code,
                arguments,
                thread,
                num_threads,
                team,
            )
            self.num_rows = self.argument("num_rows")
            self.arrivals = code.variable(code.load_i64(team, BASE))
            self.x = self.argument("scratch") + thread * self.argument("scratch_stride")
            self.line = self.x + self.argument("line")
            self.prepared = self.x + self.argument("prepared")
            self._embed()
            layers = self.argument("layers")
            with code.loop(0, self.spec.num_layers) as index:
                layer = layers + index * LAYER.size
                with code.when(index > 0):
                    self._add("mlp", layer - LAYER.size)
                self._layer(layer, index)
            self._add("mlp", layers + (self.spec.num_layers - 1) * LAYER.size)
            self._logits()

    # ---- pieces ----

    def argument(self, name: str) -> Value:
        return ARGUMENTS.get(self.code, self.arguments, name)

    def barrier(self) -> None:
        self.arrivals.set(self.arrivals.get() + self.num_threads)
        self.code.call(self.barrier_function, self.team, self.arrivals.get())

    def share(self, total: int, unit: int) -> tuple[Value, Value]:
        return _share(self.code.i64(total), unit, self.thread, self.num_threads)

    @contextmanager
    def rows(self, *buffers: tuple[Value, int]) -> Iterator[list[Value]]:
        """For each row, its place in buffers that are given by address and bytes a row; the row's number comes last."""
        with self.code.loop(0, self.num_rows) as r:
            yield [*(address + r * stride for address, stride in buffers), r]

    def _embed(self) -> None:
        """Embeddings of the new tokens into the states."""
        code, D = self.code, self.spec.width
        ids, positions, places = (self.argument(name) for name in ("ids", "positions", "places"))
        with self.rows((self.x, line_bytes(D))) as (x, r):
            row = self.argument("embedding") + code.load_i64(ids, r * 8) * self.argument("embedding_row")
            code.call_address(self.argument("expand"), row, D, x)
            if self.spec.embedding_scale != 1.0:
                with code.loop(0, line_bytes(D), 64) as i:
                    code.store(code.load(x, FLOATS, i) * self.spec.embedding_scale, x, i)
            with code.when(places > 0):
                place = places + code.load_i64(positions, r * 8) * (D * 4)
                with code.loop(0, D, LANES) as i:
                    added = code.load_first(place + i * 4, FLOATS, code.i64(D) - i)
                    code.store(code.load(x, FLOATS, i * 4) + added, x, i * 4)

    def _norm(self, record: Value, name: str, x: Value, size: int, out: Value) -> None:
        weight, bias = (LAYER.get(self.code, record, f"{name}_{what}") for what in ("weight", "bias"))
        norm(self.code, self.spec.norm, self.spec.norm_eps, x, size, out, weight, bias)

    def _add(self, side: str, layer: Value) -> None:
        """What attention or the MLP has added goes into the states."""
        spec, code, stride = self.spec, self.code, line_bytes(self.spec.width)
        with self.rows((self.argument("added"), stride), (self.x, stride)) as (added, x, _):
            if spec.norm_place == "both":
                self._norm(layer, f"{side}_post", added, spec.width, self.line)
                added = self.line
            with code.loop(0, stride, 64) as i:
                old = code.load(x, FLOATS, i)
                if spec.residual_scale != 1.0:
                    old = old * spec.residual_scale
                code.store(old + code.load(added, FLOATS, i), x, i)
            if spec.norm_place == "post":
                self._norm(layer, side, x, spec.width, x)

    def _feed(self, product: str, source: Value, size: int, record: Value, norm_name: str | None) -> None:
        """Inputs of a product, normed and prepared, into this thread's scratch."""
        with self.rows((source, line_bytes(size)), (self.prepared, prepared_stride(size))) as (x, prepared, _):
            if norm_name is not None:
                self._norm(record, norm_name, x, size, self.line)
                x = self.line
            for index, form in enumerate(self.forms[product]):
                target = prepared + self.argument("form_stride") * index
                self.code.call(self.prepare[form], x, size, target)

    def _product(self, record: Value, product: str, start: Value, end: Value, out: Value, out_size: int) -> None:
        layout = ARGUMENTS if product == "head" else LAYER
        parts, count = (layout.get(self.code, record, f"{product}_{what}") for what in ("parts", "count"))
        form_stride, stride = self.argument("form_stride"), line_bytes(out_size)
        self.code.call(self.multiply, parts, count, start, end, self.prepared, form_stride, self.num_rows, out, stride)

    # ---- a layer ----

    def _layer(self, layer: Value, index: Value) -> None:
        spec, heads = self.spec, self.spec.heads
        C, M = heads.head_size, spec.mlp_width
        inner, all_heads = heads.num_heads * C, (heads.num_heads + 2 * heads.num_kv_heads) * C
        before = spec.norm_place != "post"

        self._feed("qkv", self.x, spec.width, layer, "attention" if before else None)
        self._product(layer, "qkv", *self.share(all_heads, 2), self.argument("qkv"), all_heads)
        self.barrier()
        self._attention(layer, index)
        self.barrier()
        self._feed("out", self.argument("heads"), inner, layer, "attention_sub" if spec.sub_norm else None)
        self._product(layer, "out", *self.share(spec.width, 2), self.argument("added"), spec.width)
        self.barrier()
        self._add("attention", layer)
        self._feed("up", self.x, spec.width, layer, "mlp" if before else None)
        self._gates(layer)
        self.barrier()
        self._feed("down", self.argument("mlp"), M, layer, "mlp_sub" if spec.sub_norm else None)
        self._product(layer, "down", *self.share(spec.width, 2), self.argument("added"), spec.width)
        self.barrier()

    def _gates(self, layer: Value) -> None:
        """activation(gate) · up of this thread's part, or activation(up)."""
        spec, code, M = self.spec, self.code, self.spec.mlp_width
        start, end = self.share(M, LANES)
        gates, width = self.argument("gates"), 2 * M if spec.gated_mlp else M
        self._product(layer, "up", start, end, gates, width)
        if spec.gated_mlp:
            self._product(layer, "up", start + M, end + M, gates, width)
        buffers = (gates, line_bytes(width)), (self.argument("mlp"), line_bytes(M))
        with self.rows(*buffers) as (gate, out, _), code.loop(start * 4, end * 4, LANES * 4) as i:
            value = activate(code, spec.activation, code.load(gate, FLOATS, i))
            if spec.gated_mlp:
                value = value * code.load(gate, FLOATS, i + M * 4)
            code.store(value, out, i)

    def _attention(self, layer: Value, index: Value) -> None:
        spec, code, heads = self.spec, self.code, self.spec.heads
        H, group = heads.num_heads, heads.num_heads // heads.num_kv_heads
        start, end = _share(self.num_rows * H, 1, self.thread, self.num_threads)
        unit = code.variable(start)
        with code.repeat() as leave_if:
            leave_if(unit.get() >= end)
            row, head = unit.get() // H, unit.get() % H
            kv_head = head // group
            left, in_group = end - unit.get(), (kv_head + 1) * group - head
            left = (left < in_group).where(left, in_group)
            if any(len(halves) == 2 for halves in spec.patterns):
                in_half = code.i64(H // 2) - head
                left = (in_half > 0).where((left < in_half).where(left, in_half), left)
            taken = code.variable(code.i64(0))
            for size in heads.tiles:
                with code.when(taken.get().compare("==", 0) & (left >= size)):
                    self._attend(layer, index, row, head, kv_head, size)
                    taken.set(code.i64(size))
            unit.set(unit.get() + taken.get())

    def _attend(self, layer: Value, index: Value, row: Value, head: Value, kv_head: Value, size: int) -> None:
        """Key and value of the new token into the row's block, and `size` heads' attention over all."""
        spec, code, heads = self.spec, self.code, self.spec.heads
        H, K, C = heads.num_heads, heads.num_kv_heads, heads.head_size
        qkv = self.argument("qkv") + row * line_bytes((H + 2 * K) * C)
        angles = code.i64(0)
        if heads.rotary:
            is_local = LAYER.get(code, layer, "is_local") > 0
            position = code.load_i64(self.argument("positions"), row * 8)
            table = is_local.where(self.argument("local_angles"), self.argument("angles"))
            angles = table + position * (C * (8 if heads.rotary_scaled else 4))
        place = code.load_i64(self.argument("lengths"), row * 8)
        blocks = self.argument("tables") + row * self.argument("table_stride") * 8
        key_bytes, value_bytes = (width * BLOCK * heads.value_bytes for width in (C, padded_head(C)))
        key_offset = index * (K * (key_bytes + value_bytes)) + kv_head * key_bytes
        value_offset = index * (K * (key_bytes + value_bytes)) + K * key_bytes + kv_head * value_bytes

        key, query = self.line, self.line + line_bytes(C)
        key_angles = angles + C * 4 if heads.rotary_scaled else angles
        code.call(self.turn, qkv + (kv_head + H) * (C * 4), LAYER.get(code, layer, "k_norm"), key_angles, key)
        block = code.load_i64(blocks, place // BLOCK * 8)
        value = qkv + (kv_head + (H + K)) * (C * 4)
        code.call(self.keep, key, value, block + key_offset, block + value_offset, place % BLOCK)
        q_norm = LAYER.get(code, layer, "q_norm")
        for g in range(size):
            code.call(self.turn, qkv + (head + g) * (C * 4), q_norm, angles, query + g * C * 4)
        with code.loop(0, size * C * 4, 4) as i:
            code.store(code.load(query, F32, i) * heads.scale, query, i)

        out = self.argument("heads") + row * line_bytes(H * C) + head * (C * 4)
        scores = self.x + self.argument("scores")
        for number, halves in enumerate(spec.patterns):
            with code.when(LAYER.get(code, layer, "pattern").compare("==", number)):
                for half, pattern in enumerate(halves):
                    in_half = (head >= H // 2).compare("==", half)
                    with code.when(in_half if len(halves) == 2 else code.i64(0).compare("==", 0)):
                        call = self.attend[pattern, size]
                        code.call(call, query, blocks, key_offset, value_offset, place, scores, out)

    def _logits(self) -> None:
        spec, code, stride = self.spec, self.code, line_bytes(self.spec.width)
        with self.rows((self.x, stride), (self.prepared, prepared_stride(spec.width))) as (x, prepared, r):
            if spec.norm_place != "post":
                weight, bias = self.argument("last_norm_weight"), self.argument("last_norm_bias")
                norm(code, spec.norm, spec.norm_eps, x, spec.width, x, weight, bias)
            for index, form in enumerate(self.forms["head"]):
                code.call(self.prepare[form], x, spec.width, prepared + self.argument("form_stride") * index)
            with code.when(self.thread.compare("==", 0)), code.loop(0, stride, 64) as i:
                code.store(code.load(x, FLOATS, i), self.argument("hidden") + r * stride, i)
        start, end = self.share(spec.vocab_size, LANES)
        logits = self.argument("logits")
        self._product(self.arguments, "head", start, end, logits, spec.vocab_size)
        if spec.logit_softcap is not None:
            rows = self.rows((logits, line_bytes(spec.vocab_size)))
            with rows as (line, _), code.loop(start * 4, end * 4, LANES * 4) as i:
                code.store(softcap(code, spec.logit_softcap, code.load(line, FLOATS, i)), line, i)
        self.barrier()


def write_step(module: Module, spec: StepSpec) -> None:
    """`step(arguments, thread, num_threads, team)`, for `Team.run`."""
    _Step(module, spec).write()
