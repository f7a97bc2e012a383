"""One door for every source: what a location holds is told by itself, and never guessed in silence."""

import base64
import gzip
import inspect
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from mm_gpt.datasets.reading.files import list_files
from mm_gpt.datasets.samples import IMAGE_SUFFIXES, Conversation, ErrorCounter, Record, Sample
from mm_gpt.datasets.sources import FORMATS, detect, read_samples
from mm_gpt.document import Document, Image, Text, check_text
from mm_gpt.errors import MMGPTError

OBELICS = {"images": ["https://e/a.jpg", None], "texts": [None, "A text."], "metadata": "[null, null]"}
MMC4 = {
    "text_list": ["One.", "Two."],
    "image_info": [{"raw_url": "https://e/a.jpg", "matched_text_index": 1, "matched_sim": 0.3}],
    "similarity_matrix": [[0.1, 0.3]],
}
GRIT = {"id": 1, "url": "https://e/a.jpg", "caption": "a dog", "noun_chunks": [], "ref_exps": []}
LLAVA = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
}
COCO = {
    "info": {"year": 2014},
    "licenses": [{"id": 1}],
    "images": [{"id": 1, "file_name": "a.jpg", "height": 3, "width": 4}] * 1,
    "annotations": [{"image_id": 1, "id": 38, "caption": "A dog."}],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "train", "imgid": 0, "sentences": [{"raw": "A dog.", "imgid": 0, "sentid": 0}]}
    ],
    "dataset": "flickr8k",
}
VQA = {"info": {}, "questions": [{"image_id": 1, "question": "What?", "question_id": 10}]}
TEXTVQA = {
    "dataset_name": "textvqa",
    "data": [{"image_id": "a", "question": "What?", "question_id": 1, "answers": ["a"]}],
}
VIZWIZ = [{"image": "a.jpg", "question": "What?", "answers": [{"answer": "a"}], "answerable": 1}]


def image(suffix: str = "JPEG") -> bytes:
    packed = io.BytesIO()
    PILImage.new("RGB", (4, 3), "red").save(packed, suffix)
    return packed.getvalue()


def tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([value]), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(value).encode()))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("name", "value", "format"),
    [
        ("a.parquet", OBELICS, "rows"),
        ("a.jsonl", OBELICS, "rows"),
        ("a.jsonl", MMC4, "rows"),
        ("a.jsonl.gz", MMC4, "rows"),
        ("a.jsonl", GRIT, "rows"),
        ("a.parquet", {**GRIT, "noun_chunks": [[0, 5, 0.1, 0.1, 0.2, 0.2, 1.0]]}, "rows"),
        ("a.json", [LLAVA], "rows"),
        ("a.json", json.dumps([LLAVA], indent=2), "rows"),
        ("a.jsonl", LLAVA, "rows"),
        ("a.parquet", {"images": [image()], "texts": [{"user": "What?", "assistant": "A dog."}]}, "rows"),
        ("a.json", COCO, "coco"),
        ("a.json", json.dumps(COCO, indent=1), "coco"),
        ("a.json", dict(reversed(COCO.items())), "coco"),
        ("a.json", KARPATHY, "karpathy"),
        ("a.json", VQA, "vqa"),
        ("a.json", TEXTVQA, "textvqa"),
        ("a.json", VIZWIZ, "vizwiz"),
        ("a.json", MMC4, "rows"),  # JSON lines under another name, of one row
        ("a.json", json.dumps(GRIT) + "\n" + json.dumps(GRIT), "rows"),
        ("a.parquet", {"image": image(), "caption": "A dog."}, "rows"),
        ("a.jsonl", {"image": "a.jpg", "captions": ["A dog.", "A cat."]}, "rows"),
        ("a.parquet", {"jpg": image(), "caption": "A dog.", "key": "0", "status": "success"}, "captioned"),
        ("a.jsonl", {"text": "A text."}, "rows"),
        ("a.jsonl.gz", {"text": "A text.", "url": "https://e/"}, "rows"),
        ("a.txt", "A text.", "text"),
        ("a.html", "<p>A text.</p>", "pages"),
        ("a.warc.gz", b"", "warc"),
        ("a.warc", b"", "warc"),
    ],
)
def test_formats_are_told_apart(tmp_path: Path, name: str, value: Any, format: str) -> None:
    """Stops: a file read as something that it is not. Alone and in its folder, which may hold a note."""
    path = put(tmp_path / "data" / name, value)
    assert detect(str(path)).name == format
    assert detect(f"file://{path}").name == format
    put(tmp_path / "data" / "LICENSE", "x")
    assert detect(str(path.parent)).name == format
    assert detect(f"{path.parent}/a.*").name == format


@pytest.mark.parametrize(
    ("files", "format"),
    [
        ({"a.jpg": image(), "a.txt": "A dog."}, "captioned"),
        ({"a.jpg": image(), "a.json": {"caption": "A dog."}}, "captioned"),
        ({"a.jpg": image(), "captions.jsonl": {"image": "a.jpg", "captions": ["A dog."]}}, "captioned"),
        ({"train.json": [LLAVA], "images/a.jpg": image()}, "rows"),
        ({"page.html": "<p>x", "page_files/a.jpg": image(), "page_files/a.json": {"a": 1}}, "pages"),
        ({"one.txt": "A text.", "deep/two.txt": "Another."}, "text"),
        ({"folder.with.dots/a.txt": "A text."}, "text"),
    ],
)
def test_folders(tmp_path: Path, files: dict[str, Any], format: str) -> None:
    for name, value in files.items():
        put(tmp_path / "data.v1" / name, value)
    if format == "pages":
        (tmp_path / "data.v1/page_files/a.json").unlink()
    assert detect(str(tmp_path / "data.v1")).name == format


def test_archives(tmp_path: Path) -> None:
    caption = json.dumps({"caption": "A dog.", "url": "https://e/", "key": "0", "status": "success"}).encode()
    listing = b"d.0.text.txt"
    for name, members, format in [
        ("pairs", {"0_jpg": image(), "0_json": caption, "0_txt": b"A dog."}, "captioned"),
        ("json-first", {"0_json": caption, "0_jpg": image()}, "captioned"),
        ("m4", {"d_0_text_txt": b"One.", "d_metadata_txt": listing}, "m4"),
        ("flamingo", {"0_json": json.dumps(MMC4).encode(), "1_json": json.dumps(MMC4).encode()}, "mmc4"),
        ("lines", {"docs_jsonl": json.dumps(MMC4).encode()}, "mmc4"),
    ]:
        path = tar(tmp_path / name / "00000.tar", **members)
        put(path.with_name("00000_stats.json"), {"count": 1})
        assert detect(str(path)).name == format, name
        assert detect(str(path.parent)).name == format, name
        errors = ErrorCounter()
        assert list(read_samples(str(path), errors)), name
        assert errors.total == 0


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("pairs", "json-first", "m4", "flamingo", "lines"):
        (tmp_path / name).mkdir()


def test_reading_by_what_is_there(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.jpg", image())
    for name, value, kind in [
        ("a.jsonl", OBELICS, Document),
        ("b.jsonl", MMC4, Document),
        ("c.jsonl", GRIT, Record),
        ("d.json", [LLAVA], Conversation),
        ("e.json", COCO, Record),
        ("f.json", KARPATHY, Record),
        ("g.json", VIZWIZ, Record),
        ("h.parquet", {"image": image(), "caption": "A dog."}, Record),
        ("i.jsonl", {"image": "a.jpg", "caption": "A dog."}, Record),
        ("j.txt", "A text.", Document),
    ]:
        path = put(tmp_path / "data" / name, value)
        errors = ErrorCounter()
        found = list(read_samples(str(path), errors))
        assert [type(sample) for sample in found] == [kind], name
        assert errors.total == 0, errors.summary()


def test_folders_leave_out_what_their_format_does_not_read(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.jsonl", {"text": "One."})
    put(tmp_path / "data" / "b.jsonl", {"text": "Two."})
    put(tmp_path / "data" / "README.txt", "About the data.")
    errors = ErrorCounter()
    texts = [d.segments[0].text for d in read_samples(str(tmp_path / "data"), errors)]  # type: ignore[union-attr]
    assert texts == ["One.", "Two."]
    assert errors.total == 0


def test_corpora_of_our_own(tmp_path: Path) -> None:
    folder = tmp_path / "corpus.v1"
    folder.mkdir()
    put(folder / "corpus.json", {"shards": []})
    assert detect(str(folder)).name == "corpus"
    assert detect(f"{folder}/").name == "corpus"


def test_naming_the_format(tmp_path: Path) -> None:
    """A user may know better: a text named otherwise, or rows of two meanings."""
    path = put(tmp_path / "notes.md", "A text.")
    assert len(list(read_samples(str(path), ErrorCounter(), format="text"))) == 1
    with pytest.raises(MMGPTError, match="unknown format 'obelisc'; did you mean 'obelics'"):
        read_samples(str(path), ErrorCounter(), format="obelisc")
    put(tmp_path / "data" / "a.md", "A text.")
    put(tmp_path / "data" / "b.md", "A text.")
    with pytest.raises(MMGPTError, match=r"no \.jsonl, .* file, as obelics has"):
        read_samples(str(tmp_path / "data"), ErrorCounter(), format="obelics")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "a.jsonl",
            {"question_id": 1, "image": "a.jpg", "text": "Is there?"},
            "rows with the keys 'question_id', 'image'",
        ),
        ("a.json", [{"image_id": 1, "caption": "A dog."}], "rows with the keys 'image_id', 'caption'"),
        ("a.json", {"a": 1, "b": [2]}, "a JSON object with the keys 'a', 'b'"),
        ("a.bin", b"x", r"1 file: \.bin"),
        ("a", b"x", r"1 file: \(no suffix\)"),
        ("a.parquet", {"x": 1}, "rows with the keys 'x'"),
        ("a.jsonl", "", r"1 file: \.jsonl"),
    ],
)
def test_what_is_not_recognised_is_told(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = put(tmp_path / "data" / name, value)
    with pytest.raises(MMGPTError, match=message) as caught:
        read_samples(str(path), ErrorCounter())
    assert str(path) in str(caught.value)
    assert "obelics, conversations" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["missing.jsonl", "missing/", "*.jsonl", "{1..3}.tar", "pipe:ls", "ssh://h/a", ""])
def test_what_is_not_there(tmp_path: Path, location: str) -> None:
    """Stops: an error at the first record, hours later, or none at all."""
    with pytest.raises(MMGPTError):
        read_samples(location if ":" in location else f"{tmp_path}/none/{location}", ErrorCounter())


def test_broken_files_are_named(tmp_path: Path) -> None:
    for name, data in [("a.parquet", b"PAR1"), ("a.json", b"[{"), ("a.tar", b"x" * 600), ("a.zip", b"PK")]:
        path = put(tmp_path / "data" / name, data)
        with pytest.raises(MMGPTError, match=str(path)):
            list(read_samples(str(path), ErrorCounter()))


def test_every_reader_can_be_called_as_the_table_says() -> None:
    """Stops: a format in the table whose function was renamed."""
    for name, format in FORMATS.items():
        assert format.name == name
        assert format.about
        parameters = list(inspect.signature(format.reader()).parameters.values())
        assert [p.name for p in parameters[1:2]] == ["errors"], name
        assert any(p.name == "images" and p.kind is p.KEYWORD_ONLY for p in parameters), name
        assert all(p.default is not p.empty for p in parameters[2:]), name


def test_base64_and_remote_shards() -> None:
    import fsspec

    info = {"image_base64": base64.b64encode(image()).decode(), "matched_text_index": 0}
    row = json.dumps({"text_list": ["One."], "image_info": [info]}).encode()
    fs = fsspec.filesystem("memory")
    for n in range(3):
        fs.pipe(f"/shards/{n:03d}.jsonl.gz", gzip.compress(row))
    for location in ("memory://shards", "memory://shards/*.gz", "memory://shards/{000..002}.jsonl.gz"):
        errors = ErrorCounter()
        found = list(read_samples(location, errors))
        assert [d.images[0].source for d in found if isinstance(d, Document)] == [image()] * 3
        assert errors.total == 0
    fs.rm("/shards", recursive=True)


# ---- Rows of several kinds ----


def read(location: Path, **options: Any) -> tuple[list[Sample], dict[str, int]]:
    errors = ErrorCounter()
    return list(read_samples(str(location), errors, **options)), dict(errors.counts)


def written(samples: list[Sample]) -> list[Any]:
    """Of each sample its kind and what is written in it."""
    found: list[Any] = []
    for sample in samples:
        if isinstance(sample, Record):
            found.append(("record", *sample.captions))
        elif isinstance(sample, Document):
            found.append(("document", *(s.text if isinstance(s, Text) else s.name for s in sample.segments)))
        else:
            found.append(("conversation", *(m["role"] for m in sample.messages)))
    return found


TEXT_ROW = {"text": "Words alone."}
PAIR_ROW = {"image": "a.jpg", "text": "A dog."}
CHAT_ROW = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}


@pytest.mark.parametrize(
    "first", [TEXT_ROW, {"image": None, **TEXT_ROW}, {"image": "", **TEXT_ROW}, PAIR_ROW, CHAT_ROW]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_first_row_does_not_speak_for_the_others(tmp_path: Path, first: dict[str, Any], name: str) -> None:
    """Stops: a data set of photos learned as text, because its first row has none."""
    put(tmp_path / "a.jpg", image())
    rows = [first, TEXT_ROW, PAIR_ROW, CHAT_ROW]
    if name.endswith(".parquet"):
        pq.write_table(
            pa.Table.from_pylist([{"image": None, "text": None, "messages": None, **r} for r in rows]), tmp_path / name
        )
    else:
        put(tmp_path / name, "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    samples, errors = read(tmp_path / name)
    assert written(samples)[1:] == [
        ("document", "Words alone."),
        ("record", "A dog."),
        ("conversation", "user", "assistant"),
    ]
    assert written(samples)[0] in written(samples)[1:]
    assert errors == {}


@pytest.mark.parametrize("empty", [None, "", []])
def test_a_null_caption_is_a_missing_caption_wherever_it_stands(tmp_path: Path, empty: Any) -> None:
    put(tmp_path / "a.jpg", image())
    good, bad = {"image": "a.jpg", "caption": "A cat."}, {"image": "a.jpg", "caption": empty}
    for name, rows in (("first", [bad, good]), ("last", [good, bad])):
        path = put(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
        samples, errors = read(path)
        assert written(samples) == [("record", "A cat.")]
        assert errors == {"no captions": 1}


def test_a_first_row_in_an_archive_does_not_speak_for_the_others(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, [{"a": 1}, MMC4])).encode()
    assert detect(str(tar(tmp_path / "a.tar", docs_jsonl=lines))).name == "mmc4"
    members = {"0_json": json.dumps({"a": 1}).encode(), "1_json": json.dumps(MMC4).encode()}
    assert detect(str(tar(tmp_path / "b.tar", **members))).name == "mmc4"


def test_rows_of_no_known_kind_are_counted(tmp_path: Path) -> None:
    """Alone in a file that has others, and as a file of nothing else, in a folder that has others."""
    rows = [{"a": 1}, TEXT_ROW, {"question": "x", "text": "z"}]
    put(tmp_path / "data" / "a.jsonl", "\n".join(map(json.dumps, rows)))
    put(tmp_path / "data" / "b.csv", "name,class\n1,dog\n")
    samples, errors = read(tmp_path / "data")
    assert written(samples) == [("document", "Words alone.")]
    assert errors == {"row of no known kind": 2, "unreadable file": 1}
    with pytest.raises(MMGPTError, match="no known format"):
        read(put(tmp_path / "benchmark.json", [{"question": "x", "text": "z"}]))


def test_a_broken_first_file_hides_no_others(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.parquet", b"PAR1")
    put(tmp_path / "data" / "b.csv", "name,class\n1,dog\n")
    put(tmp_path / "data" / "c.jsonl", TEXT_ROW)
    samples, errors = read(tmp_path / "data")
    assert written(samples) == [("document", "Words alone.")]
    assert errors == {"unreadable file": 2}


def test_images_of_one_row_stand_in_a_document(tmp_path: Path) -> None:
    """Stops: rows with several images read as text alone."""
    urls = ["https://e/1.jpg", "https://e/2.jpg"]
    rows = [
        {"images": urls, "text": "Two dogs."},
        {"images": urls, "text": "From <image> to <image>."},
        {"images": urls, "captions": ["One.", "Two."]},
        {"images": urls[:1], "text": "One dog."},
        {"images": [], "text": "No dog."},
        {"images": urls, "captions": ["One.", "Two.", "Three."]},
    ]
    samples, errors = read(put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert written(samples) == [
        ("document", *urls, "Two dogs."),
        ("document", "From", urls[0], "to", urls[1], "."),
        ("document", urls[0], "One.", urls[1], "Two."),
        ("record", "One dog."),
        ("document", "No dog."),
    ]
    assert errors == {"several images and another number of captions": 1}


# ---- Folders ----


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_image_folders_with_metadata(tmp_path: Path, name: str, column: str) -> None:
    """The layout of Hugging Face's `datasets`: `file_name` counts from the metadata, of which each split may have one.

    Stops: captions learned without their photos.
    """
    for folder in ("", "train/", "test/"):
        put(tmp_path / "data" / f"{folder}deep/1.png", image("PNG"))
        rows = [{"file_name": "deep/1.png", column: f"a dog, {folder}"}, {"file_name": "2.png", column: "gone"}]
        path = tmp_path / "data" / f"{folder}{name}"
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith("csv"):
            put(path, f"file_name,{column}\n" + "".join(f'{row["file_name"]},"{row[column]}"\n' for row in rows))
        else:
            put(path, "\n".join(map(json.dumps, rows)))
    samples, errors = read(tmp_path / "data")
    assert {(s.captions, s.image) for s in samples if isinstance(s, Record)} == {
        (("a dog,",), tmp_path / "data" / "deep/1.png"),
        (("a dog, train/",), tmp_path / "data" / "train/deep/1.png"),
        (("a dog, test/",), tmp_path / "data" / "test/deep/1.png"),
    }
    assert errors == {"no image file": 3}


def test_image_folders_with_several_images_in_a_row(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.png", image("PNG"))
    rows = [
        {"input_file_name": "a.png", "output_file_name": "b.png", "text": "Make it blue."},
        {"file_names": ["a.png", "b.png"], "text": "Two."},
        {"frames_file_names": ["a.png"], "text": "One."},
        {"file_name": "../x.png", "text": "Outside."},
        {
            "file_name": "a.png",
            **CHAT_ROW,
            "messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT_ROW["messages"][1]],
        },
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    samples, errors = read(tmp_path)
    assert [[Path(str(i.source)).name for i in s.images] for s in samples if isinstance(s, Document)] == [
        ["a.png", "b.png"]
    ] * 2
    assert written(samples)[2:] == [("record", "One."), ("conversation", "user", "assistant")]
    assert isinstance(samples[-1], Conversation)
    assert samples[-1].messages[0]["content"] == [Image(tmp_path / "a.png")]
    assert errors == {"image outside the folder": 1}


@pytest.mark.parametrize("names", [["a.jpg", "b.PNG"], ["deep/a.webp"], ["a.tiff", "notes.txt"]])
def test_photos_alone_are_told_what_captions_look_like(tmp_path: Path, names: list[str]) -> None:
    """Stops: "of no known format" to somebody who has a folder of photos; or a note beside them as all the data."""
    for name in names:
        put(tmp_path / "photos" / name, b"x")
    with pytest.raises(MMGPTError, match=r"images without captions: put photo\.txt .* captions\.jsonl") as caught:
        read(tmp_path / "photos")
    assert str(tmp_path / "photos") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_no_reader_takes_are_counted(tmp_path: Path) -> None:
    """Stops: half of a folder left out without a word."""
    for name in ("a.jpg", "b.heic", "c.HEIC", "d.mp4", "deep/e.svg"):
        put(tmp_path / "data" / name, image())
        put(tmp_path / "data" / f"{name[:-4].rstrip('.')}.txt", "A dog.")
    samples, errors = read(tmp_path / "data")
    assert written(samples) == [("record", "A dog.")]
    assert errors == {
        "file that is not read (.heic)": 2,
        "file that is not read (.mp4)": 1,
        "file that is not read (.svg)": 1,
        "text without an image beside it": 4,
    }
    put(tmp_path / "texts" / "a.txt", "A text.")
    put(tmp_path / "texts" / "b.pdf", "x")
    assert read(tmp_path / "texts")[1] == {"file that is not read (.pdf)": 1}
    put(tmp_path / "pages" / "a.html", "<p>A text.</p>")
    put(tmp_path / "pages" / "a_files/logo.svg", "<svg/>")
    assert not any("not read" in reason for reason in read(tmp_path / "pages")[1])  # it belongs to the page


def test_captions_of_photos_that_are_not_read_are_no_texts(tmp_path: Path) -> None:
    put(tmp_path / "a.heic", b"x")
    put(tmp_path / "a.txt", "A dog.")
    with pytest.raises(MMGPTError, match="holds no"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_reader_knows_the_same_image_kinds(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / "folder" / f"a.{suffix.upper()}", image())
    put(tmp_path / "folder" / "a.txt", "A dog.")
    put(tmp_path / "list" / f"a.{suffix}", image())
    put(tmp_path / "list" / "captions.csv", f"image,caption\na.{suffix},A dog.\n")
    tar(tmp_path / "a.tar", **{f"a_{suffix}": image(), "a_txt": b"A dog."})
    pq.write_table(pa.Table.from_pylist([{suffix: image(), "caption": "A dog."}]), tmp_path / "a.parquet")
    for name in ("folder", "list", "a.tar", "a.parquet"):
        samples, errors = read(tmp_path / name)
        assert written(samples) == [("record", "A dog.")], name
        assert errors == {}


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def test_hidden_files_are_ignored_everywhere(tmp_path: Path) -> None:
    """What macOS writes beside each file, `._a.jpg` and `__MACOSX/`, is no data, in folders, tars and zips."""
    hidden = ["._{}", "__MACOSX/{}", "__MACOSX/._{}", ".git/{}", "deep/._{}"]
    files: dict[str, bytes] = {"a.jpg": image(), "a.txt": b"A dog."}
    files |= {form.format(name): APPLE_DOUBLE for form in hidden for name in ("a.jpg", "a.txt", "b.jsonl")}
    for name, data in files.items():
        put(tmp_path / "folder" / name, data)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in sorted(files):
            archive.add(tmp_path / "folder" / name, f"./{name}")
    assert read(tmp_path / "a.tar")[1] == {}
    for location, key in (("folder", "a"), ("a.tar", "./a")):
        samples, errors = read(tmp_path / location)
        assert [s.key for s in samples if isinstance(s, Record)] == [key]
        assert errors == {}
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as packed:
        for name in ("__MACOSX/._docs.jsonl", "._docs.jsonl"):
            packed.writestr(name, APPLE_DOUBLE)
        packed.writestr("docs.jsonl", json.dumps(MMC4))
    samples, errors = read(tmp_path / "m.zip")
    assert [type(s) for s in samples] == [Document]
    assert errors == {}
    names = [Path(file).name for file in list_files(f"{tmp_path}/folder/**/*.txt")]
    assert names == ["a.txt"]
    put(tmp_path / "texts" / "._a.txt", APPLE_DOUBLE)
    put(tmp_path / "texts" / "a.txt", "A text.")
    assert read(tmp_path / "texts") == (read(tmp_path / "texts" / "a.txt")[0], {})


# ---- Texts ----


HALF = "nice \ud83d photo"


@pytest.mark.parametrize(
    "row",
    [
        {"text": HALF},
        {"text": "A text.", "url": HALF},
        {"image": "https://e/a.jpg", "caption": HALF},
        {"image": "https://e/a.jpg", "captions": ["fine", HALF]},
        {**LLAVA, "image": "https://e/a.jpg", "model": HALF},
        {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "a", "tool_calls": [{"x": HALF}]},
            ]
        },
        {"images": [], "texts": [{"user": "a", "assistant": HALF}]},
        {**OBELICS, "texts": [None, HALF]},
        {**OBELICS, "metadata": json.dumps([{"alt_text": HALF}, None])},
        {**MMC4, "text_list": [HALF, "b"]},
        {**GRIT, "caption": HALF},
    ],
)
def test_half_a_character_is_a_counted_record_in_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    """Stops: a training run that ends in a tokenizer's TypeError, at the one row in a million that has it."""
    path = put(tmp_path / "a.jsonl", f"{json.dumps(row)}\n{json.dumps(TEXT_ROW)}")
    samples, errors = read(path)
    assert written(samples) == [("document", "Words alone.")]
    assert errors == {"text is not Unicode": 1}


def test_half_a_character_in_tars_and_folders(tmp_path: Path) -> None:
    for name, values in (
        ("0", {"caption": HALF}),
        ("1", {"qa": [{"question": HALF, "answer": "a"}]}),
        ("2", {"caption": "ok"}),
    ):
        put(tmp_path / "folder" / f"{name}.jpg", image())
        put(tmp_path / "folder" / f"{name}.json", values)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "folder", "")
    for location in ("folder", "a.tar"):
        samples, errors = read(tmp_path / location)
        assert written(samples) == [("record", "ok")]
        assert errors == {"text is not Unicode": 2}


def test_checking_one_text() -> None:
    check_text("gr\u00fcn \U0001f600", "the question")
    with pytest.raises(MMGPTError, match=r"^the question: half a character"):
        check_text(HALF, "the question")


def test_texts_and_chats_as_training_has_them(tmp_path: Path) -> None:
    """One reader for each: names with file and line, and a malformed line counted, wherever it stands."""
    lines = ["{broken", "", json.dumps(CHAT_ROW), '{"messages": "none"}', '{"messages": [{"role": "user"}]}', "[1]"]
    samples, errors = read(put(tmp_path / "chats" / "a.jsonl", "\n".join(lines)))
    assert [(s.key, s.messages[1]["content"]) for s in samples if isinstance(s, Conversation)] == [
        ("chats/a.jsonl:3", ["Ho."])
    ]
    assert errors == {
        "bad JSON": 1, "no conversations, messages or texts": 1, "an empty turn": 1, "JSON is not an object": 1
    }  # fmt: skip
    put(tmp_path / "texts" / "b.txt", "\ufeff two\r\nlines ")
    put(tmp_path / "texts" / "deep/A.TXT", "one")
    put(tmp_path / "texts" / "c.txt", "A dog.".encode("utf-16-le"))
    put(tmp_path / "texts" / "d.txt", b"caf\xe9")
    put(tmp_path / "texts" / "e.txt", " \n")
    samples, errors = read(tmp_path / "texts")
    assert [(s.id, s.segments) for s in samples if isinstance(s, Document)] == [
        ("texts/b.txt", (Text("two\nlines"),)),
        ("deep/A.TXT", (Text("one"),)),
    ]
    assert errors == {"text with zero bytes": 1, "text is not UTF-8": 1, "empty text": 1}
