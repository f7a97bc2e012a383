"""Several ranks learn what one with as many rows would, and refuse to start from different places."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import make_picture, make_tokenizer
from forked_ranks import on_ranks
from safetensors.torch import load_file
from torch import nn
from toy_stage import ToyStage, losses, toy_config

from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import MMGPTError
from mm_gpt.training import distributed
from mm_gpt.training.classification import ClassificationRecipe, ClassificationTask
from mm_gpt.training.contrastive import ContrastiveRecipe, ContrastiveTask
from mm_gpt.training.loop import train
from mm_gpt.vision.contrastive import ContrastiveConfig, TextTowerConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def labelled(count: int) -> str:
    rows = [{"text": f"a {'red' if n % 2 else 'blue'} circle {n}", "label": n % 2} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def classification(tiny_model_folder: Path, tmp_path: Path) -> ClassificationRecipe:
    (tmp_path / "train.jsonl").write_text(labelled(17))
    (tmp_path / "validation.jsonl").write_text(labelled(4))
    return ClassificationRecipe(
        train=toy_config(steps=5, lr=1e-2, save_every=5),
        start=str(tiny_model_folder),
        validation="validation.jsonl",
        auxiliary=0.0,  # a mean over the tokens of one micro-batch
        dropout=0.0,
        batch_size=4,
        data=str(tmp_path),
    )


def test_classification_on_two_ranks_is_that_of_one(classification: ClassificationRecipe, tmp_path: Path) -> None:
    """Each rank its own rows: they all learned from the same ones. The last batch of 17 is one row, for one rank."""

    def run(rank: int) -> None:
        train(ClassificationTask(classification), classification.train, tmp_path / "two", progress=False)

    assert on_ranks(run) == [None, None]
    whole = dataclasses.replace(classification, batch_size=8)
    train(ClassificationTask(whole), whole.train, tmp_path / "one", progress=False)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name in ("model.safetensors", "classifier.safetensors"):
        same_weights(tmp_path / "two/best" / name, tmp_path / "one/best" / name)


def test_an_epoch_shows_each_row_to_one_rank(
    classification: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ClassificationTask(classification)
    shown: list[tuple[int, ...]] = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        batches = [batch for step in range(2) for batch in task.micro_batches(step, 1)]
        shown += [tuple(ids[: int(n)].tolist()) for b in batches for ids, n in zip(b.input_ids, b.lengths, strict=True)]
    assert sorted(shown) == sorted(tuple(row.sequences[0]) for row in task.rows)


@pytest.fixture
def contrastive(tiny_model_folder: Path, tmp_path: Path) -> ContrastiveRecipe:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(13):
        make_picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"A red circle number {number}.\nBlue ground {number}.\n")
    text = TextTowerConfig(
        vocab_size=make_tokenizer().vocab_size, context_length=12, width=48, num_layers=1, num_heads=4
    )
    return ContrastiveRecipe(
        train=toy_config(steps=4, lr=1e-3, save_every=4),
        model=ContrastiveConfig(vision=VisionConfig(model="timm/test_vit", image_size=32), text=text),
        image=ImageTransformConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        sources=(SourceConfig(path="pictures"),),
        validation=(SourceConfig(path="pictures"),),
        decoder=str(tiny_model_folder),
        vision_blocks=1,
        batch_size=3,
        data=str(tmp_path),
    )


def test_contrastive_training_on_two_ranks_is_that_of_one(contrastive: ContrastiveRecipe, tmp_path: Path) -> None:
    """Each rank its own pairs, told from those of both; more than an epoch, with crops and captions drawn."""

    def run(rank: int) -> None:
        train(ContrastiveTask(contrastive), contrastive.train, tmp_path / "two", progress=False)

    assert on_ranks(run) == [None, None]
    whole = dataclasses.replace(contrastive, batch_size=6)
    train(ContrastiveTask(whole), whole.train, tmp_path / "one", progress=False)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_weights(tmp_path / "two/best/model.safetensors", tmp_path / "one/best/model.safetensors")


def test_records_are_read_one_at_a_time(contrastive: ContrastiveRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie on disk: nothing but their number and single ones is asked for."""

    class OnDisk:
        def __init__(self, records: Any) -> None:
            self._records = records

        def __len__(self) -> int:
            return len(self._records)

        def __getitem__(self, number: int) -> Any:
            return self._records[int(number)]

        __iter__ = None

    plain = ContrastiveTask._read
    monkeypatch.setattr(ContrastiveTask, "_read", lambda self, sources: OnDisk(plain(self, sources)))
    task = ContrastiveTask(contrastive)
    assert len(task.micro_batches(0, 2)) == 2
    with torch.no_grad():
        assert task.validate()["loss"] > 0


def test_too_few_images_for_all_ranks(contrastive: ContrastiveRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(MMGPTError, match=r"13 captioned images are fewer than a batch of 15 \(5 × 3\)"):
        ContrastiveTask(contrastive)


# ---- starting alike ----


def test_ranks_that_do_not_share_a_folder_are_refused(tmp_path: Path) -> None:
    """Rank 1 finds no checkpoint: it began anew, and the mean of the gradients belonged to nobody's weights."""
    train(ToyStage(), toy_config(steps=2), tmp_path / "0", progress=False)

    def run(rank: int) -> None:
        train(ToyStage(), toy_config(steps=4), tmp_path / str(rank), resume=True, progress=False)

    found = on_ranks(run)
    assert found[0] == found[1]
    assert found[0] == (
        "MMGPTError: the ranks do not continue from one checkpoint (rank 0 at step 2, rank 1 at step 0): --out must be "
        "a folder they share"
    )
    assert list(losses(tmp_path / "0")) == [1, 2]


def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        stage = ToyStage()
        with torch.no_grad():
            stage.model.get_parameter("vector")[0] += 1e-6 * rank
        train(stage, toy_config(steps=4), tmp_path / "run", progress=False)

    for found in on_ranks(run):
        assert found.startswith("MMGPTError: rank 1 has other weights than rank 0 at step 0: --out must be a folder")
    assert not (tmp_path / "run/log.jsonl").exists()


def test_ranks_with_other_settings_are_refused(tmp_path: Path) -> None:
    """With other numbers of steps they would wait for each other at the end, for hours."""

    def run(rank: int) -> None:
        train(ToyStage(), toy_config(steps=4 + rank), tmp_path / "run", progress=False)

    for found in on_ranks(run):
        assert found.startswith("MMGPTError: rank 1 has another train.steps than rank 0: start all ranks by the same")
    assert not (tmp_path / "run/log.jsonl").exists()


class ToyData(ToyStage):
    """Whose data is `content`."""

    content = ""

    def data_state(self, step: int) -> dict[str, Any]:
        return {"sources": [["shapes", 3, 100, self.content]]}

    def load_data_state(self, state: dict[str, Any]) -> None:
        assert state == self.data_state(0)


def test_ranks_with_other_data_are_refused(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        stage = ToyData()
        stage.content = f"digest {rank}"
        train(stage, toy_config(steps=4), tmp_path / "run", progress=False)

    for found in on_ranks(run):
        assert found.startswith("MMGPTError: rank 1 has another data.sources than rank 0")


def test_two_ranks_resume_together(tmp_path: Path) -> None:
    def run(steps: int, resume: bool) -> list[Any]:
        def each(rank: int) -> None:
            train(ToyStage(norm=True), toy_config(steps=steps), tmp_path / "run", resume=resume, progress=False)

        return on_ranks(each)

    assert run(2, False) == [None, None]
    assert run(3, True) == [None, None]
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


def test_statistics_are_averaged_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen trunk cost one for each of its 128 buffers, in every step, though none of them ever changes."""
    sent: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.clone())
        tensor *= 2
        tensor += torch.arange(len(tensor))  # as if the other rank had this much more

    monkeypatch.setattr(distributed, "ranks", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(8)), nn.Linear(3, 3), nn.GroupNorm(1, 3))
    generator = random.Random(0)
    for norm in list(model)[:8]:
        norm.running_mean.fill_(generator.random())
    model.eval()
    distributed.average_statistics(model)
    assert not sent
    moving = [model[2], model[5]]
    for norm in moving:
        norm.train()
    before = [buffer.clone() for norm in moving for buffer in (norm.running_mean, norm.running_var)]
    frozen = model[0].running_mean.clone()
    distributed.average_statistics(model)
    assert len(sent) == 1
    after = torch.cat([buffer for norm in moving for buffer in (norm.running_mean, norm.running_var)])
    torch.testing.assert_close(after, torch.cat(before) + torch.arange(12) / 2)
    assert torch.equal(model[0].running_mean, frozen)
