"""Pixels, tiles and token counts against the image processors and models of transformers, bit for bit."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import CheckpointError, ConfigError, ImageError
from mm_gpt.hub.image_processors import DEFAULTS, read_image_processor, read_nanovlm
from mm_gpt.vision.tiling import Tiler, TilingConfig, assemble, num_image_tokens, unpad, unpadded
from mm_gpt.vision.transforms import ImageTransform, ImageTransformConfig, TrainTransform

# Height and width: one pixel, slivers, exact tiles, just beside a tile, both orientations, larger than every limit
SIZES = [(1, 1), (1, 40), (40, 1), (24, 24), (48, 24), (25, 47), (50, 33), (33, 50), (200, 30), (30, 201), (131, 97)]
CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
SQUARE = {"size": {"height": 24, "width": 24}}
PINPOINTS = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}
INTERNVL = {"image_processor_type": "GotOcr2ImageProcessor"}
IDEFICS3 = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}}
FAMILIES = {
    "clip": ("CLIPImageProcessor", CLIP),
    "clip-cropped": ("CLIPImageProcessor", {"size": {"shortest_edge": 29}, "crop_size": {"height": 22, "width": 22}}),
    "clip-bilinear": ("CLIPImageProcessor", {**CLIP, "resample": 2}),
    "kosmos2": ("CLIPImageProcessor", {"use_square_size": True}),
    "siglip": ("SiglipImageProcessor", SQUARE),
    "llava": ("LlavaImageProcessor", CLIP),
    "llava-pad": ("LlavaImageProcessor", {**CLIP, "do_pad": True}),
    "llava-next": ("LlavaNextImageProcessor", {**CLIP, **PINPOINTS}),
    "onevision": ("LlavaOnevisionImageProcessor", {**SQUARE, **PINPOINTS}),
    "idefics3": ("Idefics3ImageProcessor", IDEFICS3),
    "idefics3-odd": ("Idefics3ImageProcessor", {**IDEFICS3, "size": {"longest_edge": 101}}),
    "smolvlm": ("SmolVLMImageProcessor", IDEFICS3),
    "smolvlm-whole": ("SmolVLMImageProcessor", {**IDEFICS3, "do_image_splitting": False}),
}


def noise(size, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Family -> (the processor that transformers loads by default, our tiler read from the file that it wrote)."""
    import transformers

    cache = {}

    def load(family: str):
        if family not in cache:
            name, options = FAMILIES[family]
            folder = tmp_path_factory.mktemp(family)
            getattr(transformers, name)(**options).save_pretrained(folder)
            path = folder / "preprocessor_config.json"
            ours = Tiler(*read_image_processor(json.loads(path.read_text()), str(path)))
            cache[family] = transformers.AutoImageProcessor.from_pretrained(folder), ours
        return cache[family]

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_equal_transformers(family, reference):
    # Stops: PIL's rounding in place of torchvision's, bicubic for lanczos, a crop or a padding one pixel off, the
    # global tile at the wrong end, one resize in place of two. Bit for bit.
    theirs, ours = reference(family)
    extra = {"return_row_col_info": True} if "max_image_size" in FAMILIES[family][1] else {}
    for size in SIZES:
        image = noise(size, seed=sum(size))
        expected = theirs(image, return_tensors="pt", **extra)
        tiled = ours(image)
        pixels = expected["pixel_values"][0]
        assert torch.equal(tiled.pixel_values, pixels if pixels.ndim == 4 else pixels[None]), size
        assert (tiled.rows, tiled.cols) == ours.grid(*size)
        assert tiled.size == size
        if extra:
            assert (tiled.rows, tiled.cols) == (expected["rows"][0][0], expected["cols"][0][0]), size


@pytest.mark.parametrize("family", ["clip", "llava-next", "idefics3"])
def test_batches_of_transformers_hold_the_same_pixels(family, reference):
    # Stops: images of one size, which it resizes together, coming out differently from images resized alone.
    theirs, ours = reference(family)
    images = [noise((50, 33), seed=1), noise((30, 70), seed=2), noise((50, 33), seed=3)]
    nested = [[image] for image in images] if family == "idefics3" else images
    expected = theirs(nested, return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, expected, strict=True):
        mine = ours(image).pixel_values
        assert torch.equal(mine, pixels[: len(mine)] if pixels.ndim == 4 else pixels[None])


def test_several_images_of_onevision_are_single_tiles(reference):
    # Stops: every image of a conversation split, which the model never saw, or padded with black.
    theirs, ours = reference("onevision")
    images = [noise(size) for size in [(50, 33), (33, 60), (24, 24), (1, 9)]]
    expected = theirs([images], return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, expected, strict=True):
        tiled = ours(image, alone=False)
        assert torch.equal(tiled.pixel_values, pixels)
        assert (tiled.rows, tiled.cols) == (0, 0)


def test_idefics3_with_pil_equals_the_pil_processor():
    # For torchvision below 0.27, where transformers itself takes PIL for lanczos. It normalises in another order.
    from transformers import Idefics3ImageProcessorPil

    theirs = Idefics3ImageProcessorPil(**IDEFICS3)
    image, tiling = read_image_processor(theirs.to_dict(), "here")
    ours = Tiler(dataclasses.replace(image, backend="pil"), tiling)
    for size in SIZES:
        expected = theirs(noise(size), return_tensors="pt")["pixel_values"][0]
        assert (ours(noise(size)).pixel_values - expected).abs().max() < 1e-6


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(2048, 512), (1456, 364), (1024, 384)]))
def test_idefics3_grid_is_that_of_the_pixels(height, width, lengths):
    # Stops: rows and columns in the prompt that differ from the tiles; transformers' own get_number_of_image_patches
    # forgets one rounding, so that the resizing functions are the reference.
    from transformers.models.idefics3 import image_processing_idefics3 as theirs

    longest, tile = lengths
    ours = Tiler(ImageTransformConfig(tile), TilingConfig(kind="idefics3", longest_edge=longest))
    fitted = theirs.get_resize_output_image_size(torch.empty(0, height, width), longest)
    recorded = {}
    spy = SimpleNamespace(resize=lambda image, size, resample: recorded.update(size=size))
    theirs.Idefics3ImageProcessor.resize_for_vision_encoder(spy, torch.empty(0, *fitted), tile)
    rows, cols = max(1, recorded["size"].height // tile), max(1, recorded["size"].width // tile)
    assert ours.grid(height, width) == ((0, 0) if rows == cols == 1 else (rows, cols))


# ---- Token counts ----

sizes = st.integers(1, 3000)
NEXT = TilingConfig(kind="anyres", pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
ONEVISION = TilingConfig(
    kind="anyres_max",
    pinpoints=tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7)),
    max_tiles=9,
)


@settings(deadline=None, max_examples=120)
@given(sizes, sizes, st.sampled_from([(NEXT, 336, 14), (NEXT, 336, 48), (ONEVISION, 384, 14), (ONEVISION, 384, 64)]))
def test_tokens_equal_processor_and_model(height, width, case):
    # Stops: a prompt with another number of placeholders than the model has features, because two places round the
    # unpadded size; features in another order; newlines on the wrong side; a scaled grid with another size.
    from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    tiling, tile, patch = case
    side, size = tile // patch, (height, width)
    grid = Tiler(ImageTransformConfig(tile, backend="torchvision"), tiling).grid(height, width)
    count = num_image_tokens(tiling, size=size, grid=grid, side=side)

    pinpoints = [list(pair) for pair in tiling.pinpoints]
    processor = object.__new__(LlavaNextProcessor if tiling is NEXT else LlavaOnevisionProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor.patch_size, processor.num_additional_image_tokens = patch, 0
    processor.num_image_tokens, processor.vision_aspect_ratio = side * side, "anyres_max_9"
    assert processor._get_number_of_features(height, width, tile, tile) == count

    features = torch.arange((grid[0] * grid[1] + 1) * side * side * 2).float().view(-1, side * side, 2)
    newline = torch.tensor([-1.0, -2.0])
    vision = SimpleNamespace(image_size=tile, patch_size=patch)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    if tiling is NEXT:
        packed, _ = LlavaNextModel.pack_image_features(model, [features], [size], "full", image_newline=newline)
    else:
        packed, _ = LlavaOnevisionModel.pack_image_features(model, [features], [size], newline, "anyres_max_9")
    assert torch.equal(assemble(features, tiling, size=size, grid=grid, newline=newline), packed[0])
    assert len(packed[0]) == count


def test_tokens_of_single_tiles_and_of_plain_tiles():
    features, newline = torch.arange(12.0).view(1, 4, 3), torch.full((3,), -1.0)
    one = assemble(features, ONEVISION, size=(9, 5), grid=(0, 0), newline=newline)
    assert torch.equal(one, torch.cat([features[0], newline[None]]))
    assert num_image_tokens(ONEVISION, size=(9, 5), grid=(0, 0), side=2) == 5
    idefics3 = TilingConfig(kind="idefics3", longest_edge=96)
    tiles = torch.arange(84.0).view(7, 4, 3)
    assert torch.equal(assemble(tiles, idefics3, size=(9, 5), grid=(3, 2)), tiles.view(28, 3))
    assert num_image_tokens(idefics3, size=(9, 5), grid=(3, 2), side=2) == 28
    assert num_image_tokens(None, size=(9, 5), grid=(0, 0), side=2) == 4


def test_unpad_rounds_before_it_cuts():
    # 332 * (96 / 664) is 47.99999999999999: without the rounding 47 rows would remain and the prompt is a row short
    assert unpadded((96, 96), (332, 664)) == (48, 96)
    features = torch.arange(2 * 6 * 4).view(2, 6, 4)
    assert torch.equal(unpad(features, (4, 4)), features[:, 1:5])
    assert torch.equal(unpad(features, (3, 4)), features[:, 1:5])  # 3 rows of content in 6: one row of padding stays
    assert torch.equal(unpad(features, (6, 4)), features)


# ---- nanoVLM ----


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (24, 24), (1, 70)])
def test_early_nanovlm_equals_its_transform(size):
    # It resizes with torchvision's default, bilinear, and does not normalise.
    config, tiling = read_nanovlm({"vit_img_size": 24, "lm_hidden_dim": 576}, "config.json")
    assert tiling is None
    theirs = tv.Compose([tv.Resize((24, 24)), tv.ToTensor()])
    assert torch.equal(ImageTransform(config)(noise(size)), theirs(noise(size)))


# (height, width) -> the size before the cut, by nanoVLM's own code with tiles of 24 and a limit of 96
NANOVLM = [
    ((50, 33), True, (96, 72)),
    ((30, 201), True, (24, 96)),
    ((20, 20), True, (96, 96)),
    ((49, 49), True, (96, 96)),
    ((20, 20), False, (24, 24)),
    ((20, 30), False, (48, 48)),
    ((1, 70), False, (24, 72)),
    ((131, 97), False, (96, 72)),
]


@pytest.mark.parametrize(("size", "enlarge", "full"), NANOVLM)
def test_nanovlm_tiles(size, enlarge, full):
    values = {
        "vit_img_size": 24,
        "max_img_size": 96,
        "resize_to_max_side_len": enlarge,
        "vlm_extra_tokens": {"global_image_token": "<|global_image|>"},
    }
    tiled = Tiler(*read_nanovlm(values, "config.json"))(noise(size))
    whole = tvf.to_tensor(tvf.resize(noise(size), list(full), interpolation=tvf.InterpolationMode.BICUBIC))
    tiles = [whole[:, y : y + 24, x : x + 24] for y in range(0, full[0], 24) for x in range(0, full[1], 24)]
    if len(tiles) > 1:
        tiles.insert(0, tvf.resize(whole, [24, 24]))
        assert (tiled.rows, tiled.cols) == (full[0] // 24, full[1] // 24)
    else:
        assert (tiled.rows, tiled.cols) == (0, 0)
    assert torch.equal(tiled.pixel_values, torch.stack(tiles))


# ---- Files ----


def test_both_layouts_and_the_old_one(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import CLIPImageProcessor, Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    image = Idefics3ImageProcessor(**IDEFICS3)
    Idefics3Processor(image, PreTrainedTokenizerFast(tokenizer_object=words)).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    assert "image_processor" in nested
    assert read_image_processor(nested, "nested") == read_image_processor(image.to_dict(), "flat")

    old = {"crop_size": 24, "size": 24, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    flat = CLIPImageProcessor(**CLIP).to_dict()
    assert read_image_processor(old, "old") == read_image_processor(flat, "flat")
    for name in ("CLIPImageProcessorFast", "CLIPImageProcessorPil"):
        assert read_image_processor({**flat, "image_processor_type": name}, "x") == read_image_processor(flat, "flat")


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_silent_file_means_the_defaults_of_the_class(name):
    # Stops: our copy of the defaults drifting from the installed transformers; null means default there.
    import transformers

    # LLaVA-NeXT's own default is a tile of 224 and resolutions of 336s, which no model uses and we refuse
    size = {"size": 336, "crop_size": 336} if name == "LlavaNextImageProcessor" else {}
    full = getattr(transformers, name)(**size).to_dict()
    silent = {"image_processor_type": name, "image_mean": None, "do_center_crop": None, **size}
    assert read_image_processor(silent, "silent") == read_image_processor(full, "full")


def test_tiles_of_onevision_are_read_outside_the_image_processor():
    own = {"image_processor_type": "LlavaOnevisionImageProcessor"}
    for values in (
        {**own, "vision_aspect_ratio": "anyres_max_4"},
        {"image_processor": own} | {"vision_aspect_ratio": "anyres_max_4"},
    ):
        assert read_image_processor(values, "here")[1].max_tiles == 4


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("clip", {"image_processor_type": None}, "no image_processor_type"),
        ("clip", {"image_processor_type": "CLIPImageProcesor"}, "did you mean 'CLIPImageProcessor'"),
        ("clip", {"image_processor_type": "ConvNextImageProcessor"}, "unknown image processor"),
        ("clip", {"do_normalize": False}, "do_normalize is False"),
        ("clip", {"do_resize": False}, "do_resize is False"),
        ("clip", {"do_rescale": 0}, "do_rescale is 0"),
        ("clip", {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ("clip", {"resample": 0}, "resample is 0"),
        ("clip", {"image_mean": 0.5}, "image_mean"),
        ("clip", {"image_std": [0.5, 0.5]}, "std must be three numbers"),
        ("clip", {"do_center_crop": False}, "do_center_crop"),
        ("clip", {"crop_size": {"height": 20, "width": 24}}, "crop_size.*squares"),
        ("clip", {"crop_size": {"height": 30, "width": 30}}, "crop_size.*larger"),
        ("clip", {"size": {"shortest_edge": 24, "longest_edge": 48}}, "size is"),
        ("clip", {"size": {"longest_edge": 48}}, "size is"),
        ("clip", {"size": {"shortest_edge": "24"}}, "whole number"),
        ("clip", {"do_pad": True, "pad_size": {"height": 32, "width": 32}}, "pad_size"),
        ("siglip", {"do_center_crop": True, "crop_size": 20}, "crop_size is 20"),
        ("llava-next", {"crop_size": {"height": 48, "width": 48}}, "crop_size"),
        ("llava-next", {"image_grid_pinpoints": [[24, 50]]}, "50 pixels are not whole tiles of 24"),
        ("llava-next", {"image_grid_pinpoints": 3}, "image_grid_pinpoints"),
        ("llava-next", {"image_grid_pinpoints": [[24]]}, "pinpoints"),
        ("onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        ("idefics3", {"size": {"height": 24, "width": 24}}, "size is"),
        ("idefics3", {"size": {"longest_edge": 5000}}, "longest_edge"),
        ("idefics3", {"do_image_splitting": "no"}, "expected true or false"),
        # What would fill the memory, at the first image or before it
        ("idefics3", {"max_image_size": {"longest_edge": 1}}, r"makes up to \d+ tiles of 1 pixels"),
        ("siglip", {**INTERNVL, "max_patches": 3000}, "makes up to 3000 tiles"),
        ("siglip", {**INTERNVL, "max_patches": 10**9}, "max_patches is 1000000000: expected a whole number, 1 to"),
        ("llava-next", {"image_grid_pinpoints": [[24 * 10**6, 24 * 10**6]]}, "expected a whole number, 1 to 4096"),
        ("llava-next", {"image_grid_pinpoints": [[24, 24]] * 10**5}, "image_grid_pinpoints"),
        ("siglip", {"size": {"height": 10**9, "width": 10**9}}, "expected a whole number, 1 to 4096"),
        ("clip", {"image_mean": [10**400] * 3}, "image_mean"),
        ("onevision", {"vision_aspect_ratio": "anyres_max_" + "9" * 5000}, "vision_aspect_ratio"),
        ("onevision", {"vision_aspect_ratio": "anyres_max_²"}, "vision_aspect_ratio"),
    ],
)
def test_unsupported_settings_are_refused(family, change, message):
    # Stops: a setting that changes pixels and is silently ignored.
    name, options = FAMILIES[family]
    values = {"image_processor_type": name, **options, **change}
    with pytest.raises(CheckpointError, match=f"^folder/file.json: .*{message}") as error:
        read_image_processor(values, "folder/file.json")
    assert "\n" not in str(error.value)


def test_nanovlm_refusals():
    with pytest.raises(ConfigError, match="whole must be true"):
        TilingConfig(kind="idefics3", longest_edge=48, whole=False)
    values = {"vit_img_size": 24, "max_img_size": 100, "vlm_extra_tokens": {"global_image_token": "x"}}
    with pytest.raises(CheckpointError, match=r"^config.json: .*100 pixels are not whole tiles"):
        read_nanovlm(values, "config.json")
    with pytest.raises(CheckpointError, match=r"^config.json: vit_img_size"):
        read_nanovlm({}, "config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "idefix3", "longest_edge": 96}, "did you mean 'idefics3'"),
        ({"kind": "idefics3"}, "longest_edge must"),
        ({"kind": "anyres", "pinpoints": ((24, 24),), "longest_edge": 9}, "longest_edge is not"),
        ({"kind": "anyres"}, "needs pinpoints"),
        ({"kind": "idefics3", "longest_edge": 96, "pinpoints": ((24, 24),)}, "has no pinpoints"),
        ({"kind": "anyres", "pinpoints": ((24, 24),), "max_tiles": 3}, "max_tiles"),
        ({"kind": "anyres_max", "pinpoints": ((24, 24),)}, "max_tiles"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        TilingConfig(**values)


def test_config_survives_json():
    for config in (NEXT, ONEVISION, TilingConfig(kind="idefics3", longest_edge=2048, split=False)):
        assert from_dict(TilingConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_wrong_inputs():
    with pytest.raises(ConfigError, match="squash"):
        Tiler(ImageTransformConfig(24, mode="crop"), NEXT)
    tiler = Tiler(ImageTransformConfig(24, backend="torchvision"), TilingConfig(kind="idefics3", longest_edge=96))
    with pytest.raises(ImageError, match="mode 'L'"):
        tiler(Image.new("L", (9, 9)))


# ---- The torchvision backend elsewhere ----


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_slivers_are_refused_before_they_are_blown_up(mode):
    # Stops: a 1 x 300,000 image taking gigabytes, which is what the original processors do.
    transform = ImageTransform(ImageTransformConfig(336, mode=mode, backend="torchvision"))
    with pytest.raises(ImageError, match="300000 x 1"):
        transform(Image.new("RGB", (300_000, 1)))


def test_training_sees_the_pixels_of_the_backend():
    # An identity crop and jitter must give the evaluation pixels: fine-tuning starts where the checkpoint is.
    config = ImageTransformConfig(24, mode="squash", backend="torchvision")
    transform = TrainTransform(config, torch.Generator())
    transform.min_area, transform.max_aspect_change, transform.jitter = 1.0, 1.0, 0.0
    assert torch.allclose(transform(noise((50, 33))), ImageTransform(config)(noise((50, 33))), atol=1e-5)
