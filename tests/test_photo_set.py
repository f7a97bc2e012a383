"""The set of photos: its table, damaged packages and resource files, and what is written. No network."""

import hashlib
import io
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as PILImage
from test_debian_corpora import make_deb, png

from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.naming import QUESTION
from mm_gpt.vision.imagenet import CLASSES

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("photo_set", reason="the examples are not installed")

import photo_set  # noqa: E402

ZEBRA, CORN = 340, 987
FREE = re.compile(r"GPL-[23]\+?|CC0-1\.0|CC-BY(-SA)?-[1-4]\.[05]|public-domain")


def make_rcc(files: dict[str, bytes], *, packed: bool = False) -> bytes:
    """A Qt resource file, format version 2, with all files in one folder "a"."""
    names, tree, contents = b"", b"", b""

    def name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    tree += struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    tree += struct.pack(">IHIIQ", name("a"), 2, len(files), 2, 0)
    for path, content in files.items():
        kept = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        tree += struct.pack(">IHHHIQ", name(path), int(packed), 0, 0, len(contents), 0)
        contents += struct.pack(">I", len(kept)) + kept
    start = 20
    return (
        struct.pack(">4s4I", b"qres", 2, start, start + len(tree), start + len(tree) + len(contents))
        + tree
        + contents
        + names
    )


def test_the_table_is_what_it_says() -> None:
    """Stops: a licence that is not free, a photo twice, a class of too many photos, a shrunken set."""
    photos = photo_set.read_table()
    assert len(photos) >= 90
    assert len({photo.sha256 for photo in photos}) == len(photos)
    counts = Counter(photo.index for photo in photos)
    assert max(counts) < len(CLASSES)
    assert max(counts.values()) <= photo_set.MAX_OF_A_CLASS
    assert all(FREE.fullmatch(photo.licence) for photo in photos)


@pytest.mark.parametrize("packed", [False, True])
def test_resource_files(packed: bool) -> None:
    files = {"b.png": b"one", "ü.webp": b"two" * 100}
    assert photo_set.read_resources(make_rcc(files, packed=packed)) == {f"a/{k}": v for k, v in files.items()}


def test_damaged_resource_files() -> None:
    """Stops: a crash, or an endless walk through a tree that runs in a circle."""
    whole = make_rcc({"b.png": b"content"}, packed=True)
    for length in (0, 3, 19, 30, 70):
        with pytest.raises(ValueError, match="Qt resource file"):
            photo_set.read_resources(whole[:length])
    circle = bytearray(whole)
    struct.pack_into(">II", circle, 20 + 22 + 6, 2, 0)  # folder "a" holds the root
    with pytest.raises(ValueError, match="damaged"):
        photo_set.read_resources(bytes(circle))
    zstd = bytearray(whole)
    struct.pack_into(">H", zstd, 20 + 44 + 4, 4)
    with pytest.raises(ValueError, match="zstd"):
        photo_set.read_resources(bytes(zstd))


def test_an_unfolding_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_set, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        photo_set.read_resources(make_rcc({"b": bytes(10_000)}, packed=True))


def transparent(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGBA", size, (255, 0, 0, 0)).save(out, "PNG")
    return out.getvalue()


def photo(path: str, data: bytes, index: int) -> photo_set.Photo:
    digest = hashlib.sha256(data).hexdigest()
    return photo_set.Photo("debian", "pictures", "1:2.0", path, digest, "CC0-1.0", "Ann Ode", index)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a package that need not be fetched: a picture, and one inside a resource file."""
    folder = tmp_path / "work" / "pictures-1:2.0"
    folder.mkdir(parents=True)
    members = [("./usr/corn.png", transparent((800, 400))), ("./usr/x.rcc", make_rcc({"zebra.png": png("blue")}))]
    (folder / "pictures_1%3a2.0_all.deb").write_bytes(make_deb(list(members)))
    return tmp_path / "work"


def test_what_is_written(work: Path, tmp_path: Path) -> None:
    """Stops: pictures on black, of any size, under another photo's class; a tar that the project does not read."""
    photos = [photo("usr/corn.png", transparent((800, 400)), CORN), photo("usr/x.rcc!a/zebra.png", png("blue"), ZEBRA)]
    out = tmp_path / "photos.tar"
    photo_set.write_set(photos, out, work)
    errors = ErrorCounter()
    corn, zebra = read_records(out, errors)
    assert not errors.counts
    assert corn.metadata == {"class": CORN, "name": "corn", "licence": "CC0-1.0", "author": "Ann Ode"}
    assert corn.source == "pictures 1:2.0 usr/corn.png"
    assert [(pair.question, pair.answer) for pair in zebra.questions] == [(QUESTION, "zebra")]
    assert isinstance(corn.image, bytes)
    with PILImage.open(io.BytesIO(corn.image)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (384, 192))
        assert picture.getpixel((100, 100)) == (255, 255, 255)
    first = out.read_bytes()
    photo_set.write_set(photos, out, work)
    assert out.read_bytes() == first


def test_what_is_not_as_the_table_says(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: another file of the same name in the set, and errors that do not name it."""
    wrong = {
        "usr/corn.png is not the file that the table names": photo("usr/corn.png", b"other", CORN),
        "holds no usr/none.png": photo("usr/none.png", b"", CORN),
        "holds no usr/x.rcc!a/none.png": photo("usr/x.rcc!a/none.png", b"", CORN),
        "usr/corn.png: not a Qt resource file": photo("usr/corn.png!a/b.png", b"", CORN),
    }
    for message, one in wrong.items():
        with pytest.raises(MMGPTError, match=message.replace(".", r"\.")):
            photo_set.write_set([one], tmp_path / "photos.tar", work)
    four = [photo("usr/corn.png", transparent((800, 400)), CORN)] * 4
    with pytest.raises(MMGPTError, match="4 photos of class 987, more than 3"):
        photo_set.write_set(four, tmp_path / "photos.tar", work)
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get there
    with pytest.raises(MMGPTError, match=r"apt-get download pictures=1:2\.0: .*No such file"):
        photo_set.write_set([photo("usr/corn.png", b"", CORN)], tmp_path / "photos.tar", tmp_path / "elsewhere")
    assert not (tmp_path / "photos.tar").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"registry": "ftp"},
        {"package": "--option"},
        {"package": "../../etc"},
        {"version": "-1"},
        {"version": "1 --option"},
        {"sha256": "0"},
        {"licence": ""},
        {"class": "-1"},
        {"class": "zebra"},
        {"class": "1000"},
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, str]) -> None:
    """Stops: a table whose fields reach a command line as options or paths."""
    good = dict(zip(photo_set.COLUMNS, ("debian", "a", "1.0", "usr/b.png", "0" * 64, "GPL-2", "", "340"), strict=True))
    table = tmp_path / "photos.tsv"
    lines = [photo_set.COLUMNS, list(good.values()), list((good | change).values())]
    table.write_text("".join("\t".join(line) + "\n" for line in lines))
    with pytest.raises(MMGPTError, match=r"photos\.tsv:3: not a photo"):
        photo_set.read_table(table)
    table.write_text("package\n")
    with pytest.raises(MMGPTError, match="columns"):
        photo_set.read_table(table)
    with pytest.raises(MMGPTError, match="No such file"):
        photo_set.read_table(tmp_path / "none.tsv")
