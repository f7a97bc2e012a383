"""Duplicates over a corpus: the right ones, the same ones in any order, in little memory, in linear time."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.duplicates.clusters import Clusters, shared_buckets
from mm_gpt.datasets.duplicates.documents import MIN_MEMORY, Duplicate, find_duplicates
from mm_gpt.datasets.duplicates.external_sort import MIN_ROWS, Sorter
from mm_gpt.datasets.duplicates.fingerprints import Fingerprints, write_fingerprints
from mm_gpt.datasets.duplicates.minhash import MinHash, agreement
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError

VOCABULARY = [f"w{number}" for number in range(3000)]


def words(seed: int, count: int = 100) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def document(name: str, text: str | Sequence[str], *images: bytes) -> Document:
    text = text if isinstance(text, str) else " ".join(text)
    return Document((Text(text), *(Image(data) for data in images)), id=name)


def edited(text: list[str], seed: int, changes: int) -> list[str]:
    """Words replaced here and there: each change takes up to five shingles of a hundred."""
    text, chance = list(text), random.Random(seed)
    for place in chance.sample(range(len(text)), changes):
        text[place] = f"new{chance.random()}"
    return text


def find(folder: Path, *parts: list[Document], minhash: MinHash | None = None, **options: object) -> list[Duplicate]:
    """The duplicates of partitions with these documents."""
    shutil.rmtree(folder, ignore_errors=True)
    errors = ErrorCounter()
    for index, part in enumerate(parts):
        write_fingerprints(part, folder / f"part-{index}", errors, minhash=minhash, looks=False, score=score)
    return list(find_duplicates([folder / f"part-{index}" for index in range(len(parts))], **options))  # type: ignore[arg-type]


def score(document: Document) -> float:
    return float(document.metadata.get("score", 0.0))


def as_pairs(found: list[Duplicate]) -> set[tuple[str, str, str]]:
    return {(duplicate.document, duplicate.reason, duplicate.duplicate_of) for duplicate in found}


def test_exact_and_near(tmp_path: Path) -> None:
    text = words(0)
    documents = [
        document("d", "An unrelated text."),
        document("c", edited(text, 1, 1)),
        document("b", " ".join(text).upper() + " !"),
        document("a", text),
        document("e", words(9)),
    ]
    assert as_pairs(find(tmp_path / "x", documents)) == {("b", "duplicate", "a"), ("c", "near duplicate", "a")}
    assert as_pairs(find(tmp_path / "x", documents, near=False)) == {("b", "duplicate", "a")}


def test_short_texts_and_images(tmp_path: Path) -> None:
    """Two photos with one caption are two documents; so are two short texts that differ a little."""
    documents = [
        document("a", "A dog runs.", b"one"),
        document("b", "A dog runs.", b"two"),
        document("c", "a dog runs", b"one"),
        document("d", "A dog runs."),
        document("e", "A dog runs. "),
        document("f", "?!"),
        document("g", "!!"),
        document("h", "? !"),
        document("i", ""),
        document("j", ""),
    ]
    expected = {("c", "duplicate", "a"), ("e", "duplicate", "d"), ("h", "duplicate", "f"), ("j", "duplicate", "i")}
    assert as_pairs(find(tmp_path / "x", documents)) == expected


def test_images_by_content_or_address(tmp_path: Path) -> None:
    """The same file under two names is the same; the same address is, without a fetch; broken ones are counted."""
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(b"not really an image")
    sources = [tmp_path / "one.png", tmp_path / "two.png", "http://a.example/x.png", "http://a.example/y.png"]
    documents = [Document((Image(source),), id=str(index)) for index, source in enumerate([*sources, sources[2]])]
    errors = ErrorCounter()
    write_fingerprints(documents, tmp_path / "part", errors)
    assert as_pairs(list(find_duplicates([tmp_path / "part"]))) == {("1", "duplicate", "0"), ("4", "duplicate", "2")}
    assert errors.counts == {"undecodable image": 2}


@pytest.mark.parametrize(("keep", "kept"), [("first", "a"), ("longest", "b"), ("best", "c")])
def test_which_one_is_kept(tmp_path: Path, keep: str, kept: str) -> None:
    text = words(0)
    documents = [
        Document((Text(" ".join(text)),), id="c", metadata={"score": -0.5}),
        Document((Text(" ".join([*text, "more"])),), id="b", metadata={"score": -2.0}),
        Document((Text(" ".join(text)),), id="a", metadata={"score": -1.0}),
        Document((Text(" ".join([*text, "end"])),), id="d", metadata={"score": -0.5}),
    ]
    found = find(tmp_path / "x", documents, keep=keep)
    assert {duplicate.duplicate_of for duplicate in found} == {kept}
    assert len(found) == 3


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_scores_order_as_numbers(tmp_path_factory: pytest.TempPathFactory, scores: list[float]) -> None:
    """Scores are compared by their bits: signs, zeros and infinities must still fall into place."""
    documents = [
        Document((Text("the same"),), id=f"{index}", metadata={"score": value}) for index, value in enumerate(scores)
    ]
    found = find(tmp_path_factory.mktemp("scores") / "x", documents, keep="best")
    best = min(range(len(scores)), key=lambda index: (-scores[index], str(index)))
    assert {duplicate.document for duplicate in found} == {str(i) for i in range(len(scores)) if i != best}


def families(seed: int) -> list[Document]:
    """Some texts and their edits, from almost equal to about the threshold."""
    chance = random.Random(seed)
    documents = []
    for family in range(6):
        text = words(seed * 100 + family)
        for member in range(chance.randint(1, 5)):
            documents.append(document(f"{family}-{member}", edited(text, member, member and chance.randint(0, 4))))
    return documents


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.integers(1, 4))
def test_the_order_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, seed: int, chance: random.Random, num_parts: int
) -> None:
    """Other machines, other files, other order: the same documents stay."""
    folder = tmp_path_factory.mktemp("order")
    documents = families(seed)
    expected = as_pairs(find(folder / "x", documents, window=2))
    chance.shuffle(documents)
    parts: list[list[Document]] = [[] for _ in range(num_parts)]
    for one in documents:
        parts[chance.randrange(num_parts)].append(one)
    found = find(folder / "x", *parts, window=2)
    assert as_pairs(found) == expected
    assert all(parts[int(one.partition[5:])][one.row].id == one.document for one in found)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [
            MinHash(),
            MinHash(num_hashes=16, threshold=0.6),
            MinHash(num_hashes=10, shingle_words=1, threshold=0.7, bands=10, rows=1),
        ]
    ),
)
def test_clusters_are_those_of_all_pairs(tmp_path_factory: pytest.TempPathFactory, seed: int, minhash: MinHash) -> None:
    """Brute force: every pair that shares a band and agrees enough is linked, and nothing else."""
    documents = families(seed)
    signatures = np.stack([minhash.signature(one.segments[0].text) for one in documents])  # type: ignore[union-attr]
    bands = minhash.band_hashes(signatures)
    cluster = list(range(len(documents)))
    for first in range(len(documents)):
        for second in range(first):
            shares = (bands[first] == bands[second]).any()
            if shares and agreement(signatures[first], signatures[second]) >= minhash.threshold:
                old, new = cluster[first], cluster[second]
                cluster = [new if value == old else value for value in cluster]
    members: dict[int, list[str]] = {}
    for one, root in zip(documents, cluster, strict=True):
        members.setdefault(root, []).append(one.id)
    expected = {(name, min(names)) for names in members.values() for name in names if name != min(names)}
    found = find(tmp_path_factory.mktemp("pairs") / "x", documents, minhash=minhash)
    assert {(one.document, one.duplicate_of) for one in found} == expected


def test_another_threshold_on_the_same_fingerprints(tmp_path: Path) -> None:
    """Signatures of a large corpus are made once."""
    text = words(0)
    write_fingerprints([document("a", text), document("b", edited(text, 1, 6))], tmp_path / "part", ErrorCounter())
    assert not list(find_duplicates([tmp_path / "part"]))
    assert len(list(find_duplicates([tmp_path / "part"], minhash=MinHash(threshold=0.4)))) == 1
    with pytest.raises(MMGPTError, match="made with num_hashes 128, not 64"):
        find_duplicates([tmp_path / "part"], minhash=MinHash(num_hashes=64))


def test_two_documents_of_one_id(tmp_path: Path) -> None:
    """Dropped by id, both would go: the row tells which one stays."""
    found = find(tmp_path / "x", [document("a", "same"), document("a", "same"), document("a", "different")])
    assert [(one.document, one.row, one.duplicate_of) for one in found] == [("a", 1, "a")]


def test_a_large_bucket_is_linear_and_whole(tmp_path: Path) -> None:
    """One page 5000 times, and a template with a number filled in: no quadratic time, and one of each stays."""
    minhash = MinHash(num_hashes=16)
    page, template = " ".join(words(0)), words(1, 200)
    same = [document(f"same-{index:05}", page) for index in range(5000)]
    filled = [document(f"page-{index:05}", [*template[:50], str(index), *template[50:]]) for index in range(2000)]
    found = find(tmp_path / "x", same, filled, minhash=minhash, memory=MIN_MEMORY)
    assert {one.duplicate_of for one in found} == {"same-00000", "page-00000"}
    assert len(found) == 6998


class Comparisons:
    """Counts pairs by way of the buckets alone."""

    def __init__(self, keys: list[int], window: int, block: int, max_rows: int) -> None:
        rows = np.column_stack([np.sort(np.array(keys, dtype=np.uint64)), np.arange(len(keys), dtype=np.uint64)])
        blocks: Iterator[np.ndarray] = iter([rows[start : start + block] for start in range(0, len(rows), block)])
        self.pairs = []
        for bucket in shared_buckets(blocks, window, max_rows):
            for first, second in bucket.pairs(window):
                numbers = bucket.rows[:, 1].astype(int)
                self.pairs += list(zip(numbers[first].tolist(), numbers[second].tolist(), strict=True))
        self.keys = rows[:, 0].tolist()


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_pairs_over_the_ends_of_blocks(keys: list[int], window: int, block: int, max_rows: int) -> None:
    """Each pair of neighbours in a bucket once, wherever blocks end."""
    found = Comparisons(keys, window, block, max_rows)
    near = [(i, j) for j in range(len(keys)) for i in range(max(0, j - window), j)]
    assert sorted(found.pairs) == sorted((i, j) for i, j in near if found.keys[i] == found.keys[j])


@given(st.integers(1, 30), st.data())
def test_union_find(size: int, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=40))
    clusters = Clusters(size, Path(), 1 << 20)
    expected = list(range(size))
    for first, second in pairs:
        low, high = sorted((expected[first], expected[second]))
        expected = [low if root == high else root for root in expected]
    links = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    clusters.link(links[:, 0], links[:, 1])
    assert clusters.roots(np.arange(size)).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4000), st.integers(1, 3), st.integers(1, 3000), st.integers(0, 2**32))
def test_sorting_on_disk(
    tmp_path_factory: pytest.TempPathFactory, size: int, columns: int, largest: int, seed: int
) -> None:
    """Runs of a few hundred rows: the same rows, in lexical order, twice."""
    rows = np.random.default_rng(seed).integers(0, largest, (size, columns), dtype=np.uint64)
    with closing(Sorter(tmp_path_factory.getbasetemp(), columns, 1)) as sorter:
        for part in np.array_split(rows, 7):
            sorter.add(part)
        expected = sorted(map(tuple, rows.tolist()))
        for _ in range(2):
            blocks = list(sorter.read())
            assert all(len(block) <= MIN_ROWS * 20 for block in blocks)
            assert [tuple(row) for block in blocks for row in block.tolist()] == expected


def test_fingerprints_go_back_and_forth(tmp_path: Path) -> None:
    """Rows and ids that are read here and there are those that were written, over partitions."""
    parts = [[document(f"{part}ü{index}", str(index)) for index in range(part * 700)] for part in range(4)]
    for index, part in enumerate(parts):
        write_fingerprints(part, tmp_path / f"p{index}", ErrorCounter(), minhash=MinHash(num_hashes=2, bands=1, rows=2))
    prints = Fingerprints([tmp_path / f"p{index}" for index in (2, 0, 3, 1)])
    everything = [one.id for part in parts for one in part]
    rows = np.array([0, 1, 5, 699, 700, 701, 1024, 2099, 2100, 4199])
    found = prints.read(rows)
    assert prints.ids(rows, found) == [everything[row] for row in rows]
    whole = np.concatenate([block for _, block in prints.blocks(300)])
    assert (whole[rows] == found).all()
    assert prints.locate(0) == ("p1", 0)
    assert prints.locate(2100) == ("p3", 0)


def test_bad_input(tmp_path: Path) -> None:
    errors = ErrorCounter()
    with pytest.raises(MMGPTError, match="document 1 has no id"):
        write_fingerprints([document("a", "x"), document("", "y")], tmp_path / "a", errors)
    with pytest.raises(MMGPTError, match=r"partition.json: missing or not a finished partition"):
        find_duplicates([tmp_path / "a"])
    with pytest.raises(MMGPTError, match="no partitions"):
        find_duplicates([])
    write_fingerprints([document("a", "x")], tmp_path / "a", errors)
    write_fingerprints([document("a", "x")], tmp_path / "b", errors, minhash=MinHash(num_hashes=10, shingle_words=1))
    write_fingerprints([document("a", "x")], tmp_path / "other" / "a", errors)
    with pytest.raises(MMGPTError, match="other MinHash settings"):
        find_duplicates([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(MMGPTError, match="same name"):
        find_duplicates([tmp_path / "a", tmp_path / "other" / "a"])
    with pytest.raises(ConfigError, match="memory is 5 bytes"):
        find_duplicates([tmp_path / "a"], memory=5)
    with pytest.raises(MMGPTError, match="score of document 'a' is not a number"):
        write_fingerprints([document("a", "x")], tmp_path / "c", errors, score=lambda _: float("nan"))
    with open(tmp_path / "a" / "rows.bin", "ab") as file:
        file.write(b"half a row")
    with pytest.raises(MMGPTError, match=r"rows.bin: \d+ bytes for 1 documents"):
        find_duplicates([tmp_path / "a"])


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert find(tmp_path / "x", [], []) == []


MEASURE = """
import json, resource, sys
from pathlib import Path
from mm_gpt.datasets.duplicates.documents import find_duplicates

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
count = sum(1 for _ in find_duplicates([Path(sys.argv[1])], memory=int(sys.argv[2])))
print(json.dumps({"growth": peak() - before, "count": count}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_stays_under_the_limit(tmp_path: Path) -> None:
    """60,000 fingerprints of 560 bytes, 34 MB, in 16 MiB."""
    minhash = MinHash(bands=4, rows=9)
    write_fingerprints([document("a", words(0))], tmp_path / "one", ErrorCounter(), minhash=minhash)
    (row,) = np.concatenate([block for _, block in Fingerprints([tmp_path / "one"]).blocks(1)])
    rows = np.repeat(np.array([row]), 60_000)
    chance = np.random.default_rng(0)
    for name in ("exact", "signature", "id_hash"):
        rows[name] = chance.integers(0, 2**32, rows[name].shape)
    rows["signature"][30_000:] = rows["signature"][:30_000]
    rows["signature"][30_000:, ::20] = 0  # seven of 128
    folder = tmp_path / "many"
    shutil.copytree(tmp_path / "one", folder)
    rows.tofile(folder / "rows.bin")
    about = json.loads((folder / "partition.json").read_text())
    (folder / "partition.json").write_text(json.dumps({**about, "documents": len(rows)}))
    command = [sys.executable, "-c", MEASURE, str(folder), str(MIN_MEMORY)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["count"] >= 30_000
    assert result["growth"] < 1.25 * MIN_MEMORY
