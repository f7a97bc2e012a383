"""FLOPs and parameters by formula, against a forward and backward pass that torch counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm_gpt.document import Image
from mm_gpt.errors import ConfigError
from mm_gpt.model.attention import Pattern, visible
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.flops import (
    NOTHING,
    Flops,
    Trained,
    _scores,
    batch_flops,
    connector_flops,
    decoder_flops,
    parameter_counts,
    vision_flops,
)
from mm_gpt.model.lora import LoRAConfig, add_lora
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Batch, collate
from mm_gpt.vision.connectors import ConnectorConfig, build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.native_vit import NativeViTConfig
from mm_gpt.vision.vit import ViTConfig

BASE = DecoderConfig(
    vocab_size=5000, width=256, num_layers=3, num_heads=8, num_kv_heads=8, head_size=32, mlp_width=700, max_length=512
)
VIT = ViTConfig(image_size=64, patch_size=8, width=64, num_layers=3, num_heads=4, mlp_width=256)
NATIVE = NativeViTConfig(
    patch_size=4, width=64, num_layers=4, num_heads=4, mlp_width=128, window=2, full_layers=(1,), deepstack=(0, 2)
)


def counted(run: Callable[[], Tensor | None]) -> Flops:
    """What torch counts in a pass that ends in a tensor, and in its backward pass if it has one."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of the CPU are not counted
        with FlopCounterMode(display=False) as counter:
            end = run()
        forward = counter.get_total_flops()
        if end is None or not end.requires_grad:
            return Flops(forward, 0.0)
        with FlopCounterMode(display=False) as counter:
            end.sum().backward()
    return Flops(forward, counter.get_total_flops())


def close(found: Flops, expected: Flops) -> None:
    assert found.forward == pytest.approx(expected.forward, rel=0.02)
    assert found.backward == pytest.approx(expected.backward, rel=0.02)


def run_decoder(decoder: Decoder, length: int, rows: int = 2) -> Tensor:
    device = decoder.embedding.weight.device
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    positions = torch.arange(length, device=device).expand(rows, -1)
    return decoder.logits(decoder(decoder.embed(ids), positions))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "qkv_bias": True},
        {"gated_mlp": False, "activation": "gelu", "positions": "learned", "norm": "layer"},
        {"tie_embeddings": False, "qk_norm": True, "head_size": 64},
        {"norm_place": "both", "attention_softcap": 30.0, "logit_softcap": 30.0},
        {"positions": "relative", "num_kv_heads": 4},
        {"attention": ("dense", "local"), "window": 500},  # of a row that is shorter
        {"causal": False, "sub_norm": True},
    ],
)
def test_decoder(changes: dict[str, Any]) -> None:
    """A fit's C is 6ND and attention, within 2 % of a counted forward (predictable scaling, check 8)."""
    config = dataclasses.replace(BASE, **changes)
    with torch.device("meta"):
        decoder = Decoder(config)
    close(decoder_flops(config, [192, 192]), counted(lambda: run_decoder(decoder, 192)))


def test_a_window_costs_its_width() -> None:
    """The blocks that compute it take up to twice as many keys: little where the model is wide."""
    config = dataclasses.replace(BASE, width=2048, mlp_width=5632, attention=("local",), window=64, max_length=1024)
    with torch.device("meta"):
        decoder = Decoder(config)
    close(decoder_flops(config, [1024]), counted(lambda: run_decoder(decoder, 1024, rows=1)))


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Pattern(kind="local", window=9),
        *(Pattern(kind=kind, stride=8) for kind in ("strided", "strided_local", "strided_column", "strided_heads")),
        *(Pattern(kind=kind, stride=8, summary=2) for kind in ("fixed", "fixed_block", "fixed_summary", "fixed_heads")),
    ],
)
def test_scores_of_a_pattern(pattern: Pattern) -> None:
    """No fewer than what is visible, nor more than about twice as many: causality hides up to half."""
    places = torch.arange(64)
    seen = visible(pattern, places, places).float()
    seen = float(seen.sum() if pattern.halves is None else seen.sum() / 2)
    assert seen <= _scores(pattern, 64, 64) <= 2 * seen + 3 * 64


def test_frozen_parts_cost_their_forward_pass_and_what_flows_through() -> None:
    with torch.device("meta"):
        decoder = Decoder(BASE)
    decoder.requires_grad_(False)
    close(decoder_flops(BASE, [192, 192], trained=NOTHING), counted(lambda: run_decoder(decoder, 192)))
    decoder.norm.requires_grad_(True)  # so that there is a backward pass at all
    decoder.embedding.requires_grad_(True)
    expected = counted(lambda: run_decoder(decoder, 192))
    close(decoder_flops(BASE, [192, 192], trained=Trained(blocks=False)), expected)
    assert expected.backward < 1.4 * expected.forward


@pytest.mark.parametrize("inputs", [False, True])
def test_low_rank_updates(inputs: bool) -> None:
    with torch.device("meta"):
        decoder = Decoder(dataclasses.replace(BASE, tie_embeddings=False)).requires_grad_(False)
        add_lora(decoder.blocks, LoRAConfig(rank=8, alpha=8))
    decoder.embedding.requires_grad_(inputs)
    trained = Trained(inputs=inputs, head=False, lora_rank=8)
    close(decoder_flops(BASE, [192, 192], trained=trained), counted(lambda: run_decoder(decoder, 192)))


@pytest.mark.parametrize("model", [VIT, "timm/test_vit", "ViT-B-32", "RN50", "timm/efficientnet_lite0"])
def test_vision_towers(model: ViTConfig | str) -> None:
    size = 64 if isinstance(model, ViTConfig) else 224 if model != "timm/test_vit" else 160
    config = VisionConfig(model=model, image_size=size)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    expected = counted(lambda: encoder(torch.empty(3, 3, size, size, device="meta")))
    found = vision_flops(config, 3)
    assert found.forward == pytest.approx(expected.forward, rel=0.02)
    if model != "timm/efficientnet_lite0":  # torch takes the channels of a depthwise convolution for connected
        assert found.backward == pytest.approx(expected.backward, rel=0.02)
    assert found.backward == pytest.approx(2 * found.forward, rel=0.15)
    assert vision_flops(config, 3, trained=False) == Flops(found.forward, 0.0)


def test_the_last_block_of_a_tower() -> None:
    config = VisionConfig(model=VIT, image_size=64)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    encoder.unfreeze(1)
    expected = counted(lambda: encoder(torch.empty(3, 3, 64, 64, device="meta")))
    close(vision_flops(config, 3, trained=[p.requires_grad for p in encoder.parameters()]), expected)
    with pytest.raises(ConfigError, match="2 parameters are said"):
        vision_flops(config, 3, trained=[True, False])


def test_a_tower_for_images_of_any_size() -> None:
    config, grids = VisionConfig(model=NATIVE, image_size=8), [(5, 4), (1, 7)]
    encoder = VisionEncoder(config)
    close(vision_flops(config, 27, grids=grids), counted(lambda: encoder(torch.randn(27, 3, 8, 8), grids)))
    with pytest.raises(ConfigError, match="needs the grid"):
        vision_flops(config, 27)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle_mlp", "pool", "resampler", "xconnector", "merger"])
def test_connectors(kind: Any, inputs: bool) -> None:
    config = ConnectorConfig(kind=kind, depth=2, num_latents=8)
    with torch.device("meta"):
        connector = build_connector(config, 96, 128, 16)
    x = torch.empty(1, 16, 96, device="meta", requires_grad=inputs)
    close(connector_flops(config, 96, 128, 16, inputs=inputs), counted(lambda: connector(x)))


def picture_batch() -> tuple[MMGPT, Batch]:
    model, processor = make_tiny()
    chats = [[{"role": "user", "content": [make_picture(n), "What is it?"]}] for n in range(3)]
    examples = [processor(processor.chat(chat)) for chat in chats]
    pixels = torch.stack([processor.transform(image.load()) for e in examples for image in e.images])
    batch = collate([[example] for example in examples], pixels)
    batch.labels = batch.input_ids.clamp(max=model.decoder.config.vocab_size - 1)
    batch.labels[:, :5] = -100
    return model.train(), batch


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "decoder"), ("vision", "connector")])
def test_a_batch_with_images(frozen: tuple[str, ...]) -> None:
    model, batch = picture_batch()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    expected = counted(lambda: model.loss(batch)[0])
    # The loss takes its gradient on the way up: what counts is both ways together
    assert batch_flops(model, batch).total == pytest.approx(expected.total, rel=0.02)


def test_documents_of_a_row_are_counted_apart() -> None:
    """Padding counts nothing; a branch sees the shared part and itself."""
    model, processor = make_tiny()
    photo = Image(make_picture())
    examples = [
        processor(processor.captions(photo, "Describe it.", ["A red circle.", "A blue square on a table."])),
        processor(processor.chat([{"role": "user", "content": "What is it?"}])),
    ]
    pixels = torch.stack([processor.transform(image.load()) for e in examples for image in e.images])
    batch = collate([examples], pixels, pad_to_multiple=64)
    branches = examples[0].branch_ids
    shared, first, second = (int((branches == n).sum()) for n in range(3))
    lengths = [(shared, shared), (first, shared + first), (second, shared + second), len(examples[1])]
    targets = int((batch.labels != -100).sum())
    config = model.decoder.config
    text = decoder_flops(config, lengths, supervised=targets)
    pictured = batch_flops(model, batch)
    alone = collate([examples[1:]], pixels[:0])
    alone_expected = decoder_flops(config, [len(examples[1])], supervised=int((alone.labels != -100).sum()))
    assert batch_flops(model, alone) == alone_expected
    assert model.config.vision is not None
    vision = vision_flops(model.config.vision, 1)
    assert text.forward + vision.forward < pictured.forward < 1.05 * (text.forward + vision.forward)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters(tied: bool) -> None:
    """N with and without the input table and the tower (predictable scaling, check 8)."""
    model, _ = make_tiny()
    decoder = dataclasses.replace(model.decoder.config, tie_embeddings=tied)
    config = dataclasses.replace(model.config, decoder=decoder)
    counts, table = parameter_counts(config), decoder.vocab_size * decoder.width
    assert counts == parameter_counts(MMGPT(config))
    assert counts.total == sum(p.numel() for p in MMGPT(config).parameters())
    assert counts.head == table
    assert counts.embedding == (0 if tied else table)
    assert counts.without_embedding == counts.total - counts.embedding
    assert counts.vision > 0
    text = parameter_counts(ModelConfig(decoder=decoder))
    assert (text.vision, text.connector, text.decoder) == (0, 0, counts.decoder)


def test_six_n_per_token_where_attention_is_small() -> None:
    """The rule that C = 6ND holds for short texts of a wide model, with N without the table that is looked up."""
    config = dataclasses.replace(BASE, width=1024, head_size=128, mlp_width=4096, tie_embeddings=False)
    n = parameter_counts(ModelConfig(decoder=config)).without_embedding
    assert decoder_flops(config, [64]).total == pytest.approx(6 * n * 64, rel=0.02)
