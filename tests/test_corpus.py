"""Corpora from raw sources: the funnel's numbers, killed builds that go on, sources of every kind, bad images."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_gpt import images as image_module
from mm_gpt.datasets.building import corpus as corpus_module
from mm_gpt.datasets.building import merge, process
from mm_gpt.datasets.building.corpus import CorpusSummary, build_corpus
from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.pipeline import UNKNOWN, Funnel, Step, as_document, language_of
from mm_gpt.datasets.building.process import process_split
from mm_gpt.datasets.building.runner import Runner
from mm_gpt.datasets.building.shards import Corpus, ShardWriter, write_corpus_file
from mm_gpt.datasets.building.splits import find_splits
from mm_gpt.datasets.contamination.evaluation_index import EvaluationItem
from mm_gpt.datasets.contamination.report import search_contamination
from mm_gpt.datasets.samples import Conversation, ErrorCounter, QuestionAnswer, Record, Sample
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.system.processes import EXIT_TERMINATED

pytest.importorskip("trafilatura")
pytest.importorskip("py3langid")

ARTICLES = {
    "harbour": """The old harbour was built when wooden ships still carried salt and timber across the bay. Today only a
few fishing boats leave before sunrise, and they return with mackerel for the market at noon. Visitors walk along the
stone quay, where a lighthouse of white bricks has stood for more than a century. Its keeper retired long ago, but the
lamp still turns every night. Children like to count the seconds between two flashes from their bedroom windows.""",
    "bread": """Good bread needs little more than flour, water, salt and patience. The dough rests overnight in a cool
kitchen, so that the yeast has time to work slowly and give the crumb its flavour. In the morning the baker folds it
twice, shapes a round loaf and lets it rise under a cloth. A hot oven with a bowl of steaming water makes the crust
crackle. Whoever cuts the loaf too early will find it sticky, and should wait another hour.""",
    "owls": """Barn owls hunt above meadows at dusk and find mice by hearing alone. Their faces work like dishes that
lead every rustle to the ears, of which one sits a little higher than the other. Soft feathers at the edges of the wings
let them glide without a sound. Farmers welcome the birds and leave a small opening under the roof, where a pair may
raise five or six chicks in a warm summer. In winters with deep snow many of them starve.""",
    "bridge": """Engineers inspected the railway bridge last week and found rust on several of its rivets. Trains must
slow down to walking speed until the repairs are finished, which the company expects in the spring. The arch was a
record when it opened, and painters needed four years to cover it with red lead. Postcards from that time show crowds in
Sunday clothes on both banks of the river. A museum beside the station keeps the plans and a wooden model.""",
    "chess": """The club meets every Thursday in the back room of the library, and beginners are always welcome. Members
bring their own boards, while clocks and score sheets are lent for free. After an opening lecture of twenty minutes the
pairings are drawn from a hat. Strong players give lessons to the young ones, who often beat them within a year or two.
Last season the second team won promotion on the final day with a rook ending that nobody had believed in.""",
    "garten": """Im Garten hinter dem alten Pfarrhaus wachsen seit vielen Jahren Apfelbäume, deren Früchte erst spät im
Oktober reif werden. Die Nachbarn treffen sich dann an einem Samstag, um gemeinsam zu ernten und Saft zu pressen. Wer
mithilft, darf so viele Flaschen mitnehmen, wie er tragen kann. Zwischen den Bäumen stehen Bienenkörbe, die ein junger
Imker aus dem Dorf betreut. Im Winter schneidet er die Äste zurück und streicht die Stämme mit Kalk.""",
}
PARTS = ("image: ", "text: ", "branch: ", "personal data: ")


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> PILImage.Image:
    """Smooth blobs of colour: no two look alike, and JPEG keeps them."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.BICUBIC)


def encoded(image: PILImage.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def page(article: str, *images: str, head: str = "", extra: str = "") -> str:
    """A page whose sentences stand in paragraphs of two, images after the first of them."""
    sentences = [f"{s.strip().removesuffix('.')}." for s in " ".join(ARTICLES[article].split()).split(". ")]
    first, *others = [f"<p>{' '.join(sentences[at : at + 2])}</p>" for at in range(0, len(sentences), 2)]
    figures = "".join(f'<p><img src="{name}"></p>' for name in images)
    body = f"<h1>About the {article}</h1>{first}{figures}{''.join(others)}{extra}"
    return f"<html><head><title>{article}</title>{head}</head><body><article>{body}</article></body></html>"


@pytest.fixture(autouse=True)
def no_plot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of the funnel takes most of the time of a small build; one test looks at it."""
    if request.node.name != "test_every_step_accounts_for_what_it_removed":
        monkeypatch.setattr(Funnel, "plot", lambda self, path: None)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "pages"
    folder.mkdir()
    for seed in (1, 2, 3, 4):
        (folder / f"photo-{seed}.jpg").write_bytes(encoded(photo(seed), "JPEG"))
    (folder / "banner.png").write_bytes(encoded(photo(9, (120, 40))))
    (folder / "small.png").write_bytes(encoded(photo(5, (16, 16))))
    (folder / "plain.png").write_bytes(encoded(PILImage.new("RGB", (64, 64), "navy")))
    (folder / "broken.png").write_bytes(encoded(photo(6))[:200])
    mail = "<p>Write to harbour.master@example.com for the opening hours of the tower.</p>"
    found = {
        "a": page("harbour", "photo-1.jpg", "photo-2.jpg", extra=mail),
        "b": page("bread", "photo-3.jpg", "small.png", "plain.png", "broken.png", "banner.png"),
        "c": page("harbour", "photo-1.jpg", "photo-2.jpg", extra=mail),
        "d": page("owls"),
        "e": page("owls").replace("mice by hearing", "voles by hearing"),
        "f": page("garten", "banner.png"),
        "g": page("bridge", "photo-4.jpg", head='<meta name="robots" content="noai">'),
        "h": page("chess", "banner.png", "photo-4.jpg"),
        "i": "<html><body></body></html>",
    }
    for name, html in found.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return folder


def build(source: Path | str | list[str], out: Path, *, workers: int = 1, **options: Any) -> CorpusSummary:
    known = {"format", "images"}
    others = {key: value for key, value in options.items() if key in known}
    config = CorpusConfig(**{key: value for key, value in options.items() if key not in known})
    sources = source if isinstance(source, list) else [str(source)]
    return build_corpus(sources, out, config, runner=Runner(workers, progress=False), **others)


def samples_of(out: Path) -> list[Sample]:
    errors = ErrorCounter()
    found = list(Corpus(out).samples(errors))
    assert not errors.total
    return found


def text_of(sample: Sample) -> str:
    return "\n".join(s.text for s in as_document(sample).segments if isinstance(s, Text))


def files_of(out: Path) -> dict[str, str]:
    """Every file of a corpus by its bytes."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_accounts(funnel: Funnel) -> None:
    """At each step, what came is what is left and what was removed; and what is left comes to the next step."""
    for name in funnel.steps:
        for step in [*funnel.steps[name].values(), funnel.total(name)]:
            documents = sum(n for reason, n in step.removed.items() if not reason.startswith(PARTS))
            images = sum(n for reason, n in step.removed.items() if reason.startswith("image: "))
            assert step.came.documents == step.left.documents + documents, name
            assert step.came.images == step.left.images + images, name
            assert min(step.removed.values(), default=1) > 0, name


# ---- The funnel ----


def test_every_step_accounts_for_what_it_removed(pages: Path, tmp_path: Path) -> None:
    """The counts of a small folder, worked out by hand. Images once were counted as documents that cannot be read."""
    out = tmp_path / "corpus"
    summary = build(pages, out, image_documents=2)
    funnel = summary.funnel
    check_accounts(funnel)
    expected = {
        # documents and images that are left, and what went
        "read": (7, 12, {"opt-out: noai": 1, "no main text": 1}),
        "language": (7, 12, {}),
        "image URLs": (7, 12, {}),
        "paragraphs": (7, 12, {}),
        "repeated sentences": (7, 12, {}),
        "documents": (7, 12, {}),
        "personal data": (7, 12, {"personal data: e-mail": 2}),
        "fetch images": (7, 11, {"image: missing or broken": 1}),
        "images": (7, 9, {"image: too small": 1, "image: single colour": 1}),
        "store": (7, 9, {}),
        "duplicates": (5, 7, {"duplicate": 1, "near duplicate": 1, "image: went with its document": 2}),
        "repeated images": (5, 4, {"image: in too many documents": 3}),
        "written": (5, 4, {}),
    }
    found = {}
    for name in funnel.steps:
        step = funnel.total(name)
        found[name] = (step.left.documents, step.left.images, dict(step.removed))
    assert found == expected
    assert list(found) == list(expected)
    for before, after in zip(list(funnel.steps), list(funnel.steps)[1:], strict=False):
        assert funnel.total(before).left == funnel.total(after).came
    assert {language: step.left.documents for language, step in funnel.steps["written"].items()} == {"en": 4, "de": 1}
    assert (summary.documents, summary.images, summary.shards) == (5, 4, 1)
    assert summary.errors.counts == {"opt-out: noai": 1, "no main text": 1, "image missing or broken": 1}

    assert Funnel.from_json(json.loads((out / "funnel.json").read_text())).to_json() == funnel.to_json()
    table = (out / "funnel.md").read_text()
    assert table == funnel.markdown()
    assert "| duplicates | 7 | 5 | 9 | 7 |" in table
    assert "| de | 1 | 0 |" in table
    with PILImage.open(out / "funnel.png") as plot:
        assert plot.width > 500

    documents = samples_of(out)
    assert [document.id for document in documents if isinstance(document, Document)] == [
        "a.html", "b.html", "d.html", "f.html", "h.html",
    ]  # fmt: skip
    harbour = documents[0]
    assert isinstance(harbour, Document)
    assert [type(segment) for segment in harbour.segments] == [Text, Text, Image, Image, Text, Text, Text]
    assert "Write to <EMAIL> for" in text_of(harbour)
    assert harbour.images[0].source == (pages / "photo-1.jpg").read_bytes(), "a small image stays byte for byte"
    assert harbour.metadata["language"] == "en"
    about = json.loads((out / "corpus.json").read_text())
    assert about["counts"] == {"documents": 5, "images": 4, "characters": 2319}
    assert set(about["languages"]) == {"de", "en"}
    assert not (out / ".build").exists()


def test_a_stage_that_drops_a_document_takes_its_images_along() -> None:
    """Else images would vanish from the funnel between two lines of it."""

    @dataclasses.dataclass(frozen=True)
    class Drop:
        name: str = "drop"

        def __call__(self, document: Document, removed: Any) -> Document | None:
            removed["image: one"] += 1
            removed["why"] += 1
            return None

    funnel = Funnel(["first", "drop"])
    funnel.run(Drop(), Document((Image(b"1"), Text("x"), Image(b"2"), Image(b"3")), metadata={"language": "de-AT"}))
    assert funnel.total("drop").removed == {"image: one": 1, "why": 1, "image: went with its document": 2}
    assert list(funnel.steps["drop"]) == ["de"]
    check_accounts(funnel)
    assert list(funnel.to_json()) == ["drop"], "steps that nothing came to are not shown"
    assert "first" not in funnel.markdown()


def test_languages_of_sources_cannot_grow_the_funnel() -> None:
    """A hostile source may name another language for each document."""
    names = ["en", "pt-BR", "deutsch", "", "x" * 9, 7, None, ["en"], "zh_Hans"]
    found = [language_of(Document((), metadata={"language": name})) for name in names]
    assert found == ["en", "pt", UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, "zh"]


@pytest.mark.parametrize("filters", ["obelics", "kosmos"])
def test_published_filters_account_too(pages: Path, tmp_path: Path, filters: str) -> None:
    """They check some rules twice, which once fell into one line of the funnel."""
    config = CorpusConfig(filters=filters)  # type: ignore[arg-type]
    assert len(set(config.steps())) == len(config.steps())
    for seed in (1, 2):
        (pages / f"large-{seed}.png").write_bytes(encoded(photo(70 + seed, (220, 180))))
    (pages / "z.html").write_text(page("bridge", "large-1.png", "large-2.png"))
    summary = build(pages, tmp_path / "corpus", filters=filters)
    check_accounts(summary.funnel)
    assert "z.html" in [as_document(sample).id for sample in samples_of(tmp_path / "corpus")]


def test_settings_of_a_build(pages: Path, tmp_path: Path) -> None:
    """Opt-outs, languages, near duplicates, frequent images and the number of images can be set."""
    summary = build(
        pages, tmp_path / "one", opt_out=False, near_duplicates=None, image_documents=None, max_images=1, keep="longest"
    )
    check_accounts(summary.funnel)
    kept = {sample.id: len(sample.images) for sample in samples_of(tmp_path / "one") if isinstance(sample, Document)}
    assert kept == {"a.html": 1, "b.html": 1, "d.html": 0, "e.html": 0, "f.html": 1, "g.html": 1, "h.html": 1}
    assert summary.funnel.total("image limit").removed == {"image: over the document's limit": 4}

    summary = build(pages, tmp_path / "two", languages=("de",), near_duplicates=1.0)
    assert [text_of(sample)[:16] for sample in samples_of(tmp_path / "two")] == ["About the garten"]
    assert summary.funnel.total("language").removed["other language"] == 6
    check_accounts(summary.funnel)

    with pytest.raises(MMGPTError, match="unknown language 'xx'"):
        build(pages, tmp_path / "three", languages=("xx",))
    build(pages, tmp_path / "three", languages=("de",))  # nothing was made yet: a typo costs nothing


def test_images_of_dropped_copies_do_not_count(tmp_path: Path) -> None:
    """Twelve mirrors of a page are one page: its photo once went as being in too many documents."""
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "photo.png").write_bytes(encoded(photo(1)))
    for number in range(5):
        (folder / f"{number}.html").write_text(page("owls", "photo.png"))
    summary = build(folder, tmp_path / "corpus", image_documents=2)
    assert (summary.documents, summary.images) == (1, 1)
    check_accounts(summary.funnel)


# ---- What is refused ----


def test_refusals(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that names what is wrong, before anything is made."""
    out = tmp_path / "corpus"
    with pytest.raises(MMGPTError, match="nowhere: no such file"):
        build(tmp_path / "nowhere", out)
    with pytest.raises(MMGPTError, match="unknown format 'page'; did you mean 'pages'"):
        build(pages, out, format="page")
    with pytest.raises(MMGPTError, match=r"no \.warc file, as warc has"):
        build(pages, out, format="warc")
    assert not out.exists()
    for name in ("near_duplicates", "image_side", "max_images", "image_documents", "shard_mb"):
        with pytest.raises(ConfigError, match=name):
            CorpusConfig(**{name: 0})
    with pytest.raises(ConfigError, match="workers"):
        Runner(0)

    (tmp_path / "file").write_text("x")
    with pytest.raises(MMGPTError, match="cannot be written"):
        build(pages, tmp_path / "file" / "corpus")
    with pytest.raises(MMGPTError, match="cannot be written"):
        build(pages, tmp_path / "file")
    with pytest.raises(MMGPTError, match="is not empty"):
        build(pages, pages)  # shards among the sources

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(process, "write_fingerprints", full)
        with pytest.raises(MMGPTError, match="No space left"):
            build(pages, out)
    build(pages, out, workers=1)
    with pytest.raises(MMGPTError, match="already holds a corpus"):
        build(pages, out)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    """A corpus without documents is no corpus; and other settings may be tried at once... after removing the build."""
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.html").write_text(page("owls", head='<meta name="robots" content="noai">'))
    (folder / "b.html").write_text("")
    with pytest.raises(MMGPTError, match=r"no document is left \(.*opt-out: noai: 1"):
        build(folder, tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    with pytest.raises(MMGPTError, match=r"other settings: repeat those, or remove .*\.build"):
        build(folder, tmp_path / "corpus", opt_out=False)


def test_a_broken_file_does_not_stop_the_others(tmp_path: Path) -> None:
    """A corpus of a thousand files may hold one that was cut off; it is counted, by name."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_obelics(folder / "1.parquet", ["bread"])
    whole = (folder / "1.parquet").read_bytes()
    (folder / "2.parquet").write_bytes(whole[: len(whole) // 2])
    write_obelics(folder / "3.parquet", ["owls"])
    summary = build(folder, tmp_path / "corpus", image_documents=None)
    assert summary.documents == 2
    assert summary.errors.counts == {"unreadable file": 1, "image missing or broken": 2}
    assert "2.parquet" in summary.errors.examples["unreadable file"][0]
    assert summary.funnel.total("read").removed == {"unreadable file": 1}
    check_accounts(summary.funnel)


def test_a_missing_package_stops_the_build(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missing for every file: to count them as unreadable would make a corpus without web pages."""
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(MMGPTError, match="trafilatura is not installed; in the folder of the checkout"):
        build(pages, tmp_path / "corpus")


# ---- Sources of every kind ----


def write_obelics(path: Path, articles: list[str]) -> None:
    """Rows as OBELICS has them: an image as data, one that is a file here and gone, and text."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for seed, article in enumerate(articles):
        texts = [" ".join(ARTICLES[article].split()), None, None]
        images = [None, data_url(photo(20 + seed)), data_url(photo(6))[:300]]
        metadata = json.dumps([None, {"document_url": "https://example.com"}, None])
        rows.append({"images": images, "texts": texts, "metadata": metadata, "general_metadata": "{}"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def data_url(image: PILImage.Image) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"


def write_tar(path: Path, records: list[tuple[str, bytes, str]]) -> None:
    """As img2dataset writes them."""
    with tarfile.open(path, "w") as tar:
        for key, image, caption in records:
            about = json.dumps({"caption": caption, "url": f"https://example.com/{key}", "status": "success"})
            for suffix, data in (("jpg", image), ("txt", caption.encode()), ("json", about.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_sources_of_all_kinds(pages: Path, tmp_path: Path) -> None:
    """Documents, records and conversations come into one corpus as what they are; an image that is gone takes its
    record along, and is counted."""
    write_obelics(tmp_path / "obelics.parquet", ["bridge"])
    chats = tmp_path / "chats"
    chats.mkdir()
    (chats / "one.jpg").write_bytes(encoded(photo(30), "JPEG"))
    (chats / "broken.jpg").write_bytes(encoded(photo(31), "JPEG")[:300])
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Blobs of colour."}]
    rows = [{"id": name, "image": f"{name}.jpg", "conversations": turns} for name in ("one", "broken")]
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
    (chats / "llava.json").write_text(json.dumps(rows))
    coco = tmp_path / "coco"
    coco.mkdir()
    (coco / "7.jpg").write_bytes(encoded(photo(32), "JPEG"))
    (coco / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "7.jpg"}],
                "annotations": [{"id": n, "image_id": 7, "caption": f"Caption {n}."} for n in range(3)],
            }
        )
    )
    write_tar(tmp_path / "00000.tar", [("000", encoded(photo(33), "JPEG"), "A photo."), ("001", b"no image", "None.")])
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "note.txt").write_text("The ferry leaves at nine in the morning and comes back at five.")
    sources = [
        tmp_path / "obelics.parquet",
        chats / "llava.json",
        coco / "captions.json",
        tmp_path / "00000.tar",
        texts,
    ]
    summary = build([*map(str, sources), str(pages)], tmp_path / "corpus")
    check_accounts(summary.funnel)
    assert list(summary.funnel.steps)[-1] == "written", "records come before documents; the order of steps stays"
    assert list(summary.funnel.steps)[:2] == ["read", "language"]
    assert summary.funnel.total("fetch images").removed == {
        "image: missing or broken": 2,  # in the parquet, and broken.png of the pages
        "image missing or broken": 2,
        "image: went with its document": 2,
    }
    samples = samples_of(tmp_path / "corpus")
    kinds = [type(sample).__name__ for sample in samples]
    assert kinds == ["Document", "Conversation", "Conversation", "Record", "Record", *["Document"] * 6]
    bridge, one, text, record, captioned, note = samples[:6]
    assert isinstance(bridge, Document)
    assert [type(segment) for segment in bridge.segments] == [Text, Image]
    assert isinstance(one, Conversation)
    assert [turn["role"] for turn in one.messages] == ["user", "assistant"]
    picture, question = one.messages[0]["content"]
    assert isinstance(picture, Image)
    assert picture.source == (chats / "one.jpg").read_bytes()
    assert "What is it?" in question
    assert isinstance(text, Conversation)
    assert text_of(text) == "Hi\nHello."
    assert isinstance(record, Record)
    assert record.captions == ("Caption 0.", "Caption 1.", "Caption 2.")
    assert isinstance(captioned, Record)
    assert captioned.captions == ("A photo.",)
    assert captioned.metadata["url"] == "https://example.com/000"
    assert text_of(note) == "The ferry leaves at nine in the morning and comes back at five."

    again = build(str(tmp_path / "corpus"), tmp_path / "again", filters="none")
    assert again.documents == summary.documents, "a corpus is a source as well"
    assert samples_of(tmp_path / "again") == samples


def test_parts_of_sources(pages: Path, tmp_path: Path) -> None:
    """Each file of rows and each tar is a part of its own, also behind a glob: else one process reads them all."""
    for number in range(3):
        write_tar(tmp_path / f"0000{number}.tar", [("000", encoded(photo(number), "JPEG"), f"Photo {number}.")])
        write_obelics(tmp_path / f"{number}.parquet", ["owls"])
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(70):
        (texts / f"{number}.txt").write_text(f"Text {number}")
    sources = [tmp_path / "*.tar", tmp_path / "{0..2}.parquet", texts, pages, tmp_path / "00001.tar"]
    splits = find_splits([str(source) for source in sources])
    assert [split.format for split in splits] == [
        *["captioned"] * 3, *["rows"] * 3, "text", "text", "pages", "captioned",
    ]  # fmt: skip
    assert [len(split.files) for split in splits] == [1, 1, 1, 1, 1, 1, 64, 6, 9, 1]
    assert [split.number for split in splits] == list(range(10))


def test_files_that_no_reader_takes_are_in_the_last_line(tmp_path: Path) -> None:
    """Also where each file is a part of its own."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "The ferry leaves at nine in the morning."}))
    (folder / "film.mp4").write_bytes(b"x")
    summary = build(str(folder), tmp_path / "corpus", filters="none")
    assert summary.errors.counts == {"file that is not read (.mp4)": 1}


def test_near_duplicates_with_other_pictures_stay(tmp_path: Path) -> None:
    """Made conversations ask the same of every picture; only the picture differs."""
    chats = tmp_path / "chats"
    chats.mkdir()
    words = " ".join(ARTICLES["owls"].split())
    turns = [{"from": "human", "value": f"<image>\n{words}"}, {"from": "gpt", "value": words}]
    for seed in range(2):
        (chats / f"{seed}.png").write_bytes(encoded(photo(40 + seed)))
    rows = [{"id": str(n), "image": f"{n % 2}.png", "conversations": turns} for n in range(3)]
    (chats / "llava.json").write_text(json.dumps(rows))
    summary = build(chats / "llava.json", tmp_path / "corpus")
    assert summary.documents == 2
    assert summary.funnel.total("duplicates").removed == {"duplicate": 1, "image: went with its document": 1}


def test_one_image_in_several_turns(tmp_path: Path) -> None:
    """The images of a conversation are put back by their places: one object in two turns once shifted the others."""
    one, two = Image(encoded(photo(1))), Image(encoded(photo(2)))
    messages = (
        {"role": "user", "content": [one, "And this?"]},
        {"role": "user", "content": [one, two, "Which?"]},
        {"role": "assistant", "content": "The second."},
    )
    folder = tmp_path / "source"
    writer = ShardWriter(folder)
    writer.add(Conversation("chat", messages))
    writer.add(Document((one, Text("A picture that comes twice in the same document."), one, two), id="page"))
    write_corpus_file(folder, writer.close(), {})
    build(folder, tmp_path / "corpus", filters="none", near_duplicates=None)
    chat, document = samples_of(tmp_path / "corpus")
    assert isinstance(chat, Conversation)
    found = [part.source for turn in chat.messages for part in turn["content"] if isinstance(part, Image)]
    assert found == [one.source, one.source, two.source]
    assert isinstance(document, Document)
    assert [image.source for image in document.images] == [one.source, one.source, two.source]


def test_file_names_and_text_that_are_no_unicode(tmp_path: Path) -> None:
    """Names on old disks are Latin-1, and JSON can spell half a character: both are counted, neither stops a build."""
    folder = tmp_path / "texts"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("A cup of coffee costs two euros here, and cake is one more.")
    rows = [{"text": "Half a character \ud800 in the middle of a sentence.", "id": "\udfff"}, {"text": "Fine words."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = build([str(folder), str(tmp_path / "rows.jsonl")], tmp_path / "corpus", filters="none")
    check_accounts(summary.funnel)
    assert summary.errors.counts == {"text is not Unicode": 2}
    assert [text_of(sample) for sample in samples_of(tmp_path / "corpus")] == ["Fine words."]


# ---- Images ----


def test_large_images_shrink_and_formats_are_those_of_shards(tmp_path: Path) -> None:
    """Shards hold JPEG, PNG and WEBP; a GIF or BMP is kept as a PNG, and a photo never becomes a huge PNG."""
    folder = tmp_path / "pages"
    folder.mkdir()
    turned = photo(5, (300, 200))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    turned.save(out, "JPEG", exif=exif)
    made = {
        "large.jpg": encoded(photo(1, (900, 300)), "JPEG"),
        "large.webp": encoded(photo(2, (300, 600)), "WEBP"),
        "some.gif": encoded(photo(3), "GIF"),
        "some.bmp": encoded(photo(4), "BMP"),
        "turned.jpg": out.getvalue(),
        "small.png": encoded(photo(6)),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    (folder / "a.html").write_text(page("owls", *made))
    build(folder, tmp_path / "corpus", image_side=200)
    document = samples_of(tmp_path / "corpus")[0]
    assert isinstance(document, Document)
    found = [(image_module.image_format(image.source), image.size()) for image in document.images]  # type: ignore[arg-type]
    assert found == [
        ("jpg", (67, 200)), ("webp", (200, 100)), ("png", (64, 96)), ("png", (64, 96)), ("jpg", (200, 133)),
        ("png", (64, 96)),
    ]  # fmt: skip
    assert document.images[-1].source == made["small.png"]

    build(folder, tmp_path / "whole", image_side=None)
    document = samples_of(tmp_path / "whole")[0]
    assert isinstance(document, Document)
    assert [image.source for image in document.images][:2] == [made["large.jpg"], made["large.webp"]]


class Server(BaseHTTPRequestHandler):
    """Good, missing, endless and dying images."""

    good = encoded(photo(50))
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/gone.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.good)))
        self.end_headers()
        if self.path == "/good.png":
            self.wfile.write(self.good)
        elif self.path == "/dies.png":
            self.wfile.write(self.good[:100])
        elif self.path == "/page.png":
            self.wfile.write(b"<html>".ljust(len(self.good)))
        else:  # a byte now and then
            try:
                for at in range(200):
                    self.wfile.write(self.good[at : at + 1])
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked.clear()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_images_from_the_web(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server does to us is counted and takes a bounded time; the others stay."""
    folder = tmp_path / "pages"
    folder.mkdir()
    names = [f"{server}/{name}.png" for name in ("slow", "good", "gone", "dies", "page", "slow2")]
    (folder / "a.html").write_text(page("owls", *names))
    limits = image_module.ImageLimits(timeout_s=1, allow_private_addresses=True)
    monkeypatch.setattr(process, "image_bytes", lambda source: image_module.image_bytes(source, limits=limits))
    start = time.monotonic()
    summary = build(folder, tmp_path / "corpus")
    assert time.monotonic() - start < 15
    assert summary.images == 1
    assert summary.errors.counts == {"image missing or broken": 5}
    assert summary.funnel.total("fetch images").removed == {"image: missing or broken": 5}
    check_accounts(summary.funnel)
    document = samples_of(tmp_path / "corpus")[0]
    assert isinstance(document, Document)
    assert document.images[0].source == Server.good


def test_no_page_reaches_into_our_network(server: str, tmp_path: Path) -> None:
    """A page may name any address, that of the router too. And `fetch=false` asks nobody."""
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.html").write_text(page("owls", f"{server}/good.png"))
    summary = build(folder, tmp_path / "corpus")
    assert (summary.documents, summary.images) == (1, 0)
    assert "not a public address" in summary.errors.examples["image missing or broken"][0]
    summary = build(folder, tmp_path / "other", fetch=False)
    assert (summary.documents, summary.images) == (1, 0)
    assert "not fetched" in summary.errors.examples["image missing or broken"][0]
    assert Server.asked == []


# ---- Evaluation sets ----


def test_evaluation_sets_are_cut_out(pages: Path, tmp_path: Path) -> None:
    """Text from a document, with what stands around it; a picture from it; and records that share either, whole."""
    folder = tmp_path / "long"
    folder.mkdir()
    secret = (
        "Seventeen purple elephants waltzed slowly across the frozen parliament square while tired clockmakers sang."
    )
    before, after = (f"<p>{' '.join(ARTICLES[name].split())}</p>" for name in ("bread", "chess"))
    (folder / "photo.png").write_bytes(encoded(photo(1)))
    body = f'{before}<p>{secret}</p>{after}<p><img src="photo.png"></p>{before.replace("bread", "cake")}'
    (folder / "a.html").write_text(f"<html><body><article><h1>Long</h1>{body}</article></body></html>")
    write_tar(
        tmp_path / "records.tar",
        [
            ("000", encoded(photo(2), "JPEG"), secret),
            ("001", encoded(photo(1), "JPEG"), "The photo of the set."),
            ("002", encoded(photo(3), "JPEG"), "Neither."),
        ],
    )
    sources = [str(folder), str(tmp_path / "records.tar")]
    item = EvaluationItem("1", (secret,), (encoded(photo(1)),))
    search_contamination(iter(()), {"set": [item]}, tmp_path / "found")
    plain = build(sources, tmp_path / "plain", contamination=None)
    assert plain.documents == 4
    summary = build(sources, tmp_path / "clean", contamination=str(tmp_path / "found" / "index"))
    check_accounts(summary.funnel)
    samples = samples_of(tmp_path / "clean")
    assert [type(sample) for sample in samples] == [Document, Record]
    assert "elephants" not in text_of(samples[0])
    assert "cool kitchen" in text_of(samples[0]), "what is far from the sentence stays"
    assert not as_document(samples[0]).images
    assert text_of(samples[1]) == "Neither."
    removed = summary.funnel.total("contamination").removed
    assert removed["in an evaluation set"] == 2
    assert removed["text: in an evaluation set"] == 1
    assert removed["image: in an evaluation set"] == 1


# ---- Killed, continued, and in parallel ----

SLOW = """
import sys, time
from mm_gpt.commands.cli import main
from mm_gpt.datasets.building import merge, process

original = getattr({module}, "{name}")


def slow(*arguments):
    time.sleep(0.4)
    return original(*arguments)


setattr({module}, "{name}", slow)
if __name__ == "__main__":
    settings = ["filters=none", "image_side=none", "shard_mb=1", "--workers", "{workers}"]
    sys.exit(main(["corpus", "build", *sys.argv[2:], *settings, "--out", sys.argv[1]]))
"""
OPTIONS: dict[str, Any] = {"filters": "none", "image_side": None, "shard_mb": 1}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five parts, each of more than a shard: noise does not compress."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(5):
        records = []
        for at in range(3):
            noise = np.random.default_rng(10 * number + at).integers(0, 256, (400, 400, 3), dtype=np.uint8)
            records.append((f"{at:03d}", encoded(PILImage.fromarray(noise)), f"Noise {at} of {number}."))
        records.append(("003", encoded(photo(60), "JPEG"), "The same photo in all of them."))
        write_tar(folder / f"{number}.tar", records)
    (folder / "text").mkdir()
    (folder / "text" / "note.txt").write_text("A text of its own.")
    return [str(folder / "*.tar"), str(folder / "text")]


@pytest.fixture(scope="module")
def uninterrupted(tars: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "corpus"
    summary = build(tars, out, **OPTIONS)
    assert (summary.shards, summary.documents) == (11, 17)
    return files_of(out)


def kill_when(ready: Any, name: str, workers: int, out: Path, sources: list[str], how: signal.Signals) -> int:
    """Run a slow build, send it a signal as soon as `ready()`, and wait for all of its processes; its exit code.

    Killed, it has no chance to clean up; its workers are not told.
    """
    script = out.with_name("slow.py")
    script.write_text(SLOW.format(module="process" if name == "_prepared" else "merge", name=name, workers=workers))
    process = subprocess.Popen([sys.executable, str(script), str(out), *sources], start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, "the build ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(how)
        code = process.wait()
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return code
        assert time.monotonic() < until, "workers are left"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "prefix", "workers", "how", "code"),
    [
        ("_prepared", "split", 2, signal.SIGKILL, -signal.SIGKILL),
        ("_prepared", "split", 2, signal.SIGTERM, EXIT_TERMINATED),
        ("_without_images", "group", 1, signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_killed_build_goes_on(
    name: str,
    prefix: str,
    workers: int,
    how: signal.Signals,
    code: int,
    tars: list[str],
    uninterrupted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of the first and of the last pass. Byte for byte what it would have been; nothing is made twice."""
    out = tmp_path / "corpus"
    finished = f".build/*/{prefix}-*/report.json"
    assert kill_when(lambda: len(list(out.glob(finished))) >= 2, name, workers, out, tars, how) == code
    assert not (out / "corpus.json").exists()
    before = {path.parent.name for path in out.glob(finished)}
    assert 2 <= len(before) < 6
    with pytest.raises(MMGPTError, match="other settings"):
        build(tars, out, **{**OPTIONS, "keep": "longest"})
    with pytest.raises(MMGPTError, match="other sources"):
        build(tars[:1], out, **OPTIONS)

    made = []
    for module, function in ((process, "_process"), (merge, "_write")):
        original = getattr(module, function)

        def watched(*arguments: Any, original: Any = original, **more: Any) -> Any:
            made.extend(part.name.split(".")[1] for part in arguments if isinstance(part, Path) and "-" in part.name)
            return original(*arguments, **more)

        monkeypatch.setattr(module, function, watched)
    build(tars, out, **OPTIONS)
    assert files_of(out) == uninterrupted
    assert made
    assert not before & set(made)
    assert not (out / ".build").exists()


def test_a_late_part_of_another_build_is_not_taken(
    tars: list[str], uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine finishes its part of a build that was killed and begun anew with other settings."""
    late: list[Any] = []

    def killed(*arguments: Any) -> None:
        late.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "process_split", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tars, tmp_path / "corpus", **{**OPTIONS, "image_side": 16})

    def after_the_late_one(*arguments: Any) -> dict[str, Any]:
        while late:
            process_split(*late.pop())
        return process_split(*arguments)

    monkeypatch.setattr(corpus_module, "process_split", after_the_late_one)
    build(tars, tmp_path / "corpus", **OPTIONS)
    assert files_of(tmp_path / "corpus") == uninterrupted


def test_moved_shards_are_found_again(tars: list[str], uninterrupted: dict[str, str], tmp_path: Path) -> None:
    """Killed between the shards and `corpus.json`: some of them are in their place already."""
    out = tmp_path / "corpus"

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "write_corpus_file", die)
        with pytest.raises(Killed):
            build(tars, out, **OPTIONS)
    assert (out / "shard-00000-00000.tar").is_file()
    build(tars, out, **OPTIONS)
    assert files_of(out) == uninterrupted


def test_workers_change_nothing(tars: list[str], uninterrupted: dict[str, str], tmp_path: Path) -> None:
    """The same bytes from one process and from two."""
    build(tars, tmp_path / "corpus", workers=2, **OPTIONS)
    assert files_of(tmp_path / "corpus") == uninterrupted


def test_a_part_is_made_once_by_many(tars: list[str], tmp_path: Path) -> None:
    """Two machines may work on one part at a time; the second finds it done, and both get the same report."""
    split = find_splits(tars)[0]
    config = CorpusConfig(filters="none")
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(process_split(split, config, tmp_path / "work")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 3
    assert reports[0] == reports[1] == reports[2]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["split-000000"]


def test_a_worker_that_is_killed_is_an_error_of_one_line() -> None:
    """The kernel kills what takes too much memory; a traceback of a process pool tells nobody what to do."""
    with pytest.raises(MMGPTError, match="worker process was killed"):
        list(Runner(2, progress=False)("test", os._exit, [1, 2]))


def test_step_counts_documents_and_images_apart() -> None:
    step = Step()
    step.removed.update({"opt-out: noai": 2, "image: small": 3, "text: short": 4, "personal data: phone": 5, "why": 1})
    assert (step.removed_documents, step.removed_images) == (3, 3)


def test_record_without_questions_keeps_its_answers(tmp_path: Path) -> None:
    """Questions travel with all of their answers."""
    questions = (QuestionAnswer("How many?", "two", ("two", "2", "a pair")),)
    writer = ShardWriter(tmp_path / "source")
    writer.add(Record("7", encoded(photo(1)), questions=questions, metadata={"licence": "CC0"}))
    write_corpus_file(tmp_path / "source", writer.close(), {})
    build(tmp_path / "source", tmp_path / "corpus")
    record = samples_of(tmp_path / "corpus")[0]
    assert isinstance(record, Record)
    assert record.questions == questions
    assert record.metadata == {"licence": "CC0"}
