"""A decoder block as one function with its own gradient, for training on the CPU.

Between its matrix products a block is memory traffic: norms, rotations, softmax, SwiGLU, residuals, casts. Here each of
these is one compiled pass (`mm_gpt.kernels.training`), and what a pass can make again from its neighbour is not kept for
the backward pass: norms' outputs, SwiGLU's, attention weights. Products are torch's, in the type of autocast; residuals,
norms and softmax are float32, and so is the stream between blocks.

Shapes: B rows, T tokens, M = B T, D width, H heads, K key-value heads, G = H / K, C head size, F inner width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt.kernels.parallel import PIECES
from mm_gpt.kernels.training import LANES, Kind, kernel
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRALinear
from mm_gpt.model.positions import Rotation

if TYPE_CHECKING:
    from mm_gpt.model.decoder import Block

QUERIES = 256
"""Queries whose scores exist at a time."""


@dataclass(frozen=True, eq=False)
class Fused:
    """What all blocks of one forward pass share."""

    kind: Kind
    rows: int
    tokens: int
    cos: Tensor | None
    sin: Tensor | None
    """(M, C) float32."""
    mask: Tensor | None
    """(B, T, T) uint8; None: causal."""
    looks_back: bool
    """Whether nobody sees what is ahead."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bf16" else torch.float32


def fused(
    config: DecoderConfig, x: Tensor, rotation: Rotation | None, mask: Tensor | None
) -> Fused | None:
    """The shared part for embeddings x (B, T, D), or None where blocks must run as they are written."""
    B, T, _ = x.shape
    if not x.device.type == "cpu" or T % LANES or not _is_plain(config):
        return None
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        kind: Kind = "bf16"
    elif x.dtype == torch.float32:
        kind = "f32"
    else:
        return None
    tables: list[Tensor | None] = [None, None]
    if rotation is not None:
        if rotation.scale is not None:
            return None
        tables = [
            table.float().expand(B, 1, T, config.head_size).reshape(B * T, config.head_size).contiguous()
            for table in (rotation.cos, rotation.sin)
        ]
    looks_back = True
    if mask is not None:
        mask = mask.expand(B, 1, T, T).reshape(B, T, T).contiguous().view(torch.uint8)
        looks_back = not bool(mask.triu(1).any())
    return Fused(kind, B, T, tables[0], tables[1], mask, looks_back)


def _is_plain(config: DecoderConfig) -> bool:
    """Llama's block, of sizes that fill vectors."""
    return (
        config.norm == "rms"
        and config.norm_place == "pre"
        and config.positions in ("rope", "none")
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


def fused_block(block: "Block", x: Tensor, shared: Fused) -> Tensor | None:
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
    return _Block.apply(x, attention.config, shared, scales, *norms, *tensors)  # type: ignore[no-any-return]


class _Layer:
    """One linear layer, in the type of products. What is trained stays float32: it is rounded for each pass over the block,
    in less time than copies of all blocks, kept for a step, would take to come back from memory."""

    def __init__(self, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)
        self.a = None if a is None else a.detach().to(dtype)
        self.b = None if b is None else (scale * b.detach()).to(dtype)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        y = F.linear(x, self.weight)
        return y if self.a is None or self.b is None else y.addmm_(F.linear(x, self.a), self.b.t())

    def backward(self, slope: Tensor) -> Tensor:
        """The gradient (M, out) of what came out -> that of what went in (M, in)."""
        gradient = slope @ self.weight
        return gradient if self.a is None or self.b is None else gradient.addmm_(slope @ self.b, self.a)

    def gradients(self, slope: Tensor, x: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Of the weight, A and B, in float32: those that are wanted."""
        weight = (slope.t() @ x).float() if wanted[0] else None
        if self.a is None or self.b is None:
            return [weight, None, None]
        a = ((slope @ self.b).t() @ x).float() if wanted[1] else None
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _backward(ctx, gradient)


def _layers(tensors: tuple[Tensor | None, ...], scales: tuple[float, ...], dtype: torch.dtype) -> list[_Layer]:
    parts = tensors[2:]
    return [_Layer(*parts[3 * i : 3 * i + 3], scale, dtype) for i, scale in enumerate(scales)]  # type: ignore[arg-type]


def _forward(
    ctx: Any, x: Tensor, config: DecoderConfig, shared: Fused, scales: tuple[float, ...], tensors: tuple[Any, ...]
) -> Tensor:
    kind, dtype = shared.kind, shared.dtype
    M, D, H, C = shared.rows * shared.tokens, config.width, config.num_heads, config.head_size
    x = x.contiguous()
    qkv_layer, out_layer, gate_up_layer, down_layer = _layers(tensors, scales, dtype)
    norms = [weight.detach().float() for weight in tensors[:2]]
    y = x.new_empty(M, D, dtype=dtype)
    inverses = [x.new_empty(M) for _ in range(2)]
    _run("norm_forward", (kind, D, config.norm_eps), M, x, 0, norms[0], 0, y, inverses[0], adds=False)
    qkv = qkv_layer.forward(y)
    attended, sums, heads = _attend(config, shared, qkv)
    after = torch.empty_like(x)
    h = out_layer.forward(attended)
    _run("norm_forward", (kind, D, config.norm_eps), M, x, h, norms[1], after, y, inverses[1], adds=True)
    gate_up = gate_up_layer.forward(y)
    active = x.new_empty(M, config.mlp_width, dtype=dtype)
    _run("swiglu_forward", (kind, config.mlp_width), M, gate_up, active)
    out = torch.empty_like(x)
    _run("add", (kind, D), M, after, down_layer.forward(active), out)
    assert attended.shape == (M, H * C)
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
    gradient = gradient.contiguous()
    slope = gradient if kind == "f32" else gradient.to(dtype)
    slope = slope.view(M, D)

    active, inner = x.new_empty(M, config.mlp_width, dtype=dtype), torch.empty_like(gate_up)
    _run("swiglu_backward", (kind, config.mlp_width), M, gate_up, down_layer.backward(slope), active, inner)
    of_down = down_layer.gradients(slope, active, wanted[11:14])
    del active, gate_up
    y, rounded = x.new_empty(M, D, dtype=dtype), x.new_empty(M, D, dtype=dtype)
    middle, pieces = torch.empty_like(x), x.new_zeros(PIECES, D)
    through = gate_up_layer.backward(inner)
    _run("norm_backward", (kind, D), M, through, gradient, after, second, norms[1], middle, rounded, y, pieces)
    of_gate_up, of_norm = gate_up_layer.gradients(inner, y, wanted[8:11]), pieces.sum(0)
    del inner
    of_out = out_layer.gradients(rounded, attended, wanted[5:8])
    slope = _attend_backward(config, shared, q, k, v, attended, sums, out_layer.backward(rounded))
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


def _shapes(config: DecoderConfig, shared: Fused) -> tuple[int, int, int, int, tuple[object, ...]]:
    H, K, C, T = config.num_heads, config.num_kv_heads, config.head_size, shared.tokens
    return H, K, C, T, (shared.kind, T, H, K, C)


def _scale(config: DecoderConfig) -> float:
    return config.head_size**-0.5 if config.attention_scale is None else config.attention_scale


def _spans(shared: Fused) -> list[tuple[int, int, int]]:
    """(first query, end, keys that these may see)."""
    T = shared.tokens
    starts = range(0, T, QUERIES)
    return [(a, min(a + QUERIES, T), min(a + QUERIES, T) if shared.looks_back else T) for a in starts]


def _attend(config: DecoderConfig, shared: Fused, qkv: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Attention of qkv (M, (H + 2 K) C): (M, H C), and for the backward pass the sums of each span, and q, k and v."""
    H, K, C, T, shape = _shapes(config, shared)
    B, G, M = shared.rows, H // K, len(qkv)
    q, k, v = (qkv.new_empty(B * K, T * g, C) for g in (G, 1, 1))
    turns = shared.cos is not None
    cos, sin = (0 if table is None else table for table in (shared.cos, shared.sin))
    _run("rope_forward", (*shape, _scale(config)), M, qkv, cos, sin, q, k, v, turns=turns)
    y = torch.empty_like(q)
    sums = []
    for start, end, keys in _spans(shared):
        scores = torch.bmm(q[:, start * G : end * G], k[:, :keys].mT)
        sums.append(qkv.new_empty(B * K, (end - start) * G, dtype=torch.float32))
        _softmax("softmax_forward", config, shared, (start, end, keys), scores, sums[-1])
        if (start, end) == (0, T):
            torch.bmm(scores, v, out=y)
        else:
            y[:, start * G : end * G] = torch.bmm(scores, v[:, :keys])
    attended = qkv.new_empty(M, H * C)
    _run("merge_heads", shape, M, y, attended)
    return attended, sums, [q, k, v]


def _softmax(
    name: str, config: DecoderConfig, shared: Fused, span: tuple[int, int, int], *tensors: Tensor
) -> None:
    start, end, keys = span
    settings = (shared.kind, config.num_heads, config.num_kv_heads, "causal" if shared.mask is None else "mask")
    mask = 0 if shared.mask is None else shared.mask
    rows = shared.rows * config.num_heads * (end - start)
    _run(name, settings, rows, *tensors, keys, mask, end - start, start, shared.tokens)


def _attend_backward(
    config: DecoderConfig, shared: Fused, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: list[Tensor], slope: Tensor
) -> Tensor:
    """The gradient of qkv from that of what attention gave, `slope` (M, H C)."""
    H, K, C, T, shape = _shapes(config, shared)
    B, G, M = shared.rows, H // K, len(slope)
    dy, dots = torch.empty_like(q), q.new_empty(B * K, T * G, dtype=torch.float32)
    _run("split_heads", shape, M, slope, y, dy, dots)
    spans = _spans(shared)
    several = len(spans) > 1
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(each, dtype=torch.float32) if several else each for each in (k, v))
    for span, own in zip(spans, sums, strict=True):
        start, end, keys = span
        at = slice(start * G, end * G)
        weights = torch.bmm(q[:, at], k[:, :keys].mT)
        change = torch.bmm(dy[:, at], v[:, :keys].mT)
        part = dots[:, at].contiguous()
        _softmax("softmax_backward", config, shared, span, weights, change, own, part)
        if several:
            dq[:, at] = torch.bmm(change, k[:, :keys])
            dk[:, :keys] += torch.bmm(change.mT, q[:, at])
            dv[:, :keys] += torch.bmm(weights.mT, dy[:, at])
        else:
            dq = torch.bmm(change, k)
            dk, dv = torch.bmm(change.mT, q), torch.bmm(weights.mT, dy)
    dk, dv = dk.to(q.dtype), dv.to(q.dtype)
    gradient = q.new_empty(M, (H + 2 * K) * C)
    turns = shared.cos is not None
    cos, sin = (0 if table is None else table for table in (shared.cos, shared.sin))
    _run("rope_backward", (*shape, _scale(config)), M, dq, dk, dv, cos, sin, gradient, turns=turns)
    return gradient
