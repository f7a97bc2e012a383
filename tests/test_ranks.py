"""Several ranks and workers, as real processes: killed, continued, counted."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from safetensors.torch import load_file

from mm_gpt.datasets.building.shards import ShardWriter, write_corpus_file
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.images import to_file

NUM_DOCUMENTS = 23
STEPS = 8

SCRIPT = """
import dataclasses, itertools, json, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from conftest import make_tokenizer, tiny_config
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.training.distributed import ranks
from mm_gpt.vision.transforms import ImageTransformConfig

torch.set_num_threads(1)
options = json.loads(sys.argv[1])
tokenizer = make_tokenizer()
recipe = LanguageRecipe(
    train=TrainConfig(steps=options.get("steps", {steps}), lr=3e-3, precision="fp32", device="cpu", log_every=1,
                      validate_every=100, save_every=2, accumulate=options["accumulate"], **options.get("train", {{}})),
    model=tiny_config(tokenizer.vocab_size),
    image=ImageTransformConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    sources=(SourceConfig(path=options.get("source", "corpus")),),
    validation=(SourceConfig(path=options.get("source", "corpus")),),
    decoder="full", vision_blocks=1, row_length=96, rows=options["rows"], workers=options["workers"], window_rows=4,
    validation_images=1, data=options["data"],
)
task = LanguageTask(recipe, tokenizer)
load, out = task.micro_batches, Path(options["out"])

def noted(step, count):
    batches = load(step, count)
    with (out.parent / f"{{out.name}}-seen-{{ranks()[0]}}.jsonl").open("a") as file:
        file.write(json.dumps([step, [row for batch in batches for row in batch.ids],
                               [len(batch.image_rows) for batch in batches]]) + "\\n")
    return batches

task.micro_batches = noted
if ranks()[0] == 0:
    epoch = itertools.takewhile(lambda found: found[1].epoch == 0, task.loader.plan.rows())
    units = [[[*item.unit] for item in row] for row, _ in epoch]
    names = [" ".join(task.sources[0].document(tuple(unit)).id for unit in row) for row in units]
    (out.parent / f"{{out.name}}-plan.json").write_text(json.dumps([len(task.sources[0]), units, names]))
train(task, recipe.train, out, resume=options["resume"], progress=False)
"""


def write_corpus(folder: Path) -> None:
    """Documents with words, some with pictures, in three shards: fewer than workers."""
    rng = random.Random(0)
    writer = ShardWriter(folder, shard_bytes=24_000)
    for n in range(NUM_DOCUMENTS):
        segments: list[Segment] = [Text(f"Page {n} " + "a red circle " * rng.randint(1, 8))]
        if n % 2:
            colour = (10 * n % 255, 200, 40)
            segments += [Image(to_file(PILImage.new("RGB", (24, 20), colour))), Text("blue ground")]
        writer.add(Document(tuple(segments), id=f"doc{n}"))
    shards = writer.close()
    assert 1 < len(shards) < 4
    write_corpus_file(folder, shards, {})


class Run:
    """The script in one process for each rank."""

    def __init__(self, folder: Path, name: str, *, ranks: int = 2, **options: Any):
        self.out = folder / name
        script = folder / "run.py"
        script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), steps=STEPS))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = {"data": str(folder), "out": str(self.out), "workers": 2, "rows": 1, "accumulate": 1, "resume": False}
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        command = [sys.executable, str(script), json.dumps(values | options)]
        self.processes = [
            subprocess.Popen(
                command, env=env | {"RANK": str(rank)}, start_new_session=True, stderr=subprocess.PIPE, text=True
            )
            for rank in range(ranks)
        ]

    def finish(self) -> None:
        for process in self.processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-3000:]

    def kill_after(self, step: int) -> None:
        """SIGKILL to every process, workers included, once `step` is in the log."""
        log = self.out / "log.jsonl"
        end = time.monotonic() + 200
        while not any(row["step"] >= step for row in rows(log)):
            assert all(process.poll() is None for process in self.processes), "ended by itself"
            assert time.monotonic() < end
            time.sleep(0.01)
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in rows(self.out / "log.jsonl") if "loss" in row}

    def weights(self) -> dict[str, Any]:
        return load_file(self.out / f"step-{STEPS:06d}" / "model.safetensors")

    def seen(self, rank: int) -> dict[int, list[str]]:
        """The ids of each row of each step; of a step that was repeated, the last time."""
        return {step: ids for step, ids, _ in rows_of(self.out.parent / f"{self.out.name}-seen-{rank}.jsonl")}

    def images(self, rank: int) -> list[int]:
        found = rows_of(self.out.parent / f"{self.out.name}-seen-{rank}.jsonl")
        return [sum(counts) for _, _, counts in found]


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(path) if isinstance(row, dict)]


def rows_of(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """Two ranks, each with two workers, never stopped."""
    run = Run(folder, "whole")
    run.finish()
    return run


def same_end(run: Run, other: Run) -> None:
    """Bit for bit the same losses and weights."""
    assert run.losses() == other.losses()
    ours, theirs = run.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("workers", [2, 1])
def test_killed_anywhere_it_continues_with_the_very_next_batch(folder: Path, whole: Run, workers: int) -> None:
    """SIGKILL to 2 ranks x 2 workers; continued with as many workers, and with another number of them."""
    name = f"killed-{workers}"
    Run(folder, name).kill_after(5)
    again = Run(folder, name, resume=True, workers=workers)
    again.finish()
    same_end(again, whole)
    for rank in range(2):
        assert again.seen(rank) == whole.seen(rank)


def test_another_number_of_ranks(folder: Path, whole: Run) -> None:
    """With as many rows a step, each step learns the same documents: losses differ by rounding alone."""
    name = "one-rank"
    Run(folder, name).kill_after(5)
    again = Run(folder, name, ranks=1, accumulate=2, resume=True)
    again.finish()
    for step, ids in again.seen(0).items():
        if len(ids) == 2:  # by the one rank
            assert ids == [*whole.seen(0)[step], *whole.seen(1)[step]]
    assert again.losses() == pytest.approx(whole.losses(), rel=1e-4)


@pytest.mark.slow
def test_stopped_while_steps_grow(folder: Path) -> None:
    """Steps of 2, 4 and 6 rows; killed among those of 4, and continued by one rank with two micro-batches for one: each
    step has the rows that it would have had."""
    train = {"step_tokens": 6 * 96, "ramp_from": 2 * 96, "ramp_tokens": 14 * 96}
    grown = Run(folder, "grown", train=train)
    grown.finish()
    assert [len(grown.seen(0)[step]) for step in range(STEPS)] == [1, 1, 1, 1, 2, 2, 3, 3]
    Run(folder, "grown-killed", train=train).kill_after(5)
    again = Run(folder, "grown-killed", train=train, ranks=1, resume=True)
    again.finish()
    resumed = {step: ids for step, ids in again.seen(0).items() if len(ids) != len(grown.seen(0)[step])}
    assert {4, 5, 6, 7} >= set(resumed) >= {6, 7}
    for step, ids in resumed.items():
        pairs = zip(grown.seen(0)[step], grown.seen(1)[step], strict=True)
        assert ids == [row for pair in pairs for row in pair]
    assert again.losses() == pytest.approx(grown.losses(), rel=1e-4)


def test_each_document_once_an_epoch(whole: Run) -> None:
    """With fewer shards than workers; nothing hangs, and no rank sees another's documents."""
    size, units, names = json.loads((whole.out.parent / "whole-plan.json").read_text())
    counts = Counter(tuple(unit) for row in units for unit in row)
    assert len(counts) == size
    assert set(counts.values()) == {1}
    learned = [row for step in range(STEPS) for rank in range(2) for row in whole.seen(rank)[step]]
    assert 6 < len(names) < len(learned)  # the run goes on into the next epoch
    assert learned[: len(names)] == names


def test_a_rank_without_images_trains(whole: Run) -> None:
    """Some step has images on one rank alone: the other adds no gradient to the vision side, and nobody waits."""
    pairs = list(zip(whole.images(0), whole.images(1), strict=False))
    assert any((first == 0) != (second == 0) for first, second in pairs), pairs
