"""The configuration of a transformer stack: all that distinguishes GPT-1 from Gemma 3, in one frozen dataclass."""

from dataclasses import dataclass
from typing import Literal

from mm_gpt.errors import ConfigError
from mm_gpt.model.attention import Pattern
from mm_gpt.model.positions import RopeScaling

MAX_XPOS_LENGTH = 65_536
MAX_LAYERS = 1000
"""DeepNet's. Each layer takes memory and time, even without its weights."""
PatternName = Literal[
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
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_place: Literal["pre", "post", "both"] = "pre"
    """pre: x + f(norm(x)). post: norm(x + f(x)), without a last norm. both: x + norm(f(norm(x))), as in Gemma 2."""
    sub_norm: bool = False
    """Magneto: a norm before the output projection of attention, and of the MLP."""
    qk_norm: bool = False
    """An RMS norm on each head's queries and keys (Qwen 3, Gemma 3)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    """down(activation(gate(x)) · up(x)) (GLU variants, 2002.05202); off: down(activation(up(x)))."""
    mlp_bias: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Biases of attention's projections: into queries, keys and values, and out of the heads."""
    positions: Literal["rope", "xpos", "learned", "sinusoidal", "relative"] = "rope"
    """relative: Transformer-XL's."""
    position_offset: int = 0
    """The number of a text's first position; fairseq's models count from 2."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] = ()
    """M-RoPE: how many rotary pairs turn by a token's time, row and column. Positions may then be (B, T, 3); those
    (B, T) have three components that are equal, as in ordinary text."""
    mrope_interleaved: bool = False
    """The three take turns from pair to pair (Qwen3-VL); off: one section of pairs after the other (Qwen2-VL)."""
    local_rope_theta: float | None = None
    """Of the layers with local attention, unscaled (Gemma 3); None: as the others."""
    attention: tuple[PatternName, ...] = ("dense",)
    """Patterns of the layers, repeated from the first to the last: ("dense", "local") alternates."""
    window: int | None = None
    """Tokens that local attention sees, the query itself included."""
    stride: int | None = None
    summary: int | None = None
    """l and c of Sparse Transformer's patterns: tokens in a block, and those of each block that all later ones see."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: C^-1/2."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    """cap · tanh(x / cap) of the scores, and of the logits (Gemma 2)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """α of DeepNorm: norm(α x + f(x)). For norm_place "post"."""
    memory_length: int = 0
    """M, the states of earlier segments that each layer attends to (Transformer-XL)."""
    causal: bool = True
    """Off: each token sees the whole text, as in an encoder."""
    tie_embeddings: bool = True
    """The output layer is the input embedding table."""
    dropout: float = 0.0
    """Of embeddings, attention weights and what each layer adds, in training."""
    init: Literal["scaled", "normal", "magneto", "deepnorm"] = "scaled"
    """scaled: N(0, 0.02), residual projections by 1/√(2L) (GPT-2). normal: N(0, 0.02) (GPT-1). magneto: Xavier, values
    and MLP and output by √ln(2L). deepnorm: Xavier, the same ones by (8L)^-1/4."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_size", "mlp_width")
        for name in (*sizes, "max_length", "norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:  # written so that NaN is refused
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"num_layers {self.num_layers} is more than {MAX_LAYERS}")
        for name in ("position_offset", "memory_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be below 0: {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2 and self.positions in ("rope", "xpos"):
            raise ConfigError(f"head_size {self.head_size} must be even for rotary positions")
        if self.width % 2 and self.positions in ("sinusoidal", "relative"):
            raise ConfigError(f"width {self.width} must be even for sinusoids")
        if self.positions == "xpos" and self.max_length > MAX_XPOS_LENGTH:
            raise ConfigError(f"xPos overflows float32 beyond {MAX_XPOS_LENGTH} tokens, not {self.max_length}")
        self._check_mrope()
        if not self.attention:
            raise ConfigError("attention must name at least one pattern")
        if not self.causal and set(self.attention) != {"dense"}:
            raise ConfigError("an encoder (causal off) has dense attention only")
        if self.memory_length and self.positions != "relative":
            raise ConfigError("memory_length needs positions 'relative': others repeat in each segment")
        if self.residual_scale != 1.0 and self.norm_place != "post":
            raise ConfigError("residual_scale is for norm_place 'post'")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")
        for layer in range(min(self.num_layers, len(self.attention))):
            self.pattern(layer)

    def _check_mrope(self) -> None:
        section = self.mrope_section
        if not section:
            if self.mrope_interleaved:
                raise ConfigError("mrope_interleaved needs mrope_section")
            return
        if len(section) != 3 or min(section) < 1 or 2 * sum(section) != self.head_size:
            raise ConfigError(
                f"mrope_section must be three counts of the {self.head_size // 2} pairs, not {list(section)}"
            )
        if self.mrope_interleaved and section[0] < max(section):
            raise ConfigError(f"mrope_section {list(section)} cannot take turns: its first must be the largest")
        if self.positions != "rope" or any(name.startswith("fixed") for name in self.attention):
            raise ConfigError("mrope_section goes with positions 'rope' and without fixed attention")

    def pattern(self, layer: int) -> Pattern:
        """What the queries of a layer may look at. Raises ConfigError for a pattern without its window or stride."""
        kind = self.attention[layer % len(self.attention)]
        return Pattern(
            kind=kind,
            window=self.window if kind == "local" else None,
            stride=self.stride if kind.startswith(("strided", "fixed")) else None,
            summary=self.summary if kind.startswith("fixed") else None,
        )

    def is_local(self, layer: int) -> bool:
        return self.attention[layer % len(self.attention)] == "local"
