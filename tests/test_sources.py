"""One door for every source: what a location holds is told by itself, and never guessed in silence."""

import base64
import gzip
import inspect
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from mm_gpt.datasets.samples import Conversation, ErrorCounter, Record
from mm_gpt.datasets.sources import FORMATS, detect, read_samples
from mm_gpt.document import Document
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
