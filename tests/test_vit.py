"""The plain ViT against transformers' vision towers, the configs and names it is imported by, and open_clip's tags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import CheckpointError, ConfigError, DownloadError
from mm_gpt.hub import vision_towers
from mm_gpt.hub.vision_towers import (
    load_open_clip,
    tower_prefix,
    vit_config,
    vit_left_over,
    vit_table,
)
from mm_gpt.hub.weights import Checkpoint, WeightLoader, read_json, unfilled, written
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.transforms import CLIP_MEAN, ImageTransformConfig
from mm_gpt.vision.vit import ViT, ViTConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""The same float32 sums: equal bit for bit where one matrix product with all of q, k and v adds up as three do, which
is up to the BLAS. Tokens are around 1, so this is a hundred roundings; a wrong activation or norm shows above 1e-3."""


def reference(kind: str, **values: Any) -> Any:
    """A tiny tower of transformers in which no weight is at a value that hides it: norms are not 1, biases not 0."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
    from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2VisionConfig
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    config, model = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "kosmos-2": (Kosmos2VisionConfig, Kosmos2VisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
        "idefics3": (Idefics3VisionConfig, Idefics3VisionTransformer),
        "smolvlm": (SmolVLMVisionConfig, SmolVLMVisionTransformer),
    }[kind]
    torch.manual_seed(0)
    # 44 = 5 patches of 8 pixels and 4 pixels that nothing looks at, as in SigLIP's 384 = 27 · 14 + 6
    tower = model(config(**{**SIZES, "image_size": 44, "patch_size": 8, **values})).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tower


def imported(state: dict[str, Tensor], config: ViTConfig) -> ViT:
    """A state dict read by the table. Nothing in it may be missing, and nothing left over that is not known."""
    prefix = tower_prefix(state, where="test")
    with torch.device("meta"):
        vit = ViT(config)
    account = WeightLoader("test", state)
    account.fill(vit, vit_table(prefix), state.__getitem__)
    account.finish(vit_left_over(prefix))
    return vit.eval()


@pytest.fixture(scope="module", params=["clip", "kosmos-2", "siglip", "idefics3", "smolvlm"])
def tower(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, reference(request.param)


def test_tokens_are_those_of_transformers(tower: tuple[str, Any]) -> None:
    """Stops, in one comparison of all tokens after all layers: a wrong name, order of q, k, v, activation, epsilon,
    place of the class token, a norm too many or too few, patches in another order."""
    kind, theirs = tower
    config = vit_config(theirs.config.to_dict(), where=kind)
    pixels = torch.randn(2, 3, 44, 44)
    with torch.inference_mode():
        output = theirs(pixels, output_hidden_states=True)
        expected = output.last_hidden_state
        if kind == "clip":  # norms the class token only
            expected = theirs.post_layernorm(expected)
        if kind == "kosmos-2":
            expected = theirs.model.post_layernorm(expected)
        tokens = imported(theirs.state_dict(), config)(pixels)
    assert tokens.shape == (2, 26 if kind in ("clip", "kosmos-2") else 25, 32)
    torch.testing.assert_close(tokens, expected, **CLOSE)


@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 3])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_feature_layer_counts_as_transformers_does(kind: str, layer: int) -> None:
    """LLaVA takes CLIP's -2, LLaVA-OneVision SigLIP's -1; both mean hidden states before the last norm."""
    theirs = reference(kind)
    config = vit_config(theirs.config.to_dict(), where=kind)
    vit = imported(theirs.state_dict(), dataclasses.replace(config, feature_layer=layer, post_norm=False))
    pixels = torch.randn(1, 3, 44, 44)
    with torch.inference_mode():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(vit(pixels), expected, **CLOSE)
        vit.blocks[-1].forward = None  # a block that the tokens do not pass is not run
        if layer in (-2, 0, 1):
            vit(pixels)
    assert len(vit.blocks) == 3


@pytest.mark.parametrize(("kind", "activation"), [("siglip", "gelu"), ("clip", "gelu"), ("siglip", "quick_gelu")])
def test_every_activation(kind: str, activation: str) -> None:
    """CLIP models of LAION use gelu, those of OpenAI quick_gelu: tokens differ in the second digit only."""
    theirs = reference(kind, hidden_act=activation)
    vit = imported(theirs.state_dict(), vit_config(theirs.config.to_dict(), where="test"))
    pixels = torch.randn(1, 3, 44, 44)
    with torch.inference_mode():
        expected = theirs.post_layernorm(theirs(pixels, output_hidden_states=True).hidden_states[-1])
        torch.testing.assert_close(vit(pixels), expected, **CLOSE)


def test_positions_of_idefics3_are_in_order_or_refused() -> None:
    """Its own rule for positions is wrong in float32 for some grids; importing those would give other tokens."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    config = reference("idefics3").config
    config.patch_size = 2
    agree = {}
    for side in (5, 19, 25, 26, 27, 28, 29, 32):
        config.image_size = side * 2
        embeddings = Idefics3VisionEmbeddings(config)
        torch.nn.init.zeros_(embeddings.patch_embedding.weight)
        torch.nn.init.zeros_(embeddings.patch_embedding.bias)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        positions = embeddings(torch.zeros(1, 3, side * 2, side * 2), patch_attention_mask=mask)[0]
        agree[side] = torch.equal(positions, embeddings.position_embedding.weight)
        if agree[side]:
            assert vit_config(config.to_dict(), where="x").num_patches == side**2
        else:
            with pytest.raises(CheckpointError, match="neighbour"):
                vit_config(config.to_dict(), where="x")
    # Every released model has its positions in order: 364 / 14, 384 / 14 and 512 / 16.
    assert [side for side in agree if not agree[side]] == [19, 25, 29]


# ---- configs ----


def test_config_without_defaults_is_the_same_config(tower: tuple[str, Any]) -> None:
    """Published configs leave defaults out. Each default is compared with the class of transformers."""
    kind, theirs = tower
    empty = type(theirs.config)()
    assert vit_config({"model_type": empty.model_type}, where=kind) == vit_config(empty.to_dict(), where=kind)
    full = theirs.config.to_dict()
    short = {key: value for key, value in full.items() if value != getattr(empty, key, None)}
    short["model_type"] = full["model_type"]
    assert len(short) < len(full)
    assert vit_config(short, where=kind) == vit_config(full, where=kind)


CONTRASTIVE_LEFT_OVER = (r"text_model\..*", r"(text|visual)_projection\.weight", "logit_scale", "logit_bias")
"""Patterns of what a whole CLIP or SigLIP checkpoint has beside its vision tower."""


def load_vision_tower(folder: Path) -> VisionEncoder:
    """The vision tower of a Hugging Face folder of CLIP or SigLIP, whole or the tower alone, in float32 on the CPU.

    Raises CheckpointError naming what is unsupported, missing or left over.
    """
    config = vit_config(read_json(folder / "config.json"), where=f"{folder}/config.json")
    with unfilled():
        encoder = VisionEncoder(VisionConfig(model=config, image_size=config.image_size))
    checkpoint = Checkpoint(folder)
    prefix = tower_prefix(checkpoint.names, where=str(folder))
    checkpoint.load(encoder.get_submodule("tower"), vit_table(prefix))
    checkpoint.finish((*vit_left_over(prefix), *CONTRASTIVE_LEFT_OVER))
    return encoder.eval()


def test_saved_folders(tmp_path: Path) -> None:
    """Whole contrastive models and a bare tower, as save_pretrained writes them: prefix, config and left-overs."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    pixels = torch.randn(1, 3, 32, 32)
    for name, model in (("clip", clip), ("siglip", siglip), ("bare", clip.vision_model)):
        model.save_pretrained(tmp_path / name)
        tower = getattr(model, "vision_model", model)
        encoder = load_vision_tower(tmp_path / name)
        with torch.inference_mode():
            expected = tower.post_layernorm(tower(pixels, output_hidden_states=True).hidden_states[-1])
            torch.testing.assert_close(encoder(pixels), expected[:, -4:], **CLOSE)


def test_table_written_back_is_the_same_checkpoint(tower: tuple[str, Any]) -> None:
    """Stops an exporter that swaps queries and keys, or loses the layers that the tokens do not pass."""
    kind, theirs = tower
    config = dataclasses.replace(vit_config(theirs.config.to_dict(), where=kind), feature_layer=-2, post_norm=False)
    state = theirs.state_dict()
    prefix = tower_prefix(state, where=kind)
    vit = imported(state, config)
    back = dict(written(vit, vit_table(prefix), lambda _, parts, rows: [rows // parts] * parts))
    assert back.keys() == {name for name in state if not name.startswith("head.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """What is missing, what is left over, and a known left-over under another prefix, which is not known."""
    theirs = reference("siglip")
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    for changes, message in (
        ({"encoder.layers.1.self_attn.k_proj.bias": None}, "lacks 1 tensor .encoder.layers.1.self_attn.k_proj.bias"),
        ({"encoder.layers.3.mlp.fc1.bias": torch.zeros(48)}, "has 1 tensor .encoder.layers.3.mlp.fc1.bias. left over"),
        ({"other.head.probe": torch.zeros(1)}, "has 1 tensor .other.head.probe. left over"),
        ({"post_layernorm.bias": torch.zeros(31)}, r"post_layernorm.bias has shape \(31,\), not \(32,\)"),
        ({"embeddings.patch_embedding.weight": None}, "expected one tensor named ...embeddings.patch_embedding.weight"),
    ):
        changed = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_vision_tower(tmp_path)
        assert str(tmp_path) in str(caught.value)
    save_file({**state, "embeddings.position_ids": torch.arange(25)[None]}, tmp_path / "model.safetensors")
    load_vision_tower(tmp_path)  # stored by older versions; the pooling head is there as well


PUBLISHED = {
    # google/siglip-so400m-patch14-384, and google/siglip2-* of fixed resolution: the same classes
    "so400m": (
        {
            "model_type": "siglip",
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
            },
        },
        (1152, 27, 16, 4304, 729),
    ),
    "smolvlm": (
        {
            "model_type": "smolvlm",
            "vision_config": {
                "hidden_size": 768,
                "image_size": 512,
                "max_image_size": {"longest_edge": 512},
                "model_type": "smolvlm_vision",
                "num_attention_heads": 12,
                "patch_size": 16,
                "size": {"longest_edge": 2048},
                "tie_word_embeddings": False,
                "use_base_siglip": False,
            },
        },
        (768, 12, 12, 3072, 1024),
    ),
    # Early Idefics3 towers have another model_type; the default width of theirs is 1152, of SigLIP's 768.
    "idefics3": (
        {
            "model_type": "idefics3",
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 364, "patch_size": 14},
        },
        (1152, 12, 16, 3072, 676),
    ),
    # openai/clip-vit-large-patch14 holds its vision config twice; the second one counts.
    "clip": (
        {
            "model_type": "clip",
            "vision_config": {"hidden_size": 768},
            "vision_config_dict": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        (1024, 24, 16, 4096, 256),
    ),
    # llava-hf/llava-1.5-7b-hf: the tower names its own type
    "llava": (
        {
            "model_type": "llava",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
        },
        (1024, 24, 16, 4096, 576),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    values, expected = PUBLISHED[name]
    config = vit_config(values, where=name)
    sizes = (config.width, config.num_layers, config.num_heads, config.mlp_width, config.num_patches)
    assert sizes == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "siglip_vision_model", "hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "siglip_vision_model", "hidden_size": "768"}, "hidden_size must be a whole number"),
        ({"model_type": "siglip_vision_model", "image_size": [224, 224]}, "image_size must be a whole number"),
        ({"model_type": "siglip_vision_model", "layer_norm_eps": None}, "layer_norm_eps must be a number"),
        ({"model_type": "siglip_vision_model", "num_channels": 4}, "num_channels 3"),
        ({"model_type": "siglip_vision_model", "attention_dropout": 0.1}, "attention_dropout 0"),
        ({"model_type": "siglip_vision_model", "num_attention_heads": 7}, "num_heads 7"),
        ({"model_type": "siglip2", "vision_config": {}}, "naflex"),
        ({"model_type": "siglip2_vision_model"}, "naflex"),
        ({"model_type": "dinov2"}, "'dinov2' is not one of"),
        ({}, "None is not one of"),
        ({"model_type": "clip", "vision_config": [1]}, "must be an object"),
        ({"model_type": "idefics3", "vision_config": {"image_size": 10**12}}, "are not supported"),
    ],
)
def test_unsupported_config_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        vit_config(values, where="folder/config.json")
    assert "folder/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[], ["a.embeddings.patch_embedding.weight", "b.embeddings.patch_embedding.weight"]])
def test_prefix_needs_exactly_one_tower(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=f"found {len(names)}"):
        tower_prefix(names, where="x")


# ---- the module ----

TINY = ViTConfig(
    image_size=32, patch_size=16, width=32, num_layers=3, num_heads=4, mlp_width=48, class_token=True, pre_norm=True
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 30}, "num_heads 4"),
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"patch_size": 64}, "patch_size 64"),
        ({"feature_layer": 4}, "feature_layer 4"),
        ({"feature_layer": -5}, "feature_layer -5"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_clip_large_has_kosmos_1s_number_of_parameters() -> None:
    """KOSMOS-1's encoder is CLIP ViT-L/14 at 224 pixels, about 304M. Golden: counted by hand from the paper's sizes."""
    config = vit_config({"model_type": "kosmos_2_vision_model"}, where="x")
    with torch.device("meta"):
        vit = ViT(config)
    block = 4 * (1024**2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 2 * 2 * 1024
    expected = 24 * block + 3 * 14**2 * 1024 + 1024 + 257 * 1024 + 2 * 2 * 1024
    assert sum(p.numel() for p in vit.parameters()) == expected == 303_179_776


def test_encoder_takes_a_vit_config() -> None:
    config = VisionConfig(model=TINY, image_size=32)
    assert from_dict(VisionConfig, json.loads(json.dumps(to_dict(config)))) == config
    torch.manual_seed(0)
    plain = VisionEncoder(config)
    assert (plain.num_patches, plain.width) == (4, 32)
    pixels = torch.randn(2, 3, 32, 32)
    everything = plain.tower(pixels)
    torch.testing.assert_close(plain(pixels), everything[:, 1:])

    options = VisionEncoder(dataclasses.replace(config, include_class_token=True, l2_normalize=True))
    options.load_state_dict(plain.state_dict(), strict=True)
    assert options.num_patches == 5
    torch.testing.assert_close(options(pixels), everything / everything.norm(dim=-1, keepdim=True))

    with pytest.raises(ValueError, match="32"):
        plain(torch.randn(1, 3, 48, 48))
    with pytest.raises(ConfigError, match="image_size is 64, but that of model is 32"):
        VisionConfig(model=TINY, image_size=64)
    without = VisionConfig(model=dataclasses.replace(TINY, class_token=False), image_size=32, include_class_token=True)
    with pytest.raises(ConfigError, match="no class token"):
        VisionEncoder(without)
    with pytest.raises(ConfigError, match="did you mean 'pre_norm'"):
        from_dict(VisionConfig, {"image_size": 32, "model": {**to_dict(TINY), "prenorm": True}})


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_unfreeze_trains_the_last_block_that_is_run(feature_layer: int) -> None:
    """Stops LLaVA's "last block" from being one that no token passes: it would train nothing, and nobody would see."""
    model = dataclasses.replace(TINY, feature_layer=feature_layer, post_norm=False)
    vision = VisionEncoder(VisionConfig(model=model, image_size=32))
    vision.unfreeze(1)
    vision(torch.randn(1, 3, 32, 32)).square().sum().backward()
    trained = {name for name, p in vision.named_parameters() if p.grad is not None and p.grad.any()}
    block = f"tower.blocks.{3 + feature_layer}."
    assert trained == {name for name, _ in vision.named_parameters() if name.startswith(block)}
    with pytest.raises(ConfigError, match=f"the ViT has {4 + feature_layer}"):
        vision.unfreeze(4)


def test_gradients_reach_every_weight() -> None:
    vit = ViT(TINY)
    (vit(torch.randn(2, 3, 32, 32)) * torch.randn(32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in vit.parameters())


def test_bfloat16_stays_bfloat16() -> None:
    """Stops a float32 position table or class token from turning the whole tower into float32."""
    torch.manual_seed(0)
    vit = ViT(TINY).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = vit(pixels)
        tokens = vit.bfloat16()(pixels.bfloat16())
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, atol=0.1, rtol=0.05)  # 8 bits of mantissa, three blocks


# ---- open_clip ----

OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
# A tower of timm with the attention pooling of SigLIP: heads that are cut off have weights of their own.
OPEN_CLIP_TIMM = {
    **OPEN_CLIP,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash", "size": 32}


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiny models and two tags in open_clip's own lists."""
    for name, config in (
        ("tiny", OPEN_CLIP),
        ("tiny-quickgelu", {**OPEN_CLIP, "quick_gelu": True}),
        ("tiny-timm", OPEN_CLIP_TIMM),
    ):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    image = {"mean": CLIP_MEAN, "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "shortest"}
    tags = {
        "clean": {**image, "hf_hub": "owner/tiny/"},
        "quick": {**image, "hf_hub": "owner/tiny/x.bin", "quick_gelu": True},
        "pickle": {**image, "url": "https://example.org/x.pt"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)


def save_open_clip(name: str, folder: Path, **changes: Tensor | None) -> Any:
    """A model as its hub repository holds it. `changes` replaces tensors (None: takes them out)."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    folder.mkdir()
    state = {key: value for key, value in {**model.state_dict(), **changes}.items() if value is not None}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("name", ["tiny", "tiny-quickgelu", "tiny-timm"])
def test_open_clip_folder(name: str, models: None, tmp_path: Path) -> None:
    """The activation is the folder's, whatever name it is loaded by: "tiny" finds "tiny-quickgelu"."""
    model = save_open_clip(name, tmp_path / "model")
    vision, transform = load_open_clip(f"{name.removesuffix('-quickgelu')}/{tmp_path}/model")
    size = 160 if name == "tiny-timm" else 32
    assert vision.config == VisionConfig(model=name, image_size=size)
    assert not vision.training
    assert transform == ImageTransformConfig(
        size=size, mode="squash", mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear"
    )
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        if name == "tiny-timm":
            expected = model.visual.trunk.forward_features(pixels)[:, model.visual.trunk.num_prefix_tokens :]
        else:
            model.visual.output_tokens = True
            expected = model.visual(pixels)[1]
        assert torch.equal(vision(pixels), expected)


def test_open_clip_tag(models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag says where the file is, how images are prepared, and that the activation is not the model's."""
    model = save_open_clip("tiny-quickgelu", tmp_path / "model")
    asked = []

    def download(repo: str, file: str, **_: Any) -> str:
        asked.append((repo, file))
        return str(tmp_path / "model" / "open_clip_model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    clean, transform = load_open_clip("tiny/clean")
    quick, _ = load_open_clip("tiny/quick")
    assert asked == [("owner/tiny", "open_clip_model.safetensors"), ("owner/tiny", "x.safetensors")]
    assert (clean.config.model, quick.config.model) == ("tiny", "tiny-quickgelu")
    assert transform == ImageTransformConfig(size=32, mode="crop", mean=CLIP_MEAN, std=(0.5, 0.5, 0.5))
    pixels = torch.randn(1, 3, 32, 32)
    model.visual.output_tokens = True
    with torch.inference_mode():
        assert torch.equal(quick(pixels), model.visual(pixels)[1])
        assert not torch.equal(clean(pixels), quick(pixels))


def test_every_tag_of_open_clip_is_understood() -> None:
    """Its model with the right activation exists, its preprocessing is one of ours, and a hub file can be asked for."""
    for name, tag in open_clip.list_pretrained():
        settings = open_clip.get_pretrained_cfg(name, tag)
        model = vision_towers._with_activation(name, settings.get("quick_gelu"))
        config = open_clip.get_model_config(model)
        assert config.get("quick_gelu", False) or not settings.get("quick_gelu")
        vision_towers._transform(settings, config["vision_cfg"]["image_size"], f"{name}/{tag}")
        assert settings["hf_hub"].count("/") == 2


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("ViT-B-32/laion2b_s34b_b79", "did you mean 'ViT-B-32/laion2b_s34b_b79k'"),
        ("ViT-B-33/openai", "did you mean 'ViT-B-32/openai'"),
        ("tiny", "unknown open_clip tag 'tiny'"),
        ("tiny/pickle", "tiny/pickle: its weights are published as a pickle only"),
        ("tinny/.", "unknown open_clip model 'tinny'; did you mean 'tiny'"),
    ],
)
def test_unknown_tags(tag: str, message: str, models: None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_open_clip(tag)
    assert "\n" not in str(caught.value)


def test_hub_without_the_file(models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for error, kind, message in (
        (EntryNotFoundError("404"), CheckpointError, "pickle only.*owner/tiny has no x.safetensors"),
        (LocalEntryNotFoundError("no connection"), DownloadError, "give the folder of a copy instead: tiny/FOLDER"),
        (ConnectionResetError("reset by peer\nmore"), DownloadError, "cannot fetch x.safetensors of owner/tiny: reset"),
    ):

        def download(*_: Any, error: Exception = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(kind, match=message) as caught:
            load_open_clip("tiny/quick")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.class_embedding": None}, r"lacks visual.class_embedding \(1 tensors"),
        ({"visual.extra": torch.zeros(1)}, "visual.extra is no part of tiny"),
        ({"visual.conv1.weight": torch.zeros(32, 3, 8, 8)}, r"visual.conv1.weight has shape \(32, 3, 8, 8\), not"),
    ],
)
def test_file_that_does_not_fit(changes: dict[str, Any], message: str, models: None, tmp_path: Path) -> None:
    save_open_clip("tiny", tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_open_clip(f"tiny/{tmp_path}/model")
    assert str(tmp_path) in str(caught.value)


def test_folder_that_is_not_complete(models: None, tmp_path: Path) -> None:
    """Without its config, preprocessing and activation would have to be guessed."""
    save_open_clip("tiny", tmp_path / "model")
    config = tmp_path / "model" / "open_clip_config.json"
    text = config.read_text()
    for new, message in (
        (text.replace("squash", "longest"), "resize_mode 'longest'"),
        (text.replace("bilinear", "random"), "unknown interpolation 'random'"),
        (text.replace('"mean"', '"average"'), "lacks 'mean'"),
        (text.replace("preprocess_cfg", "transform"), "expected the objects"),
    ):
        config.write_text(new)
        with pytest.raises(CheckpointError, match=message):
            load_open_clip(f"tiny/{tmp_path}/model")
    config.write_text(text.replace('"embed_dim"', '"quick_gelu": true, "embed_dim"'))
    with pytest.raises(CheckpointError, match="open_clip has no tiny-timm with QuickGELU"):
        load_open_clip(f"tiny-timm/{tmp_path}/model")
    config.write_text(text)
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    weights.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_open_clip(f"tiny/{tmp_path}/model")
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="a pickle, not safetensors"):
        load_open_clip(f"tiny/{weights.with_suffix('.bin')}")
    config.unlink()
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json: no such file"):
        load_open_clip(f"tiny/{tmp_path}/model")
