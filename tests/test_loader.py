"""From a corpus to batches: the same ones for any number of workers and ranks, and from wherever a run goes on."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_shards
import torch
from conftest import make_picture, make_tiny, make_tokenizer
from test_pieces import tiled
from test_plan import Numbers
from test_processes import is_running
from test_training import tiny_recipe

from mm_gpt.datasets.building.shards import Corpus, ShardWriter, index_path, write_corpus_file
from mm_gpt.datasets.loading.index import Measure
from mm_gpt.datasets.loading.loader import Loaded, Loader
from mm_gpt.datasets.loading.plan import Plan, Row, SourceWeight
from mm_gpt.datasets.loading.sources import IndexedSource, SourceConfig, open_sources
from mm_gpt.datasets.loading.step_sizes import StepSizes
from mm_gpt.datasets.samples import Conversation, ErrorCounter, Record, Sample
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.images import to_file
from mm_gpt.processor import Batch
from mm_gpt.training import distributed
from mm_gpt.training.language import LanguageRecipe, LanguageTask


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No worker outlives its test."""
    loaders: list[Loader] = []
    start = Loader._start

    def noted(self: Loader, step: int) -> Any:
        loaders.append(self)
        return start(self, step)

    monkeypatch.setattr(Loader, "_start", noted)
    yield
    for loader in loaders:
        loader.close()


SENTENCES = ["A red circle on a blue ground. ", "Describe the image. ", "One sentence of the user, and no more. "]


def pages(count: int, *, seed: int = 0, longest: int = 30, images: int = 3) -> list[Document]:
    """Web documents as they are: most short, some over several rows, with images between paragraphs."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        parts: list[Segment] = []
        for _ in range(generator.randint(1, 4)):
            parts.append(Text("".join(generator.choices(SENTENCES, k=generator.randint(1, longest)))))
            if generator.random() < images / 4:
                parts.append(Image(to_file(make_picture(generator.randrange(99), (8, 8)))))
        found.append(Document(tuple(parts), id=f"page-{number}"))
    return found


def source_of(folder: Path, processor: Any, max_tokens: int = 64, errors: ErrorCounter | None = None) -> IndexedSource:
    errors = errors if errors is not None else ErrorCounter()
    config, measure = SourceConfig(path=folder.name), Measure(processor, max_tokens)
    return open_sources([config], [config.open(folder.parent, errors)], measure, errors=errors)[0]


def write(folder: Path, samples: Sequence[Sample], *, shard_bytes: int = 10_000) -> Path:
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for sample in samples:
        writer.add(sample)
    write_corpus_file(folder, writer.close(), {})
    return folder


def recipe_of(data: Path, *names: str, **changes: Any) -> LanguageRecipe:
    sources = tuple(SourceConfig(path=name) for name in names or ("corpus",))
    values: dict[str, Any] = {"sources": sources, "validation": (SourceConfig(path="held-out"),), "row_length": 64}
    return tiny_recipe(data, **(values | {"rows": 2, "window_rows": 8} | changes))


def task_of(data: Path, *names: str, **changes: Any) -> LanguageTask:
    return LanguageTask(recipe_of(data, *names, **changes), make_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of several shards, and one to validate on."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "corpus", pages(24, longest=6))
    write(folder / "other", pages(9, seed=1, longest=20, images=0), shard_bytes=4_000)
    write(folder / "held-out", pages(4, seed=2, longest=4))
    return folder


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# ---- with rows that are numbers: any number of workers, ranks and stops ----


def numbers_plan(**changes: Any) -> Plan:
    generator = random.Random(5)
    sources = [Numbers([[generator.randint(1, 15)] for _ in range(n)], f"s{n}") for n in (30, 11)]
    values: dict[str, Any] = {"row_length": 20, "seed": 1, "window_rows": 4}
    return Plan(sources, [SourceWeight(), SourceWeight(repeat=1.5)], **(values | changes))


def as_read(rows: Sequence[tuple[int, Row]]) -> Loaded:
    batch: Any = list(rows)  # numbers and all
    return Loaded(batch, [("odd row", str(number)) for number, _ in rows if number % 2])


def numbers_loader(
    rows: int, accumulate: int | StepSizes = 1, world: int = 1, rank: int = 0, workers: int = 0, **changes: Any
) -> Loader:
    plan = numbers_plan(**changes)
    return Loader(plan, as_read, rows=rows, accumulate=accumulate, rank=rank, world=world, workers=workers)


def step_rows(loaders: Sequence[Loader], step: int) -> list[tuple[int, Row]]:
    found: list[Any] = [row for loader in loaders for batch in loader.micro_batches(step) for row in batch]
    return sorted(found, key=lambda row: row[0])


@pytest.mark.parametrize(
    ("rows", "accumulate", "world"), [(12, 1, 1), (3, 4, 1), (2, 1, 6), (3, 2, 2), (1, 12, 1), (1, 3, 4)]
)
def test_the_same_steps_on_any_number_of_ranks(rows: int, accumulate: int, world: int) -> None:
    """Stops: rows that two ranks both have or none has, and steps that depend on how they are divided."""
    loaders = [numbers_loader(rows, accumulate, world, rank) for rank in range(world)]
    expected = list(itertools.islice((row for row, _ in numbers_plan().rows()), 60))
    for step in range(5):
        assert all(len(loader.micro_batches(step)) == accumulate for loader in loaders)
        found = step_rows(loaders, step)
        assert found == list(enumerate(expected))[12 * step : 12 * step + 12]


def test_any_step_at_any_time() -> None:
    loader, in_order = numbers_loader(3, 2), [step_rows([numbers_loader(3, 2)], step) for step in range(9)]
    for step in (0, 1, 5, 2, 8, 8, 0, 1):
        assert step_rows([loader], step) == in_order[step]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_every_step(workers: int) -> None:
    """From JSON, while the next step is read already, over the ends of windows and epochs."""
    loader = numbers_loader(3, 2)
    steps = [step_rows([loader], step) for step in range(14)]
    plain = numbers_loader(3, 2)
    for step in range(12):
        step_rows([plain], step + 1)  # the loop reads one step ahead
        state = json.loads(json.dumps(plain.state(step + 1)))
        if workers and step % 4 != 1:
            continue
        again = numbers_loader(3, 2, workers=workers)
        again.load_state(state)
        assert [step_rows([again], step + 1), step_rows([again], step + 2)] == steps[step + 1 : step + 3]
        assert again.first_row(step + 1) == plain.first_row(step + 1)


def test_another_number_of_ranks_loses_nothing() -> None:
    """The product of rows, accumulation and ranks changes twice, in the middle of windows and epochs."""
    seen: list[tuple[int, Row]] = []
    step, state = 0, None
    for rows, accumulate, world in ((3, 2, 1), (1, 1, 5), (2, 1, 2), (7, 1, 1)):
        loaders = [numbers_loader(rows, accumulate, world, rank) for rank in range(world)]
        for loader in loaders if state is not None else ():
            loader.load_state(json.loads(json.dumps(state)))
        for _ in range(4):
            seen += step_rows(loaders, step)
            step += 1
        state = loaders[0].state(step)
    assert [number for number, _ in seen] == list(range(len(seen)))
    assert [row for _, row in seen] == list(itertools.islice((row for row, _ in numbers_plan().rows()), len(seen)))


def test_steps_that_grow() -> None:
    """A ramp on any number of ranks: the same rows in each step, none lost or twice, stopped anywhere in it and
    continued on another number of ranks; and one whose sizes change loses nothing either."""
    counts = [2, 2, 2, 2, 4, 4, 6, 6, 6, 6]
    expected = list(itertools.islice((row for row, _ in numbers_plan().rows()), 400))
    begins = [6 * sum(counts[:step]) for step in range(len(counts))]
    variants = ((3, StepSizes(6, 2, 14), 2), (6, StepSizes(6, 2, 14), 1), (3, StepSizes(12, 4, 28), 1))
    states: list[Any] = []
    for rows, sizes, world in variants:
        loaders = [numbers_loader(rows, sizes, world, rank) for rank in range(world)]
        for step, count in enumerate(counts):
            states.append(json.loads(json.dumps(loaders[0].state(step))))
            found = step_rows(loaders, step)
            assert found == list(enumerate(expected))[begins[step] : begins[step] + 6 * count]
    for state in states[:10]:
        for rows, sizes, world in variants:
            again = [numbers_loader(rows, sizes, world, rank) for rank in range(world)]
            for loader in again:
                loader.load_state(state)
            begin = begins[state["step"]]
            assert (
                step_rows(again, state["step"]) == list(enumerate(expected))[begin : begin + 6 * counts[state["step"]]]
            )
        other = numbers_loader(5, StepSizes(4, 1, 9))
        other.load_state(state)
        seen = [row for step in range(state["step"], state["step"] + 5) for row in step_rows([other], step)]
        assert seen == list(enumerate(expected))[begins[state["step"]] :][: len(seen)]


def test_what_is_skipped_is_counted_once() -> None:
    for workers in (0, 2):
        loader = numbers_loader(2, workers=workers)
        for step in range(5):
            loader.micro_batches(step)
        assert loader.errors.counts == {"odd row": 5}


def test_a_state_is_a_few_numbers() -> None:
    """Stops: checkpoints that grow with the corpus or the run."""
    large = [Numbers([[5]] * 10_000, "a"), Numbers([[5]] * 10_000, "b")]
    loader = Loader(Plan(large, row_length=20, window_rows=8), as_read, rows=8)
    sizes = []
    for step in range(40):
        loader.micro_batches(step)
        sizes.append(len(json.dumps(loader.state(step + 1))))
    assert max(sizes) < 600
    assert len(loader._cursors) <= 4


@pytest.mark.parametrize(
    "changes", [{"row_length": 21}, {"seed": 2}, {"window_rows": 5}, {"exponent": 0.7}, {"wait": False}]
)
def test_another_plan_is_refused(changes: dict[str, Any]) -> None:
    state = numbers_loader(3).state(2)
    with pytest.raises(MMGPTError, match="has changed since the checkpoint"):
        numbers_loader(3, **changes).load_state(state)


@pytest.mark.parametrize(
    "change",
    [
        {"cursor": None},
        {"cursor": {"rows": 3}},
        {"row": None},
        {"row": -1},
        {"step": "x"},
        {"cursor": {"row": 0, "window": 0, "epoch": 0, "positions": [0], "served": [0.0]}},
    ],
)
def test_broken_states_are_refused(change: dict[str, Any]) -> None:
    loader = numbers_loader(3)
    with pytest.raises(MMGPTError, match="broken"):
        loader.load_state(loader.state(2) | change)
    state = loader.state(2)
    del state["sources"]
    with pytest.raises(MMGPTError, match="broken"):
        loader.load_state(state)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch raises wherever the signal comes
@pytest.mark.parametrize("how", ["killed", "exit", "error"])
def test_a_worker_that_dies_is_an_error(how: str) -> None:
    """Stops: a run that waits for ever for a process that the system killed for its memory."""

    def load(rows: Sequence[tuple[int, Row]]) -> Loaded:
        if rows[0][0] >= 8:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "exit":
                os._exit(3)
            raise MMGPTError("a row that is out of order")
        return as_read(rows)

    loader = Loader(numbers_plan(), load, rows=2, workers=2)
    message = "a row that is out of order" if how == "error" else "a process that reads the data has died"
    with pytest.raises(MMGPTError, match=message):
        [loader.micro_batches(step) for step in range(9)]
    assert len(loader.micro_batches(0)) == 1  # and the loader is usable


ORPHANS = """
import time
from test_loader import numbers_loader
loader = numbers_loader(2, workers=2)
loader.micro_batches(0)
print(*loader._pool._processes, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_run_that_is_killed(number: int) -> None:
    """Stops: processes that wait for their next rows for ever, and keep their memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", ORPHANS], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.send_signal(number)
    run.wait(timeout=20)
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)


def test_workers_leave_the_random_numbers_alone() -> None:
    """Stops: dropout that depends on when the workers were started."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for workers in (0, 1):
        numbers_loader(2, workers=workers).micro_batches(0)
    assert torch.equal(torch.rand(3), expected)


# ---- with a corpus ----


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_for_any_number_of_workers(data: Path) -> None:
    """Augmented images too; more workers than shards and steps."""
    task = task_of(data, "corpus", "other")
    batches = [batch for step in range(4) for batch in task.micro_batches(step, 1)]
    assert any(batch.image_rows.numel() for batch in batches)
    for workers in (1, 2, 3):
        loader = Loader(task.loader.plan, task.reader, rows=2, workers=workers)
        assert all(map(same, batches, [batch for step in range(4) for batch in loader.micro_batches(step)]))
    assert task.errors.total == 0


def test_ranks_with_a_corpus_and_a_stop(data: Path) -> None:
    """Two ranks go on from one's checkpoint: together they have the same rows, images and targets."""
    whole = task_of(data, rows=4)
    expected = [whole.micro_batches(step, 1)[0] for step in range(4)]
    state = json.loads(json.dumps(whole.data_state(2)))
    for workers in (0, 1):
        ranks = [Loader(whole.loader.plan, whole.reader, rows=2, rank=r, world=2, workers=workers) for r in range(2)]
        for step in range(2, 4):
            found: list[Batch] = []
            for loader in ranks:
                if step == 2:
                    loader.load_state(state)
                found += loader.micro_batches(step)
            assert [row for batch in found for row in batch.ids] == expected[step].ids
            assert torch.equal(torch.cat([b.pixel_values for b in found]), expected[step].pixel_values)
            assert sum(int((b.labels >= 0).sum()) for b in found) == int((expected[step].labels >= 0).sum())


def texts_of_epoch(task: LanguageTask, source: int = 0) -> Counter[str]:
    """The ids of the pieces of an epoch."""
    found: Counter[str] = Counter()
    for row, cursor in task.loader.plan.rows():
        if cursor.epoch:
            return found
        found.update(task.sources[i.source].document(i.unit).id for i in row if i.source == source)
    return found


def test_an_epoch_of_a_corpus_is_all_of_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every character and image once, whatever the blocks of shards."""
    processor = make_tiny()[1]
    written = pages(24, longest=6)
    for block_shards in (1, 2, 100):
        monkeypatch.setattr("mm_gpt.datasets.loading.sources.BLOCK_SHARDS", block_shards)
        source = source_of(data / "corpus", processor)
        found: dict[str, list[tuple[tuple[int, ...], Document]]] = {}
        units = [unit for documents in source.units(3, 0, 0) for unit, _ in documents]
        assert len(set(units)) == len(units) == len(source)
        for unit in units:
            document = source.document(unit)
            found.setdefault(document.id, []).append((unit, document))
        for page in written:
            parts = [s for _, piece in sorted(found[page.id], key=lambda p: p[0]) for s in piece.segments]
            text = "".join(s.text for s in parts if isinstance(s, Text) and not s.is_control)
            said = "".join(s.text for s in page.segments if isinstance(s, Text))
            assert text.replace("\n\n", "") == said
            assert [s for s in parts if isinstance(s, Image)] == page.images
        for start in (1, len(source) // 2, len(source) - 1):
            assert [unit for documents in source.units(3, start, 0) for unit, _ in documents] == units[start:]


def test_fewer_samples_than_ranks_and_workers(tmp_path: Path) -> None:
    """Stops: an error, or a rank without rows, for a corpus of one page."""
    write(tmp_path / "corpus", [Document((Text("A red circle."),), id="one")])
    write(tmp_path / "held-out", pages(1))
    task = task_of(tmp_path)
    for rank in (0, 3):
        loader = Loader(task.loader.plan, task.reader, rows=1, rank=rank, world=4, workers=2)
        assert [loader.micro_batches(step)[0].ids for step in range(3)] == [["one"]] * 3


def test_a_changed_corpus(tmp_path: Path) -> None:
    """Stops: pieces of old pages cut out of new ones of the same size and name; a run that goes on with them."""

    def state_and_text(word: str) -> tuple[dict[str, Any], str, LanguageTask]:
        write(tmp_path / "corpus", [Document((Text(f"{word} circle. " * 40),), id=str(n)) for n in range(3)])
        task = task_of(tmp_path, validation=(SourceConfig(path="corpus"),))
        batch = task.micro_batches(0, 1)[0]
        return task.data_state(1), task.processor.tokenizer.decode(batch.input_ids[0].tolist()), task

    state, text, task = state_and_text("abc")
    task.load_data_state(json.loads(json.dumps(state)))
    assert "abc" in text
    _, text, task = state_and_text("abd")
    assert "abd" in text
    with pytest.raises(MMGPTError, match="has changed since the checkpoint"):
        task.load_data_state(json.loads(json.dumps(state)))


def test_tables_are_made_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: a corpus that is encoded anew by each run."""
    processor = make_tiny()[1]
    first = source_of(data / "corpus", processor, 50)
    monkeypatch.setattr("mm_gpt.datasets.loading.index._make_tables", None)
    again = source_of(data / "corpus", processor, 50)
    assert (len(again), again.tokens, again.images) == (len(first), first.tokens, first.images)
    assert (data / "corpus/.index").is_dir()


def test_held_out_samples_are_not_trained_on(data: Path) -> None:
    task = task_of(data, validation=(), holdout=0.25)
    held = task.held_out[0]
    assert isinstance(held, IndexedSource)
    ids = {held.document(unit).id for documents in held.units(0, 0, 0) for unit, _ in documents}
    trained = set(texts_of_epoch(task))
    assert ids
    assert not ids & trained
    assert len(ids | trained) == 24


served = test_shards.served


def test_a_corpus_at_a_url(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """Read shard by shard, not into memory as other sources at URLs are."""
    folder, url, _ = served
    write(folder / "corpus", pages(6, longest=4))
    write(tmp_path / "held-out", pages(1))
    task = task_of(tmp_path, f"{url}/corpus")
    assert isinstance(task.sources[0].store, Corpus)
    assert len(texts_of_epoch(task)) == 6
    assert task.errors.total == 0


def test_conversations_and_pages_in_one_corpus(tmp_path: Path) -> None:
    """A conversation is one piece; one that does not fit the context is counted; a record has its captions."""
    picture = Image(to_file(make_picture()))
    chat = ({"role": "user", "content": [picture, "What?"]}, {"role": "assistant", "content": "A circle."})
    long = ({"role": "user", "content": "word " * 400},)
    samples = [Conversation("chat", chat), Conversation("long", long), Record("record", picture.source, ("a caption",))]  # type: ignore[arg-type]
    write(tmp_path / "corpus", [*samples, Document((Text("A page."),), id="page")])
    errors = ErrorCounter()
    source = source_of(tmp_path / "corpus", make_tiny()[1], errors=errors)
    documents = [source.document(unit) for documents in source.units(0, 0, 0) for unit, _ in documents]
    assert {document.id for document in documents} == {"chat", "page", "record"}
    assert errors.counts == {"longer than the context": 1}
    answer = [s for d in documents if d.id == "chat" for s in d.segments if isinstance(s, Text) and s.is_target]
    assert [s.text for s in answer] == ["A circle.", "<|im_end|>"]


# ---- what is broken ----


def test_a_page_stands_without_its_broken_image(tmp_path: Path) -> None:
    """Stops: text thrown away with an image, and paragraphs run together where it was."""
    good = to_file(make_picture())
    parts = (Text("Before."), Image(good[:-30]), Text("Between."), Image(good), Text("Behind."))
    write(tmp_path / "corpus", [Document(parts, id="page"), Document((Image(good[:-30]),), id="nothing else")])
    write(tmp_path / "held-out", pages(1))
    for workers in (0, 1):
        task = task_of(tmp_path, row_length=128, rows=1, workers=workers)
        batches = [task.micro_batches(step, 1)[0] for step in range(1)]
        tokens = [id for batch in batches for id in batch.input_ids[0].tolist() if id < task.processor.vocab_size]
        text = task.processor.tokenizer.decode([id for id in tokens if id])
        assert "Before.\n\nBetween." in text
        assert "Behind." in text
        assert sum(len(batch.image_rows) for batch in batches) == 1
        assert task.errors.counts == {"broken image": 2}
        assert "page: " in task.errors.summary()


def test_an_answer_does_not_stand_without_its_image(tmp_path: Path) -> None:
    broken = Image(to_file(make_picture())[:-30])
    chat = ({"role": "user", "content": [broken, "What?"]}, {"role": "assistant", "content": "A circle."})
    write(tmp_path / "corpus", [Conversation("chat", chat), Document((Text("A page."),), id="page")])
    write(tmp_path / "held-out", pages(1))
    task = task_of(tmp_path, row_length=128, rows=1)
    assert task.micro_batches(0, 1)[0].ids == ["page"]
    assert task.errors.counts == {"broken image": 1}


def test_a_broken_image_of_a_record_is_dropped(tmp_path: Path) -> None:
    """Also one that breaks after it was checked, as one behind a URL may."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        make_picture(number).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"a picture {number}")
    write(tmp_path / "held-out", pages(1))
    task = task_of(tmp_path, "pictures", rows=3, row_length=128)
    (tmp_path / "pictures/1.png").write_bytes(b"gone")
    ids = [row for batch in task.micro_batches(0, 1) for row in batch.ids]
    assert set(" ".join(ids).split()) == {"0", "2"}
    assert set(task.errors.counts) == {"broken image"}


def test_broken_images_where_tokens_depend_on_sizes(tmp_path: Path) -> None:
    """Tiled images are measured before they are decoded: a page stands without one that cannot be."""
    write(tmp_path / "corpus", pages(1))
    task = task_of(tmp_path, validation=(SourceConfig(path="corpus"),))
    task.reader.processor = tiled()
    good = Image(to_file(make_picture(0, (64, 32))))
    skipped: list[tuple[str, str]] = []
    page = Document((Text("One."), Image(b"broken"), Text("Two."), good, Text("Three.")), id="page")
    read = task.reader.read(page, skipped)
    assert read is not None
    example, tiles = read
    assert len(example.images) == 1
    assert sum(map(len, tiles)) == 3  # two and the whole
    assert [reason for reason, _ in skipped] == ["broken image"]


def test_broken_images_do_not_end_validation(tmp_path: Path) -> None:
    """Stops: hours of training lost at the first validation."""
    good = to_file(make_picture())
    held = [Document((Text("A circle."), Image(good[:-30]), Text("More.")), id="broken"), *pages(2, longest=3)]
    write(tmp_path / "held-out", held)
    write(tmp_path / "corpus", pages(3))
    task = task_of(tmp_path)
    task.model.eval()
    with torch.no_grad():
        assert 0 < task.validate()["loss"] < 100
    for tar in (tmp_path / "held-out").glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:1024])
    task = task_of(tmp_path)
    with torch.no_grad():
        task.model.eval()
        assert task.validate()["loss"] == 0.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_truncated_shard_is_counted(tmp_path: Path, when: str) -> None:
    """Before a run finds its pieces, and after: training goes on with what is there."""
    folder = write(tmp_path / "corpus", pages(24, longest=6))
    write(tmp_path / "held-out", pages(1))

    def cut() -> None:
        tar = folder / "shard-00001.tar"
        offsets = np.load(index_path(tar))
        tar.write_bytes(tar.read_bytes()[: offsets[-2] + 100])

    if when == "before":
        cut()
    task = task_of(tmp_path)
    cut()
    epoch_rows = sum(1 for _ in itertools.takewhile(lambda r: r[1].epoch == 0, task.loader.plan.rows()))
    loader = Loader(task.loader.plan, task.reader, rows=2, workers=2, errors=task.errors)
    ids: set[str] = set()
    for step in range(-(-epoch_rows // 2)):
        ids |= {id for batch in loader.micro_batches(step) for row in batch.ids for id in row.split()}
    assert len(ids) == 23
    assert set(task.errors.counts) == {"the tar is cut short"}


def test_a_missing_shard_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "corpus", pages(24, longest=6))
    write(tmp_path / "held-out", pages(1))
    (folder / "shard-00001.tar").unlink()
    task = task_of(tmp_path)
    lost = Corpus(folder).shards[1].samples
    assert len(texts_of_epoch(task)) == 24 - lost
    list(itertools.islice(task.loader.plan.rows(), 300))  # several epochs
    assert task.errors.counts == {"missing shard": 1}
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(MMGPTError, match=r"no usable record: .*missing shard"):
        task_of(tmp_path, validation=(SourceConfig(path="held-out"),), row_length=65)


# ---- how full ----


def test_rows_are_full(tmp_path: Path) -> None:
    """97 % of positions hold tokens on a mix of long web documents with images, and of short ones."""
    processor = make_tiny()[1]
    processor.config = dataclasses.replace(processor.config, max_length=2048)
    corpora = [
        write(tmp_path / "long", pages(60, longest=60)),
        write(tmp_path / "short", pages(200, seed=4, longest=5)),
    ]
    sources = [source_of(folder, processor, 512) for folder in corpora]
    plan = Plan(sources, row_length=512)
    tokens, rows = 0, 0
    for row, _ in itertools.takewhile(lambda r: r[1].epoch == 0, plan.rows()):
        tokens, rows = tokens + sum(item.tokens for item in row), rows + 1
    assert rows > 40
    assert tokens / (512 * rows) >= 0.97
    for row, _ in itertools.islice(plan.rows(), 5):  # tokens are those that the batch has
        for item in row:
            assert len(processor(sources[item.source].document(item.unit))) == item.tokens


# ---- ranks ----


def test_ranks_are_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.ranks() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.ranks() == (2, 4)
    for rank, world in (("4", "4"), ("-1", "4"), ("a", "4"), ("0", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(MMGPTError, match="RANK"):
            distributed.ranks()


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: all ranks on the first GPU, which NCCL refuses."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.process_group(torch.device("cuda")):
        assert chosen == [1, "nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(MMGPTError, match="2 ranks on this machine, which has 1 CUDA"),
        distributed.process_group(torch.device("cuda")),
    ):
        pass
