"""Recipes: the tiny one from raw files to captions, and that the others are what they say."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest

import mm_gpt
from mm_gpt.config import override
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.training.language import LanguageRecipe, SourceConfig
from mm_gpt.training.recipes import RECIPES, run_recipe, tiny

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


def test_resuming_another_recipe_is_refused(shapes: Path, tmp_path: Path) -> None:
    """Silently going on with other settings would make a run that nothing describes."""
    recipe = override(tiny(str(shapes)), ["train.steps=2", "train.warmup_steps=1"])
    run_recipe(recipe, tmp_path / "run", progress=False)
    with pytest.raises(MMGPTError, match="rows"):
        run_recipe(override(recipe, ["rows=2"]), tmp_path / "run", resume=True, progress=False)
    longer = override(recipe, ["train.steps=3"])
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
    with pytest.raises(MMGPTError, match=r"holds no \.tar"):
        run_recipe(tiny(str(tmp_path)), tmp_path / "run", progress=False)
