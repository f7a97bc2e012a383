"""Reading records: what people have on disk, and what is broken in it."""

import hashlib
import io
import json
import logging
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.datasets.formats.captioned import clean_caption, read_records
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer, Record
from mm_gpt.document import Concepts
from mm_gpt.errors import MMGPTError

JPEG = b"\xff\xd8 not decoded here"
LICENCE = {"licence": "CC0"}
BAD_SCORE = "a concept's score is not a number from 0 to 1"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> tuple[list[Record], ErrorCounter]:
    errors = ErrorCounter()
    return list(read_records(path, errors)), errors


def captions(*texts: str) -> bytes:
    return json.dumps({"captions": texts}).encode()


def test_tar_with_captions_and_questions(tmp_path: Path) -> None:
    qa = {"qa": [{"question": "how many?", "answer": "2, 3", "answers": ["2", "3"]}, {"question": "q", "answer": "a"}]}
    tar = write_tar(
        tmp_path / "train.tar",
        [
            ("a.jpg", JPEG),
            ("a.json", captions("one", "two", "one")),
            ("sub/b.PNG", b"png"),
            ("sub/b.json", json.dumps({**qa, "source": "daquar"}).encode()),
        ],
    )
    records, errors = read(tar)
    assert errors.total == 0
    assert records[0] == Record("a", JPEG, ("one", "two"), (), "train")
    assert records[1].key == "sub/b"
    assert records[1].source == "daquar"
    assert records[1].questions == (QuestionAnswer("how many?", "2, 3", ("2", "3")), QuestionAnswer("q", "a", ("a",)))


def test_img2dataset_tar_counts_its_caption_once(tmp_path: Path) -> None:
    meta = {"caption": "a dog", "url": "http://x/y.jpg", "status": "success", "width": 3}
    tar = write_tar(
        tmp_path / "00000.tar", [("0.jpg", JPEG), ("0.txt", b"a dog"), ("0.json", json.dumps(meta).encode())]
    )
    records, _ = read(tar)
    assert [r.captions for r in records] == [("a dog",)]


IMG2DATASET = {
    "caption": "a dog,\nwet",
    "url": "http://x/y.jpg",
    "key": "000000000",
    "status": "success",
    "error_message": None,
    "width": 3,
    "height": 2,
    "original_width": 30,
    "original_height": 20,
    "exif": '{"GPS": "here"}',
    "sha256": hashlib.sha256(JPEG).hexdigest(),
}


def test_img2dataset_metadata_is_kept_and_a_caption_of_two_lines_is_one(tmp_path: Path) -> None:
    """The caption stands in .json and .txt: read line by line from the latter, it would count three times."""
    meta = json.dumps(IMG2DATASET).encode()
    tar = write_tar(tmp_path / "00000.tar", [("0.jpg", JPEG), ("0.txt", b"a dog,\nwet"), ("0.json", meta)])
    record = read(tar)[0][0]
    assert record.captions == ("a dog,\nwet",)
    known = ("url", "status", "width", "height", "original_width", "original_height", "sha256")
    assert record.metadata == {name: IMG2DATASET[name] for name in known}  # no exif, which may tell where it was taken


def test_img2dataset_failures_are_counted(tmp_path: Path) -> None:
    failed = json.dumps({**IMG2DATASET, "status": "failed_to_resize", "error_message": "too small"}).encode()
    tar = write_tar(tmp_path / "00000.tar", [("0.jpg", JPEG), ("0.txt", b"x"), ("1.json", failed)])
    stats = {"count": 9, "successes": 1, "failed_to_download": 5, "failed_to_resize": 1}
    (tmp_path / "00000_stats.json").write_text(json.dumps(stats))
    (tmp_path / "00000.parquet").write_bytes(b"metadata only, not read beside a tar")
    records, errors = read(tmp_path)
    assert len(records) == 1
    assert errors.counts == {"not downloaded": 7}
    (tmp_path / "00000_stats.json").write_text('{"failed_to_download": "many"}')
    assert read(tar)[1].counts == {"not downloaded": 1}


def test_sha256_is_checked_when_asked(tmp_path: Path) -> None:
    meta = json.dumps(IMG2DATASET).encode()
    members = [
        ("0.jpg", JPEG),
        ("0.json", meta),
        ("1.jpg", b"other"),
        ("1.json", meta),
        ("2.jpg", JPEG),
        ("2.txt", b"x"),
    ]
    tar = write_tar(tmp_path / "t.tar", members)
    errors = ErrorCounter()
    assert [r.key for r in read_records(tar, errors, check_hash=True)] == ["0"]
    assert errors.counts == {"sha256 is missing or another one": 2}
    assert len(read(tar)[0]) == 3


def test_img2dataset_parquet_with_images(tmp_path: Path) -> None:
    table = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [
        {**IMG2DATASET, "jpg": JPEG, "txt": "a dog", "similarity": 0.5},
        {**IMG2DATASET, "jpg": None, "txt": None, "status": "failed_to_download", "similarity": float("nan")},
        {**IMG2DATASET, "jpg": JPEG, "txt": "a cat", "caption": None, "key": "2", "similarity": float("nan")},
    ]
    table.write_table(arrow.Table.from_pylist(rows), tmp_path / "00000.parquet")
    records, errors = read(tmp_path)
    assert [(r.key, r.image, r.captions) for r in records] == [
        ("000000000", JPEG, ("a dog,\nwet",)),
        ("2", JPEG, ("a cat",)),
    ]
    assert records[0].metadata["similarity"] == 0.5
    assert "similarity" not in records[1].metadata  # NaN is no JSON value
    assert errors.counts == {"not downloaded": 1}
    table.write_table(arrow.Table.from_pylist([IMG2DATASET]), tmp_path / "meta.parquet")
    with pytest.raises(MMGPTError, match=r"meta\.parquet: no column jpg"):
        read(tmp_path / "meta.parquet")


def test_img2dataset_files(tmp_path: Path) -> None:
    """Shards are folders there; the same name may come in each, so that the key has the folder in it."""
    for shard in ("00001", "00000"):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "0.jpg").write_bytes(JPEG)
        (tmp_path / shard / "0.txt").write_text("a dog")
        (tmp_path / shard / "0.json").write_text(json.dumps({**IMG2DATASET, "caption": "a dog"}))
        (tmp_path / f"{shard}.parquet").write_bytes(b"not read")
        (tmp_path / f"{shard}_stats.json").write_text('{"failed_to_download": 2, "failed_to_resize": 0}')
    records, errors = read(tmp_path)
    assert [(r.key, r.captions) for r in records] == [("00000/0", ("a dog",)), ("00001/0", ("a dog",))]
    assert errors.counts == {"not downloaded": 4}


def test_tars_from_elsewhere_and_by_pattern(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for number in range(3):
        tar = write_tar(tmp_path / f"{number:02d}.tar", [(f"{number}.jpg", JPEG), (f"{number}.txt", b"x")])
        store.pipe(f"/captioned-test/{number:02d}.tar", tar.read_bytes())
    for location in ("memory://captioned-test/{00..02}.tar", f"{tmp_path}/{{00..02}}.tar", f"{tmp_path}/0?.tar"):
        assert [r.key for r in read_records(location, ErrorCounter())] == ["0", "1", "2"]
    store.pipe("/captioned-test/00.tar", b"x" * 2000)
    store.pipe("/captioned-test/01.tar", tar.read_bytes()[:520])  # in the middle of the image
    with pytest.raises(MMGPTError, match=r"00\.tar: not an uncompressed tar"):
        list(read_records("memory://captioned-test/00.tar", ErrorCounter()))
    errors = ErrorCounter()
    assert [r.key for r in read_records("memory://captioned-test/{01,02}.tar", errors)] == ["2"]
    assert sum(count for reason, count in errors.counts.items() if reason.startswith("broken tar")) == 1
    for nowhere in ("memory://captioned-test/9.tar", f"{tmp_path}/9*.tar"):
        with pytest.raises(MMGPTError, match="no such file"):
            read_records(nowhere, ErrorCounter())


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.jpg", JPEG)], "no captions or questions"),
        ([("k.json", captions("x"))], "no image"),
        ([("k.jpg", b""), ("k.json", captions("x"))], "empty image"),
        ([("k.jpg", JPEG), ("k.json", b"{broken")], "bad JSON"),
        ([("k.jpg", JPEG), ("k.json", b"[" * 100_000)], "bad JSON"),
        ([("k.jpg", JPEG), ("k.json", b"[1]")], "JSON is not an object"),
        ([("k.jpg", JPEG), ("k.json", b'{"captions": [1]}')], "captions are not text"),
        ([("k.jpg", JPEG), ("k.json", b'{"qa": [{"question": "q"}]}')], "question without text or answer"),
        ([("k.jpg", JPEG), ("k.txt", b"\xff\xfe\x00")], "text is not UTF-8"),
        ([("k.json", b'{"concepts": {"cat": 0.9}}')], "no captions or questions"),
        ([("k.json", b'{"concepts": {}, "caption": "x"}')], "concepts are not names with scores"),
        ([("k.json", b'{"concepts": ["cat"], "caption": "x"}')], "concepts are not names with scores"),
        ([("k.json", b'{"concepts": null, "caption": "x"}')], "concepts are not names with scores"),
        ([("k.json", b'{"concepts": {" ": 0.5}, "caption": "x"}')], "a concept without a name"),
        *(
            ([("k.json", b'{"concepts": {"cat": %s}, "caption": "x"}' % value)], BAD_SCORE)
            for value in (b"1.5", b"-0.1", b"NaN", b'"0.5"', b"true", b"null")
        ),
    ],
)
def test_bad_records_are_counted_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, members: list[tuple[str, bytes]], reason: str
) -> None:
    good = [("ok.jpg", JPEG), ("ok.json", captions("fine"))]
    tar = write_tar(tmp_path / "t.tar", [*members, *good])
    with caplog.at_level(logging.WARNING):
        records, errors = read(tar)
    assert [r.key for r in records] == ["ok"]
    assert errors.counts == {reason: 1}
    assert "t.tar:k" in caplog.text
    assert errors.summary() == f"1 record skipped: 1 {reason} (t.tar:k)"


def test_concepts_stand_for_an_image_that_is_not_there(tmp_path: Path) -> None:
    values = {"concepts": {"golden retriever": 0.81, "dog sled": 0}, "captions": ["A dog ."], "licence": "CC0"}
    tar = write_tar(
        tmp_path / "t.tar",
        [("a.json", json.dumps(values).encode()), ("b.jpg", JPEG), ("b.json", json.dumps(values).encode())],
    )
    (without, beside), errors = read(tar)
    assert errors.total == 0
    assert without == Record("a", Concepts({"golden retriever": 0.81, "dog sled": 0.0}), ("A dog .",), (), "t", LICENCE)
    assert beside.image == JPEG  # what is seen comes before what is said


def test_pickle_members_are_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(marker),)

    members = [("a.jpg", JPEG), ("a.pkl", pickle.dumps(Attack())), ("a.pyd", pickle.dumps(Attack()))]
    records, errors = read(write_tar(tmp_path / "t.tar", [*members, ("a.json", captions("x"))]))
    assert [r.captions for r in records] == [("x",)]
    assert errors.total == 0
    assert not marker.exists()


def test_pipe_urls_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with pytest.raises(MMGPTError, match="commands are not run"):
        read_records(f"pipe:touch {marker}", ErrorCounter())
    assert not marker.exists()


def test_huge_member_refuses_its_whole_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping only the large image would leave its smaller sibling to stand for the record."""
    monkeypatch.setattr("mm_gpt.datasets.formats.captioned.MAX_MEMBER_BYTES", 50)
    members = [("a.jpg", b"x" * 51), ("a.png", b"small"), ("a.txt", b"x"), ("b.jpg", b"x" * 50), ("b.txt", b"y")]
    records, errors = read(write_tar(tmp_path / "t.tar", members))
    assert [r.key for r in records] == ["b"]
    assert errors.counts == {"member too large": 1}


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.txt", b"x")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    records, errors = read(path)
    assert records == []
    assert errors.counts == {"no image": 1}


def test_truncated_tar_gives_what_is_whole(tmp_path: Path) -> None:
    members = [(f"{i}.{suffix}", b"x" * 2000) for i in range(5) for suffix in ("jpg", "txt")]
    tar = write_tar(tmp_path / "t.tar", members)
    tar.write_bytes(tar.read_bytes()[:9000])
    records, errors = read(tar)
    assert [r.key for r in records] == ["0"]
    assert any(reason.startswith("broken tar") for reason in errors.counts)


def test_duplicate_member_keeps_the_first(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", b"x")])
    records, errors = read(tar)
    assert [r.image for r in records] == [b"1"]
    assert errors.counts == {"duplicate member": 1}


def test_folder_of_images(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jpg").write_bytes(JPEG)
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two\n")
    (tmp_path / "lonely.png").write_bytes(b"png")
    records, errors = read(tmp_path)
    assert [(r.key, r.captions) for r in records] == [("a", ("a one", "a two")), ("b", ("b one", "b two"))]
    assert records[0].image == tmp_path / "a.jpg"
    assert errors.counts == {"no captions or questions": 1}


def test_csv_merges_the_lines_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    lines = [
        "\ufeffimage,caption",
        'b.jpg,"a dog, wet"',
        "a.jpg,a cat",
        "b.jpg,brown dog",
        "no.jpg,x",
        "../x.jpg,x",
        "a.jpg,",
    ]
    text = "\n".join(lines)
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    records, errors = read(tmp_path)
    assert [(r.key, r.captions) for r in records] == [("b", ("a dog, wet", "brown dog")), ("a", ("a cat",))]
    assert errors.counts == {"no image": 1, "image outside the folder": 1, "no captions or questions": 1}


def test_csv_without_the_columns_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("file,text\n")
    with pytest.raises(MMGPTError, match=r"captions\.csv: no column caption or image"):
        list(read_records(tmp_path, ErrorCounter()))


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    lines = ['{"image": "a.jpg", "captions": ["x", "y"]}', "", "{bad", '{"caption": "z"}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    records, errors = read(tmp_path)
    assert [r.captions for r in records] == [("x", "y")]
    assert errors.examples == {"bad JSON": ["captions.jsonl:3"], "no image named": ["captions.jsonl:4"]}


def test_folder_of_tars_in_order_of_names(tmp_path: Path) -> None:
    for name in ("2.tar", "1.tar"):
        write_tar(tmp_path / name, [(f"{name[0]}.jpg", JPEG), (f"{name[0]}.txt", b"x")])
    assert [r.key for r in read(tmp_path)[0]] == ["1", "2"]


def test_wrong_paths_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.tar").write_text("hello")
    (tmp_path / "a.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no such file"), ("a.zip", "expected a .tar"), ("empty", "holds no .tar")):
        with pytest.raises(MMGPTError, match=message):  # not an iterator that fails later
            read_records(tmp_path / name, ErrorCounter())
    with pytest.raises(MMGPTError, match=r"notes\.tar: not an uncompressed tar"):
        list(read_records(tmp_path / "notes.tar", ErrorCounter()))


def test_error_counter_names_only_the_first(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorCounter(max_examples=2)
    for i in range(5):
        errors.add("bad JSON", f"r{i}")
    errors.add("no image", "r9")
    assert errors.summary() == "6 records skipped: 5 bad JSON (r0, r1, ...); 1 no image (r9)"
    assert len(caplog.records) == 3
    assert ErrorCounter().summary() == "no records skipped"


@pytest.mark.parametrize(
    ("tokenised", "natural"),
    [
        ("A brown dog , on a rocky ground .", "A brown dog, on a rocky ground."),
        ("A baby touching a woman 's face .", "A baby touching a woman's face."),
        ("A boy does n't look", "A boy doesn't look."),
        ("two girls ' hats  in   the snow", "Two girls' hats in the snow."),
        ('holding a sign saying " the rescue " .', 'Holding a sign saying "the rescue".'),
        ('A card says " know what this is ? "', 'A card says "know what this is?"'),
        ("There is an open ' Abarrotes Mexico ' store .", "There is an open 'Abarrotes Mexico' store."),
        ("Three boys ( one in red , two in blue ) play .", "Three boys (one in red, two in blue) play."),
        ("The # 2 greyhound ; it runs .", "The #2 greyhound; it runs."),
        ("Two dogs run . One has a ball .", "Two dogs run. One has a ball."),
        ("A man runs ,", "A man runs."),
        ("Already natural, as it should be!", "Already natural, as it should be!"),
        ("A S.C.U.B.A. diver in a t-shirt .", "A S.C.U.B.A. diver in a t-shirt."),
        ("  ", ""),
    ],
)
def test_clean_caption(tokenised: str, natural: str) -> None:
    assert clean_caption(tokenised) == natural


_tokens = st.sampled_from(
    ["a", "dog", "dogs", "'", "'s", '"', ",", ".", "..", "!", ";", "(", ")", "#", "n't", "-", " "]
)


@given(st.one_of(st.text(), st.lists(_tokens).map(" ".join), st.lists(_tokens).map("".join)))
def test_clean_caption_is_stable(text: str) -> None:
    """Data that was cleaned when it was written is cleaned again when it is read."""
    once = clean_caption(text)
    assert clean_caption(once) == once
    assert "  " not in once
    assert not once or once[0] == once[0].upper()[:1]
    assert not once or once.rstrip("\"')")[-1] in ".!?" or not once.rstrip("\"')")


@given(st.lists(st.from_regex(r"[a-z]+", fullmatch=True), min_size=1))
def test_clean_caption_keeps_every_word(words: list[str]) -> None:
    assert clean_caption(" ".join(words)).rstrip(".").lower().split() == words


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_damaged_lists_of_captions_are_counted_by_line(tmp_path: Path, name: str) -> None:
    """Stops: a caption that is cut at its first comma, or learned in other letters than it was written in."""
    for number in range(1, 5):
        (tmp_path / f"{number}.jpg").write_bytes(JPEG)
    texts = ["a dog", "caf\u00e9", "a cat", "a bird"]
    if name.endswith("csv"):
        lines = [b"image,caption", b'1.jpg,"a dog', b"2.jpg,caf\xe9", b"3.jpg,a cat", b"4.jpg,a bird, wet"]
        reasons = {"bad CSV: a quote that is not closed": 1, "text is not UTF-8": 1, "more cells than columns": 1}
    else:
        rows = [
            json.dumps({"image": f"{n}.jpg", "caption": c}, ensure_ascii=False) for n, c in enumerate(texts, start=1)
        ]
        lines = [rows[0][:-1].encode(), rows[1].encode("cp1252"), rows[2].encode(), b"[]"]
        reasons = {"bad JSON": 1, "text is not UTF-8": 1, "JSON is not an object": 1}
    (tmp_path / name).write_bytes(b"\n".join(lines))
    records, errors = read(tmp_path)
    assert [(r.key, r.captions) for r in records] == [("3", ("a cat",))]
    assert errors.counts == reasons
    first = 2 if name.endswith("csv") else 1
    assert errors.examples["text is not UTF-8"] == [f"{name}:{first + 1}"]


@pytest.mark.parametrize("name", ["a\0.jpg", "x" * 5000 + ".jpg", "../a.jpg", "/a.jpg", "a.txt", "gone.jpg"])
def test_names_in_a_list_that_lead_nowhere_are_counted(tmp_path: Path, name: str) -> None:
    """Stops: a traceback for a name that the system refuses to look at."""
    (tmp_path / "list").mkdir()
    for file in ("a.jpg", "list/ok.jpg", "list/a.txt"):
        (tmp_path / file).write_bytes(JPEG)
    rows = [{"image": name, "caption": "x"}, {"image": "ok.jpg", "caption": "y"}]
    (tmp_path / "list" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, errors = read(tmp_path / "list")
    assert [r.key for r in records] == ["ok"]
    assert errors.total == 1


def test_only_line_ends_part_the_captions_of_a_file(tmp_path: Path) -> None:
    """Stops: a caption with a typographic line mark, U+2028, that counts as two."""
    for name, text in (("a", "one\u2028still one\x0cand\x85on\ntwo"), ("b", "three\r\nfour"), ("c", "five\rsix")):
        (tmp_path / f"{name}.jpg").write_bytes(JPEG)
        (tmp_path / f"{name}.txt").write_text(text, newline="")
    records, _ = read(tmp_path)
    assert [r.captions for r in records] == [
        ("one\u2028still one\x0cand\x85on", "two"),
        ("three", "four"),
        ("five", "six"),
    ]


def test_folders_in_folders_are_read_and_texts_without_an_image_counted(tmp_path: Path) -> None:
    """Stops: photos of a folder below left out without a word, because there are some above."""
    for name in ("top.jpg", "a/1.JPG", "a/deep/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
        (tmp_path / name).with_suffix(".TXT").write_text("a dog")
    (tmp_path / "a" / "orphan.txt").write_text("a cat")
    records, errors = read(tmp_path)
    assert {(r.key, r.source) for r in records} == {("top", tmp_path.name), ("a/1", "a"), ("a/deep/2", "deep")}
    assert errors.examples == {"text without an image beside it": [str(tmp_path / "a" / "orphan.txt")]}


def test_members_that_no_reader_takes_are_counted(tmp_path: Path) -> None:
    members = [
        ("a.heic", b"x"),
        ("a.txt", b"a dog"),
        ("b.mp4", b"x"),
        ("c.jpg", JPEG),
        ("c.txt", b"ok"),
        ("c.cls", b"3"),
    ]
    records, errors = read(write_tar(tmp_path / "t.tar", members))
    assert [r.key for r in records] == ["c"]
    assert errors.counts == {
        "member that is not read (.heic)": 1, "member that is not read (.mp4)": 1, "no image": 1
    }  # fmt: skip
