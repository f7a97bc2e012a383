"""Sources as numbered samples, and what planning knows of them: from a table alone, and right to the token."""

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_picture, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pieces import tiled
from webdataset import TarWriter

from mm_gpt.datasets.loading import index
from mm_gpt.datasets.loading.draws import DERIVED_SETS, RecordSampling, choose, draw_documents
from mm_gpt.datasets.loading.index import Measure, PairMeasure, Table, index_tables
from mm_gpt.datasets.loading.loader import Loader
from mm_gpt.datasets.loading.plan import Plan
from mm_gpt.datasets.loading.reader import Reader
from mm_gpt.datasets.loading.sources import IndexedSource, SourceConfig, open_sources
from mm_gpt.datasets.loading.store import TarFolder, open_store, write_array
from mm_gpt.datasets.samples import Conversation, ErrorCounter, QuestionAnswer, Record, Sample
from mm_gpt.document import Concepts, Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.images import to_file
from mm_gpt.processor import Batch, Processor
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training import language
from mm_gpt.training.language import learn_tokenizer

PROCESSOR = make_tiny()[1]
PICTURES = [to_file(make_picture(n, size)) for n, size in enumerate([(40, 30), (96, 32), (32, 64)])]
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}"
)


def vicuna() -> Processor:
    """A template without control tokens around an answer, so that words may grow together over its ends."""
    plain = tiled()
    template = ChatTemplate(VICUNA, special={}, where="a test", guarded=plain.tokenizer.special)
    return Processor(plain.tokenizer, plain.config, vocab_size=plain.vocab_size, template=template)


def source_of(
    location: Path, processor: Processor = PROCESSOR, *, errors: ErrorCounter | None = None, **changes: Any
) -> IndexedSource:
    config, errors = SourceConfig(path=location.name, **changes), errors or ErrorCounter()
    return open_sources([config], [config.open(location.parent, errors)], Measure(processor, 64), errors=errors)[0]


def write_tar(path: Path, count: int, *, first: int = 0) -> Path:
    """Captioned images as others write them."""
    path.parent.mkdir(exist_ok=True)
    with TarWriter(str(path)) as tar:
        for number in range(first, first + count):
            captions = [f"A red circle number {number}.", "Blue ground."][: 1 + number % 2]
            value = {"captions": captions, "qa": [{"question": "How many?", "answer": str(number)}]}
            tar.write({"__key__": f"{number:04d}", "jpg": PICTURES[number % 3], "json": json.dumps(value).encode()})
    return path


def units_of(source: IndexedSource, number: int = 0) -> list[tuple[tuple[int, ...], int]]:
    return [unit for documents in source.units(number, 0, 0) for unit in documents]


# ---- what a plan knows ----


WORDS = st.lists(st.sampled_from(["a ", "red", "Circle", " <|im_end|>", "é", ".", "\n", "7", "image"]), max_size=6)
TEXT = WORDS.map("".join).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXT, TEXT | st.sampled_from(["true", "yes"])), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, max_size=4), PAIRS, st.integers(0, 5), st.sampled_from([0, 1, 2]), st.booleans())
def test_a_plan_knows_the_length_of_what_is_drawn(
    captions: list[str], pairs: list[tuple[str, str]], number: int, which: int, separate: bool
) -> None:
    """Stops: rows longer than planned. Questions that begin alike may share more, and take less than planned."""
    processor = [PROCESSOR, tiled(), vicuna()][which]
    how = RecordSampling(max_captions=3, max_questions=3, augment=True, separate=separate, derived_share=0.5)
    questions = tuple(QuestionAnswer(question, answer) for question, answer in pairs)
    record = Record("r", PICTURES[number % 3], tuple(captions), questions)
    measure = Measure(processor, 10_000, how.max_questions)
    table = measure.table([(0, record)], "s", ErrorCounter())
    if not len(table):
        return
    planned = lengths(table, measure, how, number)
    found = draw_documents(record, random.Random(number), number, processor, how)
    real = [len(processor(document)) for document in found]
    assert len(planned) == len(real)
    for length, wanted, document in zip(planned, real, found, strict=True):
        slack = 0 if which < 2 else 1 + len(document.branches)  # words that grow together with the template
        assert length >= wanted - slack
        is_caption = bool(captions) and document is found[0]
        if which < 2 and (is_caption or separate):
            assert length - wanted <= (0 if is_caption and not separate else 6)


def test_concepts_are_records_of_a_plan(tmp_path: Path) -> None:
    """Without pixels; beside photos in the same tar, and bad ones are named once the table is kept, too."""
    good = {
        "concepts": {"golden retriever": 0.8},
        "captions": ["A dog."],
        "qa": [{"question": "What?", "answer": "dog"}],
    }
    with TarWriter(str(tmp_path / "t.tar")) as tar:
        tar.write({"__key__": "a", "json": json.dumps(good).encode()})
        tar.write({"__key__": "b", "json": json.dumps({**good, "concepts": {"golden retriever": 2}}).encode()})
        tar.write({"__key__": "c", "jpg": PICTURES[0], "json": json.dumps(good).encode()})
    for _ in range(2):
        errors = ErrorCounter()
        source = source_of(tmp_path / "t.tar", errors=errors)
        assert errors.counts == {"a concept's score is not a number from 0 to 1": 1}
        assert source.tables[0].records[:, 0].tolist() == [0, 2]
        units = units_of(source)
        documents = [source.document(unit) for unit, _ in units]
        assert sorted(d.id for d in documents) == ["a", "a", "c", "c"]
        for document, (_, tokens) in zip(documents, units, strict=True):
            assert tokens == len(PROCESSOR(document))
            assert (document.images[0].source == Concepts({"golden retriever": 0.8})) == (document.id == "a")


def test_concepts_in_batches_beside_photos(tmp_path: Path) -> None:
    """Their pixels are blank, with and without augmentation."""
    with TarWriter(str(tmp_path / "t.tar")) as tar:
        values = {"concepts": {"golden retriever": 0.8}, "captions": ["A dog."]}
        tar.write({"__key__": "a", "json": json.dumps(values).encode()})
        tar.write({"__key__": "b", "jpg": PICTURES[0], "json": json.dumps({"captions": ["A circle."]}).encode()})
    source = source_of(tmp_path / "t.tar")
    for augment in (False, True):
        reader = Reader([source], PROCESSOR, augment=augment, seed=0)
        documents = {d.id: d for d in (source.document(unit) for unit, _ in units_of(source))}
        skipped: list[tuple[str, str]] = []
        read = {key: reader.read(d, skipped, iter([(0, 0, 0)])) for key, d in documents.items()}
        assert not skipped
        pixels = {key: found[1][0] for key, found in read.items() if found is not None}
        assert not pixels["a"].any()
        assert pixels["b"].any()
        batch = reader.batch([[found[0]] for found in read.values() if found is not None], list(pixels.values()))
        assert sorted(map(str, batch.image_concepts)) == ["None", "{'golden retriever': 0.8}"]


def test_concepts_are_no_pairs(tmp_path: Path) -> None:
    """Contrastive training needs pixels."""
    errors = ErrorCounter()
    record = Record("a", Concepts({"cat": 0.8}), ("A cat.",))
    assert not len(PairMeasure(PROCESSOR.tokenizer).table([(0, record)], "t.tar", errors))
    assert errors.summary() == "1 record skipped: 1 concepts without an image (t.tar:a)"


def lengths(table: Table, measure: Measure, how: RecordSampling, number: int) -> list[int]:
    source = object.__new__(IndexedSource)
    source.measure, source.sampling, source.seed, source.name = measure, how, 0, "s"
    source._rng = lambda *_: random.Random(number)  # type: ignore[method-assign]
    return source._lengths(table, table.records[0].tolist(), 0, number)


def test_a_draw_is_a_choice_of_numbers() -> None:
    """As many as asked for, none twice; the same for the same numbers; each of them now and then."""
    how = RecordSampling(max_captions=2, max_questions=3, augment=True, derived_share=0.5)
    seen: Counter[int] = Counter()
    for seed in range(200):
        drawn = choose(random.Random(seed), 5, 4, 2, how)
        assert drawn == choose(random.Random(seed), 5, 4, 2, how)
        assert len(set(drawn.captions)) == 2
        assert len(drawn.capitals) == len(drawn.questions) in (3, 5)
        seen.update(drawn.captions)
    assert min(seen.values()) > 40
    assert choose(random.Random(0), 0, 0, 0, how).captions == ()


def test_units_are_planned_without_reading(tmp_path: Path) -> None:
    """Stops: text and pixels touched by the process that plans."""
    source = source_of(write_tar(tmp_path / "a.tar", 7))
    (tmp_path / "a.tar").unlink()
    source.store._open.clear()
    planned = units_of(source)
    assert len(planned) == 14
    assert len({unit for unit, _ in planned}) == 14
    with pytest.raises(MMGPTError):
        source.document(planned[0][0])


# ---- tables ----


def some_samples() -> list[Sample]:
    chat = ({"role": "user", "content": "Say one"}, {"role": "assistant", "content": "one"})
    pages = [Document((Text("A red circle. " * n), Image(PICTURES[0]), Text("Behind.")), id=str(n)) for n in range(20)]
    return [*pages, Conversation("chat", chat), Record("photo", PICTURES[1], ("a caption", "another"))]


def test_tables_come_back(tmp_path: Path) -> None:
    samples = list(enumerate(some_samples()))
    measure = Measure(PROCESSOR, 64)
    whole = measure.table(samples, "s", ErrorCounter())
    parts = [measure.table(samples[at : at + 5], "s", ErrorCounter()) for at in range(0, len(samples), 5)]
    joined = Table.join(parts)
    write_array(tmp_path / "a.npy", joined.pack())
    read = index._load_table(tmp_path / "a.npy")
    assert read is not None
    for field in dataclasses.fields(Table):
        one, other = getattr(whole, field.name), getattr(read, field.name)
        assert np.array_equal(one, other)
        assert other.dtype == np.int32
    assert len(whole.records) == 1
    assert whole.records[0, 2:].tolist() == [32, 96, 0, 2, 0, 0, 0, 0, 0]
    empty = Table.unpack(Table.join([]).pack())
    assert empty is not None
    assert len(empty) == 0


def test_broken_tables_are_made_anew(tmp_path: Path) -> None:
    """Stops: a file that a full disk cut off, which would end every run from then on."""
    path = tmp_path / "a.npy"
    good = Measure(PROCESSOR, 64).table(enumerate(some_samples()), "s", ErrorCounter()).pack()
    write_array(path, good)
    data = path.read_bytes()
    for broken in (b"", data[:20], data[:-4], b"PK\x03\x04", b"\x00" * 200):
        path.write_bytes(broken)
        assert index._load_table(path) is None
    for other in (good.astype(np.int64), good[:-1], good[None], -good, good[:3]):
        np.save(path, other)
        assert index._load_table(path) is None
    assert index._load_table(tmp_path / "none.npy") is None


def test_the_fingerprint_names_all_that_decides_a_table() -> None:
    """Stops: lengths found for one tokenizer, image size or template used with another."""
    config = PROCESSOR.config
    assert config.image is not None
    other = Tokenizer.train(["other text", "than that"] * 4, 300)

    def changed(**values: Any) -> Processor:
        return Processor(PROCESSOR.tokenizer, dataclasses.replace(config, **values), vocab_size=PROCESSOR.vocab_size)

    template = ChatTemplate("{{ messages[0].content }}", special={}, where="a test")
    processors = [
        PROCESSOR,
        changed(tokens_per_image=9),
        changed(max_length=100),
        changed(image=dataclasses.replace(config.image, size=64)),
        Processor(other, config, vocab_size=PROCESSOR.vocab_size),
        Processor(PROCESSOR.tokenizer, config, vocab_size=PROCESSOR.vocab_size, template=template),
    ]
    names = [Measure(processor, 64).fingerprint for processor in processors]
    more = {Measure(PROCESSOR, 65).fingerprint, Measure(PROCESSOR, 64, 8).fingerprint}
    assert len({*names, *more}) == len(names) + 2
    assert names[0] == Measure(make_tiny()[1], 64).fingerprint


def test_an_index_in_several_processes_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started anew, not forked; what is skipped is counted once, by each run that maps the table too."""
    for number in range(2):
        write_tar(tmp_path / f"tars/{number}.tar", 9, first=9 * number)
    with TarWriter(str(tmp_path / "tars/2.tar")) as tar:
        tar.write({"__key__": "bad", "jpg": PICTURES[0], "json": b"{"})
        tar.write({"__key__": "good", "jpg": PICTURES[0], "txt": "a caption"})
    errors = ErrorCounter()
    one = index_tables(open_store(str(tmp_path / "tars"), errors), Measure(PROCESSOR, 64), "tars", errors)
    monkeypatch.setattr(index, "CHUNK", 4)
    again = ErrorCounter()
    several = index_tables(open_store(str(tmp_path / "tars"), again), Measure(PROCESSOR, 65), "tars", again)
    assert [table.pack().tolist() for table in one] == [table.pack().tolist() for table in several]
    assert errors.counts == again.counts == {"bad JSON": 1}
    later = ErrorCounter()
    index_tables(open_store(str(tmp_path / "tars"), later), Measure(PROCESSOR, 65), "tars", later)
    assert later.counts == {"bad JSON": 1}
    assert "2.tar:0" in later.summary()


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Stops: a spawned process that runs the script again, and waits there for its parent's lock for ever."""
    write_tar(tmp_path / "a.tar", 12)
    script = f"""
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1])
from conftest import make_tiny
from mm_gpt.datasets.loading import index
from mm_gpt.datasets.loading.store import open_store
from mm_gpt.datasets.samples import ErrorCounter
index.CHUNK = 2
store = open_store({str(tmp_path / "a.tar")!r}, ErrorCounter())
print(len(index.index_tables(store, index.Measure(make_tiny()[1], 64), "a", ErrorCounter())[0]))
"""
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    results = []
    for start_method in ("spawn", "fork"):
        command = [sys.executable, str(tmp_path / "script.py"), start_method]
        results.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120))
    spawned, forked = results
    assert spawned.returncode == 1
    assert 'lacks if __name__ == "__main__"' in spawned.stderr
    assert forked.stdout == "12\n"


# ---- stores ----


def test_a_tar_of_others_is_read_at_random(tmp_path: Path) -> None:
    """Without a copy of it, and found anew when it has changed."""
    tar = write_tar(tmp_path / "a.tar", 5)
    store = open_store(str(tar), ErrorCounter())
    assert isinstance(store, TarFolder)
    sample = store.shard(0).sample(3)
    assert isinstance(sample, Record)
    assert sample.captions == ("A red circle number 3.", "Blue ground.")
    digest = store.shards[0].digest
    write_tar(tmp_path / "a.tar", 6)
    store = open_store(str(tar), ErrorCounter())
    assert len(store) == 6
    assert store.shards[0].digest != digest


def test_photos_in_files_stay_where_they_are(tmp_path: Path) -> None:
    """Stops: a second copy of every photo on the disk; and an old copy of what has changed."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(PICTURES[number] + bytes(100_000))
        (folder / f"{number}.txt").write_text(f"a photo {number}")
    store = open_store(str(folder), ErrorCounter())
    record = store.shard(0).sample(1)
    assert isinstance(record, Record)
    assert record.image == folder / "1.jpg"
    assert sum(shard.num_bytes for shard in store.shards) < 30_000
    for caption in ("another caption", "a third one", "a fourth one"):
        (folder / "1.txt").write_text(caption)
        store = open_store(str(folder), ErrorCounter())
        changed = store.shard(0).sample(1)
        assert isinstance(changed, Record)
        assert changed.captions == (caption,)
    of_source = Path(store.location).parent
    kept = [path for path in of_source.iterdir() if path.is_dir()]
    assert len(kept) == 2  # a copy for each change of the data would fill the disk
    os.utime(of_source, (0, 0))
    (tmp_path / "text.txt").write_text("Another source.")
    open_store(str(tmp_path / "text.txt"), ErrorCounter())
    assert not of_source.exists()  # nobody has opened it for long


def test_a_shard_of_strangers_names_no_files(tmp_path: Path) -> None:
    """Stops: a corpus from the net that reads files of the machine."""
    tar = tmp_path / "corpus.tar"
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    value = {"image": {"path": str(tmp_path / "secret.png")}, "captions": ["x"], "qa": [], "id": "a"}
    with TarWriter(str(tar)) as writer:
        writer.write({"__key__": "a", "json": json.dumps(value).encode(), "txt": "x"})
    errors = ErrorCounter()
    assert len(source_of(tar, errors=errors, format="captioned")) == 0
    assert errors.counts == {"no image": 1}


def test_rows_of_other_formats_are_kept(tmp_path: Path) -> None:
    """Parquet with images inside: read once, with what could not be read counted each time."""
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": PICTURES[n % 3], "path": None}, "caption": f"photo {n}"} for n in range(4)]
    rows.append({"image": {"bytes": b"", "path": None}, "caption": "none"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for _ in range(2):
        errors = ErrorCounter()
        source = source_of(tmp_path / "rows.parquet", errors=errors)
        assert len(source) == 4
        assert errors.total == 1
        captions = {source.sample(unit[0]).captions[0] for unit, _ in units_of(source)}  # type: ignore[union-attr]
        assert captions == {f"photo {n}" for n in range(4)}


def test_derived_questions_come_from_sets_that_are_planned(tmp_path: Path) -> None:
    """Each pass has the next set; planned and read lengths agree."""
    (tmp_path / "0.jpg").write_bytes(PICTURES[0])
    (tmp_path / "0.txt").write_text("A brown dog runs on the grass.\nA dog with a red ball runs.")
    config = dataclasses.replace(PROCESSOR.config, max_length=4000)
    processor = Processor(PROCESSOR.tokenizer, config, vocab_size=PROCESSOR.vocab_size)
    source = source_of(tmp_path, processor, derived_share=1.0)
    texts = []
    for number in range(DERIVED_SETS + 1):
        for unit, tokens in units_of(source, number):
            document = source.document(unit)
            assert len(processor(document)) <= tokens
            if unit[2] == 1:
                texts.append([s.text for branch in document.branches for s in branch if isinstance(s, Text)])
    assert len(texts) == DERIVED_SETS + 1
    assert len({str(sorted(each)) for each in texts}) > 2


def test_a_tokenizer_is_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: a run that goes on and reads all of its data first; and the tokenizer of what the data was before."""

    def learned() -> Tokenizer:
        return learn_tokenizer([open_store(str(tmp_path / "a.tar"), ErrorCounter())], 400)

    write_tar(tmp_path / "a.tar", 20)
    first = learned()
    with monkeypatch.context() as patched:
        patched.setattr(language, "_texts_to_learn", None)
        again = learned()
    assert again.fingerprint == first.fingerprint
    assert again.encode("A red circle number 7.<|im_end|>") == first.encode("A red circle number 7.<|im_end|>")
    write_tar(tmp_path / "a.tar", 30)
    assert learned().fingerprint != first.fingerprint


# ---- a reader that can be sent ----


def collect(tmp_path: Path, workers: int, start_method: str | None) -> list[Batch]:
    write_tar(tmp_path / "tars/a.tar", 12)
    turns = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": word}] for word in "abcdef"]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    sources = [source_of(tmp_path / "tars"), source_of(tmp_path / "chats.jsonl")]
    plan = Plan(sources, row_length=64, window_rows=4)
    loader = Loader(plan, Reader(sources, PROCESSOR, True, 0), rows=2, workers=workers, start_method=start_method)
    try:
        return [batch for step in range(5) for batch in loader.micro_batches(step)]
    finally:
        loader.close()


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_the_same_batches_however_workers_start(tmp_path: Path, start_method: str) -> None:
    """macOS spawns, Python 3.14 forks from a server: whatever a worker needs must be sent to it."""
    expected = collect(tmp_path, 0, None)
    found = collect(tmp_path, 1, start_method)
    for one, other in zip(expected, found, strict=True):
        assert one.ids == other.ids
        assert (one.input_ids == other.input_ids).all()
        assert (one.pixel_values == other.pixel_values).all()


def test_a_reader_is_small(tmp_path: Path) -> None:
    """Stops: tables, pixels or the model sent to every worker."""
    few, many = (source_of(write_tar(tmp_path / f"{n}/a.tar", n)) for n in (3, 300))
    sizes = [len(pickle.dumps(Reader([source], PROCESSOR, True, 0))) for source in (few, many)]
    assert sizes[1] - sizes[0] < 200
    assert sizes[0] < 20_000


def test_templates_travel() -> None:
    processor = vicuna()
    again = pickle.loads(pickle.dumps(processor))
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}]
    assert again.chat(chat, answer_starts=False) == processor.chat(chat, answer_starts=False)


# ---- settings ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat": -1}, "a: repeat must be 0 or more, not -1"),
        ({"repeat": float("nan")}, "repeat"),
        ({"weight": 0}, "a: weight must be above 0, not 0"),
        ({"derived_share": 1.5}, "a: derived_share must be from 0 to 1, not 1.5"),
        ({"format": "captoned"}, "did you mean 'captioned'"),
        ({"path": ""}, "path is empty"),
    ],
)
def test_settings_of_a_source_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**({"path": "a"} | changes))


def test_a_held_out_share_is_that_share(tmp_path: Path) -> None:
    """0.4 is two of five, over the ends of shards."""
    for number in range(5):
        write_tar(tmp_path / f"tars/{number}.tar", 4, first=4 * number)
    train, held = source_of(tmp_path / "tars").split(0.4)
    assert (len(train), len(held)) == (12, 8)
    numbers = [{unit[0] for unit, _ in units_of(part)} for part in (train, held)]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0] | numbers[1]) == 20
