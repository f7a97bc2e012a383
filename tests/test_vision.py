"""Vision encoders, EfficientNet-Lite weights and connectors."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub.fetching.download import cache_folder
from mm_gpt.hub.fetching.registry import lookup
from mm_gpt.hub.weights import unfilled
from mm_gpt.vision.connectors import ConnectorConfig, PixelShuffleConnector, build_connector
from mm_gpt.vision.efficientnet import EfficientNetLite, load_efficientnet_lite, rename_efficientnet_lite
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder

CNN = "timm/test_efficientnet"
LITE = "timm/tf_efficientnet_lite0"
VIT = "ViT-S-32-alt"


def encoder(model: str, image_size: int = 64, **options: bool) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(VisionConfig(model=model, image_size=image_size, **options)).eval()


@pytest.mark.parametrize(
    ("model", "size", "num_patches"),
    [
        (VIT, 64, 4),
        ("RN50", 64, 4),
        (LITE, 64, 4),
        (LITE, 72, 9),  # SAME padding rounds up: a rule such as (72 // 32) ** 2 would be wrong
        ("timm/vit_tiny_patch16_224", 64, 16),
        ("timm/convnext_atto", 64, 4),
        ("timm/swin_tiny_patch4_window7_224", 64, 4),  # features are (N, h, w, C)
    ],
)
def test_every_kind_of_tower_gives_the_announced_tokens(model: str, size: int, num_patches: int) -> None:
    vision = encoder(model, size)
    with torch.inference_mode():
        tokens = vision(torch.randn(2, 3, size, size))
    assert tokens.shape == (2, vision.num_patches, vision.width)
    assert vision.num_patches == num_patches
    assert tokens.isfinite().all()


@pytest.mark.parametrize("model", ["timm/test_resnet", "timm/swin_tiny_patch4_window7_224"])
def test_tokens_of_a_feature_map_are_its_rows_from_top_to_bottom(model: str) -> None:
    """Stops a transposed flatten, for both layouts of timm: (N, C, h, w) and (N, h, w, C)."""
    vision = encoder(model, 128)
    pixels = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        tokens = vision(pixels)
        features = vision.tower.trunk.forward_features(pixels)
    if features.shape[1] == vision.width:
        features = features.permute(0, 2, 3, 1)
    for row, column in ((0, 3), (2, 1)):
        torch.testing.assert_close(tokens[:, 4 * row + column], features[:, row, column])


def test_vit_tokens_are_what_open_clip_calls_tokens() -> None:
    """Stops a forgotten ln_post or a class token among the patches."""
    vision = encoder(VIT)
    vision.tower.output_tokens = True
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        pooled, tokens = vision.tower(pixels)
        torch.testing.assert_close(vision(pixels), tokens)
        all_tokens = encoder(VIT, include_class_token=True)(pixels)
    assert all_tokens.shape[1] == vision.num_patches + 1
    torch.testing.assert_close(all_tokens[:, 1:], tokens)
    torch.testing.assert_close(all_tokens[:, 0], pooled)


def test_l2_normalize_gives_unit_tokens() -> None:
    tokens = encoder(VIT, l2_normalize=True)(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("model", "suggestion"), [("ViT-B-33", "ViT-B-32"), ("timm/tf_efficientnet_lit2", "tf_efficientnet_lite2")]
)
def test_unknown_model_suggests_the_closest(model: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=suggestion):
        VisionConfig(model=model, image_size=64)


def test_class_token_of_a_convolutional_tower_is_refused() -> None:
    with pytest.raises(ConfigError, match="no class token"):
        encoder(CNN, include_class_token=True)


def test_wrong_image_size_is_refused() -> None:
    """P is fixed by the config: an image of another size would silently change the number of tokens."""
    with pytest.raises(ValueError, match="64"):
        encoder(CNN)(torch.randn(1, 3, 96, 96))


def test_config_survives_json() -> None:
    config = VisionConfig(model=CNN, image_size=64, l2_normalize=True)
    assert from_dict(VisionConfig, to_dict(config)) == config


def test_training_mode_does_not_mix_images_or_move_batch_norm_statistics() -> None:
    """Stops BatchNorm from averaging over the other images of a batch and from forgetting ImageNet."""
    vision = encoder(CNN).train()
    before = {k: v.clone() for k, v in vision.named_buffers()}
    pixels = torch.randn(3, 3, 64, 64)
    together = vision(pixels)
    torch.testing.assert_close(together[:1], vision(pixels[:1]), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in vision.named_buffers())

    learning = encoder(CNN, train_batch_norm=True).train()
    learning(pixels)
    assert not torch.equal(dict(learning.named_buffers())["tower.trunk.bn1.running_mean"], torch.zeros(16))


@pytest.mark.parametrize("model", [VIT, LITE])
def test_unfreeze_trains_exactly_the_last_block(model: str) -> None:
    """Stops a freeze that overrides the unfreeze, as in KOSMOS-2's released loop."""
    vision = encoder(model)
    vision.unfreeze(1)
    vision(torch.randn(1, 3, 64, 64)).square().sum().backward()
    trained = {name for name, p in vision.named_parameters() if p.grad is not None and p.grad.any()}
    if model == VIT:
        last = len(vision.tower.transformer.resblocks) - 1
        expected = {n for n, _ in vision.named_parameters() if n.startswith(f"tower.transformer.resblocks.{last}.")}
    else:
        expected = {f"tower.trunk.{n}" for n in ("conv_head.weight", "bn2.weight", "bn2.bias")}
    assert trained == expected

    vision.unfreeze(0)
    assert not any(p.requires_grad for p in vision.parameters())
    vision.unfreeze()
    assert all(p.requires_grad for p in vision.parameters())
    with pytest.raises(ConfigError, match="99"):
        vision.unfreeze(99)


def randomize_statistics(module: torch.nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.8, 1.2)
            torch.nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("model", [LITE, VIT])
def test_folding_batch_norm_keeps_the_tokens(model: str) -> None:
    vision = encoder(model)
    randomize_statistics(vision)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = vision(pixels)
    assert expected.std() > 0.01
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    for _ in range(2):  # once more changes nothing
        vision.fold_batch_norm()
        with torch.inference_mode():
            torch.testing.assert_close(vision(pixels), expected, atol=1e-4, rtol=1e-3)
    if model == LITE:
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in vision.modules())
    after = torch.nn.ModuleDict({"vision": vision}).state_dict()
    assert {f"vision.{name}" for name in before} == set(after)
    assert all(torch.equal(after[f"vision.{name}"], tensor) for name, tensor in before.items())


def test_what_is_folded_for_good_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in fewer bits are for answers alone: a second copy of the tower would take memory for nothing."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    vision = encoder(LITE)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = vision(pixels)
        assert vision.prepare("int8") == "the processor has no products in bf16"
        torch.testing.assert_close(vision(pixels), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(MMGPTError, match="is folded: to save it, load it in fp32"):
        vision.state_dict()
    with pytest.raises(ConfigError, match="is folded: to train it, load it in fp32"):
        vision.unfreeze()


@pytest.mark.parametrize(
    ("name", "has_class_token"),
    [
        ("vit_little_patch16_reg1_gap_256", False),
        ("vit_medium_patch16_reg4_gap_256", False),
        ("vit_small_patch14_reg4_dinov2", True),
        ("test_vit", True),
        ("vit_base_patch16_siglip_224", False),
        ("tf_efficientnet_lite2", False),
    ],
)
def test_registers_are_no_class_token(name: str, has_class_token: bool) -> None:
    """Stops: registers put before the patches where somebody asked for a class token, in trunks that have none."""
    with unfilled():
        plain = VisionEncoder(VisionConfig(model=f"timm/{name}", image_size=224))
        if has_class_token:
            whole = VisionEncoder(VisionConfig(model=f"timm/{name}", image_size=224, include_class_token=True))
            assert whole.num_patches > plain.num_patches
        else:
            with pytest.raises(ConfigError, match="has no class token"):
                VisionEncoder(VisionConfig(model=f"timm/{name}", image_size=224, include_class_token=True))


# EfficientNet-Lite weights


def original_lite_names(num_blocks: int) -> list[str]:
    """The names in the original files, in the order of the network, written out here independently of the table."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["_conv_stem.weight", *norm("_bn0")]
    for i in range(num_blocks):
        if i > 0:
            names += [f"_blocks.{i}._expand_conv.weight", *norm(f"_blocks.{i}._bn0")]
        names += [f"_blocks.{i}._depthwise_conv.weight", *norm(f"_blocks.{i}._bn1")]
        names += [f"_blocks.{i}._project_conv.weight", *norm(f"_blocks.{i}._bn2")]
    return [*names, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


@pytest.mark.parametrize(("variant", "num_blocks"), [(0, 16), (1, 21), (2, 21)])
def test_lite_names_map_onto_timm_one_to_one(variant: int, num_blocks: int, tmp_path: Path) -> None:
    """Both networks list their layers in the order of execution, so the n-th tensor of one is the n-th of the other."""
    model = timm.create_model(f"tf_efficientnet_lite{variant}").eval()
    state = model.state_dict()
    original = dict(zip(original_lite_names(num_blocks), state.values(), strict=True))
    path = tmp_path / "lite.pth"
    torch.save(original, path)

    renamed = load_efficientnet_lite(path, with_classifier=True)
    assert list(renamed) == list(state)
    assert all(torch.equal(renamed[key], state[key]) for key in state)

    vision = encoder(f"timm/tf_efficientnet_lite{variant}")
    vision.tower.trunk.load_state_dict(load_efficientnet_lite(path), strict=True)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.classifier(vision(pixels).mean(dim=1)), model(pixels), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", range(5))
def test_lite_is_timms(variant: int) -> None:
    """Names, their order, and the features of sides that strides do not divide: a padding on the other side differs."""
    torch.manual_seed(variant)
    reference = timm.create_model(f"tf_efficientnet_lite{variant}", num_classes=0, global_pool="").eval()
    randomize_statistics(reference)
    with unfilled():
        planned = EfficientNetLite(variant)
    assert list(planned.state_dict()) == list(reference.state_dict())
    trunk = EfficientNetLite(variant).eval()
    trunk.load_state_dict(reference.state_dict(), strict=True)
    pixels = torch.randn(1, 3, 71, 40)
    with torch.inference_mode():
        torch.testing.assert_close(trunk.forward_features(pixels), reference.forward_features(pixels))


def test_lite_starts_as_timm_starts() -> None:
    """Training from nothing depends on it: PyTorch's own draw for convolutions is narrower."""
    torch.manual_seed(0)
    ours, theirs = EfficientNetLite(0).state_dict(), timm.create_model("tf_efficientnet_lite0").state_dict()
    for name, tensor in ours.items():
        if tensor.dim() == 4 and tensor.numel() > 1000:
            torch.testing.assert_close(tensor.std(), theirs[name].std(), rtol=0.1, atol=0)
        elif tensor.dim() < 4:
            assert torch.equal(tensor, theirs[name])


def test_lite_batch_norm_epsilon_is_tensorflows() -> None:
    """The weights were trained with 1e-3; PyTorch's 1e-5 would shift every channel of small variance."""
    norms = [m for m in encoder("timm/tf_efficientnet_lite2").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert {m.eps for m in norms} == {1e-3}


def test_unexpected_lite_keys_are_named() -> None:
    state = {name: torch.zeros(1) for name in original_lite_names(16)}
    with pytest.raises(CheckpointError, match=r"_blocks\.3\._se_reduce\.weight"):
        rename_efficientnet_lite(state | {"_blocks.3._se_reduce.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="3 blocks"):
        rename_efficientnet_lite({f"_blocks.{i}._bn1.weight": torch.zeros(1) for i in range(3)})


def test_bad_weight_files_are_named(tmp_path: Path) -> None:
    """Stops pickled code (weights_only) and a traceback instead of the file's name."""
    path = tmp_path / "bad.pth"
    for content in (b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pth"):
            load_efficientnet_lite(path)
    torch.save({"_fc.weight": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_efficientnet_lite(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="state dict"):
        load_efficientnet_lite(path)
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        load_efficientnet_lite(tmp_path / "missing.pth")


def test_lite2_imagenet_weights_recognise_photos() -> None:
    """The real weights, in the wrong place or with the wrong epsilon or pixel range, would not know a cat."""
    file = lookup("efficientnet-lite2").files[0]
    path = cache_folder() / file.name
    if not path.exists():
        pytest.skip(f"{file.name} is not in the cache")
    data = pytest.importorskip("skimage.data")
    model = timm.create_model("tf_efficientnet_lite2").eval()
    model.load_state_dict(load_efficientnet_lite(path, with_classifier=True), strict=True)
    for name, classes in (("chelsea", range(281, 286)), ("coffee", (967, 968))):
        photo = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float()
        side = min(photo.shape[2:])
        top, left = (photo.shape[2] - side) // 2, (photo.shape[3] - side) // 2
        photo = photo[:, :, top : top + side, left : left + side]
        pixels = F.interpolate(photo, size=(260, 260), mode="bicubic", antialias=True).clamp(0, 255) / 127.5 - 1
        with torch.inference_mode():
            assert model(pixels).argmax().item() in classes


# Connectors


@pytest.mark.parametrize(
    ("kind", "num_tokens"), [("linear", 16), ("mlp", 16), ("pixel_shuffle", 4), ("resampler", 5), ("xconnector", 5)]
)
def test_connector_shapes_and_gradients(kind: str, num_tokens: int) -> None:
    config = from_dict(ConnectorConfig, {"kind": kind, "num_latents": 5, "depth": 2, "num_heads": 2})
    connector = build_connector(config, 12, 24, 16)
    tokens = connector(torch.randn(3, 16, 12))
    assert tokens.shape == (3, connector.num_tokens, 24)
    assert connector.num_tokens == num_tokens
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(9)), kind=st.sampled_from(["resampler", "xconnector"]))
def test_resamplers_do_not_depend_on_the_order_of_patches(order: list[int], kind: str) -> None:
    config = from_dict(ConnectorConfig, {"kind": kind, "num_latents": 3, "depth": 2, "num_heads": 2})
    torch.manual_seed(0)
    connector = build_connector(config, 8, 8, 9)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(connector(x[:, order]), connector(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(connector(torch.randn(2, 9, 8)), connector(x), atol=1e-3)  # it does look at the patches


def test_pixel_shuffle_groups_neighbours() -> None:
    """Golden: a 4 x 4 grid, numbered row by row, in 2 x 2 squares. A wrong order would mix distant patches."""
    grid = torch.arange(16.0).reshape(1, 16, 1)
    shuffled = PixelShuffleConnector(1, 8, 16, scale=2).shuffle(grid)
    assert shuffled[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("num_patches", "message"), [(50, "square"), (49, "7 x 7")])
def test_pixel_shuffle_refuses_what_does_not_divide(num_patches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_connector(ConnectorConfig(kind="pixel_shuffle"), 8, 8, num_patches)


def test_xconnector_has_kosmos_2_parameters_only() -> None:
    """One Linear, 64 queries, one attention: no norm and no feed-forward. 18.87M weights at KOSMOS-1's widths."""
    with torch.device("meta"):
        connector = build_connector(ConnectorConfig(kind="xconnector", num_heads=32), 1024, 2048, 257)
    shapes = {name: tuple(p.shape) for name, p in connector.named_parameters()}
    square = {f"{n}_proj.weight": (2048, 2048) for n in "qkv"} | {f"{n}_proj.bias": (2048,) for n in "qkv"}
    assert shapes == {
        "latent_query": (64, 2048),
        "dense.weight": (2048, 1024),
        "dense.bias": (2048,),
        "out_proj.weight": (2048, 2048),
        "out_proj.bias": (2048,),
        **square,
    }
    weights = sum(p.numel() for name, p in connector.named_parameters() if name.endswith(".weight"))
    assert weights == 1024 * 2048 + 4 * 2048**2 == 18_874_368


def test_xconnector_has_no_residual() -> None:
    """With zero values the output is the output bias alone; a residual would let the queries through."""
    connector = build_connector(ConnectorConfig(kind="xconnector", num_latents=3, num_heads=2), 8, 8, 4)
    torch.nn.init.zeros_(connector.v_proj.weight)
    torch.nn.init.zeros_(connector.v_proj.bias)
    tokens = connector(torch.randn(1, 4, 8))
    torch.testing.assert_close(tokens, connector.out_proj.bias.expand(1, 3, 8))


def test_resampler_follows_flamingo() -> None:
    """Six layers by default, each with two input norms, attention without bias and a feed-forward of 4 x width."""
    with torch.device("meta"):
        connector = build_connector(ConnectorConfig(kind="resampler"), 1024, 2048, 257)
    assert len(connector.layers) == 6
    per_layer = 4 * 1024 + 1024 * 512 * 4 + 2 * 1024 + 2 * 4 * 1024**2
    total = sum(p.numel() for p in connector.parameters())
    assert total == 6 * per_layer + 64 * 1024 + 2 * 1024 + 1024 * 2048 + 2048


def test_bad_connector_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_latents"):
        ConnectorConfig(num_latents=0)
    with pytest.raises(ConfigError, match="num_heads 7"):
        build_connector(ConnectorConfig(kind="xconnector", num_heads=7), 8, 8, 4)
