"""Self-critical training: the reward, what is sampled, the policy gradient, exact resumption, and what is refused."""

import dataclasses
import json
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from toy_stage import losses, one_step

from mm_gpt.config import override
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.eval.metrics.captions import bleu, cider_d
from mm_gpt.inference.engine import Engine
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.processor import collate
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.recipes import default_critical
from mm_gpt.training.self_critical import (
    CiderReward,
    Photos,
    SelfCriticalRecipe,
    SelfCriticalTask,
    advantages_of,
)
from mm_gpt.training.stage import Term
from mm_gpt.training.train_config import TrainConfig

# ---- the reward ----

REFERENCES = [
    ("A dog runs on the grass.", "A brown dog is running.", "The dog runs fast over a green lawn."),
    ("Two men sit on a bench.", "Men on a bench in the park."),
    ("A red car.", "A car parks in the street."),
]
CANDIDATES = ["A dog runs over the grass.", "Two dogs sit on a bench", "the the the car", "", "A dog on a"]


@given(st.lists(st.sampled_from(CANDIDATES), min_size=3, max_size=3))
@settings(max_examples=20)
def test_the_reward_is_the_metric(candidates: list[str]) -> None:
    """With the document frequencies of the same images: CIDEr-D and BLEU-4 of the evaluation."""
    plain = CiderReward(REFERENCES, end_mark=False)
    both = CiderReward(REFERENCES, end_mark=False, bleu_weight=0.5)
    expected, fours = cider_d(candidates, REFERENCES).per_item, bleu(candidates, REFERENCES)[3].per_item
    for n, (candidate, own) in enumerate(zip(candidates, REFERENCES, strict=True)):
        assert plain(candidate, own) == pytest.approx(expected[n], abs=1e-12)
        assert both(candidate, own) == pytest.approx(expected[n] + 0.5 * fours[n], abs=1e-12)


def test_document_frequencies_are_those_of_the_training_captions() -> None:
    """Not of the photos at hand: what all training captions say is worth nothing, whatever these say."""
    trained = CiderReward([*REFERENCES, ("A dog.",)], end_mark=False)
    assert trained("a dog", ["a dog"]) > 0
    everywhere = CiderReward([("a dog runs",), ("a dog sits",)], end_mark=False)
    assert everywhere("a dog", ["a dog", "a dog runs"]) == 0


def test_a_caption_that_stops_in_the_middle_is_worth_less() -> None:
    """The known fault of the paper's reward: without an end, 'on a' behind a caption costs nothing or even pays."""
    reward = CiderReward(REFERENCES)
    own = REFERENCES[1]
    assert reward("Two men sit on a bench.", own) > reward("Two men sit on a bench.", own, is_whole=False)
    assert reward("Two men sit on a bench", own) > reward("Two men sit on a bench on a", own)
    gain = reward("Two men sit on a bench", own) - reward("Two men sit on a", own)
    old = CiderReward(REFERENCES, end_mark=False)
    assert gain > old("Two men sit on a bench", own) - old("Two men sit on a", own)


def test_advantages_by_hand() -> None:
    values = advantages_of(torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(values, torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]]))


# ---- the stage ----


def write_data(folder: Path) -> None:
    for name, numbers in (("pictures", range(5)), ("held-out", range(5, 8))):
        (folder / name).mkdir(parents=True)
        for n in numbers:
            make_picture(n).save(folder / name / f"{n}.png")
            (folder / name / f"{n}.txt").write_text(f"A red circle on a blue ground {n}.\nBlue circle {n}.\n")
    (folder / "asked").mkdir()
    make_picture(9).save(folder / "asked/9.png")
    (folder / "asked/9.json").write_text(json.dumps({"qa": [{"question": "A circle?", "answer": "yes"}]}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def tiny_recipe(data: Path, start: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> SelfCriticalRecipe:
    settings: dict[str, Any] = {
        "steps": 6,
        "lr": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "validate_every": 4,
        "save_every": 2,
        "seed": 5,
    }
    values: dict[str, Any] = {
        "train": TrainConfig(**(settings | (train or {}))),
        "start": str(start),
        "sources": (SourceConfig(path="pictures"),),
        "validation": (SourceConfig(path="held-out"),),
        "photos": 2,
        "samples": 3,
        "max_new_tokens": 6,
        "data": str(data),
    }
    return SelfCriticalRecipe(**(values | changes))


def test_the_gradient_is_that_of_weighted_log_probabilities(data: Path, tiny_model_folder: Path) -> None:
    """Advantages on the wrong sample, a caption's loss with an advantage, an end mark that is not learned; and features
    that were computed once, for the samples and for the gradient of the connector."""
    task = SelfCriticalTask(tiny_recipe(data, tiny_model_folder, decoder="full", nll_weight=0.3))
    task.prepare()
    model = task.model.train()
    values = iter([0.5, 2.0, 0.1, 1.0, 0.0, 4.0])
    seen: list[tuple[int, ...]] = []

    def reward(ids: tuple[int, ...], references: Sequence[str]) -> float:
        seen.append(ids)
        return next(values)

    task._reward = reward  # type: ignore[method-assign, assignment]
    (batch,) = task.micro_batches(0, 1)
    term = task.loss(batch)["loss"]
    loss = term.total
    assert term.count == 6 == task.counts(batch)["loss"]
    assert loss.item() == pytest.approx(-7.6)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [None if p.grad is None else p.grad.clone() for p in trained]
    model.zero_grad()
    advantages = [-0.55, 1.7, -1.15, -1.0, -2.5, 3.5]
    assert len(batch.photos) == 2
    for n, photo in enumerate(batch.photos):
        pixels = batch.pixel_values[n : n + 1]
        for ids, advantage in zip(seen[3 * n : 3 * n + 3], advantages[3 * n : 3 * n + 3], strict=True):
            example = task.processor(Document((*photo.prompt, Text("", ids=ids))))
            hidden = model(collate([[example]], pixels))[0]
            logs = F.log_softmax(model.decoder.logits(hidden), dim=-1)[-len(ids) - 1 : -1]
            (-advantage * logs[range(len(ids)), list(ids)].sum()).backward()
        assert len(photo.captions) == 2
        for caption in photo.captions:
            example = task.processor(Document(caption))
            (0.3 * model.loss(collate([[example]], pixels))[0]).backward()
    for mine, parameter in zip(found, trained, strict=True):
        assert (mine is None) == (parameter.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-4)
    assert sum(mine is not None and bool(mine.any()) for mine in found) > 10


def test_what_is_rewarded_becomes_likelier(data: Path, tiny_model_folder: Path) -> None:
    changes = {"photos": 4, "samples": 8, "max_new_tokens": 1, "nll_weight": 0.0, "augment": False}
    train = {"steps": 25, "lr": 6e-3}
    recipe = tiny_recipe(data, tiny_model_folder, decoder="full", train=train, **changes)
    task = SelfCriticalTask(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    task.model.train()
    wanted = set(range(0, 400, 2))
    task._reward = lambda ids, references: float(ids[0] in wanted)  # type: ignore[method-assign]
    rewards = [-one_step(task, optimizer, recipe.train, step)["loss"] for step in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_resumes_bit_by_bit(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    """The same photos, mirror images, samples and weights, with validation between and over the end of an epoch."""
    recipe = tiny_recipe(data, tiny_model_folder, decoder="full", train={"accumulate": 2})
    task = SelfCriticalTask(recipe)
    train(task, recipe.train, tmp_path / "whole", progress=False)
    stopped = SelfCriticalTask(recipe)
    plain, calls = stopped.loss, iter(range(1, 100))

    def loss(batch: Photos) -> dict[str, Term]:
        if next(calls) == 2 * 2 + 1:  # the first micro-batch of step 3
            signal.raise_signal(signal.SIGINT)
        return plain(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        train(stopped, recipe.train, tmp_path / "stopped", progress=False)
    train(SelfCriticalTask(recipe), recipe.train, tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name in ("step-000006/model.safetensors", "step-000006/training_state/rank-0-of-1.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    start = load_file(tiny_model_folder / "model.safetensors")
    vision = [key for key in start if key.startswith("vision.")]
    end = load_file(tmp_path / "whole/step-000006/model.safetensors")
    assert vision
    assert all(torch.equal(start[key], end[key]) for key in vision)  # frozen
    assert any(not torch.equal(start[key], end[key]) for key in start if key.startswith("decoder."))
    with pytest.raises(MMGPTError, match="no longer those that the run began with"):
        SelfCriticalTask(dataclasses.replace(recipe, sources=(SourceConfig(path="held-out"),))).load_data_state(
            task.data_state(6)
        )


def test_an_epoch_shows_every_captioned_photo_once(data: Path, tiny_model_folder: Path) -> None:
    sources = (SourceConfig(path="pictures"), SourceConfig(path="asked"))
    task = SelfCriticalTask(tiny_recipe(data, tiny_model_folder, photos=1, sources=sources))
    shown = [photo.id for step in range(10) for batch in task.micro_batches(step, 1) for photo in batch.photos]
    assert sorted(shown[:5]) == sorted(shown[5:]) == [f"{n}" for n in range(5)]
    assert shown[:5] != shown[5:]


def test_greedy_captions_of_held_out_photos_are_judged(data: Path, tiny_model_folder: Path) -> None:
    """The engine's captions, and the metric of the evaluation."""
    task = SelfCriticalTask(tiny_recipe(data, tiny_model_folder))
    task.prepare()
    task.model.eval()
    values = task.validate()
    photos = [make_picture(n) for n in range(5, 8)]
    documents = [task.processor.chat([{"role": "user", "content": [Image(p), CAPTION_PROMPT]}]) for p in photos]
    answers = Engine(task.model, task.processor).generate(documents, GenerationConfig(max_new_tokens=6))
    references = [(f"A red circle on a blue ground {n}.", f"Blue circle {n}.") for n in range(5, 8)]
    assert values["cider_d"] == pytest.approx(cider_d([a.text for a in answers], references).score, abs=1e-12)
    assert values["loss"] == -values["cider_d"]
    assert values["ended"] == sum(answer.finish_reason == "stop" for answer in answers) / 3
    assert values["nats"] > 0


@pytest.mark.parametrize("decoder", ["full", "frozen"])
def test_bf16(data: Path, tiny_model_folder: Path, decoder: str) -> None:
    """Keys and values under autocast: a cache of the weights' type would not fit the queries."""
    lora = None if decoder == "full" else LoRAConfig(rank=2, alpha=4)
    recipe = tiny_recipe(data, tiny_model_folder, decoder=decoder, lora=lora, train={"precision": "bf16"})
    task = SelfCriticalTask(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    task.model.train()
    metrics = one_step(task, optimizer, recipe.train, 0)
    assert metrics["grad_norm"] > 0
    assert metrics["loss"] <= 0


# ---- what is refused ----


def test_a_broken_photo_is_counted_and_the_next_one_taken(tmp_path: Path, tiny_model_folder: Path) -> None:
    write_data(tmp_path)
    task = SelfCriticalTask(tiny_recipe(tmp_path, tiny_model_folder, photos=5))
    plain = task.processor.pixels
    broken = {"2"}

    def pixels(examples: Any) -> Tensor:
        if {example.id for example in examples} & broken:
            raise MMGPTError("2.png: cut off")
        return plain(examples)

    task.processor.pixels = pixels  # type: ignore[method-assign]
    (batch,) = task.micro_batches(0, 1)
    assert len(batch.photos) == 5
    assert {photo.id for photo in batch.photos} == {"0", "1", "3", "4"}
    assert task.errors.counts["cannot be described"] == 1
    broken |= {"0", "1", "3", "4"}
    with pytest.raises(MMGPTError, match="none of 5 captioned photos can be read"):
        task.micro_batches(0, 1)


def test_captions_that_might_not_fit_the_context_are_left_out(data: Path, tiny_model_folder: Path) -> None:
    """Not in the middle of a run, when the model happens to write long ones."""
    task = SelfCriticalTask(tiny_recipe(data, tiny_model_folder, samples=40))
    with pytest.raises(MMGPTError, match="the context holds 256"):
        task._read(task.records[0], random.Random(0), 0)


def test_photos_without_captions(data: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(MMGPTError, match="the sources hold no captioned photo"):
        SelfCriticalTask(tiny_recipe(data, tiny_model_folder, sources=(SourceConfig(path="asked"),)))
    task = SelfCriticalTask(tiny_recipe(data, tiny_model_folder, validation=(SourceConfig(path="asked"),)))
    with pytest.raises(MMGPTError, match="validation sources hold no captioned photo"):
        task.validate()


def test_several_processes_are_refused(data: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_gpt.training.self_critical.ranks", lambda: (0, 2))
    with pytest.raises(MMGPTError, match="runs in one process"):
        SelfCriticalTask(tiny_recipe(data, tiny_model_folder))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("samples=1", "samples must be at least 2"),
        ("photos=0", "photos must be at least 1"),
        ("nll_weight=-1", "nll_weight must be at least 0"),
        ("train.batch_tokens=5", "batch_tokens is for rows of tokens"),
        ("holdout=0.1", "either validation sources or a holdout"),
    ],
)
def test_settings_have_bounds(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(default_critical("."), [value])


def test_shares_of_sources_are_refused() -> None:
    """They would be ignored: an epoch shows each photo once."""
    with pytest.raises(ConfigError, match=r"a\.tar: repeat, weight and derived_share are of the language stage alone"):
        dataclasses.replace(default_critical("."), sources=(SourceConfig(path="a.tar", repeat=2.0),))
