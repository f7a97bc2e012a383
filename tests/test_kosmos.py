"""KOSMOS-1's properties, on the preset made small: images in place, sub-norms and their start, xPos, what trains."""

import dataclasses
import math

import pytest
import torch
from conftest import make_picture, make_tokenizer
from torch import Tensor

from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.positions import rotate, xpos_rotation
from mm_gpt.model.presets import preset
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor, ProcessorConfig, collate
from mm_gpt.vision.connectors import build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

NAMES = ["kosmos-1", "kosmos-1-resampler"]
SIZE = 32


def full_config(name: str) -> ModelConfig:
    config = preset(name).config
    assert isinstance(config, ModelConfig)
    return config


def small_decoder_config(vocab_size: int = 100, *, num_layers: int = 2, max_length: int = 256) -> DecoderConfig:
    decoder = full_config("kosmos-1").decoder
    assert isinstance(decoder, DecoderConfig)
    sizes = {"width": 64, "num_heads": 4, "num_kv_heads": 4, "head_size": 16, "mlp_width": 256, "embedding_scale": 8.0}
    return dataclasses.replace(
        decoder, vocab_size=vocab_size, num_layers=num_layers, max_length=max_length, dropout=0.0, **sizes
    )


def make_kosmos(name: str = "kosmos-1") -> tuple[MMGPT, Processor]:
    """The preset with a small ViT (16 patches and the class token), four latents and two decoder layers."""
    config, tokenizer = full_config(name), make_tokenizer()
    assert config.vision is not None
    assert config.connector is not None
    vit = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        width=32,
        num_layers=3,
        num_heads=2,
        mlp_width=64,
        class_token=True,
        pre_norm=True,
    )
    torch.manual_seed(0)
    model = MMGPT(
        dataclasses.replace(
            config,
            decoder=small_decoder_config(tokenizer.vocab_size),
            vision=dataclasses.replace(config.vision, model=vit, image_size=SIZE),
            connector=dataclasses.replace(config.connector, num_latents=4, num_heads=2, depth=2),
        )
    ).eval()
    half = (0.5, 0.5, 0.5)
    image = ImageTransformConfig(size=SIZE, mean=half, std=half)
    processor_config = ProcessorConfig(image=image, tokens_per_image=model.tokens_per_image, max_length=256)
    return model, Processor(tokenizer, processor_config, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def kosmos() -> tuple[MMGPT, Processor]:
    """For tests that change nothing."""
    return make_kosmos()


def picture(seed: int) -> Image:
    return Image(make_picture(seed))


def batch_of(processor: Processor, *segments: Segment) -> Batch:
    example = processor(Document(segments))
    return collate([[example]], processor.pixels([example]))


# ---- images in the text ----


def test_an_image_is_64_tokens_of_257_of_unit_length(kosmos: tuple[MMGPT, Processor]) -> None:
    """KOSMOS-2's code: the class token stays, and tokens are normalised, before the connector."""
    config = full_config("kosmos-1")
    assert isinstance(config.vision, VisionConfig)
    with torch.device("meta"):
        vision = VisionEncoder(config.vision)
        assert (vision.num_patches, vision.width) == (257, 1024)
        for name in NAMES:
            options = full_config(name).connector
            assert options is not None
            tokens = build_connector(options, vision.width, 2048, vision.num_patches)(torch.empty(3, 257, 1024))
            assert tokens.shape == (3, 64, 2048)
    model, processor = kosmos
    assert model.vision is not None
    with torch.no_grad():
        tokens = model.vision(batch_of(processor, picture(1)).pixel_values)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 17))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_changes_what_follows_it_and_nothing_before(name: str) -> None:
    model, processor = make_kosmos(name)
    parts: list[Segment] = [Text("first "), picture(1), Text(" then "), picture(2), Text(" last")]
    base = batch_of(processor, *parts)
    starts = (base.input_ids[0] == processor.image_start_id).nonzero().flatten().tolist()
    with torch.no_grad():
        before = model.decoder.logits(model(base))[0]
        for place, start in zip((1, 3), starts, strict=True):
            other = [*parts[:place], picture(9), *parts[place + 1 :]]
            after = model.decoder.logits(model(batch_of(processor, *other)))[0]
            assert torch.equal(before[: start + 1], after[: start + 1])
            assert (before[start + 1 :] != after[start + 1 :]).any(dim=-1).all()


def test_every_token_is_causal(kosmos: tuple[MMGPT, Processor]) -> None:
    """Words, marks and image tokens. Noise, not a constant: a norm would take that away."""
    model, processor = kosmos
    batch = batch_of(processor, Text("first "), picture(1), Text(" last"))
    with torch.no_grad():
        x = model.embed(batch).x
        before = model.decoder.logits(model.decoder(x, batch.position_ids))
        for at in range(x.shape[1]):
            noisy = x.clone()
            noisy[:, at] += torch.randn(x[:, at].shape, generator=torch.Generator().manual_seed(at))
            after = model.decoder.logits(model.decoder(noisy, batch.position_ids))
            assert torch.equal(before[:, :at], after[:, :at])
            assert (before[:, at:] != after[:, at:]).any(dim=-1).all()


def test_targets_are_the_words_and_the_end(kosmos: tuple[MMGPT, Processor]) -> None:
    """The first one is learned at </image>; images and their marks never are, in the middle of a text neither."""
    model, processor = kosmos
    end = Text(processor.tokenizer.end_of_text, is_control=True)
    batch = batch_of(processor, picture(1), Text("a red circle"), end)
    words = processor.tokenizer.encode("a red circle")
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    learned = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
    assert len(learned) == len(words) + 1 == int(model.loss(batch)[1])
    assert ids[learned[0]] == processor.image_end_id
    assert [labels[t] for t in learned] == ids[learned[0] + 1 :]

    batch = batch_of(processor, Text("see"), picture(1), Text("a red circle"), picture(2), end)
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    targets = [ids[t + 1] for t, label in enumerate(labels) if label != IGNORE_INDEX]
    # Without an id before it, the first of all tokens is read only.
    assert targets == [*processor.tokenizer.encode("see")[1:], *words, ids[-1]]
    assert all(id < processor.vocab_size for id in targets)


def test_exactly_the_last_block_of_the_vit_is_trained() -> None:
    """KOSMOS-2's released loop sets requires_grad and then, always, takes it back."""
    model, processor = make_kosmos()
    assert model.vision is not None
    model.vision.unfreeze(1)
    model.train()
    model.loss(batch_of(processor, picture(1), Text("a red circle")))[0].backward()
    trained = {name for name, p in model.vision.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.vision.named_parameters() if name.startswith("tower.blocks.2.")}
    others = {name for name, p in model.named_parameters() if p.grad is not None and not name.startswith("vision.")}
    assert others == {name for name, _ in model.named_parameters() if not name.startswith("vision.")}


# ---- Magneto ----


def test_norms_inside_attention_and_mlp() -> None:
    """One over all heads before the output projection, one after the activation: what both projections are given has
    mean 0 and variance 1 at the start, whatever comes in."""
    decoder = Decoder(small_decoder_config())
    init_weights(decoder, torch.Generator().manual_seed(0))
    given: dict[str, Tensor] = {}
    for number, block in enumerate(decoder.blocks):
        for name in ("attention.out", "mlp.down"):
            key = f"{number}.{name}"
            block.get_submodule(name).register_forward_pre_hook(lambda _, x, key=key: given.update({key: x[0]}))
    with torch.no_grad():
        decoder(3 * torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)), torch.arange(9).expand(2, 9))
    assert len(given) == 4
    for x in given.values():
        assert x.mean(dim=-1).abs().max() < 1e-5
        torch.testing.assert_close(x.std(dim=-1, unbiased=False), torch.ones(2, 9), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("num_layers", "golden"), [(4, 1.442), (12, 1.783), (24, 1.9675)])
def test_initial_weights(num_layers: int, golden: float) -> None:
    """Xavier, times √ln(2L) for values, output and both of the MLP; queries and keys are left alone."""
    decoder = Decoder(small_decoder_config(num_layers=num_layers))
    init_weights(decoder, torch.Generator().manual_seed(0))
    state = dict(decoder.named_parameters())
    weights: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "out", "up", "down")}
    for layer in range(num_layers):
        block = f"blocks.{layer}."
        for name, part in zip("qkv", state[block + "attention.qkv.weight"].split(64), strict=True):
            weights[name].append(part)
        for name, key in (("out", "attention.out"), ("up", "mlp.up"), ("down", "mlp.down")):
            weights[name].append(state[f"{block}{key}.weight"])
        assert not any(p.any() for n, p in state.items() if n.startswith(block) and n.endswith("bias"))
    for name, parts in weights.items():
        fan_out, fan_in = parts[0].shape
        ratio = torch.stack(parts).std().item() / math.sqrt(2 / (fan_in + fan_out))
        # At least 16,384 uniform numbers: their deviation is off by 0.35 % at one sigma.
        assert ratio == pytest.approx(1.0 if name in "qk" else golden, rel=0.014), name
    assert state["embedding.weight"].std().item() == pytest.approx(64**-0.5, rel=0.03)


# ---- xPos ----


def turned(x: Tensor, positions: Tensor, *, max_length: int, is_key: bool) -> Tensor:
    """Vectors (T, C) at positions (T,), as attention turns and scales them."""
    turn = xpos_rotation(positions.unsqueeze(0), x.shape[-1], 10_000.0, max_length // 2, x)
    assert turn.scale is not None
    y = rotate(x.view(1, 1, *x.shape), turn.cos, turn.sin)
    return (y / turn.scale if is_key else y * turn.scale)[0, 0]


def scores(q: Tensor, k: Tensor, positions: Tensor, *, max_length: int = 2048) -> Tensor:
    """(T, T) of the same query and the same key at all positions."""
    q, k = (x.expand(len(positions), -1) for x in (q, k))
    queries = turned(q, positions, max_length=max_length, is_key=False)
    return queries @ turned(k, positions, max_length=max_length, is_key=True).T


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """A query and a key of 64 channels, of unit length, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    return q / q.norm(), k / k.norm()


def test_xpos_scores_depend_on_the_distance_only(pair: tuple[Tensor, Tensor]) -> None:
    """Toeplitz, the same after a shift of the whole text, the same whatever the middle of the context is."""
    positions = torch.arange(512)
    s = scores(*pair, positions)
    assert (s[1:, 1:] - s[:-1, :-1]).abs().max() < 2e-13
    for other in (scores(*pair, positions + 1500), scores(*pair, positions, max_length=8192)):
        assert (s - other).abs().max() < 2e-13
    assert (s[200] - s[201]).abs().max() > 0.01


def test_xpos_scores_are_the_papers(pair: tuple[Tensor, Tensor]) -> None:
    """Σ ζ_i^(d/512) Re(q_i k_i* e^{iθ_i d}) over complex pairs, with ζ_i = (2i/C + 0.4) / 1.4, written out."""
    q, k = (torch.complex(x[:32], x[32:]) for x in pair)
    i = torch.arange(32, dtype=torch.float64)
    zeta, theta = (2 * i / 64 + 0.4) / 1.4, 10_000 ** (-i / 32)
    s = scores(*pair, torch.arange(600))
    for d in (0, 1, 7, 100, 599):
        expected = (zeta ** (d / 512) * (q * k.conj() * torch.exp(1j * theta * d)).real).sum()
        assert s[599, 599 - d].item() == pytest.approx(expected.item(), abs=2e-13)


def test_xpos_scores_fade() -> None:
    """The most that a query and a key of fixed length can score falls with each step of distance; with plain rotary
    positions it stays. Each pair's own: the length of (in phase, a quarter turn apart)."""
    distances = torch.arange(0, 8192, 16)
    unit = torch.eye(64, dtype=torch.float64)
    total = torch.zeros(len(distances), dtype=torch.float64)
    for i in range(32):
        q = turned(unit[i].expand(len(distances), -1), distances, max_length=2048, is_key=False)
        start = torch.zeros(1, dtype=torch.long)
        keys = torch.cat([turned(unit[j : j + 1], start, max_length=2048, is_key=True) for j in (i, i + 32)])
        own = (q @ keys.T).norm(dim=-1)
        assert (own[1:] < own[:-1]).all()
        total += own
    assert total[0].item() == pytest.approx(32)
    assert total[2048 // 16] < 0.4 * total[0]
    assert total[-1] < 0.1 * total[0]


@pytest.mark.parametrize("max_length", [2048, 16_384, 65_536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_scores_stay_finite(pair: tuple[Tensor, Tensor], dtype: torch.dtype, max_length: int) -> None:
    """Half the context away from the middle, the fastest pair's scale is 0.29^(T / 1024): 1e-35 for 65,536 tokens, and
    twice as many would overflow. Rounding is that of the type, relative to what the two vectors could score."""
    positions = torch.linspace(0, max_length - 1, 257).round().long()
    exact = scores(*pair, positions, max_length=max_length).tril()
    rough = scores(*(x.to(dtype) for x in pair), positions, max_length=max_length).tril()
    assert rough.isfinite().all()
    # Angles are float32 for either type: at 65,536 they are off by 65,536 · 2^-24 = 0.004.
    tolerance = max(max_length * 2**-24, 8 * torch.finfo(dtype).eps)
    assert (rough.double() - exact).abs().max() < tolerance


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    decoder = Decoder(small_decoder_config(max_length=64))
    init_weights(decoder, torch.Generator().manual_seed(0))
    return decoder.double().eval()


def test_xpos_with_a_cache_is_the_same(decoder: Decoder) -> None:
    """Keys are kept as they were turned; TorchScale turns all of them anew at each step, around a middle that moves."""
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        full = decoder(x, positions)
        cache = KVCache(decoder.config, 2, 40, dtype=torch.float64, device=torch.device("cpu"))
        pieces = [decoder(x[:, :9], positions[:, :9], cache=cache)]
        pieces += [decoder(x[:, t : t + 1], positions[:, t : t + 1], cache=cache) for t in range(9, 40)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-12)


def test_xpos_reads_beyond_the_length_of_training(decoder: Decoder) -> None:
    """A longer max_length moves the middle and nothing else, so weights serve any length; so does a text further on."""
    longer = Decoder(dataclasses.replace(decoder.config, max_length=512)).double().eval()
    longer.load_state_dict(decoder.state_dict())
    x = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.arange(512).unsqueeze(0)
    with torch.no_grad():
        short = decoder(x[:, :64], positions[:, :64])
        torch.testing.assert_close(longer(x, positions)[:, :64], short, rtol=0, atol=1e-12)
        torch.testing.assert_close(decoder(x[:, :64], positions[:, :64] + 1000), short, rtol=0, atol=1e-12)
        assert longer(x, positions).isfinite().all()
