"""Image rules: each has one picture that it alone drops; hashes; what is read and what is not."""

import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageEnhance

from mm_gpt.datasets.duplicates.image_hash import content_hash, hamming, perceptual_hash
from mm_gpt.datasets.filters import image_filters
from mm_gpt.datasets.filters.image_filters import (
    ImageFilter,
    URLFilter,
    is_single_coloured,
)
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError


def picture(seed: int, width: int = 200, height: int = 160) -> PILImage.Image:
    """Soft random shapes: about as smooth as a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PILImage.fromarray(noise).resize((width, height), PILImage.Resampling.BICUBIC)


def file(image: PILImage.Image, format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


GOOD = file(picture(0))
BOUNDS = {
    "min_side": 64,
    "max_side": 1000,
    "max_aspect_ratio": 3,
    "formats": ("jpg", "png"),
    "min_bytes": 1000,
    "max_bytes": 50_000,
    "min_bytes_per_pixel": 0.05,
    "single_colour_tolerance": 8,
    "unique": True,
    "min_distance": 6,
}
NOISE = PILImage.fromarray(np.random.default_rng(1).integers(120, 128, (100, 100, 3), dtype=np.uint8))
DROPPED = {
    "format": file(picture(1), "GIF"),
    "file too small": file(picture(1, 70, 70), quality=10),
    "file too large": file(
        PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)), "PNG"
    ),
    "too small": file(picture(1, 100, 63), quality=95),
    "too large": file(picture(1, 1001, 400), quality=85),
    "aspect ratio": file(picture(1, 400, 133), quality=95),
    "too few bytes per pixel": file(picture(1, 600, 500), quality=20),
    "repeated in the document": GOOD,
    "single colour": file(NOISE, "PNG"),
    "looks repeated in the document": file(picture(0), quality=60),
    "unreadable": GOOD[:2000],
}


@pytest.mark.parametrize("rule", DROPPED)
def test_each_rule_has_a_picture_that_it_alone_drops(rule: str) -> None:
    document = Document((Image(GOOD), Text("between"), Image(DROPPED[rule])))
    removed: Counter[str] = Counter()
    assert ImageFilter(**BOUNDS)(document, removed).segments == document.segments[:2]  # type: ignore[arg-type]
    assert removed == {f"image: {rule}": 1}
    field = {
        "format": "formats",
        "file too small": "min_bytes",
        "file too large": "max_bytes",
        "too small": "min_side",
        "too large": "max_side",
        "aspect ratio": "max_aspect_ratio",
        "too few bytes per pixel": "min_bytes_per_pixel",
        "single colour": "single_colour_tolerance",
        "looks repeated in the document": "min_distance",
    }.get(rule)
    if field:
        without = ImageFilter(**{**BOUNDS, field: None})  # type: ignore[arg-type]
        assert without(document, Counter()) == document, "another rule drops it as well"


def test_headers_decide_before_pixels_and_files_are_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(image_filters, name)

        def wrapper(*args: Any) -> Any:
            reads[name] += 1
            return original(*args)

        monkeypatch.setattr(image_filters, name, wrapper)

    counted("image_bytes")
    counted("load_image")
    path = tmp_path / "a.jpg"
    path.write_bytes(DROPPED["too small"])
    stage = ImageFilter(**BOUNDS)  # type: ignore[arg-type]
    stage(Document((Image(path),)), Counter())
    assert reads == {"image_bytes": 1}
    path.write_bytes(GOOD)
    stage(Document((Image(path),)), Counter())
    assert reads == {"image_bytes": 2, "load_image": 1}


def test_nothing_is_fetched_and_what_is_decoded_already_is_judged() -> None:
    url = Image("http://192.0.2.1/a.jpg")
    document = Document((url, Image(picture(0)), Image(picture(0, 10, 10)), Image(picture(0))))
    removed: Counter[str] = Counter()
    out = ImageFilter(**BOUNDS)(document, removed)  # type: ignore[arg-type]
    assert out.segments == document.segments[:2]
    assert removed == {"image: too small": 1, "image: repeated in the document": 1}


def test_defaults_drop_only_what_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    document = Document((Image(GOOD), Image(GOOD), Image(tmp_path / "absent.jpg"), Image(b"")))
    removed: Counter[str] = Counter()
    assert ImageFilter()(document, removed).segments == document.segments[:2]
    assert removed == {"image: unreadable": 2}


@pytest.mark.parametrize("part", ["logo", "button", "icon", "plugin", "widget"])
def test_urls_of_page_furniture(part: str) -> None:
    document = Document((Image("http://x.org/photo.jpg"), Image(f"http://x.org/My-{part.upper()}s/1.png"), Image(GOOD)))
    removed: Counter[str] = Counter()
    assert URLFilter()(document, removed).segments == (document.segments[0], document.segments[2])
    assert removed == {f"image: '{part}' in its URL": 1}
    assert URLFilter(parts=())(document, removed) == document


def test_single_colour() -> None:
    assert is_single_coloured(PILImage.new("RGB", (9, 9), "teal"))
    assert is_single_coloured(PILImage.new("L", (9, 9), 7), tolerance=0)
    assert not is_single_coloured(picture(0))
    dot = PILImage.new("RGB", (99, 99), "white")
    dot.putpixel((3, 3), (255, 255, 0))
    assert not is_single_coloured(dot), "blue alone differs"
    clear = PILImage.new("RGBA", (64, 64), (200, 0, 0, 0))
    removed: Counter[str] = Counter()
    ImageFilter(single_colour_tolerance=0)(Document((Image(file(clear, "PNG")),)), removed)
    assert removed == {"image: single colour": 1}, "what nobody sees is no content"


@pytest.mark.parametrize(
    "options",
    [{"min_side": -1}, {"max_aspect_ratio": 0.5}, {"formats": ("jpeg",)}, {"min_bytes_per_pixel": float("nan")}],
)
def test_impossible_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ImageFilter(**options)
    with pytest.raises(ConfigError, match="parts"):
        URLFilter(parts="logo")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(40, 300), st.integers(40, 300))
def test_perceptual_hash_is_imagehash_phash(seed: int, width: int, height: int) -> None:
    imagehash = pytest.importorskip("imagehash")
    image = picture(seed, width, height)
    assert perceptual_hash(image) == int(str(imagehash.phash(image)), 16)


def test_perceptual_hash_survives_what_the_web_does_to_photos() -> None:
    """Measured over 40 pictures: copies differ in at most 6 bits, strangers in at least 14."""
    originals = [picture(seed, 320, 240) for seed in range(40)]
    hashes = [perceptual_hash(image) for image in originals]
    farthest = 0
    for image, own in zip(originals, hashes, strict=True):
        copies = [
            image.resize((200, 150)),
            image.resize((500, 400)),
            PILImage.open(io.BytesIO(file(image, quality=20))),
            ImageEnhance.Brightness(image).enhance(0.8),
            ImageEnhance.Contrast(image).enhance(0.8),
            image.convert("L").convert("RGB"),
        ]
        farthest = max(farthest, *(hamming(own, perceptual_hash(copy)) for copy in copies))
    strangers = [hamming(a, b) for at, a in enumerate(hashes) for b in hashes[:at]]
    assert farthest <= 6
    assert min(strangers) >= 14
    assert 28 < np.mean(strangers) < 36


def test_plain_images_have_stable_hashes() -> None:
    """Stops hashes of rounding errors, which differ between machines."""
    plain = {perceptual_hash(PILImage.new("RGB", size, "red")) for size in ((64, 64), (100, 33), (1, 1))}
    assert plain == {1 << 63}
    assert content_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hamming(0b1011, 0b0010) == 2
