"""A page of HTML as a Document: its main content in reading order, images where they stand.

trafilatura (Barbaresi, 2021) decides which text is content and which is navigation, boilerplate, cookie notice or
comment. It gives text without images, or loses many of them: those in headings, tables, figures and links. So its
text is only looked up in the page, and the page itself is written out, less what trafilatura left out. The text is
the same; white space, code, lists and tables are the page's own; each image has its exact place.

Images go with their surroundings: one is kept when it stands inside the element that holds the main content, and has
a caption, or the smallest block around it that has text kept that text, or has only a short line that is no link.
Captions do not count as text there.
"""

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm_gpt.datasets.samples import BadRecordError, optional_import
from mm_gpt.datasets.web.html_flat import FlatImage, FlatPage, Spans, flatten
from mm_gpt.datasets.web.html_images import LocalImage, image_source
from mm_gpt.datasets.web.html_text import segments_of
from mm_gpt.datasets.web.html_tree import base_url, decode_html, opt_outs, page_metadata, parse_html
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError

PAGE_OPT_OUTS = ("noai", "noindex", "tdm-reservation", "train-ai=n")
MAX_IMAGES = 5000
"""Of one page, in its order; more are left out."""
IMAGE_OPT_OUTS = ("noimageai", "noimageindex")

# Parts of a page whose images are not content even where they stand among it.
_BOILERPLATE_TAGS = frozenset(("nav", "aside", "footer", "form", "button", "dialog"))
_BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|nav-?(?:bar|header|footer)|navigation|menu|breadcrumbs?|footer|sidebar|widget|shar(?:e|ing)"
    r"|social|related|promo|sponsor(?:ed)?|advert(?:isement)?|ads?|banner|avatar|gravatar|author-?(?:bio|box|info)"
    r"|byline|comments?|cookie|newsletter|subscribe|pagination|pager|rating|logo|toolbar|recommended|popular"
    r"|edit-?section)(?:$|[\s_-])",
    re.I,
)
# as DocBook and Sphinx write it
_SECTION = re.compile(r"(?:^|\s)(?:(?:ref)?sect\d|(?:ref)?section|chapter|appendix)(?:\s|$)")
_ARROWS = frozenset(
    ("prev", "previous", "next", "up", "home", "back", "top", "contents", "index", "<", ">", "<<", ">>")
)
_PARAGRAPHS = "p li dd dt td th h1 h2 h3 h4 h5 h6 blockquote figcaption caption pre"
_PARAGRAPH_TAGS = tuple(_PARAGRAPHS.split())
_PLAIN_TAGS = ("span", "em", "strong", "b", "i", "tt", "code", "kbd", "samp", "var")
_STRIPPED = "stripped"
_ALONE = frozenset(_PARAGRAPH_TAGS) - {"td", "th"}
_MAIN_SHARE = 0.9
_ANCHOR_CHARACTERS = 32
_MAX_LABEL_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is taken from a page."""

    captions: Literal["keep", "drop"] = "keep"
    """Captions (`<figcaption>` and its like) as text behind their image, or not at all."""
    alt: Literal["drop", "text"] = "drop"
    """`"text"`: alt texts as text behind their image. They stay in `Image.alt` either way."""
    fast: bool = False
    """Without the comparison with other extractors (readability, jusText): quicker, a little worse."""
    tables: bool = True
    """False: text in tables is left out."""
    page_opt_outs: tuple[str, ...] = PAGE_OPT_OUTS
    """Opt-outs for which the whole page goes (see `html_tree`)."""
    image_opt_outs: tuple[str, ...] = IMAGE_OPT_OUTS
    """Opt-outs for which the images of the page go."""
    max_html_bytes: int = 8 * 2**20
    max_elements: int = 100_000

    def __post_init__(self) -> None:
        if self.captions not in ("keep", "drop"):
            raise ConfigError(f"captions is {self.captions!r}; known: keep, drop")
        if self.alt not in ("drop", "text"):
            raise ConfigError(f"alt is {self.alt!r}; known: drop, text")
        for name in ("max_html_bytes", "max_elements"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1")
        unknown = {*self.page_opt_outs, *self.image_opt_outs} - {*PAGE_OPT_OUTS, *IMAGE_OPT_OUTS, "noml"}
        if unknown:
            raise ConfigError(f"unknown opt-out {', '.join(sorted(unknown))}")


DEFAULT = ExtractConfig()


def extract(
    html: bytes | str,
    url: str = "",
    config: ExtractConfig = DEFAULT,
    *,
    headers: Mapping[str, str] | None = None,
    local: LocalImage | None = None,
    removed: Counter[str] | None = None,
) -> Document | None:
    """The main content of a page, or None where there is none or its owner opted out.

    `url` is the page's address, which relative ones start from; `headers` are those of its HTTP response, names in any
    case. `local` finds images that lie beside the page. `removed` counts why a page went (`"opt-out: noai"`, `"no main
    text"`, `"too large"`, ...) and each image that did (`"image: tracking pixel"`, ...). Images that stand outside the
    main content are counted as well.
    """
    removed = Counter() if removed is None else removed
    lower = {name.lower(): value for name, value in (headers or {}).items()}
    try:
        return _extract(html, url, config, lower, local, removed)
    except BadRecordError as error:
        removed[str(error)] += 1
        return None


def _extract(
    html: bytes | str,
    url: str,
    config: ExtractConfig,
    headers: Mapping[str, str],
    local: LocalImage | None,
    removed: Counter[str],
) -> Document:
    if len(html) > config.max_html_bytes:
        raise BadRecordError("too large")
    if isinstance(html, bytes):
        charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", headers.get("content-type", ""), re.I)
        html = decode_html(html, charset[1] if charset else "")
    tree, whole = parse_html(html)
    signals = opt_outs(tree, headers)
    for signal in config.page_opt_outs:
        if signal in signals:
            raise BadRecordError(f"opt-out: {signal}")
    _strip_inline(tree)
    page = flatten(tree, config.max_elements)
    if not whole:
        removed["text: nested too deeply"] += 1
    body = _main_text(tree, config)
    spans, extra = locate(body, page.stream)
    kept = Spans(spans)
    without_images = next((signal for signal in config.image_opt_outs if signal in signals), "")
    images = _kept_images(page, kept, base_url(tree, url), local, removed, without_images)
    segments = segments_of(
        page, kept, lambda image: images.get(id(image)), extra=extra, captions=config.captions, alt=config.alt
    )
    if not any(isinstance(segment, Text) for segment in segments):
        raise BadRecordError("no main text")
    return Document(tuple(segments), id=url, metadata=page_metadata(tree, url, html))


def _strip_inline(tree: Any) -> None:
    """Take inline tags away from around the words of a sentence or of code, but hidden ones and boilerplate.

    trafilatura drops elements by what their class contains: of a manual's sentence the words in
    `<span class="guimenu">`, for that looks like navigation. And highlighted code has more spans than all else on its
    page, which trafilatura copies and walks many times.
    """
    for block in tree.iter(*_PARAGRAPH_TAGS):
        if next(block.iterancestors(*_PARAGRAPH_TAGS), None) is not None:
            continue
        for element in block.iter(*_PLAIN_TAGS):
            attributes = element.items()
            if not attributes or _is_plain(tuple(attributes)):
                element.tag = _STRIPPED
    optional_import("lxml.etree").strip_tags(tree, _STRIPPED)


@functools.lru_cache(maxsize=4096)
def _is_plain(attributes: tuple[tuple[str, str], ...]) -> bool:
    return not any(
        name in ("style", "hidden", "aria-hidden") or (name in ("class", "id") and _is_boilerplate(value))
        for name, value in attributes
    )


def _main_text(tree: Any, config: ExtractConfig) -> Any:
    """trafilatura's body. `tree` stays as it is. Raises BadRecordError when it finds nothing."""
    trafilatura = optional_import("trafilatura")
    try:
        result = trafilatura.bare_extraction(tree, options=_options(config.fast, config.tables))
    except (RecursionError, MemoryError, AttributeError, IndexError, KeyError, AssertionError):
        raise BadRecordError("extractor failed") from None
    if result is None or result.body is None or len(result.body) == 0:
        raise BadRecordError("no main text")
    return result.body


@functools.cache
def _options(fast: bool, tables: bool) -> Any:
    """Made once: reading its settings takes trafilatura as long as a small page."""
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what goes is counted here
    # "txt", since for "python" it would also write the text out
    settings = optional_import("trafilatura.settings")
    return settings.Extractor(output_format="txt", fast=fast, comments=False, tables=tables)


# ---- Where the text came from ----


def locate(body: Any, stream: str) -> tuple[list[tuple[int, int]], list[tuple[int, str]]]:
    """The ranges of `stream` (a page without white space) that the elements of `body` came from.

    Long blocks are found first, each behind the one before; between them, short ones from right to left, since a
    heading belongs to what follows it and not to its entry in a table of contents above. What is found nowhere (an
    article that only stood in JSON) comes back as text, with the position behind which it belongs.
    """
    spans: list[tuple[int, int]] = []
    extra: list[tuple[int, str]] = []
    short: list[str] = []
    cursor = 0
    for key, text in _pieces(body, stream):
        if len(key) < _ANCHOR_CHARACTERS:
            short.append(key)
            continue
        start = stream.find(key, cursor)
        if start < 0:
            start = stream.find(key)  # found again by a second pass, in front of what came before
            if start < 0:
                extra.append((cursor, text))
            else:
                spans.append((start, start + len(key)))
            continue
        _locate_short(short, stream, cursor, start, spans)
        short = []
        cursor = start + len(key)
        spans.append((start, cursor))
    for key in short:
        start = stream.find(key, cursor)
        if start >= 0:
            cursor = start + len(key)
            spans.append((start, cursor))
    return spans, extra


def _locate_short(keys: list[str], stream: str, start: int, end: int, spans: list[tuple[int, int]]) -> None:
    for key in reversed(keys):
        found = stream.rfind(key, start, end)
        if found >= 0:
            spans.append((found, found + len(key)))
            end = found


def _pieces(body: Any, stream: str) -> Iterable[tuple[str, str]]:
    """(text without white space, text) of each block of `body`, in parts where the page has it in parts."""
    pending = [*reversed(body)]
    while pending:
        piece = pending.pop()
        if isinstance(piece, str):
            text = piece
        else:
            text = "".join(piece.itertext())
        key = "".join(text.split())
        if not isinstance(piece, str) and len(piece) > 0 and (len(key) < _ANCHOR_CHARACTERS or key not in stream):
            for child in reversed(piece):
                if child.tail and child.tail.strip():
                    pending.append(child.tail)
                pending.append(child)
            if piece.text and piece.text.strip():
                pending.append(piece.text)
        elif key:
            yield key, " ".join(text.split())
        if not isinstance(piece, str) and piece.getparent() is body and piece.tail and piece.tail.strip():
            pending.append(piece.tail)


# ---- Images ----


def _kept_images(
    page: FlatPage,
    kept: Spans,
    base: str,
    local: LocalImage | None,
    removed: Counter[str],
    without_images: str,
) -> dict[int, Image | str]:
    """What stands for each FlatImage, by its id()."""
    if page.num_svg:
        removed["image: inline SVG"] += page.num_svg
    if not page.images:
        return {}
    captions, links = Spans(page.captions), Spans(page.links)
    main = _main_block(page, kept)
    found: dict[int, Image | str] = {}
    last: tuple[int, bytes | Path | str | None] = (-1, None)
    if len(page.images) > MAX_IMAGES:
        removed["image: too many on the page"] += len(page.images) - MAX_IMAGES
    for image in page.images[:MAX_IMAGES]:
        if image.is_noscript and last == (image.position, None):
            pass  # the picture itself, after an <img> that only holds its place
        elif image.is_noscript and last[0] == image.position:
            continue  # what is there already
        emoji = _emoji(image.element)
        if emoji:
            if kept.within(image.position - 1, image.position + 1):
                found[id(image)] = emoji
            continue
        try:
            if without_images:
                raise BadRecordError(f"opt-out: {without_images}")
            if not _is_content(image, page, kept, captions, links, main):
                raise BadRecordError("outside the main content")
            source = image_source(image.element, base, local)
            found[id(image)] = Image(source, alt=" ".join((image.element.get("alt") or "").split()))
            last = (image.position, source)
        except BadRecordError as error:
            removed[f"image: {error}"] += 1
            last = (image.position, None)
    return found


def _main_block(page: FlatPage, kept: Spans) -> int:
    """The number of the block that holds the main content: the smallest with 90 % of it, or an `<article>` around.

    When one paragraph is all that was kept, it is the block around the paragraph; and for a section of a document, the
    outermost section.
    """
    total = kept.within(0, len(page.stream))
    best, best_size = 0, len(page.stream) + 1
    for number, (_, _, start, end) in enumerate(page.blocks):
        if _MAIN_SHARE * total <= end - start <= best_size and kept.within(start, end) >= _MAIN_SHARE * total:
            best, best_size = number, end - start
    while page.blocks and page.blocks[best][0].tag in _ALONE and page.blocks[best][1] >= 0:
        best = page.blocks[best][1]
    while page.blocks and (number := page.blocks[best][1]) >= 0 and _is_section(page.blocks[number][0]):
        best = number
    number = best
    while number >= 0:
        element, parent, _, _ = page.blocks[number]
        if element.tag in ("article", "main") or element.get("role") == "main":
            return number
        number = parent
    return best


def _is_section(element: Any) -> bool:
    return element.tag == "section" or _SECTION.search(element.get("class") or "") is not None


def _is_content(image: FlatImage, page: FlatPage, kept: Spans, captions: Spans, links: Spans, main: int) -> bool:
    if _is_navigation(image.element):
        return False
    around = -1  # the smallest block with text of its own
    has_caption = False  # words of its own, that are no link to elsewhere
    number = image.block
    while number != main:
        if number < 0:
            return False
        element, parent, start, end = page.blocks[number]
        if element.tag in _BOILERPLATE_TAGS or _is_boilerplate(f"{element.get('class', '')} {element.get('id', '')}"):
            return False
        if around < 0 and end > start:
            if captions.within(start, end) < end - start:
                around = number
            else:
                has_caption = links.within(start, end) * 4 < end - start
        number = parent
    if around < 0 or has_caption:
        return True
    _, _, start, end = page.blocks[around]
    text = end - start - captions.within(start, end)
    if kept.within(start, end) * 2 >= text:
        return True
    # trafilatura leaves out short lines as well; a card that leads to another page is made of links
    return text <= _MAX_LABEL_CHARACTERS and links.within(start, end) * 4 < text


def _is_navigation(element: Any) -> bool:
    """An arrow to another page: a link of nothing but an image, that says so in place of the image."""
    link = element.getparent()
    return (
        link is not None
        and link.tag == "a"
        and (element.get("alt") or "").strip(" []").lower() in _ARROWS
        and not (link.text or "").strip()
    )


@functools.lru_cache(maxsize=4096)
def _is_boilerplate(names: str) -> bool:
    return _BOILERPLATE.search(names) is not None


def _emoji(element: Any) -> str:
    """The character that a picture of an emoji stands for."""
    alt = element.get("alt") or ""
    is_emoji = "emoji" in (element.get("class") or "") or "/emoji/" in (element.get("src") or "")
    return alt if is_emoji and 0 < len(alt) <= 12 and not alt.isascii() else ""
