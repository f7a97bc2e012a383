"""Corpora from Debian's documentation: pages with screenshots in many languages, and eight thousand captioned drawings.

    pip install -e ".[corpus]" resvg-py
    python examples/debian_corpora.py debian --languages en,de,fr,es,it,ja,ko,ru,el

GIMP's manual (one package a language), GNOME's help (49 languages in one package), scikit-learn's documentation and the
Open Clip Art Library. Packages are fetched from a mirror and checked, unpacked without root, and turned into sources
that `mm-gpt corpus build` reads; then they are built, and `debian/report.json`, `.md` and `.png` say what came of it.
"""

import argparse
import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import debian_packages
import drawings
import mallard

from mm_gpt.datasets.building.corpus import build_corpus
from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.pipeline import Funnel, as_document
from mm_gpt.datasets.building.runner import Runner
from mm_gpt.datasets.building.shards import ShardWriter, is_corpus, read_corpus, write_corpus_file
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.datasets.web.pages import page_files
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.system.processes import watch_parent
from mm_gpt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LANGUAGES = "en,de,fr,es,it,ja,ko,ru,el"  # those into which GIMP's manual is translated; Korean, in small part
MAX_FIGURE_PIXELS = 448


@dataclass(frozen=True)
class Source:
    """Something to build a corpus of."""

    name: str
    language: str
    """ISO 639-1."""
    location: Path
    format: str
    """A key of `mm_gpt.datasets.sources.FORMATS`."""
    package: str
    version: str
    licence: str


# ---- GNOME's help ----


def gnome_folders(root: Path) -> dict[str, Path]:
    """ISO 639-1 code -> the folder of GNOME's help in that language. Variants (`pt_BR`, `sr@latin`) are left out, but
    Chinese is there only as one."""
    folders = {}
    for folder in sorted((root / "usr/share/help").iterdir()):
        code = {"C": "en", "zh_CN": "zh"}.get(folder.name, folder.name)
        if len(code) == 2 and (folder / "gnome-help").is_dir():
            folders[code] = folder / "gnome-help"
    return folders


def write_gnome(folder: Path, language: str, licence: str, out: Path, errors: ErrorCounter) -> None:
    """The pages of one language as a corpus folder. Nothing is filtered yet; SVG figures become PNG."""
    writer = ShardWriter(out)
    for document in mallard.read_pages(folder, errors):
        about = {"language": language, "licence": licence, "url": f"help:gnome-help/{document.id}", "source": "gnome"}
        document = replace(
            drawn(document, errors),
            id=f"gnome/{language}/{document.id}",
            metadata={**document.metadata, **about},
        )
        try:
            writer.add(document)
        except BadRecordError as error:
            errors.add(str(error), document.id)
    write_corpus_file(out, writer.close(), {"source": "gnome-user-docs", "language": language, "licence": licence})


def drawn(document: Document, errors: ErrorCounter) -> Document:
    """SVG figures as pixels. One that cannot be drawn is counted and left out."""
    segments = []
    for segment in document.segments:
        if isinstance(segment, Image) and str(segment.source).lower().endswith(".svg"):
            try:
                segment = replace(segment, source=_pixels(Path(str(segment.source)).resolve()))
            except BadRecordError as error:
                errors.add(f"image: {error}", str(segment.source))
                continue
        segments.append(segment)
    return replace(document, segments=tuple(segments))


@lru_cache(maxsize=512)  # most languages share their figures, and pages their icons
def _pixels(path: Path) -> bytes:
    return drawings.rasterise(drawings.parse_svg(path.read_bytes()), MAX_FIGURE_PIXELS)


# ---- The clip art library ----


def write_clipart(folder: Path, licence: str, out: Path, errors: ErrorCounter, *, workers: int = 2) -> int:
    """The drawings of a folder as a tar of captioned images; how many there are. Bad ones are counted and skipped.

    The same drawing under a second name is left out.
    """
    files = list({path.stat().st_ino: path for path in sorted(folder.rglob("*.svg"))}.values())
    temporary, number = out.with_name(f".{out.name}.tmp"), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(workers, initializer=watch_parent)
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar, pool:
        for path, result in zip(files, pool.map(_clipart, files, chunksize=16), strict=True):
            if isinstance(result, str):
                errors.add(result, str(path.relative_to(folder)))
                continue
            pixels, captions = result
            about = {"captions": captions, "source": "openclipart", "licence": licence}
            about["name"] = str(path.relative_to(folder))
            _add(tar, f"{number:06d}.png", pixels)
            _add(tar, f"{number:06d}.json", json.dumps(about, ensure_ascii=False).encode())
            number += 1
    temporary.replace(out)
    return number


def _clipart(path: Path) -> tuple[bytes, tuple[str, ...]] | str:
    """Pixels and captions, or why there are none."""
    try:
        root = drawings.parse_svg(path.read_bytes())
        _, captions = drawings.caption_svg(root)
        return drawings.rasterise(root), captions
    except BadRecordError as error:
        return str(error)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# ---- All of them ----


def prepare(
    work: Path, languages: Iterable[str], mirror: str, suite: str, errors: ErrorCounter, *, only: str = ""
) -> Iterator[Source]:
    """Fetch, check and unpack the packages, and make of each what the corpus pipeline reads.

    `only` is a regular expression: other sources than those in whose names it is found are left alone.
    """
    index = debian_packages.read_index(mirror, suite)

    def unpacked(name: str) -> Path:
        if name not in index:
            raise MMGPTError(f"{mirror}: {suite} has no package {name}")
        deb = debian_packages.download(index[name], work / "packages", mirror)
        root = work / "unpacked" / f"{name}_{index[name].version.replace(':', '_')}"
        debian_packages.unpack(deb, root, errors)
        return root

    def source(name: str, language: str, location: Path, format: str, package: str, licence: str) -> Source:
        return Source(name, language, location, format, package, index[package].version, licence)

    for language in languages:
        if not re.search(only, f"gimp-{language}"):
            continue
        package = {"zh": "gimp-help-zh-cn", "pt": "gimp-help-pt-br"}.get(language, f"gimp-help-{language}")
        if package not in index:
            logger.warning("%s: GIMP's manual is not in this language", language)
            continue
        licence = debian_packages.licence(unpacked("gimp-help-common"), "gimp-help-common")
        (folder,) = (unpacked(package) / "usr/share/gimp/2.0/help").iterdir()
        yield source(f"gimp-{language}", language, folder, "pages", package, licence)

    root = unpacked("gnome-user-docs")  # always: it alone knows its languages
    licence = debian_packages.licence(root, "gnome-user-docs")
    for language, folder in gnome_folders(root).items():
        if not re.search(only, f"gnome-{language}"):
            continue
        out = work / "sources" / f"gnome-{language}"
        if not is_corpus(out):
            write_gnome(folder, language, licence, out, errors)
        yield source(f"gnome-{language}", language, out, "corpus", "gnome-user-docs", licence)

    if re.search(only, "sklearn"):
        root = unpacked("python-sklearn-doc")
        licence = debian_packages.licence(root, "python-sklearn-doc")
        html = root / "usr/share/doc/python-sklearn-doc/html"
        yield source("sklearn", "en", html, "pages", "python-sklearn-doc", licence)

    if re.search(only, "openclipart"):
        root = unpacked("openclipart-svg")
        licence = debian_packages.licence(root, "openclipart-svg")
        tar = work / "sources" / "openclipart.tar"
        if not tar.is_file():
            write_clipart(root / "usr/share/openclipart/svg", licence, tar, errors)
        yield source("openclipart", "en", tar, "captioned", "openclipart-svg", licence)


# ---- Corpora of them ----


def spread(source: Source, max_pages: int | None, out: Path) -> Source:
    """A source of at most `max_pages` of its pages, evenly spread by name, as links in the folder `out`."""
    pages = page_files(str(source.location)) if source.format == "pages" and max_pages else []
    if not pages or len(pages) <= (max_pages or 0):
        return source
    for page in map(Path, pages[:: -(-len(pages) // (max_pages or 1))]):
        link = out / page.relative_to(source.location)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.hardlink_to(page)
    return replace(source, location=out)


def build(source: Source, work: Path, *, max_pages: int | None, workers: int) -> Path:
    """Its corpus, as `mm-gpt corpus build` makes it. Pages that are not in the source's language are left out."""
    out = work / "corpora" / source.name
    if not is_corpus(out):
        part = spread(source, max_pages, work / "pages" / f"{source.name}-{max_pages}")
        build_corpus(
            [str(part.location)],
            out,
            CorpusConfig(filters="basic", languages=(source.language,), fetch=False),
            format=source.format,
            images=str(source.location) if source.format == "pages" else None,
            runner=Runner(workers, progress=False),
        )
    return out


def describe(source: Source, corpus: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row of the report: where a corpus is from, its licence, its funnel, and what is in it."""
    counts = Counter[str]()
    for sample in read_corpus(str(corpus), ErrorCounter()):
        document = as_document(sample)
        text = "\n\n".join(segment.text for segment in document.segments if isinstance(segment, Text))
        counts["documents"] += 1
        counts["with_images"] += bool(document.images)
        counts["images"] += len(document.images)
        counts["characters"] += len(text)
        counts["tokens"] += len(tokenizer.encode(text))
    fields = {key: value for key, value in asdict(source).items() if key not in ("location", "format")}
    funnel = Funnel.from_json(json.loads((corpus / "funnel.json").read_text(encoding="utf-8")))
    steps = {}
    for name in funnel.steps:
        step = funnel.total(name)
        steps[name] = {"in": vars(step.came), "out": vars(step.left), "removed": dict(step.removed.most_common())}
    return fields | {"corpus": dict(counts), "steps": steps}


def table(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown: what was read and what is left of it."""
    lines = [
        "| corpus | licence | documents read | kept | yield | with images | images | M characters | M tokens |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        num_read, left = num_documents_read(row), Counter(row["corpus"])
        lines.append(
            f"| {row['name']} | {row['licence']} | {num_read:,} | {left['documents']:,} "
            f"| {left['documents'] / max(1, num_read):.0%} | {left['with_images']:,} | {left['images']:,} "
            f"| {left['characters'] / 1e6:.2f} | {left['tokens'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def num_documents_read(row: dict[str, Any]) -> int:
    """Whole pages that extraction found nothing in are counted as read; lost images and paragraphs are not."""
    step = row["steps"]["read"]
    lost = sum(count for reason, count in step["removed"].items() if not reason.startswith(("image", "text: ")))
    return int(step["out"]["documents"]) + lost


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Pages read and kept, and images kept, of each corpus but the drawings, which would dwarf them."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["name"] != "openclipart"]
    names = [row["name"] for row in rows]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(names, [num_documents_read(row) for row in rows], color="#cccccc", label="read")
    above.bar(
        names, [row["steps"]["language"]["out"]["documents"] for row in rows], color="#88aadd", label="in its language"
    )
    above.bar(names, [row["corpus"]["documents"] for row in rows], color="#224488", label="kept")
    below.bar(names, [row["steps"]["read"]["out"]["images"] for row in rows], color="#cccccc")
    below.bar(names, [row["corpus"]["images"] for row in rows], color="#224488")
    above.set_ylabel("pages")
    below.set_ylabel("images")
    above.legend()
    below.tick_params(axis="x", labelrotation=90, labelsize=8)
    below.margins(x=0.01)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for packages, sources and corpora (about 5 GB)")
    parser.add_argument("--languages", default=LANGUAGES, help=f"of GIMP's manual (default {LANGUAGES})")
    parser.add_argument("--mirror", default=debian_packages.MIRROR, help="an https URL or a folder")
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--max-pages", type=int, help="of each set of HTML pages, evenly spread; default: all")
    parser.add_argument("--only", default="", help="build the corpora whose names match this regular expression")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    errors = ErrorCounter()
    rows, failed = [], {}
    _, tokenizer = load_decoder("smollm2-135m-instruct")
    for source in prepare(args.work, args.languages.split(","), args.mirror, args.suite, errors, only=args.only):
        try:
            corpus = build(source, args.work, max_pages=args.max_pages, workers=args.workers)
        except MMGPTError as error:  # "no document is left", of a manual that nobody translated yet
            logger.warning("%s: %s", source.name, error)
            failed[source.name] = str(error).partition(";")[0].replace(str(args.work), "")
            continue
        rows.append(describe(source, corpus, tokenizer))
        logger.info("%s", table(rows[-1:]).splitlines()[-1])
    logger.info("%s", errors.summary())
    report = {"tokens_of": "SmolLM2", "skipped_before": dict(errors.counts), "failed": failed, "corpora": rows}
    (args.work / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.work / "report.md").write_text(table(rows), encoding="utf-8")
    plot(rows, args.work / "report.png")


if __name__ == "__main__":
    main()
