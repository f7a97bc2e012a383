"""What each query looks at: dense, local and factorized attention, computed at the price of the pattern.

`visible` is the definition; `attend` computes the same without a (T, T) matrix, by blocks. A local layer costs
O(T·window), a layer of Sparse Transformer O(T·(l + T/l)), that is O(T·√T) with l ≈ √T.

Shapes: B batch, T queries, S keys, H heads, K key-value heads, G = H / K query heads that share one key-value head,
C head size, l stride, R = ⌈T / l⌉ rows of l tokens, N keys that one block of queries may need.

Papers: Sparse Transformer (1904.10509), locally banded layers as in GPT-3 (2005.14165), GQA (2305.13245), soft-capped
scores as in Gemma 2 (2408.00118).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mm_gpt.errors import ConfigError, unknown_name
from mm_gpt.model.flex import flex_attend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kind = Literal[
    "dense",
    "local",
    "strided",
    "strided_local",
    "strided_column",
    "strided_heads",
    "fixed",
    "fixed_block",
    "fixed_summary",
    "fixed_heads",
]
HALVES: dict[str, tuple[Kind, Kind]] = {
    "strided_heads": ("strided_local", "strided_column"),
    "fixed_heads": ("fixed_block", "fixed_summary"),
}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What the queries of one layer may look at, besides causality.

    With i the query's place and j <= i the key's:
    local: i - j < window (GPT-3, sliding windows).
    strided: the two sets together: strided_local, i - j < stride, and strided_column, (i - j) mod stride = 0.
    fixed: the two sets together: fixed_block, ⌊j / stride⌋ = ⌊i / stride⌋, and fixed_summary, the last `summary`
    tokens of every block, and the query itself, so that nobody sees nothing.
    strided_heads, fixed_heads: the first half of the heads has the first set, the second half the second.

    The paper's band has stride + 1 tokens, its code's has stride; ours is the code's.
    """

    kind: Kind = "dense"
    window: int | None = None
    """Tokens in the band of `local`, the query included."""
    stride: int | None = None
    """l of strided and fixed."""
    summary: int | None = None
    """c of fixed."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(unknown_name("attention pattern", self.kind, get_args(Kind)))
        is_fixed = self.kind.startswith("fixed")
        needs = {
            "window": self.kind == "local",
            "stride": is_fixed or self.kind.startswith("strided"),
            "summary": is_fixed and self.kind != "fixed_block",
        }
        for name, needed in needs.items():
            value = getattr(self, name)
            if needed and (value is None or value < 1):
                raise ConfigError(f"attention pattern {self.kind!r} needs {name} >= 1, not {value}")
            if value is not None and not (needed or (is_fixed and name == "summary")):
                raise ConfigError(f"attention pattern {self.kind!r} takes no {name}")
        if self.summary is not None and self.stride is not None and self.summary > self.stride:
            raise ConfigError(f"summary {self.summary} is more than stride {self.stride}")

    @property
    def halves(self) -> tuple["Pattern", "Pattern"] | None:
        """The patterns of the two halves of the heads, when they differ."""
        if self.kind not in HALVES:
            return None
        first, second = HALVES[self.kind]
        return (
            Pattern(kind=first, stride=self.stride, summary=self.summary),
            Pattern(kind=second, stride=self.stride, summary=self.summary),
        )


DENSE = Pattern()
NUM_CHUNKS = 4
"""Into which the queries of `strided` go: less memory for scores, yet each one's gradient is as long as the row."""


def visible(pattern: Pattern, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """True where a query may look: (…, T) and (…, S) -> (…, T, S); the two halves of heads give (2, …, T, S)."""
    if pattern.halves is not None:
        return torch.stack([visible(half, query_positions, key_positions) for half in pattern.halves])
    i, j = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    distance = i - j
    causal, kind = distance >= 0, pattern.kind
    if kind == "dense":
        return causal
    if kind == "local":
        assert pattern.window is not None
        return causal & (distance < pattern.window)
    assert pattern.stride is not None
    if kind.startswith("strided"):
        band, column = distance < pattern.stride, distance % pattern.stride == 0
        return causal & {"strided": band | column, "strided_local": band, "strided_column": column}[kind]
    block = i // pattern.stride == j // pattern.stride
    if kind == "fixed_block":
        return causal & block
    assert pattern.summary is not None
    summary = j % pattern.stride >= pattern.stride - pattern.summary
    return causal & (summary | (block if kind == "fixed" else distance == 0))


class Scoring(NamedTuple):
    """How scores become weights."""

    scale: float
    softcap: float | None
    dropout: float


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern = DENSE,
    mask: "Tensor | BlockMask | None" = None,
    positions: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q (B, H, T, C) over k and v (B, K, S, C) -> (B, H, T, C); the queries are the last T of the S keys.

    mask: boolean, broadcast to (B, 1, T, S), True where a query may look: all about causality, documents and padding.
    Or the same as blocks (`mm_gpt.model.masks`), for the dense pattern without dropout and soft cap.
    Patterns but dense take away from it what lies ahead or out of sight; a query that is left with nothing gets zeros.
    positions: places (B, T) of queries and (B, S) of keys in their documents; None: places in the row. Only the fixed
    patterns need them, since differences inside a document are those of the row, and they cost a dense product.
    causal: without a mask, only back; off goes with the dense pattern alone.
    scale: None is C^-1/2. softcap: scores become softcap · tanh(scores / softcap).

    Cheaper than dense: all patterns where T = S, and local with a cache. The rest is a dense product under a mask.
    """
    if mask is not None and not isinstance(mask, Tensor):
        if pattern.kind != "dense" or dropout or softcap is not None:
            raise ConfigError("a mask of blocks goes with dense attention, without dropout and soft cap")
        return flex_attend(q, k, v, mask, scale=scale)
    if pattern.halves is not None:
        return _attend_halves(
            q, k, v, pattern.halves, mask=mask, positions=positions, scale=scale, softcap=softcap, dropout=dropout
        )
    if not causal and pattern.kind != "dense":
        raise ConfigError(f"attention pattern {pattern.kind!r} looks back only; causal must be on")
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else scale, softcap, dropout)
    if pattern.kind == "strided_local":
        pattern = Pattern(kind="local", window=pattern.stride)
    if not pattern.kind.startswith("fixed"):
        positions = None
    T, S = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask.expand(q.shape[0], 1, T, S)
    if pattern.window is not None and T + pattern.window <= S:  # older keys are out of every query's reach
        S = T + pattern.window - 1
        k, v = k[:, :, -S:], v[:, :, -S:]
        mask = None if mask is None else mask[..., -S:]
    if mask is None and positions is None and _covers(pattern, S):
        pattern = DENSE
    if pattern.kind == "dense":
        if mask is None and causal and 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return _product(q, k, v, mask, scoring, is_causal=mask is None and causal and T > 1)
    if T == S and positions is None:
        if pattern.kind == "strided":
            return _merged_strided(q, k, v, pattern, mask, scoring)
        if pattern.kind == "strided_column":
            return _columns(q, k, v, pattern, mask, scoring)
        return _blocks(q, k, v, pattern, mask, scoring)
    index = torch.arange(S, device=q.device)
    query_places, key_places = (index[S - T :], index) if positions is None else positions
    allowed = visible(pattern, query_places, key_places)  # (T, S) or (B, T, S)
    if positions is not None:
        allowed = allowed.unsqueeze(1)
    allowed = allowed & (visible(DENSE, index[S - T :], index) if mask is None else mask)
    return _product(q, k, v, allowed, scoring, may_be_empty=True)


def _attend_halves(q: Tensor, k: Tensor, v: Tensor, halves: tuple[Pattern, Pattern], **options: object) -> Tensor:
    H, K = q.shape[1], k.shape[1]
    if H % 2:
        raise ConfigError(f"{H} heads cannot have a pattern for each half")
    if K % 2:  # the two halves share a key-value head
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    parts = zip(halves, *(x.chunk(2, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attend(q, k, v, pattern=half, **options) for half, q, k, v in parts], dim=1)  # type: ignore[arg-type]


def _covers(pattern: Pattern, num_keys: int) -> bool:
    """Whether a row of so many tokens is too short for the pattern to hide anything."""
    if pattern.kind == "local":
        return pattern.window is not None and num_keys <= pattern.window
    return pattern.kind in ("strided", "fixed", "fixed_block") and num_keys <= (pattern.stride or 0)


def _weights(scores: Tensor, allowed: Tensor | None, scoring: Scoring) -> Tensor:
    """Softmax of scores (…, S) in float32 or better; a row without anything allowed becomes zeros, not NaN."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if allowed is None:
        weights = scores.softmax(dim=-1)
    else:
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~allowed, lowest).softmax(dim=-1).masked_fill(~allowed, 0)
    return F.dropout(weights, scoring.dropout) if scoring.dropout else weights


def _product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scoring: Scoring,
    *,
    is_causal: bool = False,
    may_be_empty: bool = False,
) -> Tensor:
    """Attention over all the keys given; `allowed` broadcasts to (B, 1, T, S). `is_causal` needs T = S."""
    H, T = q.shape[1:3]
    K, S = k.shape[1:3]
    if scoring.softcap is not None:
        if is_causal:
            allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        if allowed is not None and allowed.dim() == 4:
            allowed = allowed.unsqueeze(1)
        q = rearrange(q, "b (k g) t c -> b k g t c", k=K)
        weights = _weights(torch.einsum("bkgtc,bksc->bkgts", q, k), allowed, scoring).to(v.dtype)
        return rearrange(torch.einsum("bkgts,bksc->bkgtc", weights, v), "b k g t c -> b (k g) t c")
    empty = None
    if may_be_empty and allowed is not None:  # what SDPA does with a row of False differs between its kernels
        empty = ~allowed.any(dim=-1, keepdim=True)
        allowed = allowed | empty
    if T == 1:
        # The G heads of a group become G queries of one key-value head: nothing is copied, nothing is causal.
        q = rearrange(q, "b (k g) 1 c -> b k g c", k=K)
    elif K < H and q.is_cuda:
        # With grouped heads, CUDA's kernels for masks and for float32 fall back to a plain product.
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=is_causal,
        scale=scoring.scale,
        dropout_p=scoring.dropout,
        enable_gqa=q.shape[1] > k.shape[1],
    )
    if T == 1:
        y = rearrange(y, "b k g c -> b (k g) 1 c")
    return y if empty is None else y.masked_fill(empty, 0)


def _blocks(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """local and fixed: a block of queries and the few keys that it needs, one block after the other.

    Keys are cut by `split`, whose gradient is one concatenation; a slice for each block would make its gradient as
    long as the row, and the row's cost quadratic.
    """
    T = q.shape[2]
    index = torch.arange(T, device=q.device)
    if pattern.window is not None:
        size = min(max(pattern.window, 64), 256)  # smaller ones are ruled by the overhead of calls, larger ones waste
    else:
        assert pattern.stride is not None
        size = pattern.stride
        is_summary = index % size >= size - (pattern.summary or 0)
        summaries = index[is_summary] if pattern.kind != "fixed_block" else index[:0]
        k_summary, v_summary = k.index_select(2, summaries), v.index_select(2, summaries)
    k_blocks, v_blocks = k.split(size, dim=2), v.split(size, dim=2)
    outputs = []
    for n, q_block in enumerate(q.split(size, dim=2)):
        rows = index[n * size : (n + 1) * size]
        if pattern.window is not None:
            oldest = max(0, n * size - pattern.window + 1)
            keys = index[oldest : (n + 1) * size]
            k_near, v_near = (torch.cat(x[oldest // size : n + 1], dim=2) for x in (k_blocks, v_blocks))
            k_near, v_near = (x[:, :, -len(keys) :] for x in (k_near, v_near))  # (B, K, N, C)
        else:
            earlier = n * (pattern.summary or 0)
            keys = torch.cat([summaries[:earlier], rows])
            k_near = torch.cat([k_summary[:, :, :earlier], k_blocks[n]], dim=2)
            v_near = torch.cat([v_summary[:, :, :earlier], v_blocks[n]], dim=2)
        allowed = visible(pattern, rows, keys)  # (size, N)
        if mask is not None:
            allowed = allowed & mask[:, :, n * size : (n + 1) * size][..., keys]
        outputs.append(_product(q_block, k_near, v_near, allowed, scoring, may_be_empty=mask is not None))
    return torch.cat(outputs, dim=2)


def _columns(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """strided_column: the row becomes l short rows, of every l-th token each, with causal attention inside."""
    assert pattern.stride is not None
    l, (B, _, T, _) = pattern.stride, q.shape
    R = -(-T // l)
    q, k, v = (rearrange(F.pad(x, (0, 0, 0, R * l - T)), "b h (r l) c -> (b l) h r c", l=l) for x in (q, k, v))
    if mask is None:
        y = _product(q, k, v, None, scoring, is_causal=True)  # the padding is last: nobody real looks at it
    else:
        places = rearrange(torch.arange(R * l, device=q.device).clamp(max=T - 1), "(r l) -> l r", l=l)
        allowed = mask[:, 0, places.unsqueeze(2), places.unsqueeze(1)]  # (B, l, R, R)
        allowed = rearrange(allowed.tril(), "b l r s -> (b l) 1 r s")
        y = _product(q, k, v, allowed, scoring, may_be_empty=True)
    return rearrange(y, "(b l) h r c -> b h (r l) c", b=B)[:, :, :T]


def _merged_strided(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """strided: the band and the column under one softmax.

    With the tokens written in rows of l, a query's band lies in its own row and the one before, the rest of what it
    sees in the earlier rows of its column. The two share no key but the query itself, which is left to the band.
    """
    assert pattern.stride is not None
    l, T = pattern.stride, q.shape[2]
    R = -(-T // l)
    q, k, v = (F.pad(x, (0, 0, 0, R * l - T)) for x in (q, k, v))
    q = rearrange(q, "b (k g) (r l) c -> b k g r l c", k=k.shape[1], l=l)
    k, v = (rearrange(x, "b k (r l) c -> b k r l c", l=l) for x in (k, v))
    # (B, K, R, 2l, C): each row after the one before it.
    k_band, v_band = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (k, v))
    index = torch.arange(R * l, device=q.device).view(R, l)
    band_index = torch.cat([index - l, index], dim=1)  # (R, 2l), below 0 before the first row
    in_band = visible(Pattern(kind="local", window=l), index[0], band_index[0])  # (l, 2l), the same for every row
    outputs = []
    size = -(-R // NUM_CHUNKS)
    for start in range(0, R, size):
        end = min(start + size, R)
        rows, num_rows = slice(start, end), end - start
        before = index[:end, 0] < index[rows, :1]  # (num_rows, P = end rows)
        band_exists = band_index[rows].unsqueeze(1) >= 0
        allowed = torch.cat([in_band & band_exists, before.unsqueeze(1).expand(-1, l, -1)], dim=-1)  # (…, l, 2l + P)
        if mask is not None:
            column_index = index[:end].T.expand(num_rows, -1, -1)
            keys = torch.cat([band_index[rows].unsqueeze(1).expand(-1, l, -1), column_index], dim=-1).clamp(0, T - 1)
            allowed = allowed & mask[:, 0, index[rows].clamp(max=T - 1).unsqueeze(-1), keys]
            allowed = allowed[:, None, None]  # (B, 1, 1, num_rows, l, 2l + P)
        band = torch.einsum("bkgrlc,bkrsc->bkgrls", q[:, :, :, rows], k_band[:, :, rows])
        column = torch.einsum("bkgrlc,bkplc->bkgrlp", q[:, :, :, rows], k[:, :, :end])
        weights = _weights(torch.cat([band, column], dim=-1), allowed, scoring).to(v.dtype)
        band, column = weights.split([2 * l, end], dim=-1)
        outputs.append(
            torch.einsum("bkgrls,bkrsc->bkgrlc", band, v_band[:, :, rows])
            + torch.einsum("bkgrlp,bkplc->bkgrlc", column, v[:, :, :end])
        )
    return rearrange(torch.cat(outputs, dim=3), "b k g r l c -> b (k g) (r l) c")[:, :, :T]
