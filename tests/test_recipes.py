"""Recipes: the tiny one from raw files to captions, and that the others are what they say."""

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_picture

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.config import override
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.document import Document, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.presets import PRESETS, preset
from mm_gpt.processor import collate
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.recipes import RECIPES, peak_rate, recipe, run_recipe, tiny
from mm_gpt.training.semicausal import load_semicausal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/make_shapes.py makes."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_shapes.py", str(folder)])
        runpy.run_path(str(ROOT / "examples/make_shapes.py"), run_name="__main__")
    return folder


def test_tiny_learns_to_caption_pictures_it_never_saw(shapes: Path, tmp_path: Path) -> None:
    """The whole way: raw files, tokenizer, training, checkpoint, load, caption.

    Guessing is right for 1 in 12, colours alone for 1 in 3.
    """
    out = tmp_path / "run"
    run_recipe(tiny(str(shapes)), out, progress=False)
    model = mm_gpt.load(out / "best")
    held_out = sorted(shapes.glob("*.png"))[::10]  # the recipe's tenth that is kept from training
    captions = [str(caption) for caption in model.caption(held_out)]
    wanted = [photo.with_suffix(".txt").read_text().strip() for photo in held_out]
    right = sum(caption == want for caption, want in zip(captions, wanted, strict=True))
    assert right >= 0.5 * len(wanted), captions
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > 10 * log[-2]["loss"]
    assert (out / "loss.png").stat().st_size > 1000


def test_finished_run_is_not_overwritten(shapes: Path, tmp_path: Path) -> None:
    recipe = override(tiny(str(shapes)), ["train.steps=2", "train.warmup_steps=1"])
    run_recipe(recipe, tmp_path / "run", progress=False)
    with pytest.raises(MMGPTError, match=r"already holds a run.*--resume"):
        run_recipe(recipe, tmp_path / "run", progress=False)


def test_a_run_goes_on_computed_in_another_way(shapes: Path, tmp_path: Path) -> None:
    """How many processes share a copy, what is computed again and when it is saved are no part of what a run is."""
    few = ["train.steps=1", "train.warmup_steps=0", "rows=2"]
    run_recipe(override(tiny(str(shapes)), few), tmp_path, progress=False)
    few[0] = "train.steps=2"
    other = ["train.shard=none", "train.recompute=full", "train.async_save=true"]
    run_recipe(override(tiny(str(shapes)), few + other), tmp_path, progress=False, resume=True)
    assert (tmp_path / "step-000002").is_dir()
    for change in ("train.optimizer=muon", "train.schedule=wsd"):
        name = change.partition("=")[0]
        with pytest.raises(MMGPTError, match=f"was trained with another {name}: "):
            run_recipe(override(tiny(str(shapes)), [*few, change]), tmp_path, progress=False, resume=True)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(MMGPTError, match=r"recipe\.json: no recipe of a run"):
        run_recipe(override(tiny(str(shapes)), few), tmp_path, progress=False, resume=True)


def test_resuming_another_recipe_is_refused(shapes: Path, tmp_path: Path) -> None:
    """Silently going on with other settings would make a run that nothing describes."""
    recipe = override(tiny(str(shapes)), ["train.steps=2", "train.warmup_steps=1"])
    run_recipe(recipe, tmp_path / "run", progress=False)
    with pytest.raises(MMGPTError, match="row_length"):
        run_recipe(override(recipe, ["row_length=128"]), tmp_path / "run", resume=True, progress=False)
    layout = ["train.shard=none", "train.recompute=full", "train.async_save=true"]  # changes nothing that is learned
    longer = override(recipe, ["train.steps=3", *layout])
    run_recipe(longer, tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run/step-000003").is_dir()


@pytest.mark.parametrize("name", ["tiny", "default_vision", "default"])
def test_recipes_build_and_take_overrides(name: str) -> None:
    recipe = override(RECIPES[name]("data"), ["train.lr=0.5", "train.steps=7"])
    assert (recipe.train.lr, recipe.train.steps, recipe.data) == (0.5, 7, "data")


def test_wrong_override_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        override(tiny("."), ["train.step=3"])


def test_a_language_recipe_says_what_it_validates_on() -> None:
    recipe = tiny(".")
    with pytest.raises(ConfigError, match="holdout"):
        dataclasses.replace(recipe, holdout=0.0)
    with pytest.raises(ConfigError, match="holdout"):
        dataclasses.replace(recipe, validation=(SourceConfig(path="a.tar"),))
    assert isinstance(recipe, LanguageRecipe)


def test_empty_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="an empty folder"):
        run_recipe(tiny(str(tmp_path)), tmp_path / "run", progress=False)


SHAPE = ("num_layers=2", "width=32", "num_heads=4", "num_kv_heads=4", "head_size=8", "mlp_width=48", "vocab_size=500")
SMALL = [f"model.decoder.{value}" for value in SHAPE]
RUN = ["row_length=64", "rows=2", "train.steps=2", "train.precision=fp32"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(
            f"Text number {number}: the cat sat on the mat and looked at the dog. " * 8
        )
    return folder


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt1", []),
        ("gpt2-small", []),
        ("gpt3-125m", ["model.decoder.window=16"]),
        ("transformer-xl", ["model.decoder.memory_length=16"]),
        ("sparse-transformer-strided", ["model.decoder.stride=8"]),
        ("sparse-transformer-fixed", ["model.decoder.stride=8", "model.decoder.summary=2"]),
        ("qwen3-0.6b", []),
        ("metalm", [f"model.encoder.{value}" for value in SHAPE] + ["shortest=4", "longest=8"]),
    ],
)
def test_a_preset_is_a_recipe(name: str, more: list[str], texts: Path, tmp_path: Path) -> None:
    """`mm-gpt train PRESET --data TEXTS`, at another size: trained, saved, and loaded through the usual door."""
    command = ["train", name, "--data", str(texts), "--out", str(tmp_path / "run"), *SMALL, *more, *RUN]
    assert main(command) == 0
    model = mm_gpt.load(tmp_path / "run/best", device="cpu")
    assert model.model.decoder.config.positions == preset_decoder(name).positions
    assert model.complete("The cat", max_new_tokens=3).completion_tokens >= 1


def test_the_rate_of_a_preset_belongs_to_its_batch(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-3's 6e-4 is for half a million tokens a step; it was taken for the 8,192 of a small run."""
    found = recipe("gpt3-125m", str(texts))
    assert isinstance(found, LanguageRecipe)
    assert (found.rows * found.row_length, found.train.batch_tokens, found.train.lr) == (8192, 500_000, 6e-4)
    with caplog.at_level("INFO", logger="mm_gpt"):
        assert peak_rate(found) == pytest.approx(6e-4 * math.sqrt(8192 / 500_000))
    assert "up to 8,192 tokens, the learning rate of 0.0006 is meant for 500,000: the peak is 7.68e-05" in caplog.text
    assert "train.accumulate=62 makes up the batch" in caplog.text
    assert peak_rate(override(found, ["train.accumulate=62"])) == 6e-4
    assert peak_rate(override(found, ["train.accumulate=1000"])) == 6e-4  # never above the paper's
    assert peak_rate(override(found, ["train.batch_tokens=none"])) == 6e-4
    assert peak_rate(override(found, ["row_length=8192"])) == peak_rate(found)  # no row is longer than the context
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert peak_rate(found) == pytest.approx(2 * 6e-4 * math.sqrt(8192 / 500_000))
    monkeypatch.delenv("WORLD_SIZE")
    small = override(found, [*SMALL, *RUN, "model.decoder.window=16", "train.warmup_steps=0", "train.log_every=1"])
    run_recipe(small, tmp_path / "run", progress=False)
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert first["lr"] == pytest.approx(6e-4 * math.sqrt(2 * 64 / 500_000))
    assert json.loads((tmp_path / "run/recipe.json").read_text())["train"]["lr"] == 6e-4  # what was asked for


def test_every_preset_reaches_its_rate() -> None:
    """A warm-up of 2,000 steps was the whole run; a rate that nobody published is GPT's, with GPT's batch."""
    for name in PRESETS:
        found = recipe(name, ".")
        assert found.train.warmup_steps <= found.train.steps / 10
        assert 0 < peak_rate(found) <= found.train.lr
    assert recipe("gpt2-small", ".").train.batch_tokens == recipe("gpt1", ".").train.batch_tokens == 64 * 512


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("default_vision", ["batch_size=1"], "batch_size must be at least 2, not 1"),
        ("default_vision", ["vision_lr=nan"], "vision_lr must be at least 0, not nan"),
        ("default_vision", ["vision_blocks=-1"], "vision_blocks must be at least 0"),
        ("default_vision", ["validation_images=0"], "validation_images must be at least 1"),
        ("default_vision", ["model.text=none", "model.text_width=8"], "needs a text tower"),
        ("default_vision", ["train.batch_tokens=8"], "batch_tokens is for rows of tokens"),
        ("default_vision", ["validation="], "give sources, and validation sources"),
        ("metalm", ["rows=0"], "rows must be at least 1"),
        ("metalm", ["row_length=1"], "row_length must be at least 2"),
        ("metalm", ["holdout=1"], "holdout must be above 0 and below 1, not 1"),
        ("metalm", ["share=1"], "share must be at least 0 and below 1"),
        ("metalm", ["shortest=0"], "shortest must be at least 1"),
        ("metalm", ["shortest=9", "longest=8"], "longest must be at least shortest, 9, not 8"),
        ("metalm", ["train_last=-1"], "train_last must be at least 0"),
        ("classify", ["dropout=1"], "dropout must be at least 0 and below 1"),
        ("classify", ["holdout=1"], "holdout must be at least 0 and below 1"),
        ("classify", ["holdout=nan"], "holdout must be at least 0 and below 1"),
        ("classify", ["auxiliary=-1"], "auxiliary must be at least 0"),
        ("classify", ["train.batch_tokens=8"], "batch_tokens is for rows of tokens"),
    ],
)
def test_every_setting_of_a_recipe_has_bounds(name: str, values: list[str], message: str) -> None:
    """They hung, divided by zero, or failed after the data had been read."""
    with pytest.raises(ConfigError, match=message):
        override(recipe(name, "."), values)


def preset_decoder(name: str) -> DecoderConfig:
    config = preset(name).config
    return config if isinstance(config, DecoderConfig) else config.decoder  # type: ignore[return-value]


def test_kosmos_trains_on_captioned_pictures(tmp_path: Path) -> None:
    """The last block of the tower, the connector and the decoder, and nothing else of the tower."""
    for number in range(4):
        make_picture(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    small = ["model.vision.model=timm/test_vit", "model.vision.image_size=32", "model.connector.num_latents=4"]
    small += ["model.connector.num_heads=4", "image.size=32"]
    command = ["train", "kosmos-1", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL, *small, *RUN]
    assert main(command) == 0
    assert mm_gpt.load(tmp_path / "run/best", device="cpu").caption(make_picture(1)).image_tokens == 4 + 2


def test_a_docked_encoder_is_saved_and_resumed(texts: Path, tmp_path: Path) -> None:
    """MetaLM: stopping after a step and going on gives the losses of the run that was not stopped."""
    values = [*SMALL, *(f"model.encoder.{value}" for value in SHAPE), "shortest=4", "longest=8", *RUN]
    logs = []
    for out, steps in (("whole", [3]), ("parts", [1, 3])):
        for number, last in enumerate(steps):
            chosen = override(recipe("metalm", str(texts)), [*values, f"train.steps={last}", "train.warmup_steps=0"])
            chosen = override(chosen, ["train.log_every=1", "train.final_lr=1"])
            run_recipe(chosen, tmp_path / out, resume=number > 0, progress=False)
        rows = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        logs.append([row["loss"] for row in rows if "loss" in row])
    assert logs[0] == logs[1]
    model, processor = load_semicausal(tmp_path / "whole/best")
    example = processor(Document((Text("The cat sat on the mat and looked."),)))
    batch = collate([[example]], torch.zeros(0, 3, 0, 0))
    plain = mm_gpt.load(tmp_path / "whole/best", device="cpu", dtype="fp32").model
    with torch.inference_mode():
        assert torch.equal(model(batch, [[]]), plain(batch))  # without spans: the decoder alone
        assert not torch.allclose(model(batch, [[(2, 6)]])[:, 2:], plain(batch)[:, 2:])


def test_segment_memory_is_trained(texts: Path) -> None:
    """A row of the length of one segment would never have a memory: the preset's own numbers, at a small width."""
    task = LanguageTask(override(recipe("transformer-xl", str(texts)), SMALL))
    assert isinstance(task.recipe, LanguageRecipe)
    decoder = task.model.decoder.config
    (batch,) = task.micro_batches(0, 1)
    longest = int((batch.document_ids > 0).sum(dim=1).max())
    assert longest > 2 * decoder.memory_length
    assert decoder.memory_length == decoder.max_length == 150
    # What a row begins with counts two segments later, in two layers.
    row = dataclasses.replace(batch, document_ids=torch.ones_like(batch.document_ids))
    with torch.no_grad():
        before = task.model.eval()(row)
        row.input_ids[:, 0] = (row.input_ids[:, 0] + 1) % 400
        after = task.model(row)
    assert (before[:, 150:300] != after[:, 150:300]).any()


def test_bytes_have_room_for_the_marks(texts: Path) -> None:
    """Sparse Transformer's 256 ids are bytes alone; the tokenizer's marks became other tokens, without a word."""
    small = [value for value in SMALL if "vocab_size" not in value]
    sizes = ["model.decoder.max_length=256", "row_length=128"]
    task = LanguageTask(override(recipe("sparse-transformer-fixed", str(texts)), [*small, *sizes]))
    assert task.processor.tokenizer.vocab_size == task.model.decoder.config.vocab_size == 259
    assert max(int(batch.input_ids.max()) for n in range(4) for batch in task.micro_batches(n, 1)) < 259


def test_spans_that_the_encoder_cannot_read() -> None:
    with pytest.raises(ConfigError, match="spans of 128 tokens: the encoder reads 64"):
        override(recipe("metalm", "."), ["model.encoder.max_length=64"])
