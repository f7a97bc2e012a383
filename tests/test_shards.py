"""Corpora on disk: what is written comes back, others' tars are read, and nothing in one breaks the whole."""

import contextlib
import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.building import shards
from mm_gpt.datasets.building.members import from_members, to_members
from mm_gpt.datasets.building.shards import (
    BLOCK,
    Corpus,
    Shard,
    ShardInfo,
    ShardWriter,
    index_path,
    index_tar,
    read_corpus,
    write_corpus_file,
)
from mm_gpt.datasets.loading import store
from mm_gpt.datasets.loading.store import cache_of
from mm_gpt.datasets.samples import (
    BadRecordError,
    Conversation,
    ErrorCounter,
    QuestionAnswer,
    Record,
    Sample,
    split_name,
)
from mm_gpt.document import Concepts, Document, Image, Text
from mm_gpt.errors import MMGPTError


def encoded(seed: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    make_picture(seed, (8, 8)).save(data, kind)
    return data.getvalue()


PICTURES = [encoded(0), encoded(1, "JPEG"), encoded(2, "WEBP")]


def page(number: int, *, images: int = 1) -> Document:
    parts = [Image(encoded(10 * number + n), alt=f"picture {n}") for n in range(images)]
    return Document((Text(f"Page {number}."), *parts, Text("Its end.")), id=f"page-{number}")


def write(folder: Path, samples: Sequence[Sample], *, shard_bytes: int = 2**20) -> Path:
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for sample in samples:
        writer.add(sample)
    write_corpus_file(folder, writer.close(), {"made": "by a test"})
    return folder


def make_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captioned(*keys: str) -> list[tuple[str, bytes]]:
    """As img2dataset writes them."""
    return [
        (f"{key}.{suffix}", data)
        for number, key in enumerate(keys)
        for suffix, data in (
            ("jpg", encoded(number, "JPEG")),
            ("json", json.dumps({"caption": f"caption of {key}", "url": "https://e/x"}).encode()),
            ("txt", f"caption of {key}".encode()),
        )
    ]


def all_of(shard: Shard) -> tuple[list[Sample], Counter[str]]:
    found: list[Sample] = []
    errors: Counter[str] = Counter()
    for number in range(len(shard)):
        try:
            found.append(shard.sample(number))
        except BadRecordError as error:
            errors[str(error)] += 1
    return found, errors


# ---- what is written comes back ----

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
METADATA = st.dictionaries(TEXTS, JSON, max_size=3)
IMAGES = st.builds(Image, st.sampled_from(PICTURES), alt=TEXTS)
KEYS = st.text("abc.é/", min_size=1, max_size=8)
DOCUMENTS = st.builds(
    Document,
    st.lists(st.builds(Text, TEXTS, is_target=st.booleans()) | IMAGES, max_size=6).map(tuple),
    id=KEYS,
    metadata=METADATA,
)
QUESTIONS = st.builds(QuestionAnswer, TEXTS, TEXTS, st.lists(TEXTS, max_size=2).map(tuple))
RECORDS = st.builds(
    Record,
    KEYS,
    st.sampled_from(PICTURES),
    st.lists(TEXTS, max_size=3).map(tuple),
    st.lists(QUESTIONS, max_size=2).map(tuple),
    TEXTS.filter(bool),
    METADATA,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": TEXTS | st.lists(TEXTS | IMAGES, max_size=3)},
    optional={"complete": st.booleans()},
)
CONVERSATIONS = st.builds(Conversation, KEYS, st.lists(MESSAGES, max_size=3).map(tuple), TEXTS.filter(bool), METADATA)


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENTS | RECORDS | CONVERSATIONS, max_size=4), st.sampled_from([2_000, 2**20]))
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], size: int) -> None:
    """Stops: a text, alternative text, flag or metadata value that gets lost, and one that lands in another sample."""
    folder = write(tmp_path_factory.mktemp("corpus"), samples, shard_bytes=size)
    errors = ErrorCounter()
    assert list(read_corpus(str(folder), errors)) == samples
    assert errors.total == 0
    assert len(Corpus(folder)) == len(samples)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    """Stops: times, owners or chance in a tar; and a digest that does not notice other contents of the same size."""
    samples = [page(n, images=n % 3) for n in range(9)]
    one = write(tmp_path / "one", samples, shard_bytes=9_000)
    time.sleep(1.1)  # tar keeps whole seconds
    other = write(tmp_path / "other", samples, shard_bytes=9_000)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert len([name for name in names if name.endswith(".tar")]) > 2
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    changed = write(tmp_path / "changed", [Document((Text("abc"),)), Document((Text("abd"),))])
    again = write(tmp_path / "again", [Document((Text("abc"),)), Document((Text("abe"),))])
    (a,), (b,) = Corpus(changed).shards, Corpus(again).shards
    assert (a.samples, a.num_bytes) == (b.samples, b.num_bytes)
    assert a.digest != b.digest


def test_shards_hold_about_what_was_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, [page(n) for n in range(40)], shard_bytes=20_000)
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    assert max(sizes) <= 20_000 + 10_240  # the end of a tar is padded
    assert min(sizes[:-1]) > 10_000
    assert not list(folder.glob(".*"))


def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    write(tmp_path, [page(n, images=2) for n in range(3)])
    found = list(webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False, empty_check=False))
    assert len(found) == 3
    assert [json.loads(sample["json"])["id"] for sample in found] == ["page-0", "page-1", "page-2"]
    assert {key for key in found[0] if not key.startswith("__")} == {"json", "0.png", "1.png"}


class Odd:
    """What no JSON holds."""


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Document((Image("https://e/a.jpg"),)), "not fetched"),
        (Document((Image(b"GIF89a and so on"),)), "format gif"),
        (Document((Image(b"<html>"),)), "format unknown"),
        (Document((Image(Path("/nowhere/a.jpg")),)), "unreadable image file"),
        (Document((), ((Text("a"),),)), "branches"),
        (Document((Text("half a pair \ud83d"),)), "not Unicode"),
        (Document((), metadata={"score": float("nan")}), "not JSON"),
        (Document((), metadata={"odd": Odd()}), "not JSON"),
        (Record("a", "https://e/a.jpg", ("a caption",)), "not fetched"),
        (Conversation("a", ({"role": "user", "content": [{"type": "image", "image": "a.jpg"}]},)), "part of a message"),
        (Conversation("a", ({"role": "user", "content": [7]},)), "part of a message"),
    ],
)
def test_what_no_shard_can_hold(tmp_path: Path, sample: Sample, reason: str) -> None:
    """Stops: a build that dies over one sample, and half a sample in a tar."""
    writer = ShardWriter(tmp_path)
    writer.add(page(0))
    with pytest.raises(BadRecordError, match=reason):
        writer.add(sample)
    writer.add(page(1))
    write_corpus_file(tmp_path, writer.close(), {})
    assert list(read_corpus(str(tmp_path), ErrorCounter())) == [page(0), page(1)]


def test_parts_of_messages_as_people_write_them() -> None:
    parts = [{"type": "text", "text": "What?"}, {"type": "image", "image": PICTURES[0]}, "And?"]
    members = to_members(Conversation("a", ({"role": "user", "content": parts},)))
    read = from_members("a", members)
    assert isinstance(read, Conversation)
    assert read.messages[0]["content"] == ["What?", Image(PICTURES[0]), "And?"]


def test_concepts_come_back() -> None:
    record = Record(
        "a", Concepts({"golden retriever": 0.8}), ("A dog.",), (QuestionAnswer("What?", "dog", ("dog",)),), "s"
    )
    members = to_members(record)
    assert list(members) == ["json"]
    assert from_members("x", members) == record
    bad = {"json": members["json"].replace(b"0.8", b"8")}
    with pytest.raises(BadRecordError, match="not a number from 0 to 1"):
        from_members("x", bad)


@pytest.mark.parametrize(
    "values",
    [
        {"segments": [{"image": ["a"]}]},
        {"segments": [{"image": "json"}]},
        {"segments": [{"image": "9.png"}]},
        {"segments": [{"text": "a", "image": "0.png"}]},
        {"segments": [{"text": None}]},
        {"segments": ["a"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": ["user"], "content": "a"}]},
        {"messages": ["a"]},
        {"image": "0.png", "qa": 3},
        {"image": "0.png", "qa": ["a"]},
        {"image": "0.png", "qa": [], "captions": 3},
        {"image": "0.png", "qa": [], "captions": "abc"},
        {"captions": [3]},
        [],
    ],
)
def test_malformed_samples(values: Any) -> None:
    """Stops: TypeErrors and KeyErrors that would end a run of days."""
    with pytest.raises(BadRecordError):
        from_members("a", {"json": json.dumps(values).encode(), "0.png": PICTURES[0]})


@pytest.mark.parametrize(
    "data",
    [b'{"segments": [{"text": "\\ud83d"}]}', b'{"segments": [{"text": "\xed\xa0\x80"}]}', b"[" * 100_000, b"\xff", b""],
)
def test_bad_json(data: bytes) -> None:
    """Stops: half surrogate pairs, at which tokenizers raise TypeError in the middle of training."""
    with pytest.raises(BadRecordError, match="JSON"):
        from_members("a", {"json": data})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["segments", "messages", "image", "qa", "captions", "id", "metadata"]), JSON))
def test_any_json_is_a_sample_or_a_bad_record(values: dict[str, Any]) -> None:
    with contextlib.suppress(BadRecordError):
        from_members("a", {"json": json.dumps(values).encode(), "jpg": PICTURES[1], "0.png": PICTURES[0]})


# ---- tars that others wrote ----


def test_img2dataset(tmp_path: Path) -> None:
    shard = Shard(make_tar(tmp_path / "00000.tar", captioned("000000000", "000000001", "000000002")))
    samples, errors = all_of(shard)
    assert not errors
    assert [s.captions for s in samples if isinstance(s, Record)] == [
        (f"caption of 00000000{number}",) for number in range(3)
    ]
    assert samples[1].metadata == {"url": "https://e/x"}


LONG = "a folder/" * 30


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["plain", "a/b/plain", "é中", LONG + "a", "x" * 150, "a.folder/b"])
def test_names_of_every_kind(tmp_path: Path, format: int, name: str) -> None:
    """Stops: an index that begins a sample behind its pax or long-name headers, and so gives it the name before."""
    shard = Shard(make_tar(tmp_path / "a.tar", captioned("first", name, name + "2", "last"), format))
    samples, errors = all_of(shard)
    assert not errors
    assert [s.captions[0] for s in samples if isinstance(s, Record)] == [
        f"caption of {key}" for key in ("first", name, name + "2", "last")
    ]
    assert [shard.read(n)[0] for n in range(4)] == ["first", name, name + "2", "last"]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", captioned("aXa", "b"))
    data = bytearray(tar.read_bytes())
    for _ in range(3):
        start = data.index(b"aXa.")
        block = start // BLOCK * BLOCK
        data[start + 1] = 0xE9
        data[block + 148 : block + 156] = b" " * 8
        data[block + 148 : block + 156] = f"{sum(data[block : block + BLOCK]):06o}\0 ".encode()
    tar.write_bytes(data)
    samples, errors = all_of(Shard(tar))
    assert len(samples) == 2
    assert not errors


def test_other_members_are_never_read(tmp_path: Path) -> None:
    """Stops: code in a pickle, a link out of the tar, and a folder or README that breaks a sample in two."""
    marker = tmp_path / "run"
    evil = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))

        add("./", kind=tarfile.DIRTYPE)
        add("README", b"about it")
        for key in ("a", "b"):
            add(f"{key}.jpg", PICTURES[1])
            add(f"{key}.pkl", evil)
            add(f"{key}.npy", pickle.dumps([1]))
            add(f"{key}.txt", b"a caption")
            add("LICENCE", b"free")
        add("c.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("c.txt", b"a caption")
        add("d.jpg", kind=tarfile.LNKTYPE, link="a.jpg")
        add("e.jpg", PICTURES[1])
        add("e", kind=tarfile.DIRTYPE)
        add("e.fifo", kind=tarfile.FIFOTYPE)
        add("e.txt", b"a caption")
    samples, errors = all_of(Shard(tmp_path / "a.tar"))
    assert [s.key for s in samples if isinstance(s, Record)] == ["a", "b", "e"]
    assert errors == {"no image": 1}
    assert not marker.exists()


def test_doubled_members_and_keys(tmp_path: Path) -> None:
    members = captioned("a", "b")
    tar = make_tar(tmp_path / "a.tar", [*members[:3], *members[:1], *members[3:], *captioned("a")])
    samples, errors = all_of(Shard(tar))
    assert errors == {"duplicate member": 1}
    assert [s.key for s in samples if isinstance(s, Record)] == ["b", "a"]  # the same key later: another sample


def test_huge_and_sparse_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: memory for what a header claims, and an index that takes a sparse member's size for its place."""
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 3_000)
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 20_000)
    members = [*captioned("a"), ("b.jpg", PICTURES[1]), ("b.json", b" " * 4_000), *captioned("c")]
    members += [("d.jpg", PICTURES[1]), ("d.mp4", b"0" * 8_000), ("d.txt", b"a caption")]  # nobody reads that
    members += [("e.jpg", PICTURES[1]), ("e.mp4", b"0" * 30_000), *captioned("f")]
    samples, errors = all_of(Shard(make_tar(tmp_path / "a.tar", members)))
    assert [s.key for s in samples if isinstance(s, Record)] == ["a", "c", "d", "f"]
    assert errors == {"member too large": 1, "sample too large": 1}

    pax = io.BytesIO()
    with tarfile.open(fileobj=pax, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in captioned("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        hole = b"1\n0\n10\n".ljust(BLOCK, b"\0") + b"0123456789"
        info = tarfile.TarInfo("b.json")
        info.size = len(hole)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.json"}
        info.pax_headers["GNU.sparse.realsize"] = str(10**12)
        tar.addfile(info, io.BytesIO(hole))
        for name, data in captioned("c"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "b.tar").write_bytes(pax.getvalue())
    samples, errors = all_of(Shard(tmp_path / "b.tar"))
    assert [s.key for s in samples if isinstance(s, Record)] == ["a", "c"]
    assert errors == {"member too large": 1}


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with any size in it, and a right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "bad",
    [
        header("b.jpg", b"-1000"),  # the next header is this one
        header("b.jpg", b"\xff" * 12),
        header("b.jpg", b"\x80" + b"\xff" * 11),
        header("b.jpg", b"nonsense"),
        header("./././@PaxHeader", b"77777777777", b"x"),
        header("././@LongLink", b"77777777777", b"L"),
        header("././@LongLink", b"-1000", b"L"),
        header("././@PaxHeader", b"1000", b"x") * 2,
        header("a", b"1000", b"x") + b"30 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(BLOCK, b"\0"),
        b"\x01" * BLOCK,
        header("b.jpg", b"1000")[:200],
    ],
)
def test_hostile_headers(tmp_path: Path, bad: bytes) -> None:
    """Stops: a loop without end, 8 GiB of memory for a name, and the end of a run: what is before them is read."""
    good = make_tar(tmp_path / "good.tar", captioned("a", "c")).read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % BLOCK)
    (tmp_path / "a.tar").write_bytes(good + bad + bytes(3 * BLOCK))
    errors = ErrorCounter()
    shard = Shard(tmp_path / "a.tar", errors)
    samples, bad_records = all_of(shard)
    assert [s.key for s in samples if isinstance(s, Record)] == ["a", "c"]
    assert errors.counts["broken tar, rest of it unread"] == 1, bad_records
    # ... and with an index that includes them.
    np.save(index_path(tmp_path / "a.tar"), np.array([0, len(good), len(good) + len(bad) // BLOCK * BLOCK + BLOCK]))
    assert all_of(Shard(tmp_path / "a.tar"))[1].total() in (1, 2)


def test_not_a_tar(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="No such file"):
        Shard(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "c.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "d.tar", "w:gz") as tar:
        tar.add(tmp_path / "b.tar")
    for name in "bcd":
        with pytest.raises(MMGPTError, match=f"{name}.tar: not an uncompressed tar"):
            Shard(tmp_path / f"{name}.tar")
    with pytest.raises(MMGPTError, match="is a folder"):
        Shard(tmp_path)
    make_tar(tmp_path / "e.tar", [])
    assert len(Shard(tmp_path / "e.tar")) == 0


# ---- the index ----


def brute_force(path: Path) -> list[tuple[str, list[str]]]:
    """Key and member names of each sample, from reading every header in order."""
    found: list[tuple[str, list[str]]] = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = Path(member.name).name.partition(".")
            key = member.name.removesuffix(f".{suffix}")
            if not found or found[-1][0] != key:
                found.append((key, []))
            found[-1][1].append(suffix)
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from(["", "é/", "long/" * 30]),
)
def test_the_index_is_that_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, int]], format: int, folder: str
) -> None:
    path = tmp_path_factory.mktemp("index") / "a.tar"
    members = [(f"{folder}{key}.{n}.txt", bytes(n * 300)) for key, count in samples for n in range(count + 1)]
    names = [name for name, _ in members]
    members = [member for number, member in enumerate(members) if member[0] not in names[:number]]
    shard = Shard(make_tar(path, members, format if folder != "long/" * 30 else tarfile.PAX_FORMAT))
    expected = brute_force(path)
    assert len(shard) == len(expected)
    for number, (key, suffixes) in enumerate(expected):
        read_key, read = shard.read(number)
        assert (read_key, list(read)) == (key, suffixes)


def test_the_writers_index_is_that_of_the_tar(tmp_path: Path) -> None:
    write(tmp_path, [page(n, images=n % 4) for n in range(20)])
    tar, errors = tmp_path / "shard-00000.tar", ErrorCounter()
    assert index_tar(tar, errors).tolist() == np.load(index_path(tar)).tolist()
    assert errors.total == 0


@pytest.mark.parametrize("has_index", [True, False])
def test_a_tar_that_was_cut_short(tmp_path: Path, has_index: bool) -> None:
    """At every block: what is whole is read, what is not is counted, nothing is half a sample."""
    pages = [page(n, images=2) for n in range(4)]
    write(tmp_path, pages)
    tar = tmp_path / "shard-00000.tar"
    data, offsets = tar.read_bytes(), np.load(index_path(tar)).tolist()
    if not has_index:
        index_path(tar).unlink()
    for size in (*range(BLOCK, len(data) - 10_240, BLOCK), offsets[2] + 100, offsets[3] - 1):
        tar.write_bytes(data[:size])
        errors = ErrorCounter()
        shard = Shard(tar, errors)
        samples, bad = all_of(shard)
        whole = sum(end <= size for end in offsets[1:])
        assert samples[:whole] == pages[:whole]
        assert len(samples) == whole
        if has_index:
            assert bad == {"the tar is cut short": 4 - whole}
        elif size < offsets[-1]:
            assert errors.counts["broken tar, rest of it unread"] == 1


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 not a zip",
        pickle.dumps([0, 512]),
        np.array([0, 512, 512]),
        np.array([512, 0]),
        np.array([-512, 0, 512]),
        np.array([0.0, 512.0]),
        np.array([[0, 512]]),
        np.array([], dtype=np.int64),
        np.array([0, "a"], dtype=object),
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(117)
        + b"\n",
    ],
)
def test_broken_indexes(tmp_path: Path, index: bytes | np.ndarray) -> None:
    """Stops: pickles, memory for numbers that are not there, and samples at places before the file's start."""
    write(tmp_path, [page(0)])
    path = index_path(tmp_path / "shard-00000.tar")
    if isinstance(index, bytes):
        path.write_bytes(index)
    else:
        np.save(path, index, allow_pickle=True)
    with pytest.raises(MMGPTError, match="broken index"):
        Shard(tmp_path / "shard-00000.tar")


def test_an_index_of_another_tar(tmp_path: Path) -> None:
    """Stops: crashes on what is no header, and samples whose number is not there."""
    write(tmp_path, [page(n) for n in range(3)])
    tar = tmp_path / "shard-00000.tar"
    end = tar.stat().st_size
    for offsets in ([0, 700, end], [BLOCK, 3 * BLOCK, end], [end, end + BLOCK], [0, 2**62], [100, 2_000]):
        np.save(index_path(tar), np.array(offsets))
        shard = Shard(tar)
        assert all_of(shard)[1].total() >= 1
        for number in (-1, len(shard)):
            with pytest.raises(BadRecordError, match="no such sample"):
                shard.sample(number)


def test_a_member_is_missing(tmp_path: Path) -> None:
    members = to_members(page(0, images=2))
    kept = [(f"a.{suffix}", data) for suffix, data in members.items() if suffix != "1.png"]
    tar = make_tar(tmp_path / "a.tar", [*kept, *((f"b.{suffix}", data) for suffix, data in members.items())])
    samples, errors = all_of(Shard(tar))
    assert samples == [page(0, images=2)]
    assert errors == {"missing image": 1}


# ---- corpora ----


def test_missing_and_wrong_shards_are_counted(tmp_path: Path) -> None:
    pages = [page(n) for n in range(40)]
    corpus = Corpus(write(tmp_path, pages, shard_bytes=20_000))
    assert len(corpus.shards) > 3
    (tmp_path / corpus.shards[1].name).unlink()
    index_path(tmp_path / corpus.shards[2].name).write_bytes(b"broken")
    errors = ErrorCounter()
    left = list(Corpus(tmp_path).samples(errors))
    gone = [page for page in pages if page not in left]
    assert len(gone) == corpus.shards[1].samples + corpus.shards[2].samples
    assert errors.counts == {"missing shard": 2}
    shutil.copy(tmp_path / corpus.shards[3].name, tmp_path / corpus.shards[0].name)
    shutil.copy(index_path(tmp_path / corpus.shards[-1].name), index_path(tmp_path / corpus.shards[0].name))
    with pytest.raises(MMGPTError, match=r"samples, not the \d+ of corpus.json"):
        Corpus(tmp_path).shard(0)


GOOD = {"name": "a.tar", "samples": 1, "bytes": 1}


@pytest.mark.parametrize(
    "values",
    [
        "",
        "[",
        "[]",
        "[" * 100_000,
        {},
        {"version": 99, "shards": []},
        {"version": 1, "shards": 3},
        {"version": 1, "shards": ["a.tar"]},
        {"version": 1, "shards": [{"name": "a.tar"}]},
        *(
            {"version": 1, "shards": [GOOD | {"name": name}]}
            for name in ("../x.tar", "/etc/x.tar", "a/b.tar", "a\\b.tar", "a.tar\0", ".tar", "x.pkl", "", 3, None, "..")
        ),
        *({"version": 1, "shards": [GOOD | {"samples": count}]} for count in (-1, 1e999, "many", None, 1.5)),
    ],
)
def test_broken_descriptions(tmp_path: Path, values: Any) -> None:
    """Stops: a name that leads out of the folder, and errors that name no file."""
    (tmp_path / "corpus.json").write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(MMGPTError, match=r"corpus\.json|no name of a shard"):
        Corpus(tmp_path)


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match=r"corpus\.json: No such file"):
        Corpus(tmp_path)


def test_a_few_shards_stay_open(tmp_path: Path) -> None:
    """Stops: a file handle for each of ten thousand shards, also when two threads open them at once."""
    corpus = Corpus(write(tmp_path, [page(n) for n in range(40)], shard_bytes=3_000))
    assert len(corpus.shards) == 40
    failures: list[BaseException] = []

    def read_all(order: range) -> None:
        try:
            for _ in range(3):
                for number in order:
                    assert corpus.shard(number).sample(0) == page(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read_all, args=(order,)) for order in (range(40), range(39, -1, -1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(corpus._open) <= 17


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, its URL, and what was asked for."""
    monkeypatch.setenv("MM_GPT_PRIVATE_ADDRESSES", "1")
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path / "cache"))
    folder, seen = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            seen.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_a_corpus_at_a_url(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """Copied once, its index as well; a shard that the server lacks is counted."""
    folder, url, seen = served
    pages = [page(n) for n in range(12)]
    write(folder, pages, shard_bytes=10_000)
    errors = ErrorCounter()
    corpus = Corpus(url)
    assert list(corpus.samples(errors)) == pages
    assert errors.total == 0
    assert any(path.endswith(".index.npy") for path in seen)
    assert not (folder / ".index").exists()
    assert tmp_path / "cache" in cache_of(corpus).parents
    (folder / corpus.shards[1].name).unlink()
    shutil.rmtree(tmp_path / "cache")
    index_path(folder / corpus.shards[2].name).unlink()  # made from the tar then
    left = list(Corpus(url).samples(errors))
    assert len(left) == 12 - corpus.shards[1].samples
    assert errors.counts == {"missing shard": 1}


def test_tables_are_kept_elsewhere_for_other_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store.os, "access", lambda *_: False)
    one, other = (Corpus(write(tmp_path / name, [page(0)])) for name in ("one", "other"))
    assert cache_of(one) != cache_of(other)
    assert (tmp_path / "cache") in cache_of(one).parents


def test_shard_names_stay_as_written() -> None:
    assert ShardInfo("a.tar", 1, 2).digest == ""  # corpora of before have none


@given(st.sampled_from(["", "x/", "x.y/", "./", "/x/y/"]), st.text(alphabet="ab._", max_size=8))
def test_names_are_split_as_webdataset_does(folder: str, name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(folder + name) == base_plus_ext(folder + name)
