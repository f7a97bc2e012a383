"""The page of photos drawn by chance: what is on it, that it is what was drawn, and whose photos they are."""

import csv
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_harness import png, write_tar

ROOT = Path(__file__).resolve().parent.parent
PAGE: dict[str, Any] = runpy.run_path(str(ROOT / "examples/photo_page.py"))
BEAGLE, TEAPOT = 162, 849


def about(index: int, name: str, licence: str = "CC-BY-2.0", author: str = "") -> dict[str, Any]:
    asked = [{"question": "What is it?", "answer": name}]
    values = {"class": index, "name": name, "licence": licence, "author": author, "qa": asked}
    return values | {"source": "some-photos 1.2 usr/a/b.webp"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two beagles and a teapot."""
    told = [about(BEAGLE, "beagle", author="A | B"), about(BEAGLE, "beagle"), about(TEAPOT, "teapot", "public-domain")]
    return write_tar(tmp_path / "photos.tar", [(f"00{n}", png(n), values) for n, values in enumerate(told)])


def samples(path: Path, texts: list[tuple[str, str]], control: str = "none") -> Path:
    rows = [{"id": f"00{n}", "control": control, "caption": c, "answer": a} for n, (c, a) in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["photo_page.py", *map(str, arguments)])
    PAGE["main"]()


def test_the_page_says_what_was_said(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: marks that are not the metric's, a control's answers, a model's words that become markup."""
    texts = [("Grass.", "a Beagle"), ("A dog | <b>runs</b>.", "x"), ("A dog.", "y")]
    said = samples(tmp_path / "naming.samples.jsonl", texts)
    with said.open("a") as file:
        file.write(json.dumps({"id": "002", "control": "shuffled", "caption": "a teapot", "answer": ""}) + "\n")
    run(photos, tmp_path, "--samples", said, monkeypatch=monkeypatch)
    text = (tmp_path / "photos.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    licence = "[CC-BY-2.0](https://creativecommons.org/licenses/by/2.0/)"
    assert rows == [
        f"| 1 | beagle | Grass. | a Beagle | named | some-photos 1.2, b.webp | A \\| B | {licence} |",
        "| 2 | beagle | A dog \\| \\<b\\>runs\\</b\\>. | x | kind | some-photos 1.2, b.webp | the package's authors "
        f"| {licence} |",
        "| 3 | teapot | A dog. | y | no | some-photos 1.2, b.webp | the package's authors | public-domain |",
    ]
    assert "| kind | 1 | only its broader kind" in text
    sheet = Image.open(tmp_path / "photos.jpg")
    assert sheet.format == "JPEG"
    assert sheet.width == PAGE["COLUMNS"] * PAGE["CELL"]
    marks = [PAGE["MARKS"][mark] for mark in ("named", "kind", "no")]
    y = 6 + PAGE["PICTURE"][1] + 4 + 6
    for n, colour in enumerate(marks):
        wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        seen = sheet.getpixel((n * PAGE["CELL"] + 6 + 4, y))
        assert isinstance(seen, tuple)
        assert all(abs(a - b) < 40 for a, b in zip(seen, wanted, strict=True)), (n, seen, wanted)


def test_a_sheet_of_forty_keeps_its_size() -> None:
    """Noise is the worst that a JPEG can hold."""
    noise = io.BytesIO()
    Image.effect_noise((384, 384), 120).convert("RGB").save(noise, "PNG")
    record = PAGE["Record"]("0", noise.getvalue(), metadata=about(BEAGLE, "beagle"))
    photo = PAGE["Said"](record, "A dog in a caption that goes on and on and on " * 4, "dog")
    assert len(PAGE["sheet"]([photo] * 40)) <= PAGE["MAX_BYTES"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "naming.samples.jsonl:1: not a sample"),
        ('{"id": "000", "control": "none"}', "naming.samples.jsonl:1: not a sample"),
        ('{"id": "000", "control": "none", "caption": "a", "answer": "b"}', "nothing is said of photo 001"),
    ],
)
def test_what_is_wrong_with_samples_is_told(
    line: str, message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "naming.samples.jsonl"
    said.write_text(f"{line}\n")
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(photos, tmp_path, "--samples", said, monkeypatch=monkeypatch)
    assert not (tmp_path / "photos.md").exists()


def test_a_photo_without_a_known_licence_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "photos.tar", [("000", png(0), about(BEAGLE, "beagle", "all rights reserved"))])
    with pytest.raises(SystemExit, match=r"photos\.tar: 000: .*'all rights reserved'"):
        run(tar, tmp_path, monkeypatch=monkeypatch)


def test_the_page_in_the_docs_is_what_was_drawn() -> None:
    """Nothing was chosen: its photos are those that the seed draws from the table, each with its owner."""
    with (ROOT / "examples/photos.tsv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wanted = []
    for n in PAGE["drawn"](len(table)):
        row = table[n]
        source = f"{row['package']} {row['version']}, {row['path'].rpartition('/')[2]}"
        wanted.append((source, row["author"] or "the package's authors", row["licence"]))
    lines = (ROOT / "docs/photos.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines if re.match(r"\| \d", line)]
    shown = [tuple(re.sub(r"\\(.)|\]\([^)]*\)", r"\1", c).strip(" [") for c in row[6:9]) for row in cells]
    assert len(shown) == PAGE["COUNT"]
    assert shown == wanted
    assert (ROOT / "docs/photos.jpg").stat().st_size <= PAGE["MAX_BYTES"]
