"""Towers with packed weights: close to float32, the same bits in any company, and not dead."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import make_picture, make_tiny, tiny_config
from torch import nn
from torch.nn import functional as F

import mm_gpt
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import save_model
from mm_gpt.kernels import tiles
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import collate
from mm_gpt.vision import bf16
from mm_gpt.vision.connectors import ConnectorConfig, build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.native_vit import NativeViTConfig
from mm_gpt.vision.vit import LayerScale, ViTConfig

needs_instructions = pytest.mark.skipif(tiles.missing() is not None, reason=str(tiles.missing()))
SIGLIP: dict[str, Any] = {"activation": "gelu_tanh"}
CLIP: dict[str, Any] = {"activation": "quick_gelu", "class_token": True, "pre_norm": True, "patch_bias": False}
CLIP |= {"feature_layer": -2, "post_norm": False, "image_size": 50}  # what is behind the last whole patch is not seen
INTERN: dict[str, Any] = {"norm": "rms", "qkv_bias": False, "qk_norm": True, "layer_scale": True, "last_norm": False}
NARROW: dict[str, Any] = {"width": 60, "num_heads": 3, "mlp_width": 100}


def encoder(**changes: Any) -> VisionEncoder:
    """With weights of every size and features that stand out, as those of trained towers do."""
    values = {"image_size": 48, "patch_size": 8, "width": 96, "num_layers": 3, "num_heads": 4, "mlp_width": 200}
    config = ViTConfig(**values | changes)
    torch.manual_seed(0)
    vision = VisionEncoder(VisionConfig(model=config, image_size=config.image_size)).eval()
    for module in vision.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, LayerScale):
            nn.init.uniform_(module.factors, 0.1, 1)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    return vision


@needs_instructions
@pytest.mark.parametrize("config", [SIGLIP, CLIP, INTERN, NARROW])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@torch.inference_mode()
def test_tokens_are_close_to_float32(config: dict[str, Any], dtype: Literal["bf16", "int8", "int4"]) -> None:
    vision = encoder(**config)
    size = vision.config.image_size
    pixels = torch.randn(3, 3, size, size)
    expected = vision(pixels)
    assert vision.prepare(dtype) is None
    found = vision(pixels)
    assert found.dtype == torch.float32
    similarity = F.cosine_similarity(found, expected, dim=-1)
    assert similarity.min() > (0.9995 if dtype == "bf16" else 0.999)
    length = found.norm(dim=-1) / expected.norm(dim=-1)
    assert (length - 1).abs().max() < 0.03
    # Its own tokens, whoever is encoded with it
    for i in range(3):
        assert torch.equal(vision(pixels[i : i + 1])[0], found[i])
    assert F.cosine_similarity(found[0], found[1], dim=-1).min() < 0.99  # not dead
    assert torch.equal(vision(pixels), found)
    assert vision(pixels[:0]).shape == (0, *found.shape[1:])


@needs_instructions
@torch.inference_mode()
def test_threads_change_no_bit() -> None:
    vision = encoder()
    vision.prepare("int8")
    pixels = torch.randn(2, 3, 48, 48)
    before = torch.get_num_threads()
    tokens = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tokens.append(vision(pixels))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@needs_instructions
def test_packed_towers_are_for_inference_alone() -> None:
    """Stops: a checkpoint without the tower's weights, a tower that does not learn."""
    vision = encoder()
    vision.prepare("bf16")
    vision.prepare("bf16")  # once more changes nothing
    model = nn.ModuleDict({"vision": vision})
    with pytest.raises(MMGPTError, match="the ViT is packed in bf16: to save it, load it in fp32"):
        model.state_dict()
    with pytest.raises(ConfigError, match="packed in bf16: to train it"):
        vision.unfreeze(1)
    # No second copy: what is left are the positions and the norm behind the blocks
    assert sum(parameter.numel() for parameter in vision.parameters()) == 36 * 96 + 2 * 96


def test_heads_of_odd_size_keep_float32() -> None:
    """They would not lie on whole groups of bytes."""
    assert encoder(width=60, num_heads=4).prepare("int8") == "the size of its heads is odd"


def test_float32_stays_as_it_is() -> None:
    vision = encoder()
    pixels = torch.randn(1, 3, 48, 48)
    plain = copy.deepcopy(vision)
    assert vision.prepare("fp32") is None
    with torch.inference_mode():
        assert torch.equal(vision(pixels), plain(pixels))
    assert vision.state_dict().keys() == plain.state_dict().keys()


def test_processors_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles.llvmlite.binding, "get_host_cpu_features", lambda: {"avx512f": True})
    tiles.missing.cache_clear()
    vision = encoder()
    try:
        assert vision.prepare("int8") == "the processor has no avx512bw"
    finally:
        tiles.missing.cache_clear()
    assert vision.state_dict()


def test_other_towers_keep_float32() -> None:
    vision = VisionEncoder(VisionConfig(model="timm/test_convnext", image_size=64)).eval()
    assert vision.prepare("int8") == "timm/test_convnext has no products in int8"
    assert all(parameter.dtype == torch.float32 for parameter in vision.parameters())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_an_efficientnet_lite_is_folded_and_runs_in_bf16(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor multiplies in it; elsewhere it stays in float32, which is told."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    vision = VisionEncoder(VisionConfig(model="timm/tf_efficientnet_lite0", image_size=64)).eval()
    assert vision.prepare("int8") == (None if has_bf16 else "the processor has no products in bf16")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in vision.modules())
    wanted = torch.bfloat16 if has_bf16 else torch.float32
    assert all(parameter.dtype == wanted for parameter in vision.parameters())
    with pytest.raises(MMGPTError, match="in bf16: to save it" if has_bf16 else "folded: to save it"):
        vision.state_dict()


@needs_instructions
@pytest.mark.parametrize("kind", ["linear", "mlp", "pixel_shuffle", "pixel_shuffle_mlp", "resampler", "xconnector"])
@torch.inference_mode()
def test_connectors_go_with_the_tower(kind: Any) -> None:
    torch.manual_seed(0)
    vision, config = encoder(), ConnectorConfig(kind=kind, num_latents=4, depth=2)
    connector = build_connector(config, vision.width, 64, vision.num_patches).eval()
    tokens = torch.randn(2, vision.num_patches, vision.width)
    expected = connector(tokens)
    vision.prepare("int8", connector)
    found = connector(tokens)
    assert not any(type(module) is nn.Linear for module in connector.modules())
    assert F.cosine_similarity(found, expected, dim=-1).min() > 0.9995
    assert not torch.equal(found, expected)
    assert connector(tokens[:0]).shape == (0, *expected.shape[1:])
    with pytest.raises(MMGPTError, match="packed in bf16: to save them"):
        nn.ModuleDict({"connector": connector}).state_dict()


@needs_instructions
@pytest.mark.parametrize("worth_packing", [1, 512])
@torch.inference_mode()
def test_towers_of_native_resolution(worth_packing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several sizes, with layers that see a window of cells and one that sees all."""
    monkeypatch.setattr(bf16, "WORTH_PACKING", worth_packing)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch_size": 4, "merge": 2, "width": 64, "num_layers": 3, "num_heads": 4, "mlp_width": 96}
    config = NativeViTConfig(**sizes, window=2, full_layers=(1,))
    vision = VisionEncoder(VisionConfig(model=config, image_size=config.image_size)).eval()
    cells, grids = torch.randn(10, 3, 8, 8), [(2, 3), (4, 1)]
    expected = vision(cells, grids)
    assert vision.prepare("int8") is None
    found = vision(cells, grids)
    assert F.cosine_similarity(found, expected, dim=-1).min() > 0.999
    assert (found.norm(dim=-1) / expected.norm(dim=-1) - 1).abs().max() < 0.01
    with pytest.raises(MMGPTError, match="packed in bf16"):
        vision.state_dict()


@needs_instructions
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_loaded_model_sees_alike_in_each_dtype(dtype: str, tmp_path: Path) -> None:
    """From a folder to the tokens that the decoder reads. Stops: a tower that is prepared twice, or not at all."""
    _, processor = make_tiny()
    vision = dataclasses.replace(encoder(image_size=32).config)
    config = dataclasses.replace(tiny_config(processor.tokenizer.vocab_size), vision=vision)
    model = MMGPT(config)
    model.vision = encoder(image_size=32)
    settings = dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image)
    save_model(model, type(processor)(processor.tokenizer, settings, vocab_size=processor.vocab_size), tmp_path)
    plain, packed = (mm_gpt.load(tmp_path, device="cpu", dtype=name) for name in ("fp32", dtype))
    seen = []
    for assistant in (plain, packed):
        documents = [Document((Image(make_picture(seed)), Text("What?"))) for seed in (0, 1)]
        examples = [assistant.processor(document) for document in documents]
        batch = collate([[example] for example in examples], assistant.processor.pixels(examples))
        with torch.inference_mode():
            seen.append([image.tokens for image in assistant.model.image_tokens(batch)])
        assert assistant.ask(make_picture(0), "What?", max_new_tokens=2).image_tokens == settings.tokens_per_image + 2
    for exact, found in zip(*seen, strict=True):
        assert F.cosine_similarity(exact, found, dim=-1).min() > 0.999
        assert not torch.equal(exact, found)
    assert F.cosine_similarity(*seen[1], dim=-1).min() < 0.99
