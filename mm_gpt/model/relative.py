"""Attention with relative positions and segment memory (Transformer-XL, 1901.02860).

score(i, j) = [(q_i + u) · k_j + (q_i + v) · W_r R_{i-j}] / √C: u and v are learned, R are sinusoids of the distance.
Keys and values come from the memory and the segment together, queries from the segment alone.

Shapes: B batch, T queries, S keys (the last T of them the queries' own), M memory, D width, H heads, C head size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ConfigError
from mm_gpt.model.cache import ForwardContext
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.norms import make_norm
from mm_gpt.model.positions import sinusoids


class RelativeAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        if config.attention != ("dense",) or not config.causal:
            raise ConfigError("relative positions go with dense causal attention only")
        if config.qk_norm or config.attention_softcap is not None:
            raise ConfigError("relative positions do not go with qk_norm or attention_softcap")
        self.config, self.layer = config, layer
        H, K, C = config.num_heads, config.num_kv_heads, config.head_size
        self.qkv = nn.Linear(config.width, (H + 2 * K) * C, bias=config.qkv_bias)
        self.distance = nn.Linear(config.width, H * C, bias=False)  # W_r
        self.content_bias = nn.Parameter(torch.zeros(H, C))  # u
        self.position_bias = nn.Parameter(torch.zeros(H, C))  # v
        self.sub_norm = make_norm(config, H * C) if config.sub_norm else nn.Identity()
        self.out = nn.Linear(H * C, config.width, bias=config.output_bias)

    def forward(self, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        H, K, C = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        T = x.shape[1]
        source = x if memory is None else torch.cat([memory, x], dim=1)
        qkv = rearrange(self.qkv(source), "b s (h c) -> b h s c", c=C)
        q, k, v = qkv[:, :H, -T:], qkv[:, H : H + K], qkv[:, H + K :]
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v)
        S = k.shape[2]
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
        scale = self.config.attention_scale or C**-0.5
        distances = torch.arange(S - 1, -1, -1, device=x.device)  # of the last query to each key
        r = rearrange(self.distance(sinusoids(distances, self.config.width, x.dtype)), "s (h c) -> h s c", h=H)
        bias = shift((q + self.position_bias[:, None].to(q.dtype)) @ r.transpose(-1, -2)) * scale  # (B, H, T, S)
        mask = step.mask
        assert mask is None or isinstance(mask, Tensor)  # `uses_blocks` leaves these positions out
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        bias = bias.masked_fill(~mask, -torch.inf)
        dropout = self.config.dropout if self.training else 0.0
        q = q + self.content_bias[:, None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
        return self.out(self.sub_norm(rearrange(y, "b h t c -> b t (h c)")))


def shift(scores: Tensor) -> Tensor:
    """(…, T, S) with column j for distance S-1-j, the same for each query -> column j for key j.

    Query t stands T-1-t before the last one, so its row moves left by as much: a column of zeros in front, read anew
    with rows of T, does that without a copy for each row. What comes in beyond the query's own key is for the causal
    mask to hide.
    """
    *batch, T, S = scores.shape
    return F.pad(scores, (1, 0)).reshape(*batch, S + 1, T)[..., 1:, :].reshape(*batch, T, S)
