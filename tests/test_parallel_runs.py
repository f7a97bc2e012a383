"""Runs whose ranks share a model: the same losses, validation and saved models as those of one process."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from forked_ranks import on_ranks
from safetensors.torch import load_file
from sharded_model import CPU, Given, Recorder, batch_of, config, document
from test_ranks import write_corpus
from toy_stage import ToyStage, logged, losses, toy_config

import mm_gpt
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import ConfigError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.distributed import process_group, ranks
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train, training_step
from mm_gpt.training.parallel import shard_model
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.transforms import ImageTransformConfig

STEPS = 4
KINDS: dict[str, dict[str, Any]] = {
    "full": {"decoder": "full", "vision_blocks": 1},
    "adapted": {"lora": LoRAConfig(rank=2, alpha=4), "vision_blocks": 0, "precision": "bf16"},
}


def recipe_of(data: Path, kind: str, *, rows: int, shard: int | None = 1, **train_settings: Any) -> LanguageRecipe:
    values = dict(KINDS[kind])
    settings: dict[str, Any] = {
        "steps": STEPS, "lr": 3e-3, "precision": values.pop("precision", "fp32"), "device": "cpu", "shard": shard,
        "log_every": 1, "validate_every": 2, "save_every": 2,
    }  # fmt: skip
    model = tiny_config(make_tokenizer().vocab_size)
    if lora := values.pop("lora", None):
        model = dataclasses.replace(model, lora=lora)
    return LanguageRecipe(
        train=TrainConfig(**(settings | train_settings)),
        model=model,
        image=ImageTransformConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        sources=(SourceConfig(path="corpus"),),
        validation=(SourceConfig(path="corpus"),),
        row_length=96,
        rows=rows,
        window_rows=4,
        validation_images=5,
        data=str(data),
        **values,
    )


def run(recipe: LanguageRecipe, out: Path, *, resume: bool = False) -> None:
    train(LanguageTask(recipe, make_tokenizer()), recipe.train, out, resume=resume, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_corpus(folder / "corpus")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_model_is_trained_as_a_whole_one(data: Path, kind: str) -> None:
    """The recipe's whole way: losses, validation, the saved model, and one process that continues what two began.
    With bfloat16, frozen weights are saved as they were before they were rounded."""
    two, one = data / f"{kind}-two", data / f"{kind}-one"
    assert on_ranks(lambda rank: run(recipe_of(data, kind, rows=1, shard=None, steps=2), two)) == [None, None]
    run(recipe_of(data, kind, rows=2, shard=None), two, resume=True)
    run(recipe_of(data, kind, rows=2, steps=2), one)
    run(recipe_of(data, kind, rows=2), one, resume=True)
    rounding = 1e-4 if kind == "full" else 1e-2
    assert losses(two).keys() == {1, 2, 3, 4}
    assert losses(two) == pytest.approx(losses(one), rel=rounding)
    judged: list[dict[int, Any]] = [dict(logged(out, "validation")) for out in (two, one)]
    ours, theirs = ({step: values["loss"] for step, values in each.items()} for each in judged)
    assert ours == pytest.approx(theirs, rel=rounding)
    saved, expected = (load_file(folder / "step-000002/model.safetensors") for folder in (two, one))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        same = tensor.dim() > 1 and kind == "adapted" and name.startswith("decoder") and "lora" not in name
        tolerance = 0.0 if same else 10 * rounding
        torch.testing.assert_close(saved[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    assert mm_gpt.load(two / "best").model.decoder.config.num_layers == 3


def test_other_stages_are_not_sharded(tmp_path: Path) -> None:
    def refused(rank: int) -> None:
        train(ToyStage(), toy_config(shard=None), tmp_path / "run", progress=False)

    message = "ConfigError: this stage is trained with the whole model on each rank: train.shard must be 1"
    assert on_ranks(refused) == [message] * 2
    with pytest.raises(ConfigError, match="shard"):
        toy_config(shard=0)
    with pytest.raises(ConfigError, match="2 ranks cannot share a copy of the model: the run has 1"):
        train(ToyStage(), toy_config(shard=2), tmp_path / "alone", progress=False)


@pytest.mark.parametrize("shard", [1, 2])
def test_a_loss_that_is_no_number_ends_all_ranks(shard: int) -> None:
    """Check 11: at the same step, with the rank and the samples that it comes from."""

    def broken(rank: int) -> None:
        from conftest import make_tiny

        model, processor = make_tiny()
        batches = [batch_of(processor, [document(n, image=True)]) for n in range(2)]
        batches[1].pixel_values[:] = torch.nan
        with process_group(CPU):
            if shard == 2:
                shard_model(model, 2, CPU, bf16=False)
            stage = Given(model.train(), batches)
            training_step(stage, stage.micro_batches(6, 1), Recorder(model), config(steps=9), 6, CPU)

    message = "MMGPTError: the loss is nan at step 7 (rank 1, samples doc1): lower the learning rate (0.001)"
    assert on_ranks(broken) == [message] * 2


def test_validation_is_a_mean_over_all_ranks_targets(data: Path) -> None:
    """A loss of 2 over one target and of 90 over nine are 9.2 a target, not the mean of 2 and 10."""

    def validated(rank: int) -> float:
        task = LanguageTask(recipe_of(data, "full", rows=1), make_tokenizer())
        batch = batch_of(task.processor, [document(0, image=False)])
        task._held_out_batches = lambda held: iter([batch])  # type: ignore[method-assign]
        found = torch.tensor([2.0, 90.0][rank]), torch.tensor([1, 9][rank])
        with process_group(CPU):
            return task._validate(lambda batch: found)["loss"]

    assert on_ranks(validated) == [pytest.approx(9.2)] * 2


def test_ranks_validate_equally_often(data: Path) -> None:
    """With a part of the model each, a rank with a row less would leave the others waiting."""

    def counted(rank: int) -> tuple[int, int, int]:
        task = LanguageTask(recipe_of(data, "full", rows=1, shard=None), make_tokenizer())
        plain = sum(1 for _ in task._held_out_batches(task.held_out[0]))
        with process_group(CPU):
            task.prepare()
            batches = list(task._held_out_batches(task.held_out[0]))
        return plain, len(batches), sum(not batch.ids[0] for batch in batches)

    found = on_ranks(counted, 3)
    rows = sum(plain for plain, _, _ in found)
    assert rows % 3, "as many rows as ranks: nothing is tested"
    assert [number for _, number, _ in found] == [-(-rows // 3)] * 3
    assert sum(empty for _, _, empty in found) == -rows % 3


def test_ranks_build_no_weights_of_their_own(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get rank 0's; otherwise a machine would hold a whole model for each of its GPUs."""
    recipe = recipe_of(data, "full", rows=1, shard=2)
    for rank, is_meta in ((0, False), (1, True)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        task = LanguageTask(recipe, make_tokenizer())
        assert {p.is_meta for p in task.model.parameters()} == {is_meta}
        assert ranks() == (rank, 2)
