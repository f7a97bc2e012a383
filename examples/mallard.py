"""Mallard, GNOME's help format (projectmallard.org), as documents: text and figures in reading order.

A page is XML: titles, paragraphs, lists, steps, notes, tables, figures. Pages come once for each language.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import MMGPTError

NAMESPACE = "{http://projectmallard.org/1.0/}"
MAX_PAGE_BYTES = 4 * 2**20
SKIPPED = ("info", "comment", "links")  # about the page, notes of its authors, and lists that are made when shown
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".svg")


def read_pages(folder: Path, errors: ErrorCounter) -> Iterator[Document]:
    """The `.page` files of a folder, by name, without their metadata. Bad ones are counted and skipped.

    Images are paths of existing files below `folder`, SVG drawings among them. `metadata["title"]` is the page's title.
    """
    for page in sorted(folder.glob("*.page")):
        try:
            if page.stat().st_size > MAX_PAGE_BYTES:
                errors.add("page too large", str(page))
                continue
            root = ElementTree.fromstring(page.read_bytes())
        except (ElementTree.ParseError, OSError) as error:
            errors.add("bad XML", f"{page} ({error})")
            continue
        if root.tag != f"{NAMESPACE}page":
            errors.add("not a Mallard page", str(page))
            continue
        title = next((_text(child) for child in root if child.tag == f"{NAMESPACE}title"), "")
        segments = tuple(_blocks(root, page, errors))
        if segments:
            yield Document(segments, id=page.stem, metadata={"title": title} if title else {})


def _blocks(element: ElementTree.Element, page: Path, errors: ErrorCounter) -> Iterator[Segment]:
    """The paragraphs and figures inside an element, in order."""
    for child in element:
        name = child.tag.removeprefix(NAMESPACE) if isinstance(child.tag, str) else ""
        if name in SKIPPED:
            continue
        if name in ("p", "title", "subtitle", "desc", "cite"):
            yield from _paragraph(_text(child))
        elif name in ("screen", "code", "synopsis"):
            yield from _paragraph("".join(child.itertext()).strip("\n"))
        elif name == "media":
            yield from _figure(child, page, errors)
        elif name in ("list", "steps"):
            items = [item for item in child if item.tag == f"{NAMESPACE}item"]
            heading = [part for part in child if part.tag == f"{NAMESPACE}title"]
            yield from (s for part in heading for s in _paragraph(_text(part)))
            for number, item in enumerate(items, start=1):
                yield from _marked(_blocks(item, page, errors), f"{number}. " if name == "steps" else "- ")
        elif name == "tr":
            # A row is one paragraph: the cells mean nothing alone.
            cells = [list(_blocks(cell, page, errors)) for cell in child]
            texts = [" ".join(s.text for s in cell if isinstance(s, Text)) for cell in cells]
            yield from _paragraph(" | ".join(filter(None, texts)))
            yield from (s for cell in cells for s in cell if isinstance(s, Image))
        else:  # section, note, figure, example, table, terms, ..., and what other namespaces wrap around them
            yield from _blocks(child, page, errors)


def _marked(segments: Iterator[Segment], mark: str) -> Iterator[Segment]:
    """The first paragraph of a list's item carries its mark."""
    for segment in segments:
        if isinstance(segment, Text) and mark:
            segment, mark = Text(mark + segment.text), ""
        yield segment


def _paragraph(text: str) -> Iterator[Text]:
    if text.strip():
        yield Text(text)


def _text(element: ElementTree.Element) -> str:
    """The words of a line. An icon inside it stands for the words that it carries as its fallback."""
    return " ".join("".join(element.itertext()).split())


def _figure(media: ElementTree.Element, page: Path, errors: ErrorCounter) -> Iterator[Image]:
    source = media.get("src", "")
    if media.get("type", "image") != "image" or not source:
        return  # a video: its fallback are subtitles
    try:
        path = Path(files.resolve(str(page.parent), source))
    except MMGPTError:
        errors.add("image: outside of its folder", f"{page}:{source[:80]}")
        return
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        errors.add("image: unknown format", f"{page}:{source[:80]}")
    elif not path.is_file():
        errors.add("image: missing", f"{page}:{source[:80]}")
    else:
        yield Image(path, alt=_text(media))
