"""JPEGs decoded at a part of their size, and the transform that does so."""

import contextlib
import io
import math
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps

from mm_gpt.document import Image
from mm_gpt.errors import ImageError
from mm_gpt.images import ImageLimits, load_image, load_pixels
from mm_gpt.vision.transforms import FastTransform, ImageTransform, ImageTransformConfig, TrainTransform

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def scene(width: int, height: int) -> PILImage.Image:
    """Smooth colours with edges, different in each corner."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    disc = ((x - 0.3) ** 2 + (y - 0.2) ** 2 < 0.02) * 90
    pixels = np.stack([40 + 120 * x + disc, 60 + 150 * y, 90 + 50 * np.sin(9 * x + 5 * y)], axis=2)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: PILImage.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def small_image(source: object, **options: object) -> PILImage.Image:
    return PILImage.fromarray(load_pixels(source, **options))


def psnr(a: object, b: object) -> float:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return 10 * math.log10(255**2 / max(1e-9, float((difference**2).mean())))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- load_pixels -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 700), st.integers(1, 700), st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 3, 6, 8])
)
def test_never_smaller_than_asked_and_never_twice_as_large(width, height, least_height, least_width, orientation):
    # Stops: sides exchanged for a sideways photo, and a scale that leaves less than the resize needs.
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = jpeg(PILImage.new("RGB", (width, height)), exif=exif)
    full = load_image(data)
    small = small_image(data, at_least=(least_height, least_width))
    if full.width >= least_width and full.height >= least_height:
        assert small.width >= least_width
        assert small.height >= least_height
        scale = round(full.width / small.width) if full.width >= full.height else round(full.height / small.height)
        assert scale in (1, 2, 4, 8)
        assert small.size == (math.ceil(full.width / scale), math.ceil(full.height / scale))
        # the next smaller scale would be too small
        assert scale == 8 or full.width < 2 * scale * least_width or full.height < 2 * scale * least_height
    else:
        assert small.size == full.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    full = load_image(jpeg(scene(640, 400), exif=exif))
    small = small_image(jpeg(scene(640, 400), exif=exif), at_least=(100, 100))
    assert small.size == (full.width // 4, full.height // 4)
    assert psnr(small, full.resize(small.size, PILImage.Resampling.BOX)) > 35
    assert load_image(small).tobytes() == small.tobytes()  # not turned again


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_kinds_of_jpeg(mode, progressive, scale):
    data = jpeg(scene(640, 480).convert(mode), progressive=progressive)
    full, small = load_image(data), small_image(data, at_least=(480 // scale, 640 // scale))
    assert small.mode == "RGB"
    assert small.size == (640 // scale, 480 // scale)
    assert psnr(small, full.resize(small.size, PILImage.Resampling.BOX)) > 35


def test_what_is_not_in_perfect_order_comes_whole_and_as_pillow_reads_it():
    # Stops: CMYK's inverted inks, and a photo that passes the check at the start of a run but ends it later.
    data = jpeg(scene(640, 480))
    scan = data.index(b"\xff\xda")
    odd = data[:scan] + b"\0" * 7 + data[scan:]  # bytes between two segments: decoders warn and go on
    for file in (jpeg(scene(640, 480).convert("CMYK")), odd):
        assert small_image(file, at_least=(100, 100)).tobytes() == load_image(file).tobytes()


SEEDS = [jpeg(scene(90, 60)), jpeg(scene(90, 60), progressive=True), jpeg(scene(90, 60).convert("L"))]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 8), st.sampled_from([(60, 90), (10, 10)]))
def test_mutated_files_are_refused_or_accepted_as_by_load_image(data, seed, num_changes, at_least):
    # Stops: a second decoder with other errors, and two decoders that see two sizes in one file.
    rng, broken = random.Random(seed), bytearray(data)
    for _ in range(num_changes):
        broken[rng.randrange(3, len(broken))] = rng.randrange(256)
    limits = ImageLimits(max_pixels=100_000)
    try:
        whole = load_image(bytes(broken), limits=limits)
    except ImageError:
        with pytest.raises(ImageError):
            load_pixels(bytes(broken), at_least=at_least, limits=limits)
        return
    pixels = load_pixels(bytes(broken), at_least=at_least, limits=limits)
    assert pixels.shape[0] in [math.ceil(whole.height / scale) for scale in (1, 2, 4, 8)]
    assert pixels.shape[1] in [math.ceil(whole.width / scale) for scale in (1, 2, 4, 8)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_an_error_at_every_scale(share):
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    data = jpeg(noise)
    for at_least in ((400, 400), (200, 200), (10, 10)):
        with pytest.raises(ImageError, match="broken image"):
            small_image(data[: int(len(data) * share)], at_least=at_least)


def test_the_pixel_limit_is_that_of_the_file(monkeypatch):
    # Stops: a bomb that passes since an eighth of its size is below the limit.
    data = jpeg(PILImage.new("RGB", (3000, 2000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="3000 x 2000 pixels, over the limit"):
        small_image(data, at_least=(10, 10), limits=ImageLimits(max_pixels=5_000_000))


def test_too_many_scans_are_refused_as_well():
    data = jpeg(scene(40, 24), progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="scans"):
        small_image(data[:-2] + data[last:-2] * 200 + b"\xff\xd9", at_least=(1, 1))


def test_scans_behind_a_whole_picture_are_not_decoded():
    # Stops: a file whose end is not looked at, since it is not progressive, and which keeps the decoder busy there.
    data = jpeg(scene(640, 480))
    scan = data[data.index(b"\xff\xda") : -2]
    start = time.process_time()
    assert small_image(data, at_least=(480, 640)).size == (640, 480)
    once = time.process_time() - start
    bomb = data[:-2] + scan * 300 + b"\xff\xd9"
    for load in (load_image, lambda file: small_image(file, at_least=(480, 640))):
        start = time.process_time()
        with contextlib.suppress(ImageError):
            assert load(bomb).size == (640, 480)
        assert time.process_time() - start < 20 * once + 0.2


def test_other_sources_come_whole(tmp_path):
    buffer = io.BytesIO()
    scene(640, 480).save(buffer, "PNG")
    assert small_image(buffer.getvalue(), at_least=(10, 10)).size == (640, 480)
    assert small_image(np.asarray(scene(640, 480)), at_least=(10, 10)).size == (640, 480)
    opened = PILImage.open(io.BytesIO(jpeg(scene(640, 480))))  # somebody else's: it may not change under their hands
    assert small_image(opened, at_least=(10, 10)).size == opened.size == (640, 480)
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(scene(640, 480)))
    assert small_image(path, at_least=(10, 10)).size == (80, 60)


def test_at_full_scale_the_pixels_are_those_of_load_image():
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}):
        data = jpeg(scene(333, 251), **options)
        assert small_image(data, at_least=(251, 333)).tobytes() == load_image(data).tobytes()


def test_mirrored():
    data = jpeg(scene(640, 480))
    small = Image(data, mirrored=True).pixels(at_least=(120, 160))
    assert small.tobytes() == ImageOps.mirror(small_image(data, at_least=(120, 160))).tobytes()


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1203, 401), (300, 301), (64, 64), (90, 17)])
def test_fast_is_close_to_exact(mode, backend, size):
    # Stops: an offset or a scale that differs from the exact transform's, wrong channels, wrong normalising.
    config = ImageTransformConfig(size=64, mode=mode, backend=backend)
    data = jpeg(scene(*size))
    ours = FastTransform(config)(Image(data))
    exact = ImageTransform(config)(load_image(data))
    assert ours.shape == exact.shape == (3, 64, 64)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    std = torch.tensor(config.std)[:, None, None] * 255
    assert psnr(ours * std, exact * std) > 32  # a box in whole pixels is up to half a pixel off


def test_of_an_image_at_its_final_size_only_rounding_differs():
    config = ImageTransformConfig(size=64)
    image = scene(64, 64)
    assert torch.allclose(FastTransform(config)(image), ImageTransform(config)(image), atol=1e-5)


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (2, 3), (20_000, 3)])
def test_slivers(mode, size):
    config = ImageTransformConfig(size=32, mode=mode)
    data = jpeg(PILImage.new("RGB", size, (10, 200, 30)))
    for transform in (FastTransform(config), TrainTransform(config, generator(0))):
        out = transform(Image(data))
        assert out.shape == (3, 32, 32)
        assert out.isfinite().all()
        assert abs(out[1, 16, 16] - ImageTransform(config)(load_image(data))[1, 16, 16]) < 0.6


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([(640, 480), (200, 700), (100, 90)]), st.sampled_from(["crop", "squash"]))
def test_a_random_crop_never_enlarges_what_the_file_holds(seed, size, mode):
    # Stops: a blurred picture where a sharper one was in the file.
    config = ImageTransformConfig(size=64, mode=mode)
    crop = TrainTransform(config, generator(seed))._crop()
    least = FastTransform(config)._needed(crop)
    small = small_image(jpeg(PILImage.new("RGB", size)), at_least=least)
    left, top, right, bottom = crop.box(*small.size)
    assert right - left >= 64
    assert bottom - top >= 64


def test_training_gives_the_same_crop_at_every_scale():
    # Stops: a crop that depends on how much of the file was decoded.
    config = ImageTransformConfig(size=64, **PLAIN)
    data = jpeg(scene(1280, 960))
    assert small_image(data, at_least=(93, 93)).size == (160, 120)
    for seed in range(5):
        small = TrainTransform(config, generator(seed))(Image(data))
        whole = TrainTransform(config, generator(seed))(load_image(data))
        assert psnr(small * 255, whole * 255) > 30


def test_colour_jitter_is_that_of_pil():
    # Stops: a wrong order or a wrong grey in the one matrix that stands for three steps.
    config = ImageTransformConfig(size=64, **PLAIN)
    image = scene(64, 64)
    for seed in range(5):
        transform = TrainTransform(config, generator(seed))
        ours = transform._colour(torch.from_numpy(np.array(image)).reshape(-1, 3).T.float())
        rng, expected = generator(seed), image
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            expected = enhance(expected).enhance(0.9 + 0.2 * torch.rand((), generator=rng, dtype=torch.float64).item())
        theirs = torch.from_numpy(np.array(expected)).reshape(-1, 3).T / 255
        assert (ours - theirs).abs().max() < 4 / 255  # PIL rounds down after each step
        assert ours.min() >= 0
        assert ours.max() <= 1 + 1e-6


def test_white_stays_white():
    out = TrainTransform(ImageTransformConfig(size=8, **PLAIN), generator(1))
    values = [out(PILImage.new("RGB", (8, 8), "white")).max().item() for _ in range(20)]
    assert max(values) <= 1 + 1e-6
