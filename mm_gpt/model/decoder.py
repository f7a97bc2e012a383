"""The transformer stack: every decoder of the papers is a configuration of it, and so are their text encoders.

Shapes: B batch, T new tokens, S tokens in the cache and new ones together, M tokens of segment memory, D width, H
heads, K key-value heads, C head size, V vocabulary.

Papers: GPT-1, GPT-2, GPT-3 (2005.14165), LLaMA (2302.13971), GQA (2305.13245), Magneto (2210.06423), DeepNorm
(2203.00555), xPos (2212.10554), Sparse Transformer (1904.10509), Transformer-XL (1901.02860), Gemma 2 (2408.00118).
`mm_gpt.model.presets` names the published models.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ContextOverflowError
from mm_gpt.model.attention import DENSE, attend
from mm_gpt.model.cache import ForwardContext, KVCache
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.fused import fused, fused_block
from mm_gpt.model.loss import CHUNK, TiedEmbedding, next_token_loss
from mm_gpt.model.norms import RMSNorm, make_norm
from mm_gpt.model.packed import Matrix, PackedEmbedding, PackedLinear, stacked_product
from mm_gpt.model.positions import mrope_components, rotate, rotation, sinusoids, xpos_rotation
from mm_gpt.model.relative import RelativeAttention
from mm_gpt.processor import IGNORE_INDEX

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.pattern, self.is_local = config.pattern(layer), config.is_local(layer)
        inner = config.num_heads * config.head_size
        self.qkv = nn.Linear(config.width, inner + 2 * config.num_kv_heads * config.head_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.sub_norm = make_norm(config, inner) if config.sub_norm else nn.Identity()
        self.out = nn.Linear(inner, config.width, bias=config.output_bias)

    def forward(self, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        H, K, C = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        qkv = rearrange(self.qkv(x), "b t (h c) -> b h t c", c=C)
        turned, v = qkv[:, : H + K], qkv[:, H + K :]
        if self.config.qk_norm:
            turned = torch.cat([self.q_norm(turned[:, :H]), self.k_norm(turned[:, H:])], dim=1)
        turn = step.local_rotation if self.is_local else step.rotation
        if turn is not None:
            turned = rotate(turned, turn.cos, turn.sin)  # queries and keys turn together
        q, k = turned[:, :H], turned[:, H:]
        if turn is not None and turn.scale is not None:
            q, k = q * turn.scale, k / turn.scale
        if step.cache is not None:
            k, v = step.cache.append(self.layer, k, v)
        whole = self.is_local and step.local_mask is not None  # the mask holds the pattern
        y = attend(
            q,
            k,
            v,
            pattern=DENSE if whole else self.pattern,
            mask=step.local_mask if whole else step.mask,
            positions=step.positions,
            causal=self.config.causal,
            scale=self.config.attention_scale,
            softcap=self.config.attention_softcap,
            dropout=self.config.dropout if self.training else 0.0,
        )
        return self.out(self.sub_norm(rearrange(y, "b h t c -> b t (h c)")))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU with silu, GeGLU with gelu (2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.sub_norm = make_norm(config, config.mlp_width) if config.sub_norm else nn.Identity()
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.sub_norm(self.activation(gate) * up))


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.sub_norm = make_norm(config, config.mlp_width) if config.sub_norm else nn.Identity()
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.sub_norm(self.activation(self.up(x))))


class Block(nn.Module):
    """Attention and MLP, each with its residual; subclasses differ in where the norms stand. This one: before."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = (RelativeAttention if config.positions == "relative" else Attention)(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). `memory` (B, M, D): what this layer was given for the tokens before."""
        if step.fused is not None and memory is None and (y := fused_block(self, x, step.fused)) is not None:
            return y
        if memory is not None:
            memory = self.attention_norm(memory)
        x = x + self.drop(self.attention(self.attention_norm(x), step, memory))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class PostNormBlock(Block):
    """norm(α x + f(x)): the original transformer, GPT-1; with α above 1 DeepNorm."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        x = self.attention_norm(self.residual_scale * x + self.drop(self.attention(x, step, memory)))
        return self.mlp_norm(self.residual_scale * x + self.drop(self.mlp(x)))


class BothNormBlock(Block):
    """x + norm(f(norm(x))): Gemma 2 and 3."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.attention_post_norm = make_norm(config, config.width)
        self.mlp_post_norm = make_norm(config, config.width)

    def forward(self, x: Tensor, step: ForwardContext, memory: Tensor | None = None) -> Tensor:
        if memory is not None:
            memory = self.attention_norm(memory)
        x = x + self.drop(self.attention_post_norm(self.attention(self.attention_norm(x), step, memory)))
        return x + self.drop(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))


BLOCKS = {"pre": Block, "post": PostNormBlock, "both": BothNormBlock}


class Decoder(nn.Module):
    """Token embeddings in, hidden states out; `logits` is a separate step, so that training never makes them all."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.position_offset + config.max_length, config.width)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(BLOCKS[config.norm_place](config, layer) for layer in range(config.num_layers))
        self.norm = nn.Identity() if config.norm_place == "post" else make_norm(config, config.width)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self._learned: Tensor | None = None
        self._tied: Tensor | None = None
        """See `learning`."""
        self._needs_positions = any(name.startswith("fixed") for name in config.attention)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the matrix that turns a hidden state into logits, of a decoder that is not packed."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def packed_head(self) -> list[Matrix]:
        """The parts of that matrix in a packed decoder; nothing in another."""
        if self.head is None:
            return [self.embedding.matrix] if isinstance(self.embedding, PackedEmbedding) else []
        return self.head.parts if isinstance(self.head, PackedLinear) else []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.packed_head else self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return torch.float32 if self.packed_head else self.embedding.weight.dtype

    def set_dropout(self, rate: float) -> None:
        """Dropout in training at another rate, with the same weights. Raises ConfigError for one outside of [0, 1)."""
        self.config = dataclasses.replace(self.config, dropout=rate)
        self.drop = nn.Dropout(rate) if rate else nn.Identity()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.drop = nn.Dropout(rate) if rate else nn.Identity()
            block.attention.config = self.config

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (…, D) of token ids (…), before positions."""
        if self._learned is not None and self._is_tied_and_trained():
            x, self._tied = TiedEmbedding.apply(self.embedding.weight, ids)
        else:
            x = self.embedding(ids)
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    @contextmanager
    def learning(self, labels: Tensor) -> Iterator[None]:
        """Inside, one `embed`, one forward pass and its `loss` belong together; labels (B, T) are those of the loss.

        Where it saves work, hidden states without a label are left out of the last block, and the gradients of both
        uses of a tied matrix are added in one place.
        """
        self._learned = labels
        try:
            yield
        finally:
            self._learned = self._tied = None

    def _is_tied_and_trained(self) -> bool:
        embedding = self.embedding
        return (
            self.head is None
            and type(embedding) is nn.Embedding
            and embedding.weight.device.type == "cpu"  # on a GPU rows are added in no fixed order
            and not embedding._forward_hooks  # as sharding has them
            and self.training
            and embedding.weight.requires_grad
            and torch.is_grad_enabled()
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        mask: "Tensor | BlockMask | None" = None,
        local_mask: "Tensor | BlockMask | None" = None,
        cache: KVCache | None = None,
        added: Sequence[Tensor] = (),
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm.

        x (B, T, D): embeddings. positions (B, T): each token's place in its document; with M-RoPE (B, T, 3) as well.
        added: what is added behind the first layers, one (B, T, D) for each. mask: boolean, True where a
        query (B, 1, T, S) may look; None means plain causal attention over T tokens (or, for one new token, over the
        whole cache). local_mask: the same for layers with local attention, window and all; None means `mask` within the
        window. Raises ContextOverflowError for more tokens than `max_length`.
        """
        x, step = self._begin(x, positions, mask, cache)
        step.local_mask = local_mask
        if self.training and cache is None and (mask is None or isinstance(mask, Tensor)):
            step.fused = fused(self.config, x, step.rotation, mask)
            x = x if step.fused is None else x.float()
        for layer, block in enumerate(self.blocks):
            if layer == len(self.blocks) - 1 and step.fused is not None and self._learned is not None:
                step = dataclasses.replace(step, fused=step.fused.asked(self._learned))
            x = block(x, step)
            if layer < len(added):
                x = x + added[layer]
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def forward_segment(
        self, x: Tensor, positions: Tensor, memory: list[Tensor] | None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states of a segment, and the memory for the next (Transformer-XL, for training).

        memory: what each layer was given before, (B, up to memory_length, D) a layer; None for the first segment. No
        gradient flows into it. mask (B, 1, T, M + T), or None: all of the memory, and causal in the segment.
        """
        x, step = self._begin(x, positions, mask, None)
        remembered: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            old = None if memory is None else memory[layer]
            seen = x.detach() if old is None else torch.cat([old, x.detach()], dim=1)
            remembered.append(seen[:, max(0, seen.shape[1] - self.config.memory_length) :])
            x = block(x, step, old)
        return self.norm(x), remembered

    def _begin(
        self, x: Tensor, positions: Tensor, mask: "Tensor | BlockMask | None", cache: KVCache | None
    ) -> tuple[Tensor, ForwardContext]:
        """Positions put into the embeddings or into rotations, once for all layers."""
        config = self.config
        if x.shape[1] > config.max_length:
            raise ContextOverflowError(
                f"{x.shape[1]} tokens do not fit into the model's context of {config.max_length}"
            )
        step = ForwardContext(mask=mask, cache=cache)
        if config.positions == "rope":
            components = None
            if positions.dim() == 3:
                components = mrope_components(config.mrope_section, config.mrope_interleaved, x.device)
            turned = partial(rotation, positions, config.head_size, x=x, components=components)
            step.rotation = turned(config.rope_theta, config.rope_scaling)
            local = config.local_rope_theta
            step.local_rotation = step.rotation if local is None else turned(local, None)
        elif config.positions == "xpos":
            turn = xpos_rotation(positions, config.head_size, config.rope_theta, config.max_length // 2, x)
            step.rotation = step.local_rotation = turn
        elif config.positions == "learned":
            x = x + self.position_embedding(positions + config.position_offset)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(positions + config.position_offset, config.width, x.dtype)
        if self._needs_positions:
            keys = positions if cache is None else cache.place(positions)
            if mask is not None or (cache is not None and cache.length > 0):  # else index and position are the same
                step.positions = (positions, keys)
        return self.drop(x), step

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) in float32, or float64 when `hidden` is."""
        if parts := self.packed_head:
            logits = stacked_product(parts, hidden)
        else:
            logits = F.linear(hidden, self.head_weight.to(hidden.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy in nats, and the number of supervised positions.

        hidden (B, T, D); labels (B, T), already shifted.
        """
        if not self.packed_head:
            weight = self.head_weight if self._tied is None else self._tied
            return next_token_loss(hidden, weight, labels, softcap=self.config.logit_softcap)
        supervised = labels != IGNORE_INDEX
        total = hidden.new_zeros(())
        for rows, targets in zip(hidden[supervised].split(CHUNK), labels[supervised].split(CHUNK), strict=True):
            total += F.cross_entropy(self.logits(rows), targets, reduction="sum")
        return total, supervised.sum()


def init_weights(decoder: Decoder, generator: torch.Generator | None = None) -> None:
    """Initial weights by `config.init`: matrices only, norms are 1 and biases 0 for all but the plain ones."""
    config = decoder.config
    layers = config.num_layers
    if config.init in ("scaled", "normal"):
        for name, parameter in decoder.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            residual = config.init == "scaled" and name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / (2 * layers) ** 0.5 if residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
        return
    gain = math.sqrt(math.log(2 * layers)) if config.init == "magneto" else (8 * layers) ** -0.25
    inner = config.num_heads * config.head_size
    kv_width = config.num_kv_heads * config.head_size
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        elif name.endswith("attention.qkv.weight"):
            # One matrix for the computer, three for the initialisation: Xavier goes by the size of each.
            q, k, v = parameter.detach().split([inner, kv_width, kv_width])
            for part, factor in ((q, 1.0), (k, 1.0), (v, gain)):
                nn.init.xavier_uniform_(part, gain=factor, generator=generator)
        elif "mlp.gate_up" in name:
            for part in parameter.detach().chunk(2):
                nn.init.xavier_uniform_(part, gain=gain, generator=generator)
        elif "mlp." in name or "attention.out" in name:
            nn.init.xavier_uniform_(parameter, gain=gain, generator=generator)
        elif name.startswith(("embedding", "head", "position_embedding")):
            nn.init.normal_(parameter, std=config.width**-0.5, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
