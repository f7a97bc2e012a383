import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import ConfigError, ImageError
from mm_gpt.vision.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, ImageTransformConfig, TrainTransform

SIZES = [(64, 48), (48, 64), (33, 100), (100, 33), (32, 32), (500, 7), (7, 500), (31, 32), (201, 134), (1, 1)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_squash_equals_torchvision(size, interpolation):
    # Stops: a resize without antialiasing, a wrong order of mean and division, H and W swapped. Bit for bit.
    config = ImageTransformConfig(size=32, mode="squash", interpolation=interpolation)
    theirs = tv.Compose(
        [
            tv.Resize((32, 32), interpolation=tv.InterpolationMode(interpolation)),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    image = noise(*size)
    assert torch.equal(ImageTransform(config)(image), theirs(image))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 40),
    st.sampled_from([None, 0, 3, 8]),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_crop_equals_torchvision(width, height, size, margin, interpolation):
    # Stops: an offset that rounds the other way, and a box resize that differs from resizing the whole image.
    short_side = None if margin is None else size + margin
    config = ImageTransformConfig(size=size, mode="crop", short_side=short_side, interpolation=interpolation)
    resize = tv.Resize(short_side or size, interpolation=tv.InterpolationMode(interpolation))
    theirs = tv.Compose([resize, tv.CenterCrop(size)])
    image = noise(width, height, seed=width * 151 + height)
    ours = np.asarray(ImageTransform(config).resize(image)).astype(int)
    # The box is a float, so that in each of PIL's two passes a value at exactly .5 may round the other way: one grey
    # level a pass. A wrong offset changes noise by a hundred.
    assert np.abs(ours - np.asarray(theirs(image)).astype(int)).max() <= 2


@pytest.mark.parametrize(("size", "content"), [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((90, 30), (32, 11))])
def test_pad_keeps_aspect_and_centres(size, content):
    # Stops: content stuck to a corner, stretched content, padding that is black instead of the mean colour.
    out = ImageTransform(ImageTransformConfig(size=32, mode="pad"))(Image.new("RGB", size, "white"))
    filled = (out != 0).all(dim=0)
    rows, columns = filled.any(dim=1).nonzero()[:, 0], filled.any(dim=0).nonzero()[:, 0]
    assert (len(columns), len(rows)) == content
    assert filled.sum() == content[0] * content[1]
    assert abs(int(rows[0]) - (31 - int(rows[-1]))) <= 1
    assert abs(int(columns[0]) - (31 - int(columns[-1]))) <= 1


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (2_000_000, 1), (1, 2_000_000)])
def test_extreme_aspect_ratios(mode, size):
    # Stops: a side rounded to 0, and in "crop" a resize to 32 x 64,000,000 (6 GB) before cutting.
    config = ImageTransformConfig(size=32, mode=mode)
    image = Image.new("RGB", size, (10, 200, 30))
    for transform in (ImageTransform(config), TrainTransform(config, generator(0))):
        out = transform(image)
        assert out.shape == (3, 32, 32)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_refused(mode):
    config = ImageTransformConfig(size=8)
    for transform in (ImageTransform(config), TrainTransform(config, generator(0))):
        with pytest.raises(ImageError, match=f"mode '{mode}'"):
            transform(Image.new(mode, (8, 8)))
        with pytest.raises(ImageError, match="ndarray"):
            transform(np.zeros((8, 8, 3), np.uint8))


def test_the_input_image_is_not_changed():
    image = noise(40, 30)
    before = image.tobytes()
    TrainTransform(ImageTransformConfig(size=16), generator(1))(image)
    ImageTransform(ImageTransformConfig(size=40, mode="pad"))(image).fill_(7)
    assert image.tobytes() == before


def test_training_is_a_function_of_the_seed():
    # Stops: draws from a global generator, which would break the resume of a run.
    config, image = ImageTransformConfig(size=32), noise(80, 60)
    first = TrainTransform(config, generator(3))
    a = [first(image) for _ in range(3)]
    random.seed(0)
    torch.manual_seed(0)
    second = TrainTransform(config, generator(3))
    b = [second(image) for _ in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], TrainTransform(config, generator(4))(image))
    first.generator.manual_seed(3)
    assert torch.equal(first(image), a[0])


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
def test_training_never_mirrors_and_jitters_little(mode):
    # Stops: a horizontal flip (mirrored text, left for right), and jitter that turns one colour name into another.
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = (200, 40, 40)
    pixels[:, 32:] = (40, 40, 200)
    config = ImageTransformConfig(size=32, mode=mode, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    transform = TrainTransform(config, generator(0))
    for _ in range(50):
        out = transform(Image.fromarray(pixels))
        left, right = out[:, 16, 2], out[:, 16, -3]
        assert left[0] > 0.55
        assert left[2] < 0.35
        assert right[2] > 0.55
        assert right[0] < 0.35


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2**31))
def test_crops_stay_inside_and_keep_their_share(width, height, seed):
    transform = TrainTransform(ImageTransformConfig(size=8), generator(seed))
    left, top, right, bottom = transform._crop().box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    rounding = 1 / width + 1 / height
    assert (right - left) * (bottom - top) / (width * height) >= 0.7 - rounding


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": 2.5}, "size"),
        ({"size": True}, "size"),
        ({"size": 8, "mode": "sqash"}, "did you mean 'squash'"),
        ({"size": 8, "interpolation": "nearest"}, "interpolation"),
        ({"size": 8, "backend": "torch"}, "did you mean 'torchvision'"),
        ({"size": 8, "mode": "crop", "short_side": 7}, "short_side"),
        ({"size": 8, "short_side": 9}, "short_side"),
        ({"size": 8, "mean": (0.5,)}, "mean"),
        ({"size": 8, "mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"size": 8, "std": (0.5, 0.5, 0.0)}, "std"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        ImageTransformConfig(**values)


def test_config_survives_json():
    config = ImageTransformConfig(size=96, mode="pad", mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    assert from_dict(ImageTransformConfig, to_dict(config)) == config
    assert dataclasses.replace(config, size=8).size == 8
