"""Images that come again over a corpus: all that are close are found, and the right ones go."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_gpt.datasets.duplicates.fingerprints import IMAGE_ROW, write_fingerprints
from mm_gpt.datasets.duplicates.images import FREQUENT, REPEATED, find_repeated_images, tables
from mm_gpt.datasets.duplicates.minhash import MinHash
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError


def picture(seed: int, *, side: int = 96, format: str = "PNG", quality: int = 60) -> bytes:
    """A smooth random picture, the same at every size."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    image = PILImage.fromarray(small).resize((side, side), PILImage.Resampling.BICUBIC)
    image.save(data, format=format, quality=quality)
    return data.getvalue()


def write(folder: Path, looks: list[list[int]]) -> Path:
    """A partition of documents with images of these looks."""
    documents = [Document((Text(f"document {index}"),), id=f"{index:04}") for index in range(len(looks))]
    write_fingerprints(documents, folder, ErrorCounter(), minhash=MinHash(num_hashes=2, bands=1, rows=2))
    rows = [(row, index, 1, 0, look) for row, part in enumerate(looks) for index, look in enumerate(part)]
    np.array(rows, dtype=IMAGE_ROW).tofile(folder / "images.bin")
    return folder


def test_a_logo_and_a_repeated_photo(tmp_path: Path) -> None:
    """The logo goes everywhere, resized and compressed or not; a photo stays, but once in a document."""
    logos = [picture(0), picture(0, side=120), picture(0, format="JPEG")]
    errors = ErrorCounter()
    parts = []
    for part in range(2):
        documents = []
        for index in range(3):
            sources = [logos[index], picture(10 * part + index + 1), logos[(index + 1) % 3]]
            if index == 2:
                sources.append(picture(10 * part + index + 1, format="JPEG"))
            documents.append(Document(tuple(Image(source) for source in sources), id=f"{part}-{index}"))
        parts.append(tmp_path / f"part-{part}")
        write_fingerprints(documents, parts[-1], errors)
    found = {
        (one.document, one.image, one.reason, one.num_documents) for one in find_repeated_images(parts, max_documents=5)
    }
    expected = {(f"{part}-{index}", image, FREQUENT, 6) for part in range(2) for index in range(3) for image in (0, 2)}
    assert found == expected | {(f"{part}-2", 3, REPEATED, 1) for part in range(2)}
    assert not errors.total
    few = {one.reason for one in find_repeated_images(parts, max_documents=6, once_per_document=False)}
    assert not few
    assert {one.reason for one in find_repeated_images(parts, max_documents=None)} == {REPEATED}


def test_without_looks_by_bytes_or_address(tmp_path: Path) -> None:
    errors = ErrorCounter()
    documents = [
        Document(
            (Image("http://a.example/logo.png"), Image(b"broken"), Image(f"http://a.example/{index}.png")),
            id=f"{index}",
        )
        for index in range(3)
    ]
    write_fingerprints(documents, tmp_path / "part", errors)
    found = list(find_repeated_images([tmp_path / "part"], max_documents=2))
    assert sorted((one.document, one.row, one.image) for one in found) == [
        (f"{i}", i, j) for i in range(3) for j in (0, 1)
    ]
    assert errors.counts == {"undecodable image": 3}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 3))
def test_clusters_are_those_of_all_pairs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, distance: int, max_documents: int
) -> None:
    """Brute force over all pairs of hashes, with distances around the limit."""
    chance = np.random.default_rng(seed)
    looks: list[int] = []
    for base in chance.integers(0, 2**64, 10, dtype=np.uint64).tolist():
        for _ in range(chance.integers(1, 5)):
            bits = chance.choice(64, chance.integers(0, distance + 3), replace=False)
            looks.append(base ^ sum(1 << int(bit) for bit in bits))
    cluster = list(range(len(looks)))
    for first, second in itertools.combinations(range(len(looks)), 2):
        if (looks[first] ^ looks[second]).bit_count() <= distance:
            old, new = cluster[first], cluster[second]
            cluster = [new if value == old else value for value in cluster]
    expected = {f"{i:04}" for i, root in enumerate(cluster) if cluster.count(root) > max_documents}
    folder = write(tmp_path_factory.mktemp("looks") / "part", [[look] for look in looks])
    found = find_repeated_images([folder], distance=distance, max_documents=max_documents)
    assert {one.document for one in found} == expected


@pytest.mark.parametrize("num_looks", [10, 10**5, 10**7, 10**10])
@pytest.mark.parametrize("distance", [1, 4, 8])
def test_some_table_always_meets(distance: int, num_looks: int) -> None:
    """Pigeonhole: whichever bits differ, one mask sees none of them; masks grow with the number of hashes."""
    masks = tables(distance, num_looks)
    chance = np.random.default_rng(0)
    for _ in range(300):
        difference = sum(1 << int(bit) for bit in chance.choice(64, distance, replace=False))
        assert any(mask & difference == 0 for mask in masks)
    assert all(0 < mask < 2**64 for mask in masks)
    if distance == 4:
        assert len(masks) == {10: 5, 10**5: 15, 10**7: 35, 10**10: 70}[num_looks]


def test_many_looks_in_linear_time(tmp_path: Path) -> None:
    """100,000 different pictures, and close pairs among them: all pairs would be five thousand million."""
    looks = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    looks[50_000:50_100] = looks[:100] ^ np.uint64(0b1011 << 30)
    folder = write(tmp_path / "part", [looks[start : start + 1000].tolist() for start in range(0, 100_000, 1000)])
    found = list(find_repeated_images([folder], max_documents=1))
    assert len(found) == 200


def test_bad_settings(tmp_path: Path) -> None:
    for options, message in (({"distance": 9}, "distance is 9"), ({"max_documents": 0}, "max_documents is 0")):
        with pytest.raises(ConfigError, match=message):
            find_repeated_images([tmp_path], **options)  # type: ignore[arg-type]


def test_no_images(tmp_path: Path) -> None:
    assert list(find_repeated_images([write(tmp_path / "part", [[], []])])) == []
