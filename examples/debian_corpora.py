"""Corpora from Debian's documentation: pages with screenshots in many languages, and eight thousand captioned drawings.

    pip install "mm-gpt[corpus]" resvg-py
    python examples/debian_corpora.py debian --languages en,de,fr,es,it,ja,ko,ru,zh,el

GIMP's manual (one package a language), GNOME's help (49 languages in one package), scikit-learn's documentation and the
Open Clip Art Library. Packages are fetched from a mirror and checked, unpacked without root, and turned into sources
that `mm-gpt corpus build` reads; then they are built, and `debian/report.json`, `.md` and `.png` say what came of it.
"""

import argparse
import io
import json
import logging
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

from mm_gpt.datasets.image_filters import ImageFilter
from mm_gpt.datasets.language_id import Language
from mm_gpt.datasets.pipeline import Stage
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Sample
from mm_gpt.datasets.shards import ShardWriter, is_corpus, write_corpus_file
from mm_gpt.datasets.sources import read_samples
from mm_gpt.datasets.text_filters import DocumentFilter
from mm_gpt.datasets.web import folder_pages, page_document
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LANGUAGES = "en,de,fr,es,it,ja,ko,ru,zh,el"
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
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar, ProcessPoolExecutor(workers) as pool:
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


def prepare(work: Path, languages: Iterable[str], mirror: str, suite: str, errors: ErrorCounter) -> Iterator[Source]:
    """Fetch, check and unpack the packages, and make of each what the corpus pipeline reads."""
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

    gimp_licence = debian_packages.licence(unpacked("gimp-help-common"), "gimp-help-common")
    for language in languages:
        package = {"zh": "gimp-help-zh-cn", "pt": "gimp-help-pt-br"}.get(language, f"gimp-help-{language}")
        if package not in index:
            logger.warning("%s: GIMP's manual is not in this language", language)
            continue
        (folder,) = (unpacked(package) / "usr/share/gimp/2.0/help").iterdir()
        yield source(f"gimp-{language}", language, folder, "pages", package, gimp_licence)

    root = unpacked("gnome-user-docs")
    licence = debian_packages.licence(root, "gnome-user-docs")
    for language, folder in gnome_folders(root).items():
        out = work / "sources" / f"gnome-{language}"
        if not is_corpus(out):
            write_gnome(folder, language, licence, out, errors)
        yield source(f"gnome-{language}", language, out, "corpus", "gnome-user-docs", licence)

    root = unpacked("python-sklearn-doc")
    licence = debian_packages.licence(root, "python-sklearn-doc")
    html = root / "usr/share/doc/python-sklearn-doc/html"
    yield source("sklearn", "en", html, "pages", "python-sklearn-doc", licence)

    root = unpacked("openclipart-svg")
    licence = debian_packages.licence(root, "openclipart-svg")
    tar = work / "sources" / "openclipart.tar"
    if not tar.is_file():
        write_clipart(root / "usr/share/openclipart/svg", licence, tar, errors)
    yield source("openclipart", "en", tar, "captioned", "openclipart-svg", licence)


# ---- Corpora of them ----


def stages(language: str) -> tuple[Stage, ...]:
    """What a page goes through. Manuals are clean: the rest is for pages that nobody translated, and for icons."""
    return (
        Language(languages=(language,), min_score=0.8),
        DocumentFilter(min_words=20, max_character_repetition=0.3),
        ImageFilter(min_side=32, max_aspect_ratio=10, single_colour_tolerance=8, unique=True),
    )


def read(
    source: Source, errors: ErrorCounter, removed: Counter[str], max_pages: int | None
) -> Iterator[tuple[Sample, int]]:
    """Its samples, each with the images that its page had; of web pages at most `max_pages`, evenly spread by name."""
    if source.format != "pages":
        yield from ((sample, measure(sample)["images"]) for sample in read_samples(str(source.location), errors))
        return
    pages = list(folder_pages(str(source.location), errors))
    for page in pages[:: -(-len(pages) // (max_pages or len(pages)))]:
        why: Counter[str] = Counter()
        document = page_document(page, removed=why)
        removed.update(why)
        lost = sum(count for reason, count in why.items() if reason.startswith("image: "))
        if document is None:
            errors.add("no main text", page.name)
        else:
            yield document, len(document.images) + lost


def build(source: Source, out: Path, tokenizer: Tokenizer, *, max_pages: int | None) -> dict[str, Any]:
    """The source through its stages into the corpus folder `out`; what each of them left, as a row of the report."""
    errors, removed = ErrorCounter(), Counter[str]()
    steps = () if source.format == "captioned" else stages(source.language)
    left = {name: Counter[str]() for name in ("pages", "extracted", *(step.name for step in steps))}
    writer = ShardWriter(out)
    for sample, num_images in read(source, errors, removed, max_pages):
        left["pages"].update({"documents": 1, "images": num_images})
        left["extracted"].update(measure(sample, tokenizer))
        for step in steps:
            kept = step(sample, removed) if isinstance(sample, Document) else None
            if kept is None:
                break
            sample = kept
            left[step.name].update(measure(sample, tokenizer))
        else:
            try:
                writer.add(with_origin(sample, source))
            except BadRecordError as error:
                errors.add(str(error), source.name)
    left["pages"]["documents"] += errors.counts["no main text"]
    about = {"source": source.name, "language": source.language, "licence": source.licence}
    write_corpus_file(out, writer.close(), about)
    fields = {key: value for key, value in asdict(source).items() if key not in ("location", "format")}
    return fields | {
        "max_pages": max_pages if source.format == "pages" else None,
        "stages": {name: dict(counts) for name, counts in left.items()},
        "removed": dict(removed),
        "skipped": dict(errors.counts),
    }


def with_origin(sample: Sample, source: Source) -> Sample:
    """Where it comes from, and under which licence it may be used, with each sample."""
    about = {"licence": source.licence, "source": f"{source.package} {source.version}"}
    if isinstance(sample, Document):
        sample = replace(sample, id=f"{source.name}/{sample.id.rpartition('/')[2]}")
    return replace(sample, metadata={**sample.metadata, **about})


def measure(sample: Sample, tokenizer: Tokenizer | None = None) -> dict[str, int]:
    """Documents, images, characters and tokens of one sample; images count no tokens."""
    if isinstance(sample, Document):
        texts = [segment.text for segment in sample.segments if isinstance(segment, Text)]
        num_images = len(sample.images)
    else:
        texts, num_images = list(getattr(sample, "captions", ())), 1
    text = "\n\n".join(texts)
    return {
        "documents": 1,
        "with_images": int(num_images > 0),
        "images": num_images,
        "characters": len(text),
        "tokens": len(tokenizer.encode(text)) if tokenizer else 0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown: what was read and what is left of it."""
    lines = [
        "| corpus | licence | read | kept | yield | with images | images | M characters | M tokens |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        first, *_, last = [Counter(counts) for counts in (row["stages"]["pages"], *row["stages"].values())]
        lines.append(
            f"| {row['name']} | {row['licence']} | {first['documents']:,} | {last['documents']:,} "
            f"| {last['documents'] / max(1, first['documents']):.0%} | {last['with_images']:,} | {last['images']:,} "
            f"| {last['characters'] / 1e6:.2f} | {last['tokens'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Pages read and kept, and images kept, of each corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["name"] != "openclipart"]
    names = [row["name"] for row in rows]
    figure, (above, below) = plt.subplots(2, 1, figsize=(13, 6), sharex=True, layout="constrained")
    for stage, colour in (("pages", "#cccccc"), ("language", "#6699cc"), ("images", "#224488")):
        counts = [row["stages"][stage].get("documents", 0) for row in rows]
        above.bar(
            names, counts, color=colour, label={"images": "kept", "language": "in its language"}.get(stage, stage)
        )
    below.bar(names, [row["stages"]["pages"].get("images", 0) for row in rows], color="#cccccc", label="all")
    below.bar(names, [row["stages"]["images"].get("images", 0) for row in rows], color="#224488", label="kept")
    above.set_ylabel("pages")
    below.set_ylabel("images")
    above.legend()
    below.tick_params(axis="x", labelrotation=90, labelsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for packages, sources and corpora (about 5 GB)")
    parser.add_argument("--languages", default=LANGUAGES, help=f"of GIMP's manual (default {LANGUAGES})")
    parser.add_argument("--mirror", default=debian_packages.MIRROR, help="an https URL or a folder")
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--max-pages", type=int, help="of each set of HTML pages, evenly spread; default: all")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    errors = ErrorCounter()
    sources = list(prepare(args.work, args.languages.split(","), args.mirror, args.suite, errors))
    print(errors.summary())
    _, tokenizer = load_decoder("smollm2-135m-instruct")
    rows = []
    for source in sources:
        out = args.work / "corpora" / source.name
        note = out / "report.json"
        if not note.is_file():
            row = build(source, out, tokenizer, max_pages=args.max_pages)
            note.write_text(json.dumps(row, ensure_ascii=False))
        rows.append(json.loads(note.read_text()))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    report = {"tokens_of": "SmolLM2", "skipped_before": dict(errors.counts), "corpora": rows}
    (args.work / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.work / "report.md").write_text(table(rows), encoding="utf-8")
    plot(rows, args.work / "report.png")


if __name__ == "__main__":
    main()
