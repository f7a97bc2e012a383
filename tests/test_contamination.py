"""Contamination: planted test items are found by every method, cut out by GPT-3's rules, and split from the scores."""

import argparse
import io
import json
import pickle
import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_gpt.datasets.contamination.check import Scan, find_hits, save_scan, scan, scan_parallel
from mm_gpt.datasets.contamination.decontaminate import RemoveContamination
from mm_gpt.datasets.contamination.evaluation_index import EvaluationIndex, EvaluationItem, IndexConfig, ngram_length
from mm_gpt.datasets.contamination.overlap import (
    KeyTable,
    SubstringTable,
    composed,
    find_words,
    letters_of,
    to_string,
    window_hashes,
)
from mm_gpt.datasets.contamination.report import markdown, read_report, report, search_contamination
from mm_gpt.datasets.samples import Conversation, QuestionAnswer, Record
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.contamination import evaluation_items
from mm_gpt.eval.harness import add_arguments, evaluate, table
from mm_gpt.eval.harness import run as run_command
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.generation import Answer, GenerationConfig

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("lt", "m", "nd", "p", "rk", "s")]


def prose(seed: int, count: int) -> str:
    """Random words as sentences."""
    chance = random.Random(seed)
    words = [chance.choice(WORDS) for _ in range(count)]
    return " ".join(w.capitalize() + "." if i % 9 == 8 else w for i, w in enumerate(words))


def changed(text: str) -> str:
    """The same words in other case, punctuation and spacing."""
    return "* " + " -- ".join(word.upper().strip(".") for word in text.split())


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> PILImage.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.BICUBIC)


def encoded(image: PILImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def page(*parts: str | bytes, id: str = "page") -> Document:
    segments: list[Segment] = [Text(p) if isinstance(p, str) else Image(p) for p in parts]
    return Document(tuple(segments), id=id)


def index_of(*items: EvaluationItem, **options: Any) -> EvaluationIndex:
    return EvaluationIndex.build({"test": items}, IndexConfig(**options))


# ---- words, hashes, filters ----


@settings(deadline=None)  # the first call makes the table of characters
@given(st.text(alphabet="abZ09 .,'-\n_é", max_size=60))
def test_words_are_runs_of_letters_and_digits(text: str) -> None:
    """Stops: words split or joined wrongly, positions that do not fit the text, hashes that depend on the place."""
    words = find_words(composed(text))
    expected = re.findall(r"[a-z0-9é]+", text.lower())
    assert [text[s:e].lower() for s, e in zip(words.starts, words.ends, strict=True)] == expected
    alone = [find_words(word).hashes[0] for word in expected]
    assert words.hashes.tolist() == [int(h) for h in alone]
    assert len(set(words.hashes.tolist())) == len(set(expected))


def test_same_words_in_other_clothes() -> None:
    """Stops: full-width letters, decomposed accents, final sigma or an emoji hiding a copy."""
    for one, other in (
        ("Café au lait", "CAFE\u0301, au—lait!"),
        ("Hello world 12", "ＨＥＬＬＯ　ｗｏｒｌｄ １２"),
        ("ΟΔΟΣ", "οδος"),
        ("snow man", "snow\U0001f600man"),
    ):
        assert find_words(composed(one)).hashes.tolist() == find_words(composed(other)).hashes.tolist()
    assert len(find_words("一个关于猫的问题")) == 8  # no spaces: each character is a word
    assert len(find_words("हिन्दी भाषा")) == 2  # vowel signs do not end a word
    assert len(find_words("")) == len(find_words(" ... ")) == 0
    assert len(find_words("\ud800 a")) == 1  # a lone surrogate, as broken JSON gives it


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 14))
def test_window_hashes_tell_windows_apart(values: list[int], length: int) -> None:
    """Stops: a window cut short, off by one, or equal to another."""
    hashes = window_hashes(np.array(values, np.uint64), length).tolist()
    windows = [tuple(values[i : i + length]) for i in range(len(values) - length + 1)]
    assert len(hashes) == len(windows)
    assert len(set(zip(hashes, windows, strict=True))) == len(set(hashes)) == len(set(windows))


def test_hashes_never_change() -> None:
    """Stops: a saved index that no longer fits after an update, or in another process."""
    assert window_hashes(find_words("The quick, brown fox").hashes, 3).tolist() == [
        2380079717903642192,
        12330505848291006307,
    ]


@given(st.sets(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
@settings(max_examples=50)
def test_key_table_finds_what_it_holds(keys: set[int], others: list[int]) -> None:
    table = KeyTable(np.array(sorted(keys), np.uint64))
    asked = [*others, *keys]
    places, numbers = table.find(np.array(asked, np.uint64))
    assert [asked[p] for p in places] == [k for k in asked if k in keys]
    assert table.keys[numbers].tolist() == [asked[p] for p in places]


@given(st.lists(st.text("ab", min_size=1, max_size=40), max_size=20, unique=True), st.text("ab", max_size=120))
def test_substrings_equal_python(strings: list[str], text: str) -> None:
    """Stops: a substring missed at the end, hidden behind another with the same beginning, or found wrongly."""
    found = SubstringTable(strings).find(letters_of(text))
    assert found == [number for number, string in enumerate(strings) if string in text]


def test_overlap_equals_exact_sets() -> None:
    """Stops: GPT-2's number differing between the index and plain sets of strings."""
    corpus = [prose(seed, 300) for seed in range(5)]
    tests = [changed(" ".join(corpus[0].split()[20:60])), prose(100, 50), corpus[3] + " " + prose(101, 30)]

    def grams(text: str) -> list[str]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return [" ".join(words[i : i + 8]) for i in range(len(words) - 7)]

    known = {gram for text in corpus for gram in grams(text)}
    asked = [gram for text in tests for gram in grams(text)]
    exact = sum(gram in known for gram in asked) / len(asked)
    assert 0 < exact < 1
    index = index_of(*(EvaluationItem(str(i), (t,)) for i, t in enumerate(tests)))
    values = report(index, scan([page(text) for text in corpus], index))
    assert values["sets"]["test"]["overlap_8grams"] == exact


# ---- the index and the scan ----


@pytest.mark.parametrize(
    ("lengths", "n"), [([], 8), ([3, 4, 5], 8), ([10] * 100, 10), ([50] * 100, 13), ([10] * 6 + [40] * 94, 10)]
)
def test_ngram_length(lengths: list[int], n: int) -> None:
    """GPT-3: the 5th percentile of the lengths, from 8 to 13."""
    assert ngram_length(lengths) == n


def dirty(values: dict[str, Any], method: str, name: str = "test") -> list[str]:
    return values["sets"][name]["methods"][method]["ids"]


def test_each_method_finds_what_it_should() -> None:
    """Stops: copies that hide behind case, punctuation and paragraphs, and strangers that are called copies."""
    long, short = prose(1, 60), "Bark kilp dand gums fark dom."  # 6 words, 23 letters
    items = [
        EvaluationItem("long", (long,)),
        EvaluationItem("short", (short,)),
        EvaluationItem("tiny", ("a dog",)),
        EvaluationItem("other", (prose(2, 60),)),
        EvaluationItem("second text", (prose(3, 40), prose(4, 40))),
    ]
    index = index_of(*items)
    words = long.split()
    corpus = [
        page(prose(10, 50), changed(" ".join(words[:30])), changed(" ".join(words[30:])), prose(11, 50)),
        page(prose(12, 20) + " " + short.upper() + prose(13, 20) + " a dog"),
        Record("photo", b"", captions=(prose(4, 40),)),
        page(" ".join(prose(2, 60).split()[:7])),  # too few words in a row
    ]
    values = report(index, scan(corpus, index))
    for method in ("n-gram", "substring", "any"):
        assert dirty(values, method) == ["long", "short", "second text"], method
    assert dirty(values, "13-gram") == ["long", "second text"]
    assert values["sets"]["test"]["too_short"] == 1
    example = values["sets"]["test"]["examples"]["n-gram"][0]
    assert example["item"] == "long"
    assert example["sample"] == "page"
    assert example["shared"].startswith(changed(" ".join(words[:3])).strip("* "))


def test_every_kind_of_sample_is_searched() -> None:
    """Stops: text in conversations, questions or branches going unseen."""
    text = prose(5, 30)
    half, rest = " ".join(text.split()[:15]), " ".join(text.split()[15:])
    index = index_of(EvaluationItem("a", (text,)))
    branches = Document((Text(prose(6, 5)),), ((Text(prose(7, 9)),), (Text(text),)))
    part = {"type": "text", "text": text}
    for sample in (
        branches,
        Record("r", b"", questions=(QuestionAnswer(half, rest),)),
        Conversation("c", ({"role": "user", "content": text},)),
        Conversation("c", ({"role": "user", "content": [half, Image(b"")]}, {"role": "assistant", "content": rest})),
        Conversation("c", ({"role": "user", "content": [part]},)),
    ):
        hits = find_hits(sample, index)
        assert sum(map(len, hits.grams.values())) > 0
        assert len(hits.strings) == 3
    assert find_hits(Document((Text(""),)), index).grams == {}


def test_images_are_found_again() -> None:
    """Stops: a resized or recompressed test image going unseen; plain areas that all look the same; fetching URLs."""
    items = [EvaluationItem(str(i), (), (encoded(photo(i)),)) for i in range(20)]
    items += [
        EvaluationItem("plain", (), (encoded(PILImage.new("RGB", (50, 50), "red")),)),
        EvaluationItem("broken", (), (b"no",)),
    ]
    index = index_of(*items)
    corpus = [
        page("one", encoded(photo(3).resize((100, 75)), "JPEG", quality=70)),
        page("two", encoded(photo(5)), encoded(photo(99))),
        page("three", encoded(PILImage.new("RGB", (70, 50), "blue")), b"broken"),
        Document((Image("https://example.com/photo.jpg"),)),
    ]
    values = report(index, scan(corpus, index))
    assert dirty(values, "image") == ["3", "5"]
    assert dirty(values, "same file") == ["5"]
    assert values["corpus"] == {"samples": 4, "images": 6, "image not fetched": 1, "broken image": 1}
    assert values["sets"]["test"]["broken_images"] == 1
    assert values["sets"]["test"]["look_alikes"] == 0


def test_sets_of_look_alikes_say_so() -> None:
    """Stops: drawn shapes, all alike to the hash, reported as copies without a word."""
    drawings = []
    for i in range(10):
        picture = photo(1)
        picture.putpixel((i, 0), (0, 0, 0))
        drawings.append(EvaluationItem(str(i), (), (encoded(picture),)))
    index = index_of(*drawings)
    values = report(index, Scan(index))
    assert values["sets"]["test"]["look_alikes"] == 1.0
    assert "100 % of its images look like another" in markdown(values)


def small_corpus() -> tuple[EvaluationIndex, list[Document]]:
    items = [EvaluationItem(str(i), (prose(i, 30),), (encoded(photo(i)),)) for i in range(20)]
    documents = [page(prose(1000 + i, 50), prose(i, 30) if i % 3 == 0 else "", id=f"d{i}") for i in range(60)]
    documents[5] = page("x", encoded(photo(5)), id="image")
    return index_of(*items), documents


def test_shards_and_processes_agree(tmp_path: Path) -> None:
    """Stops: counts lost between shards or processes, and an index that changes on its way to disk or a worker."""
    index, documents = small_corpus()
    whole = report(index, scan(documents, index))
    assert dirty(whole, "any") == ["0", "3", "5", "6", "9", "12", "15", "18"]
    merged = scan(documents[:7], index)
    merged.merge(scan(documents[7:40], index))
    merged.merge(scan(documents[40:], index))
    assert report(index, merged) == whole
    assert report(index, scan_parallel(documents, index, workers=2)) == whole
    index.save(tmp_path)
    for copy in (EvaluationIndex.load(tmp_path), pickle.loads(pickle.dumps(index))):
        assert report(copy, scan(documents, copy)) == whole
    json.dumps(whole, allow_nan=False)


def test_broken_index_is_named(tmp_path: Path) -> None:
    index, _ = small_corpus()
    index.save(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(MMGPTError, match="not an index"):
        EvaluationIndex.load(tmp_path)
    with pytest.raises(MMGPTError, match="not an index"):
        EvaluationIndex.load(tmp_path / "nothing")


def test_mistakes_in_sets_are_named() -> None:
    with pytest.raises(MMGPTError, match="empty: no items"):
        EvaluationIndex.build({"empty": []})
    with pytest.raises(MMGPTError, match="two items are named 'a'"):
        index_of(EvaluationItem("a"), EvaluationItem("a"))
    with pytest.raises(ConfigError, match="max_image_distance"):
        IndexConfig(max_image_distance=40)


def test_report_is_one_table_whatever_pages_say(tmp_path: Path) -> None:
    """Stops: text of a page that breaks the table or becomes markup."""
    text = "<img src=x> | a\n\n# b `c` " + prose(1, 20)
    search_contamination([page(text, id="p|1")], {"s|t": [EvaluationItem("i", (text,))]}, tmp_path)
    table = (tmp_path / "contamination.md").read_text().splitlines()
    assert sum("dirty" in line or line.startswith("#") for line in table) == 0
    assert "<img" not in "".join(table)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table if "s\\|t" in line} == {12, 6}
    assert read_report(tmp_path / "contamination.json")["sets"]["s|t"]["methods"]["any"]["dirty"] == 1


# ---- cutting it out of documents ----


def remover(tmp_path: Path, test: Sequence[EvaluationItem], corpus: Sequence[Document], **options: Any) -> Any:
    index = index_of(*test)
    save_scan(tmp_path / "index", index, scan(corpus, index))
    return RemoveContamination(index_path=str(tmp_path / "index"), **options)


def letters(document: Document) -> str:
    return " ".join(s.text for s in document.segments if isinstance(s, Text))


def test_window_goes_and_the_rest_is_split(tmp_path: Path) -> None:
    """GPT-3: the 13-gram and 200 characters on each side go; here also the rest of a word that this would cut."""
    test = prose(1, 13)
    before, after = prose(2, 120), prose(3, 120)
    document = page(f"{before} {changed(test)} {after}", id="d")
    removed: Counter[str] = Counter()
    stage = remover(tmp_path, [EvaluationItem("t", (test,))], [document])
    first, second = stage.split(document, removed)
    assert [first.id, second.id] == ["d#0", "d#1"]
    left = document.segments[0].text.index("* ") + 2  # type: ignore[union-attr]
    assert before.startswith(letters(first))
    assert left - 200 - 6 <= len(letters(first)) <= left - 200
    assert after.endswith(letters(second))
    assert after.index(letters(second)) in range(198, 210)
    assert removed == {"text: in an evaluation set": 1}
    whole = stage(document, Counter())
    assert whole.id == "d"
    assert whole.segments == (*first.segments, *second.segments)


def test_twelve_words_are_no_collision(tmp_path: Path) -> None:
    """Stops: cutting what is no 13-gram; a document without hits must come out as the same object."""
    test = prose(1, 30)
    document = page(prose(2, 50), " ".join(test.split()[:12]), prose(3, 50))
    stage = remover(tmp_path, [EvaluationItem("t", (test,))], [document])
    assert stage(document, Counter()) is document


def test_short_pieces_go(tmp_path: Path) -> None:
    """GPT-3: pieces under 200 characters are dropped, the others stay."""
    test = prose(1, 13)
    document = page(f"{prose(2, 70)} {test} {prose(3, 120)}")
    stage = remover(tmp_path, [EvaluationItem("t", (test,))], [document], min_piece=250)
    removed: Counter[str] = Counter()
    (piece,) = stage.split(document, removed)
    assert piece.id == "page"
    assert prose(3, 120).endswith(letters(piece))
    assert removed["text: piece under 250 characters"] == 1
    assert stage(page(test, id="alone"), removed) is None
    assert removed["evaluation sets leave nothing"] == 1


@pytest.mark.parametrize(("cuts", "stays"), [(9, True), (10, False)])
def test_more_than_ten_pieces(tmp_path: Path, cuts: int, stays: bool) -> None:
    """GPT-3: a document in 10 pieces stays, in 11 it goes."""
    items = [EvaluationItem(str(i), (prose(i, 13),)) for i in range(cuts)]
    parts = [prose(100, 150)]
    for i in range(cuts):
        parts += [prose(i, 13), prose(101 + i, 150)]
    document = page(*parts)
    removed: Counter[str] = Counter()
    pieces = remover(tmp_path, items, [document]).split(document, removed)
    assert len(pieces) == (cuts + 1 if stays else 0)
    assert removed["evaluation sets leave more than 10 pieces"] == (not stays)


@pytest.mark.parametrize(("count", "is_cut"), [(10, True), (11, False)])
def test_common_phrases_stay(tmp_path: Path, count: int, is_cut: bool) -> None:
    """GPT-3: 13-grams in more than 10 documents are ignored; twice in one document counts once."""
    licence = prose(1, 13)
    corpus = [page(prose(10 + i, 100), licence, licence, prose(50 + i, 100), id=str(i)) for i in range(count)]
    items = [EvaluationItem("t", (licence,))]
    stage = remover(tmp_path, items, corpus)
    assert (stage(corpus[0], Counter()) is not corpus[0]) == is_cut
    values = report(index_of(*items), scan(corpus, index_of(*items)))
    assert dirty(values, "13-gram") == (["t"] if is_cut else [])
    assert dirty(values, "n-gram") == ["t"]


def test_images_stay_with_their_piece(tmp_path: Path) -> None:
    """Stops: an image that moves to another piece, survives beside its test caption, or is a test image itself."""
    test = prose(1, 13)
    a, b, c, d = (encoded(photo(i)) for i in range(4))
    document = page(a, prose(2, 90), b, test, c, prose(3, 90), d, encoded(photo(50).resize((80, 60))))
    items = [EvaluationItem("t", (test,)), EvaluationItem("image", (), (encoded(photo(50)),))]
    removed: Counter[str] = Counter()
    first, second = remover(tmp_path, items, [document]).split(document, removed)
    assert [i.source for i in first.images] == [a]
    assert [i.source for i in second.images] == [d]
    assert removed["image: beside text of an evaluation set"] == 2
    assert removed["image: in an evaluation set"] == 1


def test_images_that_cannot_be_compared_do_not_slip_in(tmp_path: Path) -> None:
    items = [EvaluationItem("image", (prose(1, 20),), (encoded(photo(50)),))]
    document = Document((Text("x"), Image("https://example.com/a.png"), Image(b"broken")), metadata={"url": "u"})
    stage = remover(tmp_path, items, [document])
    removed: Counter[str] = Counter()
    assert stage(document, removed) == replace(document, segments=(Text("x"),))
    assert removed == {"image: cannot be compared with evaluation sets": 2}
    assert replace(stage, check_images=False)(document, removed) is document


def test_branches_go_whole(tmp_path: Path) -> None:
    """Stops: a caption of the test set among the captions of a training photo; half a caption as a target."""
    test = prose(1, 9)
    branches = ((Text(prose(2, 9)),), (Text(changed(test)),))
    document = Document((Image(encoded(photo(1))), Text("A caption:")), branches, id="d")
    stage = remover(tmp_path, [EvaluationItem("t", (test,))], [document])
    removed: Counter[str] = Counter()
    assert stage(document, removed) == replace(document, branches=branches[:1])
    assert removed == {"branch: in an evaluation set": 1}
    assert stage(replace(document, branches=branches[1:]), removed) is None


def test_counts_of_the_corpus_are_asked_for(tmp_path: Path) -> None:
    """Stops: boilerplate cut everywhere because the first phase was forgotten."""
    index_of(EvaluationItem("t", (prose(1, 20),))).save(tmp_path)
    stage = RemoveContamination(index_path=str(tmp_path))
    with pytest.raises(MMGPTError, match="search it first"):
        stage(page(prose(1, 20)), Counter())
    assert replace(stage, ignore_common=False)(page(prose(1, 20)), Counter()) is None
    assert pickle.loads(pickle.dumps(stage)) == stage


# ---- planted contamination, and what it does to a score ----


def answer(text: str) -> Answer:
    return Answer(
        text,
        prompt_tokens=1,
        image_tokens=0,
        completion_tokens=1,
        finish_reason="stop",
        generation=GenerationConfig(),
        logprobs=None,
    )


class Memoriser:
    """Knows the answers to the questions it has seen, and says "no" to everything else."""

    def __init__(self, answers: dict[str, str]):
        self.answers = answers

    def generate(self, documents: Sequence[Document], config: Any) -> list[Answer]:
        answers = []
        for document in documents:
            prompt = "".join(s.text for s in document.segments if isinstance(s, Text) and not s.is_control)
            known = [said for question, said in self.answers.items() if question in prompt]
            answers.append(answer(known[0] if known else "no"))
        return answers


def write_set(path: Path, records: Sequence[tuple[str, bytes, dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, image, about in records:
            for name, data in ((f"{key}.png", image), (f"{key}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_planted_items_are_found_and_their_score_is_higher(
    tmp_path: Path, tiny_model_folder: Path, tiny_assistant: Assistant
) -> None:
    """The whole way: 20 % of a test set planted in a corpus in three guises, all found, clean below dirty."""
    questions = [(f"k{i:03}", f"{prose(i, 11)}?", "yes" if i % 4 else "no") for i in range(60)]
    records = [
        (key, encoded(photo(i)), {"qa": [{"question": q, "answer": a}]}) for i, (key, q, a) in enumerate(questions)
    ]
    tar = write_set(tmp_path / "vqa.tar", records)
    planted = questions[10:22]
    corpus = [page(prose(500 + i, 200), id=f"clean{i}") for i in range(50)]
    for i, (_, question, answer) in enumerate(planted[:8]):
        text = f"{question} {answer}"
        corpus[i] = page(prose(700 + i, 80), text if i % 2 else changed(text), prose(800 + i, 80), id=f"text{i}")
    for i in range(18, 22):
        copy = encoded(photo(i).resize((120, 90)), "JPEG", quality=80)
        corpus[i] = page(prose(900 + i, 50), copy, id=f"image{i}")
    config = EvalConfig(task="vqa", data=(str(tar),), model=str(tiny_model_folder), device="cpu")
    values = search_contamination(corpus, {"vqa": evaluation_items(config)}, tmp_path / "report")
    ids = [f"{key}#0" for key, _, _ in planted]
    assert dirty(values, "any", "vqa") == ids
    assert dirty(values, "n-gram", "vqa") == dirty(values, "substring", "vqa") == ids[:8]
    assert dirty(values, "image", "vqa") == ids[8:]

    tiny_assistant.engine = Memoriser({q: a for _, q, a in planted})  # type: ignore[assignment]
    output = tmp_path / "results.json"
    evaluate(config, output, assistant=tiny_assistant)
    config = replace(config, contamination=str(tmp_path / "report" / "contamination.json"))
    results = evaluate(config, output, assistant=tiny_assistant)  # a finished run is only scored again
    found = results["contamination"]["methods"]["any"]
    assert found["n"] == {"full": 60, "clean": 48, "dirty": 12}
    scores = found["metrics"]["exact match"]
    assert scores["dirty"]["value"] == 1.0
    assert scores["clean"]["value"] == scores["worse_of_full_and_clean"] == pytest.approx(12 / 48)
    assert scores["full"] == results["metrics"]["exact match"]
    assert scores["clean"]["high"] < scores["dirty"]["low"]
    relative = scores["relative_difference"]
    assert relative["value"] == pytest.approx((12 / 48 - 24 / 60) / (24 / 60))
    assert relative["low"] < relative["value"] < relative["high"] < 0
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--task", "vqa", "--data", str(tar), "--model", str(tiny_model_folder), "--device", "cpu"]
    arguments = parser.parse_args([*options, "--contamination", str(config.contamination), "-o", str(output)])
    assert run_command(arguments) == 0
    assert json.loads(output.read_text())["contamination"] == results["contamination"]
    shown = table(results)
    assert "clean by any (n = 48)" in shown
    assert "-37.5 %" in shown
    assert "same file" not in shown


def test_report_of_other_data_is_refused(tmp_path: Path, tiny_model_folder: Path, tiny_assistant: Assistant) -> None:
    """Stops: clean scores by the report of another set whose ids happen to be the same."""
    about = {"qa": [{"question": "is it red?", "answer": "yes"}, {"question": "is it blue?", "answer": "no"}]}
    one = write_set(tmp_path / "one.tar", [("a", encoded(make_picture(1)), about), ("b", encoded(photo(1)), about)])
    other = write_set(tmp_path / "other.tar", [("a", encoded(make_picture(2)), about), ("b", encoded(photo(2)), about)])
    config = EvalConfig(task="vqa", data=(str(one),), model=str(tiny_model_folder), device="cpu", limit=1)
    items = evaluation_items(config)
    assert [item.id for item in items] == ["a#0", "a#1", "b#0", "b#1"]  # all, whatever the limit
    assert items[0].texts == ("is it red? yes",)
    tiny_assistant.engine = Memoriser({})  # type: ignore[assignment]
    sets = {"other": evaluation_items(replace(config, data=(str(other),)))}
    wrong = search_contamination([], sets, tmp_path / "wrong")
    assert wrong["sets"]["other"]["too_short"] == 4
    path = tmp_path / "wrong" / "contamination.json"
    with pytest.raises(MMGPTError, match="none of its sets"):
        evaluate(replace(config, contamination=str(path)), tmp_path / "r.json", assistant=tiny_assistant)
    path.write_text("[]")
    with pytest.raises(MMGPTError, match="not a contamination report"):
        evaluate(replace(config, contamination=str(path)), tmp_path / "r.json", assistant=tiny_assistant)
    search_contamination([], {"one": items}, tmp_path / "right")
    path = tmp_path / "right" / "contamination.json"
    results = evaluate(replace(config, contamination=str(path)), tmp_path / "r.json", assistant=tiny_assistant)
    found = results["contamination"]["methods"]["any"]
    assert found["n"] == {"full": 2, "clean": 2, "dirty": 0}
    assert found["metrics"]["exact match"]["dirty"]["value"] is None
    assert found["metrics"]["exact match"]["relative_difference"]["value"] == 0


def test_captions_and_perplexity_split_as_well(
    tmp_path: Path, tiny_model_folder: Path, tiny_assistant: Assistant
) -> None:
    """Stops: metrics that are no mean of items (BLEU, perplexity) split wrongly; for perplexity, higher is worse."""
    records = [(f"c{i}", encoded(photo(i)), {"captions": [prose(i, 10), prose(100 + i, 10)]}) for i in range(12)]
    tar = write_set(tmp_path / "captions.tar", records)
    config = EvalConfig(task="captioning", data=(str(tar),), model=str(tiny_model_folder), device="cpu")
    corpus = [Record(str(i), b"", captions=(prose(i, 10),)) for i in range(4)]
    search_contamination(corpus, {"captions": evaluation_items(config)}, tmp_path / "report")
    config = replace(config, contamination=str(tmp_path / "report" / "contamination.json"))

    class Captioner:
        def generate(self, documents: Sequence[Document], config: Any) -> list[Answer]:
            sources = [document.images[0].source for document in documents]
            said = [next(i for i, r in enumerate(records) if r[1] == source) for source in sources]
            return [answer(prose(i, 10) if i < 4 else prose(i, 5)) for i in said]

    tiny_assistant.engine = Captioner()  # type: ignore[assignment]
    results = evaluate(config, tmp_path / "captions.json", assistant=tiny_assistant)
    found = results["contamination"]["methods"]["n-gram"]
    assert found["n"] == {"full": 12, "clean": 8, "dirty": 4}
    for name, scores in found["metrics"].items():
        assert scores["clean"]["value"] < scores["full"]["value"] < scores["dirty"]["value"], name
        assert scores["full"]["value"] == pytest.approx(results["metrics"][name]["value"])
        assert scores["relative_difference"]["high"] < 0
    assert found["metrics"]["BLEU-4"]["dirty"]["value"] == pytest.approx(1.0)

    text = tmp_path / "text.txt"
    text.write_text(prose(1, 3000))
    config = EvalConfig(task="perplexity", data=(str(text),), model=str(tiny_model_folder), device="cpu", controls=())
    items = evaluation_items(config)
    search_contamination([page(items[0].texts[0])], {"text": items}, tmp_path / "report")
    config = replace(config, contamination=str(tmp_path / "report" / "contamination.json"))
    results = evaluate(config, tmp_path / "perplexity.json")
    found = results["contamination"]["methods"]["n-gram"]
    assert found["n"]["full"] == len(items)
    assert 1 <= found["n"]["dirty"] < len(items)
    scores = found["metrics"]["perplexity"]
    assert scores["worse_of_full_and_clean"] == max(scores["full"]["value"], scores["clean"]["value"])
    assert to_string(letters_of("A b-1")) == "ab1"
