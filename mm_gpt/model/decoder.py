"""The causal decoder (Llama family: RMSNorm, SwiGLU, rotary positions, grouped-query attention).

Shapes: B batch, T new tokens, S tokens in the cache and new ones together, D width, H heads, K key-value heads,
G = H / K query heads that share one key-value head, C head size, V vocabulary.

Papers: LLaMA (2302.13971), RoPE (2104.09864), GQA (2305.13245), SmolLM2 (2502.02737).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, ContextOverflowError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    vocab_size: int
    width: int
    """D, the size of a token's state."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    max_length: int
    """Longest sequence in tokens that the model may see."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    """The output layer is the input embedding table."""
    attention_bias: bool = False
    """The four projections of attention have biases."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ConfigError(f"head_size {self.head_size} must be even for rotary positions")


class KVCache:
    """Keys and values of the tokens seen so far, in buffers allocated once for `capacity` tokens."""

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) of the new tokens, return (B, K, S, C) of all; `length` moves when the step is done."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select_rows(self, rows: Tensor) -> None:
        """Make row i of the cache a copy of row `rows[i]`: beams that survive, requests that are not finished."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 (or better) inside. Root Mean Square Layer Normalization, 1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.weight.shape, self.weight.to(precise), self.eps).to(x.dtype)


def rotary_table(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (max_length, C) of every position's angles."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2).float() / config.head_size)
    angles = torch.outer(torch.arange(config.max_length).float(), frequencies)  # (max_length, C/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, heads, T, C); pairs are (i, i + C/2). cos, sin (B, 1, T, C)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        bias = config.attention_bias
        qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.qkv = nn.Linear(config.width, qkv_width, bias=bias)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        H, K, C = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        T = x.shape[1]
        qkv = rearrange(self.qkv(x), "b t (h c) -> b h t c", c=C)
        rotated = rotate(qkv[:, : H + K], cos, sin)  # queries and keys turn together
        q, k, v = rotated[:, :H], rotated[:, H:], qkv[:, H + K :]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if T == 1:
            # The G heads of a group become G queries of one key-value head: nothing is copied, nothing is causal.
            y = F.scaled_dot_product_attention(rearrange(q, "b (k g) 1 c -> b k g c", k=K), k, v, attn_mask=mask)
            y = rearrange(y, "b k g c -> b 1 (k g c)")
        else:
            k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))  # (B, H, S, C)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            y = rearrange(y, "b h t c -> b t (h c)")
        return self.out(y)


class MLP(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token embeddings in, hidden states out; `logits` is a separate step, so that training never makes them all."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the matrix that turns a hidden state into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, x: Tensor, positions: Tensor, *, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm.

        x (B, T, D): embeddings. positions (B, T): each token's place in its document. mask: boolean, True where a
        query (B, 1, T, S) may look; None means plain causal attention over T tokens (or, for one new token, over the
        whole cache).
        """
        if x.shape[1] > self.config.max_length:
            raise ContextOverflowError(
                f"{x.shape[1]} tokens do not fit into the model's context of {self.config.max_length}"
            )
        cos = self.cos[positions].unsqueeze(1).to(x.dtype)  # (B, 1, T, C)
        sin = self.sin[positions].unsqueeze(1).to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) in float32, or float64 when `hidden` is."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def init_weights(decoder: Decoder, generator: torch.Generator | None = None) -> None:
    """N(0, 0.02) for matrices, residual projections scaled by 1/√(2L) (GPT-2)."""
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2:
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = 0.02 / (2 * decoder.config.num_layers) ** 0.5 if residual else 0.02
        nn.init.normal_(parameter, std=std, generator=generator)
