"""Interleaved documents in the very shapes in which they are published, with every trap that those have."""

import base64
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_gpt.datasets.formats.grit import grit_record, read_grit
from mm_gpt.datasets.formats.interleaved import (
    NEW_DOCUMENT,
    mmc4_document,
    paragraphs,
    read_interleaved_tars,
    read_mmc4,
    read_obelics,
)
from mm_gpt.datasets.formats.texts import read_text
from mm_gpt.datasets.reading import archives
from mm_gpt.datasets.row_samples import from_hf_dataset, kind_of_row, read_hf
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, checked
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError

JPEG = b"\xff\xd8 not decoded here"


def outline(document: Document) -> list[Any]:
    """Texts as strings, images as [source]."""
    return [part.text if isinstance(part, Text) else [part.source] for part in document.segments]


def read(reader: Any, location: Path | str, **options: Any) -> tuple[list[Any], ErrorCounter]:
    errors = ErrorCounter()
    return list(checked(reader(str(location), errors, **options), errors)), errors


def write_tar(path: Path, members: list[tuple[str, bytes]], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ---- OBELICS ----

OBELICS: dict[str, Any] = {
    "images": ["https://cdn.example/urus.jpg", None, "https://cdn.example/b.png"],
    "texts": [None, "VW Group\n\nsays so.", None],
    "metadata": json.dumps(
        [
            {
                "document_url": "https://cars.example/1",
                "unformatted_src": "urus.jpg",
                "src": "https://cdn.example/urus.jpg",
                "formatted_filename": "lamborghini urus",
                "alt_text": "A car",
                "original_width": 1920,
                "original_height": 1080,
                "format": "jpeg",
            },
            None,
            {"src": "https://cdn.example/b.png"},
        ]
    ),
    "general_metadata": json.dumps(
        {
            "url": "https://cars.example/1",
            "warc_filename": "crawl-data/x.warc.gz",
            "warc_record_offset": 1,
            "warc_record_length": 2,
        }
    ),
}


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_obelics_parquet(tmp_path: Path) -> None:
    found, errors = read(read_obelics, write_parquet(tmp_path / "train-00000.parquet", OBELICS))
    assert errors.total == 0
    assert outline(found[0]) == [
        ["https://cdn.example/urus.jpg"],
        "VW Group",
        "says so.",
        ["https://cdn.example/b.png"],
    ]
    assert [image.alt for image in found[0].images] == ["A car", ""]
    assert found[0].metadata == {
        "source": "obelics",
        "url": "https://cars.example/1",
        "warc_filename": "crawl-data/x.warc.gz",
        "warc_record_offset": 1,
        "warc_record_length": 2,
    }
    assert found[0].id.endswith("/train-00000.parquet:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"general_metadata": "[]"},
        {"general_metadata": None},
        {"general_metadata": ""},
        {"metadata": "[null, null, null]"},
        {"metadata": "[]"},
        {"metadata": None},
        {"metadata": '[{"alt_text": null}, null, 7]'},
        {"images": ["https://cdn.example/urus.jpg", "", "https://cdn.example/b.png"], "texts": ["", "VW", ""]},
    ],
)
def test_obelics_as_its_own_tools_write_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stops: "" taken for a text, and rows lost for what is optional."""
    found, errors = read(read_obelics, write_jsonl(tmp_path / "a.jsonl", {**OBELICS, **changes}))
    assert errors.total == 0
    assert [type(part) for part in found[0].segments[:2]] == [Image, Text]
    assert len(found[0].images) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"texts": [None, "a"]}, "images and texts of unequal length"),
        ({"texts": ["b", "a", None]}, "an image and a text in one place"),
        ({"texts": None}, "images or texts are no list"),
        ({"texts": [None, 7, None]}, "text is not a string"),
        ({"metadata": "{broken"}, "metadata is not JSON"),
        ({"metadata": "[" * 100_000}, "metadata is not JSON"),
        ({"images": [None, None, None], "texts": [None, " ", ""]}, "empty document"),
    ],
)
def test_bad_obelics_rows(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found, errors = read(read_obelics, write_jsonl(tmp_path / "a.jsonl", {**OBELICS, **changes}, OBELICS))
    assert errors.counts == {reason: 1}
    assert errors.examples[reason] == ["a.jsonl:1"]
    assert [document.id.rpartition(":")[2] for document in found] == ["2"]


def test_obelics_images_that_are_none(tmp_path: Path) -> None:
    """Stops: a file name in a row that reads a file of the user's."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.jpg").write_bytes(JPEG)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    row = {"images": ["b.jpg", "../secret.jpg", "none.jpg", "file:///etc/passwd", None], "texts": [None] * 4 + ["t"]}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    found, errors = read(read_obelics, path, images=str(tmp_path / "pictures"))
    assert outline(found[0]) == [[tmp_path / "pictures" / "b.jpg"], "t"]
    assert errors.counts == {"image: image outside the folder": 2, "image: no image file": 1}
    found, errors = read(read_obelics, path)
    assert outline(found[0]) == ["t"]


def test_a_page_of_two_articles_is_two_documents(tmp_path: Path) -> None:
    row = {
        "images": [None, "https://e/a.jpg", None],
        "texts": [f"one\n\n{NEW_DOCUMENT}\n\ntwo", None, f"three\n\n{NEW_DOCUMENT}"],
        "general_metadata": '{"url": "https://e/"}',
    }
    found, errors = read(read_obelics, write_jsonl(tmp_path / "a.jsonl", row))
    assert [outline(document) for document in found] == [["one"], ["two", ["https://e/a.jpg"], "three"]]
    assert len({document.id for document in found}) == 2
    assert errors.total == 0


def test_many_files_of_which_one_is_broken(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", OBELICS)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    found, errors = read(read_obelics, tmp_path)
    assert len(found) == 1
    assert errors.counts == {"unreadable file": 1}
    with pytest.raises(MMGPTError, match=r"b\.parquet: not a readable parquet"):
        read(read_obelics, tmp_path / "b.parquet")
    with pytest.raises(MMGPTError, match="no such file"):
        read_obelics(str(tmp_path / "missing.parquet"), ErrorCounter())  # when called


# ---- MMC4 ----

MMC4: dict[str, Any] = {
    "url": "http://www.hfitinfo.com/hofi-48.html",
    "text_list": ["When you lock it.", "Press down.", "Done."],
    "image_info": [
        {
            "image_name": "b9040a0dbb22.jpg",
            "raw_url": "http://e/1.jpg",
            "matched_text_index": 1,
            "matched_sim": 0.277,
            "face_detections": None,
        },
        {"image_name": "c.png", "raw_url": "http://e/2.png", "matched_text_index": 1, "matched_sim": 0.20},
    ],
    "similarity_matrix": [[0.24, 0.277, 0.1], [0.19, 0.20, 0.05]],
    "could_have_url_duplicate": 0,
}


def test_an_image_stands_before_its_sentence(tmp_path: Path) -> None:
    """Stops: images after their sentence, which teaches the model to describe what it has not seen yet."""
    found, errors = read(read_mmc4, write_jsonl(tmp_path / "docs_shard_0_v2.jsonl", MMC4))
    assert outline(found[0]) == ["When you lock it.", ["http://e/1.jpg"], ["http://e/2.png"], "Press down. Done."]
    assert found[0].metadata == {"source": "mmc4", "url": MMC4["url"]}
    assert errors.total == 0


def test_one_to_one_assignment(tmp_path: Path) -> None:
    """Golden: both images fit sentence 1 best, and 0.277 + 0.19 > 0.24 + 0.20. OpenFlamingo trains on this."""
    path = write_jsonl(tmp_path / "a.jsonl", MMC4)
    found, _ = read(read_mmc4, path, assign="one-to-one")
    assert outline(found[0]) == [["http://e/2.png"], "When you lock it.", ["http://e/1.jpg"], "Press down. Done."]
    found, errors = read(read_mmc4, path, assign="one-to-one", min_similarity=0.195)
    assert outline(found[0]) == ["When you lock it.", ["http://e/1.jpg"], "Press down. Done."]
    assert errors.total == 0
    for matrix in (None, [], [[0.1]], [[0.1, "x", 0.2]] * 2, [[float("nan")] * 3] * 2):
        with pytest.raises(BadRecordError, match="similarity_matrix"):
            mmc4_document({**MMC4, "similarity_matrix": matrix}, "", "", ErrorCounter(), assign="one-to-one")
    with pytest.raises(ConfigError, match="matched"):
        read(read_mmc4, path, assign="best")


def test_more_images_than_sentences() -> None:
    row = {**MMC4, "text_list": ["One."], "similarity_matrix": [[0.3], [0.2]]}
    errors = ErrorCounter()
    document = mmc4_document(row, "", "a:1", errors, assign="one-to-one")
    assert outline(document) == [["http://e/1.jpg"], "One."]
    assert errors.counts == {"image: no sentence of that number": 1}


def test_similarity_threshold(tmp_path: Path) -> None:
    found, errors = read(read_mmc4, write_jsonl(tmp_path / "a.jsonl", MMC4), min_similarity=0.25)
    assert outline(found[0]) == ["When you lock it.", ["http://e/1.jpg"], "Press down. Done."]
    assert errors.total == 0


def test_mmc4_in_zips_and_tars_and_packed(tmp_path: Path) -> None:
    lines = (json.dumps(MMC4) + "\n").encode() * 2 + b"{broken\n"
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", lines)
        archive.writestr("README.md", b"x")
    write_tar(tmp_path / "a.tar", [("docs_shard_1.jsonl", lines), ("x/", b"")])
    write_tar(tmp_path / "b.tar.gz", [("docs_shard_1.jsonl", lines)], mode="w:gz")
    write_tar(tmp_path / "of.tar", [("0.json", json.dumps(MMC4).encode()), ("1.json", json.dumps(MMC4).encode())])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("docs_shard_0_v2.jsonl.zip", "a.tar", "b.tar.gz", "c.jsonl.gz", "of.tar"):
        found, errors = read(read_mmc4, tmp_path / name)
        assert [outline(d)[0] for d in found] == ["When you lock it."] * 2, name
        assert errors.counts == ({} if name == "of.tar" else {"bad JSON": 1})
        assert len({d.id for d in found}) == 2


def test_base64_shards(tmp_path: Path) -> None:
    info = {"image_base64": base64.b64encode(JPEG).decode(), "image_name": "a.jpg", "matched_text_index": 0}
    broken = [{**info, "image_base64": wrong} for wrong in ("!!!", "AAA", "é", 7)]
    row = {"text_list": ["One.", ""], "image_info": [info, *broken]}
    found, errors = read(read_mmc4, write_jsonl(tmp_path / "a.jsonl", row))
    assert outline(found[0]) == [[JPEG], "One."]
    assert errors.counts == {"image: no image": 4}


def test_mmc4_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b9040a0dbb22.jpg").write_bytes(JPEG)
    found, errors = read(read_mmc4, write_jsonl(tmp_path / "a.jsonl", MMC4), images=str(tmp_path))
    assert outline(found[0]) == ["When you lock it.", [tmp_path / "b9040a0dbb22.jpg"], "Press down. Done."]
    assert errors.counts == {"image: no image file": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_list": None}, "no text_list or image_info"),
        ({"text_list": []}, "no text_list or image_info"),
        ({"text_list": [1]}, "text is not a string"),
        ({"text_list": [" "], "image_info": []}, "empty document"),
    ],
)
def test_bad_mmc4_rows(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found, errors = read(read_mmc4, write_jsonl(tmp_path / "a.jsonl", {**MMC4, **changes}, MMC4, [1]))
    assert len(found) == 1
    assert errors.counts == {reason: 1, "JSON is not an object": 1}


@pytest.mark.parametrize("index", [3, -1, None, "1", True, 1.0])
def test_images_of_no_sentence(index: Any) -> None:
    errors = ErrorCounter()
    row = {**MMC4, "image_info": [{**MMC4["image_info"][0], "matched_text_index": index}, None]}
    document = mmc4_document(row, "", "a:1", errors)
    assert document.images == []
    assert errors.counts == {"image: no sentence of that number": 2}


@given(st.lists(st.text("ab ", max_size=3), min_size=1, max_size=6), st.lists(st.integers(0, 5), max_size=6))
def test_no_sentence_or_image_is_lost(sentences: list[str], places: list[int]) -> None:
    infos = [
        {"raw_url": f"http://e/{n}", "matched_text_index": min(place, len(sentences) - 1)}
        for n, place in enumerate(places)
    ]
    errors = ErrorCounter()
    try:
        document = mmc4_document({"text_list": sentences, "image_info": infos}, "", "", errors)
    except BadRecordError:
        assert not infos
        assert not any(s.strip() for s in sentences)
        return
    texts = [part.text for part in document.segments if isinstance(part, Text)]
    assert " ".join(texts).split() == " ".join(sentences).split()
    assert sorted(str(image.source) for image in document.images) == [f"http://e/{n}" for n in range(len(infos))]
    assert errors.total == 0


# ---- M4's tars ----


def m4_members(key: str, parts: list[str | bytes]) -> list[tuple[str, bytes]]:
    members = [
        (f"{key}.{n}.text.txt", part.encode()) if isinstance(part, str) else (f"{key}.{n}.image.jpg", part)
        for n, part in enumerate(parts)
    ]
    listing = [name for name, _ in members] + [f"{key}.metadata.txt"]
    return [(f"{key}.metadata.txt", "\n".join(listing).encode()), *members]


def test_interleaved_tars(tmp_path: Path) -> None:
    parts = [f"text {n}" if n % 2 else JPEG + bytes([n]) for n in range(12)]
    shuffled = m4_members("doc1", parts)[::-1]  # 10 must not come before 2
    tar = write_tar(tmp_path / "a.tar", [*m4_members("./0/doc0", ["One.\n\nTwo.", JPEG]), *shuffled])
    found, errors = read(read_interleaved_tars, tar)
    assert outline(found[0]) == ["One.", "Two.", [JPEG]]
    assert outline(found[1]) == [part if isinstance(part, str) else [part] for part in parts]
    assert [document.id for document in found] == ["0/doc0", "doc1"]
    assert errors.total == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m[:-1], "incomplete document"),
        (lambda m: m[1:], "incomplete document"),
        (lambda m: [(m[0][0], b""), *m[1:]], "incomplete document"),
        (lambda m: [*m, m[-1]], "duplicate member"),
        (lambda m: [*m, ("doc.0.image.png", JPEG)], "an image and a text in one place"),
        (lambda m: [*m[:2], (m[2][0], b"")], "empty image"),
        (lambda m: [m[0], (m[1][0], b"\xff\xff"), m[2]], "text is not UTF-8"),
        (lambda m: [(m[0][0], m[0][1] + b"\nother.0.text.txt"), *m[1:]], "incomplete document"),
    ],
)
def test_incomplete_documents_are_rejected(tmp_path: Path, change: Any, reason: str) -> None:
    members = [*change(m4_members("doc", ["One.", JPEG])), *m4_members("next", ["Two."])]
    found, errors = read(read_interleaved_tars, write_tar(tmp_path / "a.tar", members))
    assert [document.id for document in found] == ["next"]
    assert errors.counts == {reason: 1}


def test_a_tar_that_was_cut_off(tmp_path: Path) -> None:
    """Stops: a copy that broke and passes for whole, or one that costs the documents before the break."""
    members = [m for n in range(3) for m in m4_members(f"d{n}", ["x" * 2000, JPEG * 500])]
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    end = whole.index(b"d2.1.image.jpg", whole.index(b"d2.0.text.txt", whole.index(b"x" * 100)))
    for cut in (end + 600, end + 100):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        found, errors = read(read_interleaved_tars, tmp_path / "b.tar")
        assert [document.id for document in found] == ["d0", "d1"]
        assert errors.total >= 1
    for nothing in (b"", b"x" * 2000):
        (tmp_path / "b.tar").write_bytes(nothing)
        with pytest.raises(MMGPTError, match="not a tar"):
            read(read_interleaved_tars, tmp_path / "b.tar")


def test_zip_bombs_and_broken_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jsonl", b"x" * 3_000_000)
        archive.writestr("good.jsonl", json.dumps(MMC4))
    found, errors = read(read_mmc4, tmp_path / "a.zip")
    assert len(found) == 1
    assert errors.counts == {"archive member unfolds too far": 1}
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"good.jsonl") + 30
    data[at : at + 20] = b"\0" * 20
    (tmp_path / "b.zip").write_bytes(data)
    found, errors = read(read_mmc4, tmp_path / "b.zip")
    assert found == []
    assert errors.total == 2


# ---- GRIT ----

GRIT: dict[str, Any] = {
    "id": 1795296605919,
    "url": "https://e/customerservice-1.jpg",
    "caption": "a wire hanger with a paper cover that reads we heart our customers",
    "width": 1024,
    "height": 693,
    "noun_chunks": [[19, 32, 0.0196, 0.3105, 0.9622, 0.9603, 0.7930]],
    "ref_exps": [[19, 66, 0.0196, 0.3105, 0.9622, 0.9603, 0.7930]],
    "clip_similarity_vitb32": 0.353,
    "clip_similarity_vitl14": 0.296,
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_grit(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, GRIT)
    else:
        path.write_text(json.dumps([GRIT] if kind == "json" else GRIT))
    found, errors = read(read_grit, path)
    assert errors.total == 0
    record = found[0]
    assert (record.key, record.image, record.captions) == ("1795296605919", GRIT["url"], (GRIT["caption"],))
    start, end, *box = record.metadata["ref_exps"][0]
    assert record.captions[0][start:end] == "a paper cover that reads we heart our customers"
    assert box == [0.0196, 0.3105, 0.9622, 0.9603, 0.7930]
    assert record.metadata["width"] == 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"caption": " "}, "no caption"),
        ({"caption": None}, "no caption"),
        ({"url": None}, "no image"),
        ({"noun_chunks": [[19, 32, 0.1]]}, "a box is not seven numbers"),
        ({"noun_chunks": [[19, 99, 0.1, 0.1, 0.2, 0.2, 1]]}, "a box for no part of the caption"),
        ({"ref_exps": [[0, 2, 0.5, 0.1, 0.2, 0.2, 1]]}, "a box outside of the image"),
        ({"ref_exps": [[0, 2, 0, 0, float("nan"), 1, 1]]}, "a box outside of the image"),
        ({"ref_exps": "x"}, "boxes are no list"),
    ],
)
def test_bad_grit_rows(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError, match=reason):
        grit_record({**GRIT, **changes}, "k")


def test_grit_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "1795296605919.jpg").write_bytes(JPEG)
    assert grit_record(GRIT, "", images=str(tmp_path)).image == tmp_path / "1795296605919.jpg"
    with pytest.raises(BadRecordError, match="no image file"):
        grit_record({**GRIT, "id": 7}, "", images=str(tmp_path))
    with pytest.raises(BadRecordError, match="outside"):
        grit_record({**GRIT, "key": "../x.jpg"}, "", images=str(tmp_path))


# ---- Text ----


def test_text_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne\nline.\r\n \r\nTwo.\n\n\n".encode())
    write_jsonl(
        tmp_path / "b.jsonl",
        {"text": "Three.", "url": "https://e/", "meta": {"language": "en"}, "license": "cc0"},
        {"text": " "},
        {"content": "Four."},
        {"text": "\ud800"},
    )
    write_parquet(tmp_path / "c.parquet", {"text": "Five.", "id": 3})
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Six."}'))
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00")
    found, errors = read(read_text, tmp_path)
    assert [outline(d) for d in found] == [["One\nline.", "Two."], ["Three."], ["Four."], ["Five."], ["Six."]]
    assert found[1].metadata == {"url": "https://e/", "language": "en", "licence": "cc0"}
    assert errors.counts == {"empty text": 1, "text is not Unicode": 1, "text is not UTF-8": 1}
    assert len({d.id for d in found}) == 5


def test_paragraphs() -> None:
    assert paragraphs("a\nb\n\nc\n \t\n\n d \n\n\n") == ["a\nb", "c", "d"]
    assert paragraphs("\n\n") == []


# ---- Hugging Face's datasets ----


def hf(kind: str, path: Path) -> Any:
    from datasets import load_dataset

    cache = str(path.parent / "hf")
    return load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True, cache_dir=cache)


def png() -> bytes:
    packed = io.BytesIO()
    PILImage.new("RGB", (4, 3), "red").save(packed, "PNG")
    return packed.getvalue()


def stream(dataset: Any, **options: Any) -> tuple[list[Any], ErrorCounter]:
    errors = ErrorCounter()
    return list(from_hf_dataset(dataset, errors, **options)), errors


def test_streamed_rows_of_known_shapes(tmp_path: Path) -> None:
    for name, row, kind in [("o", OBELICS, Document), ("m", MMC4, Document), ("g", GRIT, Record)]:
        found, errors = stream(hf("json", write_jsonl(tmp_path / f"{name}.jsonl", row, row)))
        assert [type(sample) for sample in found] == [kind, kind]
        assert errors.total == 0
    found, _ = stream(hf("parquet", write_parquet(tmp_path / "o.parquet", OBELICS)))
    assert outline(found[0])[1] == "VW Group"
    found, _ = stream(hf("json", write_jsonl(tmp_path / "t.jsonl", {"text": "a"}, {"text": "b"}, {"text": ""})))
    assert [outline(d) for d in found] == [["a"], ["b"]]


def test_streamed_images_stay_undecoded(tmp_path: Path) -> None:
    """Stops: every picture of a data set decoded, by any decoder, only to be read again later."""
    from datasets import Dataset, Features, Value
    from datasets import Image as HFImage

    features = Features({"picture": HFImage(), "caption": Value("string")})
    rows = {"picture": [{"bytes": png(), "path": None}, {"bytes": b"broken", "path": None}], "caption": ["a", "b"]}
    dataset = Dataset.from_dict(rows, features=features)
    for one in (dataset, dataset.to_iterable_dataset()):
        found, errors = stream(one, columns={"picture": "image"})
        assert [(r.image, r.captions) for r in found] == [(png(), ("a",)), (b"broken", ("b",))]
        assert errors.total == 0


def test_streamed_cauldron(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as HFImage

    features = Features(
        {"images": List(HFImage()), "texts": List({"user": Value("string"), "assistant": Value("string")})}
    )
    rows = {"images": [[{"bytes": png(), "path": None}]], "texts": [[{"user": "What?", "assistant": "Red."}]]}
    found, errors = stream(Dataset.from_dict(rows, features=features).to_iterable_dataset())
    assert errors.total == 0
    assert isinstance(found[0], Conversation)
    assert [m["role"] for m in found[0].messages] == ["user", "assistant"]
    assert any(isinstance(part, Image) and part.source == png() for part in found[0].messages[0]["content"])


def test_streamed_conversations_name_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: a row that reads a picture of the folder that the program happens to run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"image": "a.png", "conversations": turns}, {"image": "https://e/a.png", "conversations": turns}]
    found, errors = stream(rows)
    assert [c.messages[0]["content"][0].source for c in found] == ["https://e/a.png"]
    assert errors.counts == {"no image": 1}
    found, _ = stream(rows[:1], images=str(tmp_path))
    assert found[0].messages[0]["content"][0].source == tmp_path / "a.png"
    decoded = [{"image": PILImage.new("RGB", (2, 2)), "conversations": turns}]
    found, _ = stream(decoded)
    assert found[0].messages[0]["content"][0].size() == (2, 2)
    found, errors = stream([{"conversations": turns[:1], "image": "https://e/a.png"}])
    assert errors.counts == {"no answer": 1}


def test_streamed_paths_stay_in_their_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    rows = [{"image": {"bytes": None, "path": str(tmp_path / name)}, "text": name} for name in ("in/a.png", "b.png")]
    found, errors = stream(Dataset.from_list(rows), images=str(tmp_path / "in"))
    assert [r.image for r in found] == [tmp_path / "in" / "a.png"]
    assert errors.counts == {"image outside the folder": 1}
    with pytest.raises(MMGPTError, match="splits train, test"):
        stream(DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows)))
    with pytest.raises(MMGPTError, match="no known kind"):
        stream(Dataset.from_list([{"a": 1}]))


def test_streamed_rows_of_several_kinds() -> None:
    """Stops: a data set whose first row has no image read as text to its end; its order must not matter."""
    from datasets import Dataset, Features, Value
    from datasets import Image as HFImage

    features = Features({"image": HFImage(), "text": Value("string")})
    some = {"bytes": png(), "path": None}
    for order in ([None, some, some], [some, some, None]):
        rows = [{"image": one, "text": "words"} for one in order]
        for dataset in (Dataset.from_list(rows, features=features), rows):
            found, errors = stream(dataset)
            assert [type(sample) for sample in found] == [Document if one is None else Record for one in order]
            assert errors.total == 0
    found, errors = stream([{"a": 1}, {"text": "b"}, {"a": 2}, {"text": "half \ud83d"}])
    assert [outline(d) for d in found] == [["b"]]
    assert errors.counts == {"row of no known kind": 2, "text is not Unicode": 1}
    assert stream([]) == ([], ErrorCounter())


@pytest.mark.parametrize("streaming", [False, True])
def test_streamed_columns_that_python_cannot_hold(tmp_path: Path, streaming: bool) -> None:
    """Dates that nobody asked for stop nothing; one inside of what is asked for costs its row."""
    from datasets import load_dataset

    far = 253_402_300_800_000_000  # the year 10000, in microseconds
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("us"))])
    turns = [[{"role": role, "content": "a", "at": at} for role in ("user", "assistant")] for at in (far, 0)]
    columns = {"messages": pa.array(turns, type=pa.list_(turn)), "at": pa.array([far, far], type=pa.timestamp("us"))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    files = {"train": str(tmp_path / "a.parquet")}
    dataset = load_dataset(
        "parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "hf")
    )
    found, errors = stream(dataset)
    assert [type(sample) for sample in found] == [Conversation]
    assert errors.counts == {"unreadable row": 1}


def test_hub_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_GPT_OFFLINE", "1")
    with pytest.raises(MMGPTError, match="MM_GPT_OFFLINE"):
        read(read_hf, "hf://datasets/a/b")
    monkeypatch.delenv("MM_GPT_OFFLINE")
    with pytest.raises(MMGPTError, match="unknown option 'splitt'"):
        read(read_hf, "hf://datasets/a/b?splitt=train")
    with pytest.raises(MMGPTError, match="not hf://"):
        read(read_hf, "hf://models/a")
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return iter([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    found, _ = read(read_hf, "hf://datasets/a/b@v1?config=en&split=test")
    assert outline(found[0]) == ["a"]
    assert calls == [(("a/b", "en"), {"split": "test", "revision": "v1", "streaming": True})]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (OBELICS, "obelics"),
        (MMC4, "mmc4"),
        (GRIT, "grit"),
        ({"images": [], "texts": [{"user": "a", "assistant": "b"}]}, "conversations"),
        ({"id": "1", "conversations": []}, "conversations"),
        ({"messages": []}, "conversations"),
        ({"image": b"x", "text": "a"}, "pairs"),
        ({"url": "https://e/", "text": "a page"}, "text"),
        ({"url": "https://e/a.jpg", "caption": "a"}, "pairs"),
        ({"question_id": 1, "image": "a.jpg", "text": "Is there?", "label": "yes"}, None),
        ({"image": b"", "question": "q", "chosen": "a", "rejected": "b"}, "comparisons"),
        ({"prompt": "q", "chosen": None, "question": "q"}, "comparisons"),
        ({"question": "q", "text": "a"}, None),
        ({"a": 1}, None),
    ],
)
def test_kinds_of_rows(row: dict[str, Any], kind: str | None) -> None:
    """Stops: a benchmark's questions read as captions."""
    assert kind_of_row(row) == kind
