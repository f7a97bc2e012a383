"""The image settings of public checkpoints -> our configs.

`transformers` writes them as `preprocessor_config.json`, or, from version 5 on, under "image_processor" of
`processor_config.json`; where a folder holds both, the latter counts. A key that is missing or null means the default
of its class. A setting that would change pixels and that we do not have is refused: CheckpointError names file and key.
"""

import re
from collections.abc import Sequence
from typing import Any

from mm_gpt.errors import CheckpointError, ConfigError, unknown_name
from mm_gpt.vision.tiling import MAX_LONGEST_EDGE, MAX_TILES, Tiler, TilingConfig
from mm_gpt.vision.transforms import CLIP_MEAN, CLIP_STD, ImageTransformConfig

HALF = (0.5, 0.5, 0.5)
_COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
_CLIP = {
    **_COMMON,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
_IDEFICS3 = {
    **_COMMON,
    "image_mean": HALF,
    "image_std": HALF,
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": {
        **_COMMON,
        "image_mean": HALF,
        "image_std": HALF,
        "size": {"height": 224, "width": 224},
    },
    "Gemma3ImageProcessor": {
        **_COMMON,
        "image_mean": HALF,
        "image_std": HALF,
        "resample": 2,
        "size": {"height": 224, "width": 224},
    },
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": {
        **_CLIP,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevisionImageProcessor": {
        **_COMMON,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
        "vision_aspect_ratio": "anyres_max_9",
    },
    "GotOcr2ImageProcessor": {  # InternVL's
        **_COMMON,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
        "min_patches": 1,
        "max_patches": 12,
    },
    "Qwen2VLImageProcessor": {
        **_COMMON,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "Idefics3ImageProcessor": _IDEFICS3,
    "SmolVLMImageProcessor": _IDEFICS3,
}
"""What each class of transformers takes where the file is silent."""
_OTHER_NAMES = {
    "Kosmos2ImageProcessor": "CLIPImageProcessor",
    "Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessor",
}
"""Of the code that came with the first files of KOSMOS-2 and Qwen2.5-VL."""
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters, which is what the files hold."""


def read_image_processor(values: dict[str, Any], where: str) -> tuple[ImageTransformConfig, TilingConfig | None]:
    """Either file's content -> how an image becomes pixels, and how it is cut, if it is.

    LLaVA-OneVision's number of tiles stands outside the image processor: the key "vision_aspect_ratio" of
    `processor_config.json`, or of the model's `config.json`, which the caller may add to `values`.
    """
    nested = values.get("image_processor")
    own = nested if isinstance(nested, dict) else values
    # Files of 2022 call the class CLIPFeatureExtractor; Fast and Pil are the same settings with another backend
    name = str(own.get("image_processor_type") or own.get("feature_extractor_type") or "")
    if not name:
        raise CheckpointError(f"{where}: no image_processor_type")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    name = _OTHER_NAMES.get(name, name)
    if name not in DEFAULTS:
        raise CheckpointError(f"{where}: image_processor_type: {unknown_name('image processor', name, DEFAULTS)}")
    given = {key: value for key, value in {**values, **own}.items() if value is not None}
    settings = _Settings({**DEFAULTS[name], **given}, where)
    settings.check_common()
    try:
        if name in ("Idefics3ImageProcessor", "SmolVLMImageProcessor"):
            image, tiling = _idefics3(settings)
        elif name == "Qwen2VLImageProcessor":
            image, tiling = _qwen(settings)
        elif name == "GotOcr2ImageProcessor":
            image, tiling = _internvl(settings)
        elif "image_grid_pinpoints" in DEFAULTS[name]:
            image, tiling = _anyres(settings, name)
        else:
            image, tiling = _plain(settings, name), None
        Tiler(image, tiling)  # checks that the two go together
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return image, tiling


def read_nanovlm(values: dict[str, Any], where: str) -> tuple[ImageTransformConfig, TilingConfig | None]:
    """nanoVLM's `config.json`. Early models squash the image and have no tiles, then come tiles alone, then tiles and
    the whole image; none normalises."""
    settings = _Settings(values, where)
    size = settings.integer("vit_img_size", values.get("vit_img_size"))
    unchanged: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if "max_img_size" not in values:
        return ImageTransformConfig(size, interpolation="bilinear", **unchanged), None
    image = ImageTransformConfig(size, interpolation="bicubic", **unchanged)
    try:
        tiling = TilingConfig(
            kind="nanovlm",
            longest_edge=settings.integer("max_img_size", values["max_img_size"]),
            enlarge=values.get("resize_to_max_side_len") is True,
            whole="global_image_token" in (values.get("vlm_extra_tokens") or {}),
        )
        Tiler(image, tiling)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return image, tiling


class _Settings:
    """The keys of one file, with messages that name it."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {repr(self.values.get(key))[:80]}: {why}")

    def check_common(self) -> None:
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if self.values[key] is not True:
                raise self.error(key, "only true is supported")
        factor = self.values["rescale_factor"]
        if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
            raise self.error("rescale_factor", "only 1/255 is supported")
        if not isinstance(self.values["resample"], int) or self.values["resample"] not in _FILTERS:
            raise self.error("resample", "only 1 (lanczos), 2 (bilinear) and 3 (bicubic) are supported")
        for key in ("image_mean", "image_std"):
            numbers = self.values[key]
            fits = isinstance(numbers, Sequence) and all(isinstance(n, float | int) and abs(n) < 1e6 for n in numbers)
            if not fits:
                raise self.error(key, "expected three numbers")

    def image(self, size: int, **how: Any) -> ImageTransformConfig:
        return ImageTransformConfig(
            size=size,
            mean=tuple(map(float, self.values["image_mean"])),
            std=tuple(map(float, self.values["image_std"])),
            interpolation=_FILTERS[self.values["resample"]],  # type: ignore[arg-type]
            backend="torchvision",
            **how,
        )

    def integer(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_LONGEST_EDGE:
            raise self.error(key, f"expected a whole number, 1 to {MAX_LONGEST_EDGE}")
        return value

    def edges(self, key: str) -> tuple[str, int]:
        """A size as the name of its rule and one length: ("shortest_edge", n), ("longest_edge", n), ("square", n)."""
        value = self.values.get(key)
        if isinstance(value, int):  # how files of 2022 write it: the short edge of size, both sides of crop_size
            value = {"shortest_edge": value} if key == "size" else [value, value]
        if isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if isinstance(value, dict) and value.keys() == {"height", "width"}:
            if value["height"] != value["width"]:
                raise self.error(key, "only squares are supported")
            return "square", self.integer(key, value["height"])
        for rule in ("shortest_edge", "longest_edge"):
            if isinstance(value, dict) and value.keys() == {rule}:
                return rule, self.integer(key, value[rule])
        raise self.error(key, "expected height and width, shortest_edge or longest_edge")

    def length(self, key: str, rules: Sequence[str]) -> int:
        rule, length = self.edges(key)
        if rule not in rules:
            raise self.error(key, f"expected {' or '.join(rules)}")
        return length


def _plain(settings: _Settings, name: str) -> ImageTransformConfig:
    """CLIP, SigLIP, Gemma 3 and LLaVA: the whole image as one tile."""
    values = settings.values
    if values.get("do_pan_and_scan"):
        raise settings.error("do_pan_and_scan", "crops of an image besides the whole are not supported, only false")
    pads = values.get("do_pad") is True
    if pads and name != "LlavaImageProcessor" and values.get("pad_size") is not None:
        raise settings.error("pad_size", f"padding by {name} is not supported")
    if name == "CLIPImageProcessor" and values.get("use_square_size"):
        rule, size = "square", 224  # KOSMOS-2: the class takes its own default, whatever `size` says
    else:
        rule, size = settings.edges("size")
    if rule == "longest_edge":
        raise settings.error("size", "expected shortest_edge or height and width")
    crop = settings.length("crop_size", ["square"]) if values.get("do_center_crop") else None
    if pads and name == "LlavaImageProcessor":
        rule, mode = "square", "pad"  # after padding all rules are one
    else:
        mode = "squash"
    if rule == "square":
        if crop not in (None, size):
            raise settings.error("crop_size", f"a crop after resizing to {size} x {size} is not supported")
        return settings.image(size, mode=mode)
    if crop is None:
        raise settings.error("do_center_crop", "without it a size with shortest_edge gives no square")
    if crop > size:
        raise settings.error("crop_size", f"larger than the resized image, whose short edge is {size}")
    return settings.image(crop, mode="crop", short_side=None if size == crop else size)


def _anyres(settings: _Settings, name: str) -> tuple[ImageTransformConfig, TilingConfig]:
    tile = settings.length("size", ["square", "shortest_edge"])
    if settings.values.get("crop_size") is not None and settings.length("crop_size", ["square"]) != tile:
        raise settings.error("crop_size", f"tiles must be as large as size, {tile}")
    pairs = settings.values["image_grid_pinpoints"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs) or len(pairs) > MAX_TILES:
        raise settings.error("image_grid_pinpoints", f"expected a list of [height, width], {MAX_TILES} at most")
    pinpoints = tuple(tuple(settings.integer("image_grid_pinpoints", length) for length in pair) for pair in pairs)
    image = settings.image(tile)
    if name == "LlavaNextImageProcessor":
        return image, TilingConfig(kind="anyres", pinpoints=pinpoints)  # type: ignore[arg-type]
    number = str(settings.values["vision_aspect_ratio"]).removeprefix("anyres_max_")
    if not re.fullmatch("[0-9]{1,4}", number):
        raise settings.error("vision_aspect_ratio", "expected anyres_max_ and a number")
    return image, TilingConfig(kind="anyres_max", pinpoints=pinpoints, max_tiles=int(number))  # type: ignore[arg-type]


def _internvl(settings: _Settings) -> tuple[ImageTransformConfig, TilingConfig]:
    """Published files say `crop_to_patches` false, but InternVL's processor cuts whatever they say."""
    least, most = (settings.integer(key, settings.values[key]) for key in ("min_patches", "max_patches"))
    tiling = TilingConfig(kind="internvl", min_tiles=least, max_tiles=most)
    return settings.image(settings.length("size", ["square"])), tiling


def _qwen(settings: _Settings) -> tuple[ImageTransformConfig, TilingConfig]:
    """`size` holds numbers of pixels here, under any of two pairs of names; keys beside it outrank it."""
    size = settings.values["size"]
    if not isinstance(size, dict) or size.keys() - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
        raise settings.error("size", "expected shortest_edge and longest_edge, in pixels of the whole image")
    pixels: list[int] = []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        pixels.append(settings.values.get(key, size.get(edge, size.get(key))))  # type: ignore[arg-type]
        if type(pixels[-1]) is not int:
            raise settings.error("size", f"{edge} must be a whole number of pixels, not {pixels[-1]!r}")
    patch, merge = (settings.integer(key, settings.values[key]) for key in ("patch_size", "merge_size"))
    tiling = TilingConfig(kind="native", whole=False, min_pixels=pixels[0], max_pixels=pixels[1])
    return settings.image(patch * merge), tiling


def _idefics3(settings: _Settings) -> tuple[ImageTransformConfig, TilingConfig]:
    split = settings.values["do_image_splitting"]
    if not isinstance(split, bool):
        raise settings.error("do_image_splitting", "expected true or false")
    longest = settings.length("size", ["longest_edge"])
    tile = settings.length("max_image_size", ["longest_edge"])
    return settings.image(tile), TilingConfig(kind="idefics3", longest_edge=longest, split=split)
