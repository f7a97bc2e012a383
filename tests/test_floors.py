"""The oldest versions that pyproject.toml allows are those with which the tests of images and GGUF files pass."""

import logging
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torchvision

from mm_gpt.vision import transforms
from mm_gpt.vision.transforms import ImageTransformConfig, resize_pixels

DEPENDENCIES = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]
# Each was run at this version, and older ones fail
NEEDED = {
    "timm": "1.0.20",
    "open_clip_torch": "3.0",  # forward_intermediates of its towers
    "gguf": "0.17.1",  # keys of vision models, without SentencePiece
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def floors() -> dict[str, str]:
    return {name: floor for entry in DEPENDENCIES for name, _, floor in [entry.partition(">=")] if floor}


@pytest.mark.parametrize("name", NEEDED)
def test_floors_are_what_is_needed(name: str) -> None:
    assert numbers(floors()[name]) >= numbers(NEEDED[name])
    assert numbers(version(name)) >= numbers(floors()[name])


def test_torch_and_torchvision_are_released_in_pairs() -> None:
    torch_floor, vision_floor = (numbers(floors()[name]) for name in ("torch", "torchvision"))
    assert torch_floor[0] == 2
    assert vision_floor == (0, torch_floor[1] + 15)


def test_lanczos_with_a_torchvision_that_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SmolVLM's first image ended in an error; it is resized, a little differently, and that is said once."""
    config = ImageTransformConfig(size=32, interpolation="lanczos", backend="torchvision")
    picture = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = resize_pixels(picture, 32, 48, config)
    transforms._warn_of_lanczos.cache_clear()
    monkeypatch.setattr(torchvision, "__version__", "0.20.1+cpu")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = resize_pixels(picture, 32, 48, config)
    assert (found.int() - expected.int()).abs().max() <= 2
    assert (found != expected).float().mean() < 0.05
    (record,) = caplog.records
    assert "torchvision 0.20.1+cpu has no Lanczos filter" in record.getMessage()
