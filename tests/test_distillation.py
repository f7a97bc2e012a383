"""Distillation: the chunked loss, what teacher and student read, the student's own answers, and exact resumption."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_SIZE, make_picture, make_tiny, tiny_config
from forked_ranks import on_ranks
from safetensors.torch import load_file
from toy_stage import logged, losses, one_step

import mm_gpt
from mm_gpt.alignment import distillation
from mm_gpt.alignment.distillation import (
    DistillationRecipe,
    DistillationTask,
    TaughtBatch,
    chunked_distillation_loss,
)
from mm_gpt.alignment.losses import distillation_loss
from mm_gpt.config import override
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import ConfigError
from mm_gpt.hub.checkpoint import model_folder, read_configs, save_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Processor
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.recipes import RECIPES, run_recipe
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.transforms import ImageTransformConfig

IMAGE = ImageTransformConfig(size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


# ---- the loss ----


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_chunks_are_the_whole(kind: Any, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients are those of all logits at once; a teacher of another width."""
    monkeypatch.setattr(distillation, "CHUNK", 3)
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    labels = torch.tensor([[1, IGNORE_INDEX, 2, 3, 4, 5], [6, 7, IGNORE_INDEX, IGNORE_INDEX, 8, 9]])
    known, head = torch.randn(9, 4), torch.randn(11, 4)
    found = chunked_distillation_loss(
        hidden,
        weight,
        labels,
        lambda rows: known[rows] @ head.T,
        softcap=softcap,
        temperature=2.0,
        divergence=kind,
        beta=0.3,
    )
    (found * 0.7).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = F.linear(hidden[labels != IGNORE_INDEX], weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = distillation_loss(logits, known @ head.T, temperature=2.0, kind=kind, beta=0.3).sum()
    (expected * 0.7).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-6)


# ---- the stage ----


def write_data(folder: Path) -> None:
    for name, numbers in (("pictures", range(6)), ("held-out", range(6, 8))):
        (folder / name).mkdir(parents=True)
        for n in numbers:
            make_picture(n).save(folder / name / f"{n}.png")
            (folder / name / f"{n}.txt").write_text(f"A red circle {n}.\nBlue ground, number {n}.\n")
    (folder / "texts").mkdir()
    for n in range(2):
        (folder / "texts" / f"{n}.txt").write_text(f"A page about red circles on a blue ground, number {n}. " * 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student: another model, which reads images in fewer tokens than the teacher."""
    folder = tmp_path_factory.mktemp("student")
    plain, processor = make_tiny(7)
    connector = ConnectorConfig(kind="resampler", num_heads=4, num_latents=2, depth=1)
    model = MMGPT(dataclasses.replace(plain.config, connector=connector), plain.decoder)
    config = dataclasses.replace(processor.config, tokens_per_image=2)
    save_model(model, Processor(processor.tokenizer, config, vocab_size=processor.vocab_size), folder)
    return folder


def tiny_recipe(data: Path, teacher: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "steps": 4,
        "lr": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "validate_every": 3,
        "save_every": 2,
        "seed": 5,
    }
    values: dict[str, Any] = {
        "train": TrainConfig(**(settings | (train or {}))),
        "model": None,
        "image": None,
        "start": str(teacher),
        "teacher": str(teacher),
        "sources": (SourceConfig(path="pictures"),),
        "validation": (SourceConfig(path="held-out"),),
        "decoder": "full",
        "row_length": 96,
        "rows": 2,
        "window_rows": 4,
        "max_new_tokens": 5,
        "data": str(data),
    }
    return DistillationRecipe(**(values | changes))


def gradients(task: LanguageTask) -> dict[str, torch.Tensor]:
    task.model.train()
    (batch,) = task.micro_batches(0, 1)
    counts = task.counts(batch)
    terms = task.loss(batch)
    total = sum(term.total * term.weight / counts[name] for name, term in terms.items())
    assert isinstance(total, torch.Tensor)
    total.backward()
    return {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}


def test_alpha_0_is_training_without_a_teacher(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    recipe = tiny_recipe(data, tiny_model_folder, start=str(other_folder), alpha=0.0, augment=False)
    task = DistillationTask(recipe)
    plain = LanguageTask(
        LanguageRecipe(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(LanguageRecipe)})
    )
    task.prepare(), plain.prepare()
    ours, theirs = gradients(task), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (batch,) = task.micro_batches(1, 1)
    assert set(task.loss(batch)) == {"nll"}


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(data: Path, tiny_model_folder: Path, kind: str) -> None:
    task = DistillationTask(tiny_recipe(data, tiny_model_folder, alpha=1.0, divergence=kind))
    task.prepare()
    found = gradients(task)
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-6
    (batch,) = task.micro_batches(1, 1)
    terms = task.loss(batch)
    assert set(terms) == {"kl"}
    assert terms["kl"].total.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_a_student_comes_closer_to_its_teacher(
    data: Path, tiny_model_folder: Path, other_folder: Path, on_policy: float
) -> None:
    """Also where each reads the images in its own way, and on its own answers. The teacher stays what it was."""
    recipe = tiny_recipe(
        data, tiny_model_folder, start=str(other_folder), alpha=1.0, train={"lr": 3e-3}, on_policy=on_policy
    )
    task = DistillationTask(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    task.model.train()
    with torch.no_grad():
        first = task.validate()
    for step in range(15):
        one_step(task, optimizer, recipe.train, step)
    with torch.no_grad():
        last = task.validate()
    assert last["kl"] < 0.8 * first["kl"]
    assert all(torch.equal(p, before[name]) for name, p in task.teacher.named_parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_both_read_the_same_targets(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    sources = (SourceConfig(path="pictures"), SourceConfig(path="texts"))
    task = DistillationTask(tiny_recipe(data, tiny_model_folder, start=str(other_folder), sources=sources))
    batches = [batch for step in range(6) for batch in task.micro_batches(step, 1)]
    for batch in batches:
        assert isinstance(batch, TaughtBatch)
        assert batch.teacher is not None
        own, theirs = batch.labels, batch.teacher.labels
        assert torch.equal(own[own != IGNORE_INDEX], theirs[theirs != IGNORE_INDEX])
        assert len(batch.image_tiles) == len(batch.teacher.image_tiles)
        shorter = batch.teacher.input_ids.count_nonzero() - batch.input_ids.count_nonzero()
        assert shorter == 2 * len(batch.image_tiles)
        torch.testing.assert_close(batch.pixel_values, batch.teacher.pixel_values)  # the same crops
    assert sum(len(batch.image_tiles) for batch in batches) > 5


def test_answers_are_the_student_s_own(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    """Of each prompt one, that is likely to the student; the same at the same step, others at the next; a page without
    a prompt is learned as it is."""
    sources = (SourceConfig(path="pictures"), SourceConfig(path="texts"))
    changes: dict[str, Any] = {"start": str(other_folder), "on_policy": 1.0, "sources": sources}
    task = DistillationTask(tiny_recipe(data, tiny_model_folder, **changes))
    task.prepare()
    assert task.on_policy
    sampled: list[TaughtBatch] = []
    given: list[TaughtBatch] = []
    for step in range(6):
        (batch,), (again,) = task.micro_batches(step, 1), task.micro_batches(step, 1)
        assert isinstance(batch, TaughtBatch)
        assert batch.teacher is not None
        assert torch.equal(batch.labels, again.labels)
        assert "nll" not in task.counts(batch) or not batch.is_sampled
        (sampled if batch.is_sampled else given).append(batch)
        if not batch.is_sampled:
            continue
        assert task.counts(batch) == {"kl": float((batch.labels != IGNORE_INDEX).sum())}
        for row, theirs in zip(batch.labels, batch.teacher.labels, strict=True):
            answer = row[row != IGNORE_INDEX]
            assert torch.equal(answer, theirs[theirs != IGNORE_INDEX])
            assert 1 <= len(answer) <= 5
            ends = torch.isin(answer, torch.tensor(task.processor.tokenizer.end_ids))
            assert len(answer) == 5 or ends[-1]
            assert not ends[:-1].any()
    assert sampled
    flat = [tuple(row[row != IGNORE_INDEX].tolist()) for batch in sampled for row in batch.labels]
    assert len(set(flat)) > len(flat) / 2


def test_a_share_of_the_batches_is_on_policy(data: Path, tiny_model_folder: Path) -> None:
    task = DistillationTask(tiny_recipe(data, tiny_model_folder, on_policy=0.5, max_new_tokens=1))
    kinds = [batch.is_sampled for step in range(16) for batch in task.micro_batches(step, 1)]  # type: ignore[attr-defined]
    assert 3 <= sum(kinds) <= 13


def test_workers_read_the_same(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    """Also what the student is to answer, which travels as prompts."""
    found = []
    for workers in (0, 1):
        recipe = tiny_recipe(data, tiny_model_folder, start=str(other_folder), on_policy=0.5, workers=workers)
        task = DistillationTask(recipe)
        found.append([batch for step in range(4) for batch in task.micro_batches(step, 1)])
        task.loader.close()
    for one, other in zip(*found, strict=True):
        assert isinstance(one, TaughtBatch)
        assert isinstance(other, TaughtBatch)
        assert one.is_sampled == other.is_sampled
        assert one.teacher is not None
        assert other.teacher is not None
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.teacher.pixel_values, other.teacher.pixel_values)
    assert len({batch.is_sampled for batch in found[0]}) == 2  # type: ignore[attr-defined]


def test_micro_batches_are_one_batch(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    """Each of the terms has the denominator of the whole step."""
    found = []
    for rows, accumulate in ((2, 1), (1, 2)):
        changes: dict[str, Any] = {"rows": rows, "train": {"accumulate": accumulate, "clip": 1e9}, "augment": False}
        recipe = tiny_recipe(data, tiny_model_folder, start=str(other_folder), row_length=48, **changes)
        task = DistillationTask(recipe)
        optimizer = make_optimizer(task.prepare(), recipe.train)
        task.model.eval()
        found.append((one_step(task, optimizer, recipe.train, 0), dict(task.model.named_parameters())))
    for key in ("loss", "nll", "kl", "grad_norm"):
        assert found[0][0][key] == pytest.approx(found[1][0][key], rel=1e-4), key
    assert found[0][0]["loss"] == pytest.approx(0.5 * found[0][0]["nll"] + 0.5 * found[0][0]["kl"], rel=1e-5)


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_resumes_bit_by_bit(tmp_path: Path, data: Path, tiny_model_folder: Path, on_policy: float) -> None:
    recipe = tiny_recipe(
        data, tiny_model_folder, on_policy=on_policy, decoder="frozen", lora=LoRAConfig(rank=2, alpha=4), alpha=0.7
    )
    train(DistillationTask(recipe), recipe.train, tmp_path / "whole", progress=False)
    stopped = DistillationTask(recipe)
    plain, calls = stopped.loss, iter(range(1, 100))

    def loss(batch: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return plain(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        train(stopped, recipe.train, tmp_path / "stopped", progress=False)
    train(DistillationTask(recipe), recipe.train, tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert logged(tmp_path / "stopped", "kl") == logged(tmp_path / "whole", "kl")
    one, other = (load_file(tmp_path / name / "step-000004/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_ranks_learn_what_one_process_does(data: Path, tiny_model_folder: Path, other_folder: Path) -> None:
    base: dict[str, Any] = {"start": str(other_folder), "augment": False, "alpha": 0.3, "row_length": 48}

    def steps(rank: int) -> list[float]:
        recipe = tiny_recipe(data, tiny_model_folder, rows=1, **base)
        return run(recipe)

    def run(recipe: Any) -> list[float]:
        from mm_gpt.training.distributed import process_group

        with process_group(torch.device("cpu")):
            task = DistillationTask(recipe)
            optimizer = make_optimizer(task.prepare(), recipe.train)
            task.model.eval()
            return [one_step(task, optimizer, recipe.train, step)["loss"] for step in range(2)]

    together = on_ranks(steps)
    alone = run(tiny_recipe(data, tiny_model_folder, rows=2, **base))
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone, rel=1e-4)


# ---- what is taken and what is refused ----


def test_a_new_student_takes_the_teacher_s_tokenizer_and_eyes(data: Path, tiny_model_folder: Path) -> None:
    _, processor = make_tiny()
    config = tiny_config(processor.vocab_size)
    changes: dict[str, Any] = {"start": None, "model": config, "image": IMAGE, "teacher_vision": True}
    task = DistillationTask(tiny_recipe(data, tiny_model_folder, **changes))
    assert task.model.vision is not None
    assert task.teacher.vision is not None
    ours, theirs = task.model.vision.tower.state_dict(), task.teacher.vision.tower.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert task.processor.tokenizer.fingerprint == processor.tokenizer.fingerprint
    assert config.vision is not None
    other = dataclasses.replace(config, vision=dataclasses.replace(config.vision, model="timm/test_vit2"))
    with pytest.raises(ConfigError, match=r"the student's tower is timm/test_vit2 at 32 pixels, that of the teacher"):
        DistillationTask(tiny_recipe(data, tiny_model_folder, **(changes | {"model": other})))


def test_another_vocabulary_is_refused(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["other words", "user assistant system"] * 4, 300)
    model, plain = make_tiny()
    config = tiny_config(tokenizer.vocab_size)
    other = type(model)(config)
    save_model(other, Processor(tokenizer, plain.config, vocab_size=tokenizer.vocab_size), tmp_path)
    said = rf"\({tmp_path}\) has {tokenizer.vocab_size} ids and the teacher \({tiny_model_folder}\) {plain.vocab_size}"
    with pytest.raises(ConfigError, match=said):
        DistillationTask(tiny_recipe(data, tiny_model_folder, start=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"on_policy": 0.5, "alpha": 0.0}, "alpha must be above 0"),
        ({"on_policy": 0.5, "compile": True}, "compile must be off"),
        ({"teacher_vision": True}, "teacher_vision is for a student from random weights"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_recipe(Path("."), Path("x"), **changes)


def test_the_recipe_s_student_has_its_teacher_s_tower_and_words(data: Path) -> None:
    """Checked against the configuration of the default model, without its decoder's weights."""
    recipe = RECIPES["distill"](str(data))
    assert isinstance(recipe, DistillationRecipe)
    assert recipe.model is not None
    config, processor = read_configs(model_folder(recipe.teacher))
    assert config.vision is not None
    assert recipe.model.vision == dataclasses.replace(config.vision, concepts=None)
    assert recipe.image == processor.image
    assert config.decoder == "smollm2-135m-instruct"
    assert not isinstance(recipe.model.decoder, str)
    assert recipe.model.decoder.vocab_size == 49_152


def test_a_recipe_runs_and_goes_on(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    recipe = tiny_recipe(data, tiny_model_folder, validation=(), holdout=0.3, train={"steps": 2})
    run_recipe(recipe, tmp_path / "run", progress=False)
    run_recipe(override(recipe, ["train.steps=3"]), tmp_path / "run", resume=True, progress=False)
    assert logged(tmp_path / "run", "kl").keys() >= {1, 2, 3}
    assert mm_gpt.load(tmp_path / "run/best").caption(data / "pictures/0.png") is not None
