"""Fixtures: a tiny model with random weights and its own small tokenizer, so that tests need no download."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image as PILImage

from mm_gpt.hub.checkpoint import save_model
from mm_gpt.inference.assistant import Assistant
from mm_gpt.model.decoder import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig

torch.set_num_threads(1)
# The same examples in each run, so that a change is judged by itself; EXPLORE=1 looks for new ones.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
if not os.environ.get("EXPLORE"):
    settings.load_profile("repeatable")
IMAGE_SIZE = 32


@pytest.fixture(autouse=True, scope="session")
def nobody_s_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which model is taken by default is not for whoever runs the tests to say."""
    os.environ.pop("MM_GPT_MODEL", None)
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("settings"))


@pytest.fixture(autouse=True)
def our_own_log() -> Iterator[None]:
    """Commands and examples that run in this process say how much is logged: not for the tests that follow."""
    yield
    logging.getLogger("mm_gpt").setLevel(logging.NOTSET)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens, learned from a few sentences."""
    text = ["user assistant system", "Describe the image in one sentence.", "A red circle on a blue ground."] * 4
    return Tokenizer.train(text, 400)


def tiny_config(vocab_size: int, *, connector: str = "mlp") -> ModelConfig:
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            width=48,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            head_size=8,
            mlp_width=96,
            max_length=256,
        ),
        vision=VisionConfig(model="timm/test_vit", image_size=IMAGE_SIZE),
        connector=ConnectorConfig(kind=connector, num_heads=4, num_latents=4, depth=1),  # type: ignore[arg-type]
    )


def make_tiny(seed: int = 0, *, connector: str = "mlp") -> tuple[MMGPT, Processor]:
    """A random model: ViT on 32 pixels (4 patches), three decoder layers. Weights are large enough to disagree."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = tiny_config(tokenizer.vocab_size, connector=connector)
    model = MMGPT(config).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)  # 0.02 is too little for pictures and words to matter in three layers
    image = ImageTransformConfig(size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    processor_config = ProcessorConfig(
        image=image, tokens_per_image=model.tokens_per_image, max_length=model.decoder.config.max_length
    )
    return model, Processor(tokenizer, processor_config, vocab_size=model.decoder.config.vocab_size)


def make_picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> PILImage.Image:
    """A picture of random coloured blocks."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.NEAREST)


@pytest.fixture
def tiny() -> tuple[MMGPT, Processor]:
    return make_tiny()


@pytest.fixture
def tiny_assistant() -> Assistant:
    return Assistant(*make_tiny())


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model, for `mm_gpt.load` and the command line's `--model`."""
    folder = tmp_path_factory.mktemp("tiny-model")
    model, processor = make_tiny()
    save_model(model, processor, folder)
    return folder


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    make_picture().save(path)
    return path
