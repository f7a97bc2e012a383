"""A decoder block as one function with its own gradient, for training on the CPU.

Between its matrix products a block is memory traffic: norms, rotations, softmax, SwiGLU, residuals, casts. Here each
of these is one compiled pass (`mm_gpt.kernels.training`), and what a pass can make again from its neighbour is not kept
for the backward pass: norms' outputs, SwiGLU's, attention weights (2205.14135). Products are torch's, in the type of
autocast; residuals, norms and softmax are float32, and so is the stream between blocks.

Shapes: B rows, T tokens, M = B T, D width, H heads, K key-value heads, G = H / K, C head size, F inner width.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_gpt.kernels.parallel import PIECES
from mm_gpt.kernels.training import LANES, Kind, kernel
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRALinear
from mm_gpt.model.positions import Rotation
from mm_gpt.processor import IGNORE_INDEX

QUERIES = 256
"""Queries whose scores exist at a time."""
FEW = 128
"""Tokens of short texts that are computed as one, under their mask."""


class Span(NamedTuple):
    """Queries of some rows, and the keys that are computed for them: as many as fill vectors."""

    row: int
    end_row: int
    start: int
    end: int
    first_key: int
    keys: int


@dataclass(frozen=True, eq=False)
class Fused:
    """What all blocks of one forward pass share."""

    kind: Kind
    rows: int
    tokens: int
    cos: Tensor
    sin: Tensor
    """(M, C) float32."""
    mask: Tensor | None
    """(B, T, T) uint8; None: causal."""
    spans: tuple[Span, ...]
    learned: Tensor | None = None
    """(N,) the positions out of M that the loss asks for, where this is the last block; it gives zeros for others."""

    def asked(self, labels: Tensor) -> "Fused":
        """For the last block, where only positions with labels (B, T) are asked for, if that saves much."""
        learned = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
        fits = labels.shape == (self.rows, self.tokens) and 0 < len(learned) <= 0.9 * labels.numel()
        return dataclasses.replace(self, learned=learned) if fits else self

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bf16" else torch.float32


def fused(config: DecoderConfig, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Fused | None:
    """The shared part for embeddings x (B, T, D), or None where blocks must run as they are written."""
    B, T, _ = x.shape
    if x.device.type != "cpu" or T % LANES or not has_function(config):
        return None
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        kind: Kind = "bf16"
    elif x.dtype == torch.float32:
        kind = "f32"
    else:
        return None
    assert rotation is not None  # of rotary positions
    cos, sin = (
        table.float().expand(B, 1, T, config.head_size).reshape(B * T, config.head_size).contiguous()
        for table in (rotation.cos, rotation.sin)
    )
    if mask is not None:
        mask = mask.expand(B, 1, T, T).reshape(B, T, T).contiguous().view(torch.uint8)
    return Fused(kind, B, T, cos, sin, mask, tuple(_spans(mask, B, T)))


def _spans(mask: Tensor | None, rows: int, tokens: int) -> Iterator[Span]:
    """Queries with the keys that they may see, those of a text together: nothing is computed between texts."""
    if mask is None:
        for start in range(0, tokens, QUERIES):
            end = min(start + QUERIES, tokens)
            yield Span(0, rows, start, end, 0, end)
        return
    first = mask.argmax(dim=2).flip(1).cummin(dim=1).values.flip(1)  # (B, T): of all queries from here on
    last = (tokens - mask.flip(2).argmax(dim=2)).cummax(dim=1).values  # the end for all queries up to here
    places = torch.arange(tokens)
    begins = first >= places
    begins[:, 1:] &= last[:, :-1] <= places[1:]
    for row in range(rows):
        edges = [*begins[row].nonzero().flatten().tolist(), tokens]
        if edges[0]:  # a query that sees nothing
            edges.insert(0, 0)
        text = 0
        for place, edge in enumerate(edges[1:], start=1):
            if place + 1 < len(edges) and edges[place + 1] - text <= FEW:
                continue  # short texts go together
            for start in range(text, edge, QUERIES):
                end = min(start + QUERIES, edge)
                reach = max(int(last[row, end - 1]), end)
                keys = min(-(-(reach - text) // LANES) * LANES, tokens)
                yield Span(row, row + 1, start, end, min(text, tokens - keys), keys)
            text = edge


def has_function(config: DecoderConfig) -> bool:
    """Whether a decoder has blocks that can be one function: Llama's, of sizes that fill vectors."""
    return (
        config.norm == "rms"
        and config.norm_place == "pre"
        and config.positions == "rope"
        and config.gated_mlp
        and config.activation == "silu"
        and config.causal
        and not (config.qkv_bias or config.output_bias or config.mlp_bias)
        and not (config.sub_norm or config.qk_norm or config.dropout)
        and config.attention_softcap is None
        and config.width % LANES == config.mlp_width % LANES == config.head_size % (2 * LANES) == 0
    )


class Linear(NamedTuple):
    """A linear layer and its adaptation, y = x W' + scale (x A') B'."""

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: float


def _linear(layer: nn.Module) -> Linear | None:
    if type(layer) is nn.Linear:
        return Linear(layer.weight, None, None, 0.0)
    if type(layer) is LoRALinear and type(layer.base) is nn.Linear and not layer.dropout:
        if not layer.enabled:
            return Linear(layer.base.weight, None, None, 0.0)
        return Linear(layer.base.weight, layer.lora_a, layer.lora_b, layer.scale)
    return None


class PreNormBlock(Protocol):
    """`mm_gpt.model.decoder.Block`, as far as it is needed here."""

    attention_norm: Any
    attention: Any
    mlp_norm: Any
    mlp: Any


def fused_block(block: PreNormBlock, x: Tensor, shared: Fused) -> Tensor | None:
    """What the block gives for x (B, T, D), float32; None where it has layers that are not those of this function."""
    attention, mlp = block.attention, block.mlp
    if attention.pattern.kind != "dense":
        return None
    found = [_linear(layer) for layer in (attention.qkv, attention.out, mlp.gate_up, mlp.down)]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found):
        return None
    tensors = [t for layer in layers for t in (layer.weight, layer.a, layer.b)]
    norms = (block.attention_norm.weight, block.mlp_norm.weight)
    scales = tuple(layer.scale for layer in layers)
    return _Block.apply(x, attention.config, shared, scales, *norms, *tensors)


class _Layer:
    """One linear layer, in the type of products. What is trained stays float32: it is rounded for each pass over the
    block, in less time than copies of all blocks, kept for a step, would take to come back from memory."""

    def __init__(self, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)
        self.a = None if a is None else a.detach().to(dtype)
        self.b = None if b is None else (scale * b.detach()).to(dtype)
        self.scale = scale
        self.through: Tensor | None = None
        """(M, rank): the last `backward`'s slope behind B."""

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        y = F.linear(x, self.weight)
        if self.a is not None and self.b is not None:
            y.addmm_(F.linear(x, self.a), self.b.t())
        return y

    def backward(self, slope: Tensor) -> Tensor:
        """The gradient (M, out) of what came out -> that of what went in (M, in)."""
        gradient = slope @ self.weight
        if self.a is not None and self.b is not None:
            self.through = slope @ self.b
            gradient.addmm_(self.through, self.a)
        return gradient

    def gradients(self, slope: Tensor, x: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Of the weight, A and B, in float32: those that are wanted."""
        weight = (slope.t() @ x).float() if wanted[0] else None
        if self.a is None or self.b is None:
            return [weight, None, None]
        assert self.through is not None  # `backward` comes first, with the same slope
        a = (self.through.t() @ x).float() if wanted[1] else None
        b = (slope.t() @ F.linear(x, self.a)).float().mul_(self.scale) if wanted[2] else None
        return [weight, a, b]


def _run(name: str, settings: tuple[object, ...], rows: int, *args: Tensor | int, **options: object) -> None:
    addresses = [arg if isinstance(arg, int) else arg.data_ptr() for arg in args]
    kernel(name, *settings, **options)(rows, addresses, torch.get_num_threads())


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, config: DecoderConfig, shared: Fused, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return _forward(ctx, x, config, shared, scales, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _backward(ctx, gradient)


def _layers(tensors: tuple[Tensor | None, ...], scales: tuple[float, ...], dtype: torch.dtype) -> list[_Layer]:
    found = []
    for i, scale in enumerate(scales):
        weight, a, b = tensors[2 + 3 * i : 5 + 3 * i]
        assert weight is not None
        found.append(_Layer(weight, a, b, scale, dtype))
    return found


def _forward(
    ctx: Any, x: Tensor, config: DecoderConfig, shared: Fused, scales: tuple[float, ...], tensors: tuple[Any, ...]
) -> Tensor:
    kind, dtype = shared.kind, shared.dtype
    M, D, H, C = shared.rows * shared.tokens, config.width, config.num_heads, config.head_size
    x = x.contiguous()
    qkv_layer, out_layer, gate_up_layer, down_layer = _layers(tensors, scales, dtype)
    norms = [weight.detach().float() for weight in tensors[:2]]
    y, flat = x.new_empty(M, D, dtype=dtype), x.view(M, D)
    inverses = [x.new_empty(M) for _ in range(2)]
    _run("norm_forward", (kind, D, config.norm_eps), M, x, 0, norms[0], 0, y, inverses[0], adds=False)
    qkv = qkv_layer.forward(y)
    attended, sums, heads = _attend(config, shared, qkv)
    assert attended.shape == (M, H * C)
    own = _some(flat, shared.learned)  # from here on each position is for itself
    N, after = len(own), torch.empty_like(own)
    h, y = out_layer.forward(_some(attended, shared.learned)), y[:N]
    _run("norm_forward", (kind, D, config.norm_eps), N, own, h, norms[1], after, y, inverses[1], adds=True)
    gate_up = gate_up_layer.forward(y)
    active = x.new_empty(N, config.mlp_width, dtype=dtype)
    _run("swiglu_forward", (kind, config.mlp_width), N, gate_up, active)
    out = torch.empty_like(own)
    _run("add", (kind, D), N, after, down_layer.forward(active), out)
    out = _spread(out, shared.learned, M).view_as(x)
    ctx.config, ctx.shared, ctx.scales, ctx.num = config, shared, scales, len(tensors)
    ctx.save_for_backward(*tensors, x, after, *inverses, *heads, attended, *sums, gate_up)
    return out


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    config, shared, saved = ctx.config, ctx.shared, ctx.saved_tensors
    kind, dtype = shared.kind, shared.dtype
    tensors, (x, after, *kept) = saved[: ctx.num], saved[ctx.num :]
    (first, second, q, k, v, attended), (*sums, gate_up) = kept[:6], kept[6:]
    wanted = ctx.needs_input_grad[4:]
    M, D = shared.rows * shared.tokens, config.width
    qkv_layer, out_layer, gate_up_layer, down_layer = _layers(tensors, ctx.scales, dtype)
    norms = [weight.detach().float() for weight in tensors[:2]]
    gradient = _some(gradient.reshape(M, D), shared.learned).contiguous()
    slope, N = gradient.to(dtype), len(gradient)

    active, inner = x.new_empty(N, config.mlp_width, dtype=dtype), torch.empty_like(gate_up)
    _run("swiglu_backward", (kind, config.mlp_width), N, gate_up, down_layer.backward(slope), active, inner)
    of_down = down_layer.gradients(slope, active, wanted[11:14])
    del active, gate_up
    y, rounded = x.new_empty(N, D, dtype=dtype), x.new_empty(N, D, dtype=dtype)
    middle, pieces = torch.empty_like(after), x.new_zeros(PIECES, D)
    through = gate_up_layer.backward(inner)
    _run("norm_backward", (kind, D), N, through, gradient, after, second, norms[1], middle, rounded, y, pieces)
    of_gate_up, of_norm = gate_up_layer.gradients(inner, y, wanted[8:11]), pieces.sum(0)
    del inner
    through = _spread(out_layer.backward(rounded), shared.learned, M)
    of_out = out_layer.gradients(rounded, _some(attended, shared.learned), wanted[5:8])
    slope = _attend_backward(config, shared, q, k, v, attended, sums, through)
    middle = _spread(middle, shared.learned, M)
    y, rounded = x.new_empty(M, D, dtype=dtype), x.new_empty(M, D, dtype=dtype)
    result, pieces = torch.empty_like(x), x.new_zeros(PIECES, D)
    through = qkv_layer.backward(slope)
    _run("norm_backward", (kind, D), M, through, middle, x, first, norms[0], result, rounded, y, pieces)
    of_qkv = qkv_layer.gradients(slope, y, wanted[2:5])
    all_of = [pieces.sum(0), of_norm, *of_qkv, *of_out, *of_gate_up, *of_down]
    grads = [
        None if not want or found is None else found.to(weight.dtype)
        for want, found, weight in zip(wanted, all_of, tensors, strict=True)
    ]
    return (result, None, None, None, *grads)


def _some(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of x; None: all."""
    return x if rows is None else x[rows]


def _spread(x: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """The other way: zeros in all other rows."""
    return x if rows is None else x.new_zeros(total, x.shape[1]).index_copy_(0, rows, x)


def _shapes(config: DecoderConfig, shared: Fused) -> tuple[int, int, int, int, tuple[object, ...]]:
    H, K, C, T = config.num_heads, config.num_kv_heads, config.head_size, shared.tokens
    return H, K, C, T, (shared.kind, T, H, K, C)


def _scale(config: DecoderConfig) -> float:
    return config.head_size**-0.5 if config.attention_scale is None else config.attention_scale


def _attend(config: DecoderConfig, shared: Fused, qkv: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Attention of qkv (M, (H + 2 K) C): (M, H C), and for the backward pass the sums of each span, and q, k and v."""
    H, K, C, T, shape = _shapes(config, shared)
    B, G, M = shared.rows, H // K, len(qkv)
    q, k, v = (qkv.new_empty(B * K, T * g, C) for g in (G, 1, 1))
    _run("rope_forward", (*shape, _scale(config)), M, qkv, shared.cos, shared.sin, q, k, v)
    y = torch.empty_like(q)
    sums = []
    for span in shared.spans:
        at = _of(span, K, G)
        scores = torch.bmm(q[at.queries], k[at.keys].mT)
        sums.append(scores.new_empty(scores.shape[:2], dtype=torch.float32))
        _softmax("softmax_forward", config, shared, span, scores, sums[-1])
        if scores.shape[1] == T * G:
            torch.bmm(scores, v[at.keys], out=y[at.rows])
        else:
            y[at.queries] = torch.bmm(scores, v[at.keys])
    attended = qkv.new_empty(M, H * C)
    _run("merge_heads", shape, M, y, attended)
    return attended, sums, [q, k, v]


class _Place(NamedTuple):
    """Where the queries and keys of a span are, in (B K, T G, C) and (B K, T, C)."""

    rows: slice
    queries: tuple[slice, slice]
    keys: tuple[slice, slice]


def _of(span: Span, K: int, G: int) -> _Place:
    rows = slice(span.row * K, span.end_row * K)
    queries, keys = slice(span.start * G, span.end * G), slice(span.first_key, span.first_key + span.keys)
    return _Place(rows, (rows, queries), (rows, keys))


def _softmax(name: str, config: DecoderConfig, shared: Fused, span: Span, *tensors: Tensor) -> None:
    masking, mask, queries = "causal", 0, span.end - span.start
    if shared.mask is not None:
        masking = "mask"
        mask = shared.mask.data_ptr() + span.row * shared.tokens**2 + span.first_key
    settings = (shared.kind, config.num_heads, config.num_kv_heads, masking)
    rows = (span.end_row - span.row) * config.num_heads * queries
    _run(name, settings, rows, *tensors, span.keys, mask, queries, span.start, shared.tokens)


def _attend_backward(
    config: DecoderConfig, shared: Fused, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: list[Tensor], slope: Tensor
) -> Tensor:
    """The gradient of qkv from that of what attention gave, `slope` (M, H C)."""
    H, K, C, T, shape = _shapes(config, shared)
    B, G, M = shared.rows, H // K, len(slope)
    dy, dots = torch.empty_like(q), q.new_empty(B * K, T * G, dtype=torch.float32)
    _run("split_heads", shape, M, slope, y, dy, dots)
    dq = torch.empty_like(q)
    # Several spans may see one key: what they give is added up in float32
    dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
    for span, own in zip(shared.spans, sums, strict=True):
        at = _of(span, K, G)
        weights = torch.bmm(q[at.queries], k[at.keys].mT)
        change = torch.bmm(dy[at.queries], v[at.keys].mT)
        _softmax("softmax_backward", config, shared, span, weights, change, own, dots[at.queries].contiguous())
        dq[at.queries] = torch.bmm(change, k[at.keys])
        dk[at.keys] += torch.bmm(change.mT, q[at.queries])
        dv[at.keys] += torch.bmm(weights.mT, dy[at.queries])
    dk, dv = dk.to(q.dtype), dv.to(q.dtype)
    gradient = q.new_empty(M, (H + 2 * K) * C)
    _run("rope_backward", (*shape, _scale(config)), M, dq, dk, dv, shared.cos, shared.sin, gradient)
    return gradient
