"""The published models by name: `preset("gpt2-small").config` is a complete configuration, with random weights.

Each has what its paper or its released code says. Where the two disagree, where nothing was published, or where this
decoder does otherwise, `differs` says so. Weights are a matter of `mm_gpt.hub`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from mm_gpt.errors import ConfigError, unknown_name
from mm_gpt.model.decoder_config import DecoderConfig, PatternName
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.model.semicausal import SemiCausalConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig


class Hyperparameters(TypedDict, total=False):
    """Of pretraining, in the names of `TrainConfig`, as far as they were published."""

    lr: float
    schedule: Literal["linear", "wsd"]
    warmup_steps: int
    final_lr: float
    final_share: float
    decay_share: float
    ramp_from: int
    ramp_tokens: int
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip: float


@dataclass(frozen=True, kw_only=True)
class Preset:
    name: str
    about: str
    """One line, with the paper."""
    config: DecoderConfig | ModelConfig | SemiCausalConfig
    training: Hyperparameters = field(default_factory=Hyperparameters)
    """`TrainConfig(steps=…, **preset.training)`; the loop's defaults stand in for what is not known."""
    batch_tokens: int | None = None
    """Tokens in an optimizer step of pretraining."""
    differs: str = ""
    """What was chosen here, or left out."""


def preset(name: str) -> Preset:
    """Raises ConfigError with the closest name for one that is not there."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]


def _gpt(width: int, num_layers: int, num_heads: int, **changes: Any) -> DecoderConfig:
    """GPT-2's block: LayerNorm before, learned positions, biases everywhere, four times the width inside."""
    values: dict[str, Any] = {
        "vocab_size": 50_257,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_size": width // num_heads,
        "mlp_width": 4 * width,
        "max_length": 1024,
        "norm": "layer",
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "mlp_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "positions": "learned",
    }
    return DecoderConfig(**(values | changes))


# ---- GPT ----


def _gpt1() -> Preset:
    return Preset(
        name="gpt1",
        about="GPT (Radford et al. 2018): post-norm, learned positions, byte pairs of BooksCorpus",
        # The vocabulary: 40,000 merges and 478 characters.
        config=_gpt(768, 12, 12, vocab_size=40_478, max_length=512, norm_place="post", dropout=0.1, init="normal"),
        training={
            "lr": 2.5e-4,
            "warmup_steps": 2000,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.999,  # it, eps and clip: of the released code
            "eps": 1e-8,
            "clip": 1.0,
        },
        batch_tokens=64 * 512,
    )


def _gpt2(size: str, width: int, num_layers: int, num_heads: int) -> Preset:
    return Preset(
        name=f"gpt2-{size}",
        about="GPT-2 (Radford et al. 2019): norms before, a last norm, residual projections start smaller",
        config=_gpt(width, num_layers, num_heads),
        batch_tokens=512 * 1024,
        differs="The optimizer was not published. Initial weights are the paper's: its code has no 1/√N.",
    )


def _gpt3(size: str, width: int, num_layers: int, num_heads: int, lr: float, batch_tokens: int) -> Preset:
    note = {
        "13b": " The width is 40 heads of 128, 5120; the paper prints 5140.",
        "1.3b": " It has 16 heads of 128; the paper prints 24.",
    }.get(size, "")
    return Preset(
        name=f"gpt3-{size}",
        about="GPT-3 (2005.14165): GPT-2 with dense and locally banded layers in turn",
        config=_gpt(width, num_layers, num_heads, max_length=2048, attention=("dense", "local"), window=256),
        training={
            "lr": lr,
            "warmup_steps": round(375e6 / batch_tokens),
            "final_lr": 0.1,
            "final_share": 40 / 300,  # after 260 of 300 billion tokens
            "ramp_from": 32_000,
            "ramp_tokens": round(4e9 + 8e9 * (batch_tokens - 500_000) / 2_700_000),
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "clip": 1.0,
        },
        batch_tokens=batch_tokens,
        differs="The band's width was not published: 256 is a choice, an eighth of the context. Of the batch's growth "
        "it is known that it takes 4 to 12 billion tokens by size; those between are in proportion to the batch."
        + note,
    )


# ---- KOSMOS-1 and MetaLM ----


def _kosmos1(name: str, connector: ConnectorConfig, *, about: str) -> Preset:
    decoder = _gpt(
        2048,
        24,
        32,
        vocab_size=64_007,
        max_length=2048,
        sub_norm=True,
        activation="gelu",
        positions="xpos",
        embedding_scale=2048**0.5,
        dropout=0.1,
        init="magneto",
    )
    vision = VisionConfig(model="ViT-L-14-quickgelu", image_size=224, include_class_token=True, l2_normalize=True)
    return Preset(
        name=name,
        about=f"KOSMOS-1 (2302.14045): CLIP ViT-L/14 into a Magneto decoder with xPos by {about}",
        config=ModelConfig(decoder=decoder, vision=vision, connector=connector),
        training={
            "lr": 2e-4,
            "schedule": "linear",
            "warmup_steps": 375,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.98,
            "eps": 1e-6,  # it and clip: of KOSMOS-2's released command
            "clip": 2.0,
        },
        batch_tokens=1_200_000,
        differs="The paper names a resampler, KOSMOS-2's "
        "code has one cross-attention; class token, unit length and scaled embeddings are that code's. Of the ViT "
        "train the last block: `vision.unfreeze(1)`. The image's marks have their own embeddings besides the 64,007.",
    )


def _metalm() -> Preset:
    deepnorm: dict[str, Any] = {
        "vocab_size": 64_007,
        "max_length": 2048,
        "norm_place": "post",
        "activation": "gelu",
        "positions": "sinusoidal",
        "residual_scale": (2 * 24) ** 0.25,
        "init": "deepnorm",
    }
    return Preset(
        name="metalm",
        about="MetaLM (2206.06336): a causal decoder that docks a bidirectional encoder of spans",
        config=SemiCausalConfig(
            decoder=_gpt(2048, 24, 32, embedding_scale=2048**0.5, **deepnorm),
            encoder=_gpt(1024, 24, 16, embedding_scale=1024**0.5, causal=False, dropout=0.1, **deepnorm),
        ),
        training={"lr": 6e-4},
        batch_tokens=1024 * 2048,
        differs="Vocabulary and context are KOSMOS-1's, and the encoder's norms the decoder's: guesses. The encoder is "
        "pretrained, and all but its last two layers stay as they are: `freeze_encoder(train_last=2)`.",
    )


# ---- Long contexts ----


def _wikitext(
    width: int, num_layers: int, num_heads: int, *, mlp_width: int, segment: int, dropout: float
) -> DecoderConfig:
    return _gpt(
        width,
        num_layers,
        num_heads,
        vocab_size=267_735,
        mlp_width=mlp_width,
        max_length=segment,
        memory_length=segment,
        norm_place="post",
        activation="relu",
        qkv_bias=False,
        output_bias=False,
        positions="relative",
        embedding_scale=width**0.5,
        dropout=dropout,
        init="normal",
    )


def _transformer_xl(name: str, config: DecoderConfig, *, rows: int, warmup: int) -> Preset:
    return Preset(
        name=name,
        about="Transformer-XL (1901.02860) of WikiText-103: relative positions, and a memory of the last segment",
        config=config,
        training={
            "lr": 2.5e-4,
            "warmup_steps": warmup,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "clip": 0.25,
        },
        batch_tokens=rows * config.max_length,
        differs="The adaptive softmax is left out: one full table of words makes the large model 520M instead of 257M. "
        "u and v are of each layer, as in the TensorFlow code. The slowest sinusoid has a wavelength of 20,000π, not "
        "a little less. The base model's dropout spared attention weights. max_length is one segment.",
    )


def _sparse(pattern: PatternName, *, summary: int | None) -> Preset:
    return Preset(
        name=f"sparse-transformer-{pattern}",
        about=f"Sparse Transformer (1904.10509) of enwik8's bytes: {pattern} attention, both parts under one softmax",
        config=_gpt(
            512,
            30,
            8,
            vocab_size=256,
            max_length=12_288,
            attention=(pattern,),
            stride=128,
            summary=summary,
            tie_embeddings=False,
            dropout=0.4,
        ),
        training={"lr": 3.5e-4, "warmup_steps": 5000, "weight_decay": 0.01, "clip": 1.0},
        differs="Positions are one learned table, not one of rows and one of columns. The band has 128 tokens, as in "
        "the code, not 129. gelu_tanh stands for x · sigmoid(1.702 x). Weights start with 0.02, not 0.125/√fan-in, the "
        "output not with zeros. Depth, dropout, c and the learning rate were not looked up again.",
    )


# ---- Llama's kind ----


def _llama(
    width: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int, **changes: Any
) -> DecoderConfig:
    values: dict[str, Any] = {
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": width // num_heads,
        "mlp_width": mlp_width,
    }
    return DecoderConfig(**(values | changes))


def _llama_7b() -> Preset:
    return Preset(
        name="llama-7b",
        about="LLaMA (2302.13971): RMS norms, SwiGLU, rotary positions, no biases",
        config=_llama(
            4096, 32, 32, 32, 11_008, vocab_size=32_000, max_length=2048, norm_eps=1e-6, tie_embeddings=False
        ),
        training={
            "lr": 3e-4,
            "warmup_steps": 2000,
            "final_lr": 0.1,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "clip": 1.0,
        },
        batch_tokens=4_000_000,
    )


def _smollm2(size: str, lr: float, decay_share: float, batch_tokens: int, theta: float, *sizes: int) -> Preset:
    return Preset(
        name=f"smollm2-{size}",
        about="SmolLM2 (2502.02737): LLaMA, small, with tied embeddings",
        config=_llama(*sizes, vocab_size=49_152, max_length=8192, rope_theta=theta),
        training={
            "lr": lr,
            "schedule": "wsd",
            "decay_share": decay_share,
            "warmup_steps": 2000,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "clip": 1.0,
        },
        batch_tokens=batch_tokens,
        differs="Pretraining read 2048 tokens with a smaller θ, and the longer context came last. Weight decay, batch "
        "and the share of the decay were not looked up again.",
    )


def _qwen(version: int, size: str, *sizes: int, **changes: Any) -> Preset:
    paper = {
        2: "(2407.10671): LLaMA with grouped queries, and biases on queries, keys and values",
        3: "(2505.09388): LLaMA with grouped queries, and norms on queries and keys",
    }
    return Preset(
        name=f"qwen{version}-{size}",
        about=f"Qwen{version} {paper[version]}",
        config=_llama(*sizes, vocab_size=151_936, norm_eps=1e-6, rope_theta=1e6, **changes),
        differs="Pretraining's learning rate and optimizer were not published.",
    )


# Below: width, layers, heads, for Llama's kind also key-value heads and the MLP's width.
_XL_BASE = _wikitext(410, 16, 10, mlp_width=2100, segment=150, dropout=0.1)
_XL_LARGE = _wikitext(1024, 18, 16, mlp_width=4096, segment=384, dropout=0.2)
_RESAMPLER = ConnectorConfig(kind="resampler", num_latents=64, depth=6, num_heads=8)
_XCONNECTOR = ConnectorConfig(kind="xconnector", num_latents=64, num_heads=32)

PRESETS: dict[str, Preset] = {
    found.name: found
    for found in (
        _gpt1(),
        _gpt2("small", 768, 12, 12),
        _gpt2("medium", 1024, 24, 16),
        _gpt2("large", 1280, 36, 20),
        _gpt2("xl", 1600, 48, 25),
        _gpt3("125m", 768, 12, 12, 6e-4, 500_000),
        _gpt3("350m", 1024, 24, 16, 3e-4, 500_000),
        _gpt3("760m", 1536, 24, 16, 2.5e-4, 500_000),
        _gpt3("1.3b", 2048, 24, 16, 2e-4, 1_000_000),
        _gpt3("2.7b", 2560, 32, 32, 1.6e-4, 1_000_000),
        _gpt3("6.7b", 4096, 32, 32, 1.2e-4, 2_000_000),
        _gpt3("13b", 5120, 40, 40, 1e-4, 2_000_000),
        _gpt3("175b", 12_288, 96, 96, 0.6e-4, 3_200_000),
        _kosmos1("kosmos-1", _XCONNECTOR, about="KOSMOS-2's connector, one cross-attention"),
        _kosmos1("kosmos-1-resampler", _RESAMPLER, about="Flamingo's resampler, six layers"),
        _metalm(),
        _transformer_xl("transformer-xl", _XL_BASE, rows=60, warmup=0),
        _transformer_xl("transformer-xl-large", _XL_LARGE, rows=128, warmup=16_000),
        _sparse("fixed", summary=32),
        _sparse("strided", summary=None),
        _llama_7b(),
        _smollm2("135m", 3e-3, 0.2, 2**20, 100_000.0, 576, 30, 9, 3, 1536),
        _smollm2("360m", 3e-3, 0.2, 2**20, 100_000.0, 960, 32, 15, 5, 2560),
        _smollm2("1.7b", 5e-4, 0.1, 2**21, 130_000.0, 2048, 24, 32, 32, 8192),
        _qwen(2, "0.5b", 896, 24, 14, 2, 4864, max_length=32_768, qkv_bias=True),
        _qwen(2, "1.5b", 1536, 28, 12, 2, 8960, max_length=32_768, qkv_bias=True),
        _qwen(3, "0.6b", 1024, 28, 16, 8, 3072, max_length=40_960, head_size=128, qk_norm=True),
        _qwen(3, "1.7b", 2048, 28, 16, 8, 6144, max_length=40_960, head_size=128, qk_norm=True),
    )
}
