"""The published models by name: how many parameters they have, what makes them what they are, and that they run."""

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import MMGPTError
from mm_gpt.hub.decoders import decoder_config
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.presets import PRESETS, preset
from mm_gpt.model.semicausal import SemiCausalConfig, SemiCausalLM
from mm_gpt.training.schedules import learning_rate
from mm_gpt.training.train_config import TrainConfig


def decoder_of(name: str) -> DecoderConfig:
    config = preset(name).config
    decoder = config if isinstance(config, DecoderConfig) else config.decoder
    assert isinstance(decoder, DecoderConfig)
    return decoder


def build(config: Any) -> nn.Module:
    if isinstance(config, ModelConfig):
        return MMGPT(config)
    return SemiCausalLM(config) if isinstance(config, SemiCausalConfig) else Decoder(config)


# ---- sizes, by formulas that know nothing of the code ----


def gpt(vocab: int, context: int, layers: int, D: int, *, last_norm: bool = True) -> int:
    attention = D * 3 * D + 3 * D + D * D + D
    mlp = D * 4 * D + 4 * D + 4 * D * D + D
    norms = 2 * 2 * D
    return vocab * D + context * D + layers * (attention + mlp + norms) + 2 * D * last_norm


def llama(vocab: int, layers: int, D: int, q: int, kv: int, mlp: int, *, extra: int = 0, tied: bool = True) -> int:
    """q, kv: the width of all queries, and of all keys; extra: what a family adds to each layer."""
    return (1 if tied else 2) * vocab * D + layers * (2 * D * q + 2 * D * kv + 3 * D * mlp + 2 * D + extra) + D


def transformer_xl(layers: int, D: int, inner: int, mlp: int) -> int:
    attention = 5 * D * inner + 2 * inner  # queries, keys, values, distances, output; u and v
    return 267_735 * D + layers * (attention + 2 * D * mlp + mlp + D + 4 * D)


def magneto(vocab: int, layers: int, D: int) -> int:
    """GPT-2's layer without positions, and norms inside: of D before the output, of 4 D before the MLP's end."""
    return gpt(vocab, 0, layers, D) + layers * (2 * D + 2 * 4 * D)


def vit_large() -> int:
    D = 1024
    return gpt(0, 257, 24, D) + 3 * 14**2 * D + D + 2 * D  # the patches, the class token, the norm before


def xconnector() -> int:
    return 1024 * 2048 + 2048 + 64 * 2048 + 4 * (2048**2 + 2048)


def resampler() -> int:
    return 6 * (4 * 1024 + 4 * 1024 * 512 + 2 * 1024 + 8 * 1024**2) + 64 * 1024 + 2 * 1024 + 1024 * 2048 + 2048


def metalm() -> int:
    decoder = gpt(64_007, 0, 24, 2048, last_norm=False)
    return decoder + gpt(64_007, 0, 24, 1024, last_norm=False) + 1024 * 2048 + 2048


SPARSE = gpt(256, 12_288, 30, 512) + 256 * 512  # the output has weights of its own
MARKS = 2 * 2048
QWEN = 151_936
# Parameters by the formula, and as published: exactly those of a public checkpoint, or the paper's round number.
SIZES: dict[str, tuple[int, float]] = {
    "gpt1": (gpt(40_478, 512, 12, 768, last_norm=False), 116_534_784),
    "gpt2-small": (gpt(50_257, 1024, 12, 768), 124_439_808),
    "gpt2-medium": (gpt(50_257, 1024, 24, 1024), 354_823_168),
    "gpt2-large": (gpt(50_257, 1024, 36, 1280), 774_030_080),
    "gpt2-xl": (gpt(50_257, 1024, 48, 1600), 1_557_611_200),
    "gpt3-125m": (gpt(50_257, 2048, 12, 768), 125e6),
    "gpt3-350m": (gpt(50_257, 2048, 24, 1024), 356e6),
    "gpt3-760m": (gpt(50_257, 2048, 24, 1536), 760e6),
    "gpt3-1.3b": (gpt(50_257, 2048, 24, 2048), 1.3e9),
    "gpt3-2.7b": (gpt(50_257, 2048, 32, 2560), 2.7e9),
    "gpt3-6.7b": (gpt(50_257, 2048, 32, 4096), 6.7e9),
    "gpt3-13b": (gpt(50_257, 2048, 40, 5120), 13.0e9),
    "gpt3-175b": (gpt(50_257, 2048, 96, 12_288), 175e9),
    "kosmos-1": (magneto(64_007, 24, 2048) + vit_large() + xconnector() + MARKS, 1.66e9),
    "kosmos-1-resampler": (magneto(64_007, 24, 2048) + vit_large() + resampler() + MARKS, 1.7e9),
    "metalm": (metalm(), 1.34e9 + 366e6),  # "1.3B" and 366M
    "transformer-xl": (transformer_xl(16, 410, 410, 2100), 151e6),
    "transformer-xl-large": (transformer_xl(18, 1024, 1024, 4096), 520e6),  # 257M with the adaptive softmax
    "sparse-transformer-fixed": (SPARSE, 95e6 + 12_288 * 512),  # the paper's table of positions is tiny
    "sparse-transformer-strided": (SPARSE, 95e6 + 12_288 * 512),
    "llama-7b": (llama(32_000, 32, 4096, 4096, 4096, 11_008, tied=False), 6_738_415_616),
    "smollm2-135m": (llama(49_152, 30, 576, 576, 192, 1536), 134_515_008),
    "smollm2-360m": (llama(49_152, 32, 960, 960, 320, 2560), 361_821_120),
    "smollm2-1.7b": (llama(49_152, 24, 2048, 2048, 2048, 8192), 1_711_376_384),
    "qwen2-0.5b": (llama(QWEN, 24, 896, 896, 128, 4864, extra=896 + 2 * 128), 494_032_768),
    "qwen2-1.5b": (llama(QWEN, 28, 1536, 1536, 256, 8960, extra=1536 + 2 * 256), 1_543_714_304),
    "qwen3-0.6b": (llama(QWEN, 28, 1024, 2048, 1024, 3072, extra=2 * 128), 596_049_920),
    "qwen3-1.7b": (llama(QWEN, 28, 2048, 2048, 1024, 6144, extra=2 * 128), 1_720_574_976),
}


def test_every_preset_has_a_size_and_says_what_it_is() -> None:
    assert set(SIZES) == set(PRESETS)
    for name, found in PRESETS.items():
        assert found.name == name
        assert "\n" not in found.about
        assert "(" in found.about  # the paper


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name: str) -> None:
    expected, published = SIZES[name]
    with torch.device("meta"):
        model = build(preset(name).config)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert expected == published if isinstance(published, int) else expected == pytest.approx(published, rel=0.025)


# ---- what makes them what they are ----


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("gpt1", 512),
        ("gpt2-xl", 1024),
        ("gpt3-175b", 2048),
        ("kosmos-1", 2048),
        ("sparse-transformer-fixed", 12_288),
        ("llama-7b", 2048),
        ("smollm2-135m", 8192),
    ],
)
def test_context(name: str, length: int) -> None:
    assert decoder_of(name).max_length == length


def test_only_llama_and_the_sparse_transformer_have_an_output_of_their_own() -> None:
    untied = {name for name in PRESETS if not decoder_of(name).tie_embeddings}
    assert untied == {"llama-7b", "sparse-transformer-fixed", "sparse-transformer-strided"}


def test_post_norm_ends_without_a_norm() -> None:
    """GPT-1's blocks end with one; a norm before them and one more at the end is GPT-2."""
    for name in PRESETS:
        with torch.device("meta"):
            decoder = Decoder(dataclasses.replace(decoder_of(name), num_layers=1))
        is_post = name in ("gpt1", "metalm", "transformer-xl", "transformer-xl-large")
        assert isinstance(decoder.norm, nn.Identity) == is_post, name


def test_gpt3_is_dense_and_local_in_turn() -> None:
    for name in (n for n in PRESETS if n.startswith("gpt3-")):
        config = decoder_of(name)
        assert [config.is_local(layer) for layer in range(config.num_layers)] == [False, True] * (
            config.num_layers // 2
        )
        assert config.pattern(1).window == 256
        assert config.num_heads * config.head_size == config.width


@pytest.mark.parametrize(("name", "expected"), [("gpt2-small", 0.00408), ("gpt2-xl", 0.02 / 96**0.5), ("gpt1", 0.02)])
def test_initial_residual_projections(name: str, expected: float) -> None:
    """GPT-2's paper: smaller by the root of the number of residual layers, 0.00408 for twelve. GPT-1: all the same."""
    config = dataclasses.replace(decoder_of(name), width=64, head_size=16, num_heads=4, num_kv_heads=4, mlp_width=256)
    decoder = Decoder(dataclasses.replace(config, vocab_size=500, max_length=64))
    init_weights(decoder, torch.Generator().manual_seed(0))
    for kind in ("attention.out.weight", "mlp.down.weight"):
        weights = torch.cat([p.flatten() for n, p in decoder.named_parameters() if n.endswith(kind)])
        assert weights.std().item() == pytest.approx(expected, rel=0.01)
    assert decoder.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_deepnorm_of_24_layers() -> None:
    """α = (2 L)^1/4 of the residual, β = (8 L)^-1/4 of the weights, for a stack of one kind."""
    config = preset("metalm").config
    assert isinstance(config, SemiCausalConfig)
    for part in (config.decoder, config.encoder):
        assert part.residual_scale == pytest.approx(2.6321, abs=1e-4)
        assert (part.norm_place, part.init, part.positions, part.num_layers) == ("post", "deepnorm", "sinusoidal", 24)
    assert (config.decoder.causal, config.encoder.causal) == (True, False)


@pytest.mark.parametrize(
    ("name", "cls", "changes"),
    [
        ("gpt2-small", "GPT2Config", {}),
        ("llama-7b", "LlamaConfig", {}),
        (
            "smollm2-135m",
            "LlamaConfig",
            {
                "vocab_size": 49_152,
                "hidden_size": 576,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "intermediate_size": 1536,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            },
        ),
        (
            "qwen2-0.5b",
            "Qwen2Config",
            {
                "hidden_size": 896,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "intermediate_size": 4864,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
        (
            "qwen3-0.6b",
            "Qwen3Config",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "intermediate_size": 3072,
                "max_position_embeddings": 40_960,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
    ],
)
def test_a_checkpoint_of_that_name_has_the_same_config(name: str, cls: str, changes: dict[str, Any]) -> None:
    """What is read from `config.json` is another way to the same model: biases, norms and activations included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    values = getattr(transformers, cls)(**changes).to_dict()
    assert decoder_config(values, "config.json") == preset(name).config


def test_gpt1_is_that_of_transformers() -> None:
    """The order of norms and residuals, and the activation: no file format of ours reads GPT-1, so it is copied by
    hand. Tolerance: float32 over two layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    torch.manual_seed(0)
    sizes = transformers.OpenAIGPTConfig(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    theirs = transformers.OpenAIGPTModel(sizes).eval()
    shape = {"width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_size": 8, "mlp_width": 128}
    ours = Decoder(dataclasses.replace(decoder_of("gpt1"), vocab_size=100, max_length=32, **shape)).eval()
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    state = {"embedding.weight": theirs.tokens_embed.weight, "position_embedding.weight": theirs.positions_embed.weight}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1 and parameter.mean() == 1))
        for layer in range(2):
            for our, their in names.items():
                module = theirs.h[layer].get_submodule(their)
                is_matrix = module.weight.dim() == 2
                state[f"blocks.{layer}.{our}.weight"] = module.weight.mT if is_matrix else module.weight  # (in, out)
                state[f"blocks.{layer}.{our}.bias"] = module.bias
        ours.load_state_dict(state)
        ids = torch.randint(0, 100, (2, 20))
        expected = theirs(ids).last_hidden_state
        hidden = ours(ours.embed(ids), torch.arange(20).expand(2, 20))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


# ---- they run ----


def shrunk(config: DecoderConfig) -> DecoderConfig:
    """The same model in all but its sizes."""
    groups = 1 if config.num_kv_heads == config.num_heads else 2
    return dataclasses.replace(
        config,
        vocab_size=64,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4 // groups,
        head_size=8,
        mlp_width=48,
        max_length=32,
        window=None if config.window is None else 6,
        stride=None if config.stride is None else 6,
        summary=None if config.summary is None else 2,
        memory_length=min(config.memory_length, 32),
        dropout=0.0,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_causal_language_model(name: str) -> None:
    """Noise at token 13 leaves all before it as it was, and all weights are used."""
    decoder = Decoder(shrunk(decoder_of(name)))
    init_weights(decoder, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x = decoder.embed(torch.randint(0, 64, (2, 20), generator=generator))
    noisy = x.detach().clone()
    noisy[:, 13] += torch.randn(2, 32, generator=generator)
    positions = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        before, after = decoder(x, positions), decoder(noisy, positions)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13] != after[:, 13]).any(dim=-1).all()
    torch.logsumexp(decoder.logits(decoder(x, positions)), dim=-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_json(name: str) -> None:
    config = preset(name).config
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


# ---- recipes and names ----


def test_training_hyperparameters_fit_the_loop() -> None:
    for found in PRESETS.values():
        options = {"lr": 1e-3} | found.training
        config = TrainConfig(steps=1000, **options)
        assert (config.beta1, config.lr) == (0.9, options["lr"])


def test_gpt3_learning_rate() -> None:
    """Golden: half of the peak in the middle of 375M tokens of warm-up, a tenth of it at the end."""
    found = preset("gpt3-125m")
    assert found.batch_tokens == 500_000
    config = TrainConfig(steps=600_000, **found.training)  # 300 billion tokens, were all steps whole ones
    assert learning_rate(config, 374) == pytest.approx(3e-4)
    assert learning_rate(config, 749) == learning_rate(config, 750) == pytest.approx(6e-4)
    assert learning_rate(config, 500_000) > 6.1e-5
    assert [learning_rate(config, step) for step in (520_000, 599_999)] == pytest.approx([6e-5] * 2)
    assert [preset(f"gpt3-{size}").training["ramp_tokens"] for size in ("125m", "175b")] == [4e9, 12e9]


@pytest.mark.parametrize(
    ("name", "closest"), [("gpt2-smal", "gpt2-small"), ("kosmos1", "kosmos-1"), ("Qwen3-0.6B", "qwen3-0.6b")]
)
def test_unknown_names(name: str, closest: str) -> None:
    with pytest.raises(MMGPTError, match=rf"unknown preset '{name}'; did you mean '{closest}'"):
        preset(name)
