"""Text to learn from: the manuals of Debian's documentation packages, without their pictures.

    python examples/scaling/manuals.py TEXTS
    python examples/scaling/manuals.py TEXTS --packages FOLDER     (of .deb files, as `apt-get download` leaves them)

writes `TEXTS/train.jsonl` and `TEXTS/held_out.jsonl`, a row a paragraph or a part of one, and `TEXTS/report.json`:
what is from where, under which licence. Packages are fetched from a mirror and checked. Each paragraph is kept once,
whatever page it stands on, so that what is held out is not known by heart; pages are divided by the hash of their name.
Texts are short, since what small models gain from long ones is mostly that they begin to copy: that comes all at once,
at some size, and no law sees it coming.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples beside this folder

import debian_packages
import mallard

from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.web.pages import read_pages
from mm_gpt.document import Text
from mm_gpt.errors import MMGPTError

PACKAGES = {
    "gimp-help-en": "usr/share/gimp/2.0/help/en",
    "gnome-user-docs": "usr/share/help/C/gnome-help",
    "python-sklearn-doc": "usr/share/doc/python-sklearn-doc/html",
    "python3.11-doc": "usr/share/doc/python3.11/html",
    "python-django-doc": "usr/share/doc/python-django-doc/html",
    "python-sqlalchemy-doc": "usr/share/doc/python-sqlalchemy-doc/html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html",
    "sqlite3-doc": "usr/share/doc/sqlite3",
    "git-doc": "usr/share/doc/git-doc",
    "cmake-doc": "usr/share/doc/cmake-data/html",
    "libreoffice-help-en-us": "usr/share/libreoffice/help/en-US/text",
    "maxima-doc": "usr/share/doc/maxima-doc/html",
    "vim-doc": "usr/share/doc/vim/html",
}
"""Package -> the folder of its pages."""
HELD_OUT = 0.04
HELD_OUT_CHARACTERS = 0.05
"""Characters to validate on, at most, for each to train on."""
PART_CHARACTERS, MIN_PART = 300, 40
MIN_CHARACTERS = 300
"""Of a page, when repeated paragraphs are gone."""


def manual_pages(root: Path, errors: ErrorCounter, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Name and text of the pages of a folder; paragraphs in `seen` are left out, and others added to it."""
    is_mallard = any(root.glob("*.page"))
    for document in mallard.read_pages(root, errors) if is_mallard else read_pages(str(root), errors):
        kept = []
        for segment in document.segments:
            if not isinstance(segment, Text):
                continue
            digest = hashlib.sha256(" ".join(segment.text.split()).encode()).digest()[:12]
            if digest not in seen:
                seen.add(digest)
                kept.append(segment.text)
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARACTERS:
            yield document.id, text


def parts(text: str) -> list[str]:
    """The paragraphs of a page, longer ones in parts of whole sentences of about `PART_CHARACTERS`."""
    found = []
    for paragraph in text.split("\n\n"):
        part = ""
        for sentence in re.split(r"(?<=[.;:!?]) ", " ".join(paragraph.split())):
            if part and len(part) + len(sentence) > PART_CHARACTERS:
                found.append(part)
                part = ""
            part = f"{part} {sentence}".strip()[: 2 * PART_CHARACTERS]
        found.append(part)
    return [part for part in found if len(part) >= MIN_PART]


def licence_of(root: Path, package: str) -> str:
    """As far as the package says it in a form for machines."""
    try:
        return debian_packages.licence(root, package)
    except MMGPTError:
        return f"see usr/share/doc/{package}/copyright in the package"


def fetch(folder: Path, mirror: str, suite: str) -> None:
    """All packages, from a mirror. Raises MMGPTError for one that it does not have."""
    index = debian_packages.read_index(mirror, suite)
    for package in PACKAGES:
        if package not in index:
            raise MMGPTError(f"{mirror}: {suite} has no package {package}")
        debian_packages.download(index[package], folder, mirror)


def write_manuals(out: Path, packages: Path, characters: float, errors: ErrorCounter) -> dict[str, object]:
    """What the module says, of up to so many characters; returns the report, of all that there are."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    rows: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    report: dict[str, object] = {}
    for package, folder in PACKAGES.items():
        debs = sorted(packages.glob(f"{package}_*.deb"))
        if not debs:
            raise MMGPTError(f"{packages}: no {package}_*.deb")
        root = out / "unpacked" / debs[-1].stem
        debian_packages.unpack(debs[-1], root, errors)
        counts = Counter[str]()
        for name, text in manual_pages(root / folder, errors, seen):
            number = int.from_bytes(hashlib.sha256(f"{package} {name}".encode()).digest()[:4], "big")
            side = "held_out" if number < HELD_OUT * 2**32 else "train"
            rows[side] += [{"text": part, "source": package} for part in parts(text)]
            counts[f"{side} pages"] += 1
            counts[f"{side} characters"] += len(text)
        report[package] = {"package": debs[-1].name, "licence": licence_of(root, package), **counts}
        print(package, dict(counts), flush=True)
    for side, limit in (("train", characters), ("held_out", characters * HELD_OUT_CHARACTERS)):
        random.Random(0).shuffle(rows[side])
        ends = itertools.accumulate(len(row["text"]) for row in rows[side])
        kept = [json.dumps(row, ensure_ascii=False) for row, end in zip(rows[side], ends, strict=True) if end <= limit]
        (out / f"{side}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="take the packages from here")
    parser.add_argument("--characters", type=float, default=14e6, help="to train on, at most (default: %(default)g)")
    parser.add_argument("--mirror", default=debian_packages.MIRROR)
    parser.add_argument("--suite", default="bookworm")
    args = parser.parse_args()
    errors = ErrorCounter()
    packages = args.packages or args.out / "packages"
    if args.packages is None:
        fetch(packages, args.mirror, args.suite)
    write_manuals(args.out, packages, args.characters, errors)
    if errors.total:
        print(errors.summary())


if __name__ == "__main__":
    main()
