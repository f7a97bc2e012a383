"""A tree as one flat line of text, breaks and images, and that line, less what is not wanted, as segments.

`flatten` walks the tree once. Every place in it has a position: how many characters that are no white space stand
before it. So a text found in `FlatPage.stream` says which nodes it came from, whatever was done to white space.
"""

import bisect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from mm_gpt.datasets.samples import BadRecordError, optional_import
from mm_gpt.document import Image, Segment, Text


class Kind(IntEnum):
    """What an event is; in brackets what its value holds."""

    TEXT = 0  # (text as written, its characters that are no white space)
    BREAK = 1  # (strength)
    IMAGE = 2  # (number in FlatPage.images)
    PRE = 3  # (True at its start)
    LIST = 4  # (True at its start)
    ITEM = 5  # (marker)
    TABLE = 6  # (True at its start)
    ROW = 7
    CELL = 8
    FIGURE = 9  # (True at its start)
    CAPTION = 10  # (True at its start)


SPACE, LINE, PARAGRAPH = 1, 2, 3
_INLINE_TAGS = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q rb rp rt ruby s samp small"
    " span strike strong sub sup time tt u var wbr img amp-img picture source svg math"
)
_INLINE = frozenset(_INLINE_TAGS.split())
_SKIPPED_TAGS = "script style template head iframe object embed video audio canvas select textarea map"
_SKIPPED = frozenset(_SKIPPED_TAGS.split())
_BOUNDARIES = {
    "ul": Kind.LIST,
    "ol": Kind.LIST,
    "menu": Kind.LIST,
    "pre": Kind.PRE,
    "listing": Kind.PRE,
    "figure": Kind.FIGURE,
    "figcaption": Kind.CAPTION,
}
_FIGURE_CLASS = re.compile(r"(?:^|\s)(?:wp-caption|thumb|thumbinner|figure|captioned-image|gallerybox)(?:\s|$)")
_CAPTION_CLASS = re.compile(r"(?:^|\s)(?:wp-caption-text|thumbcaption|gallerytext|image-caption|caption)(?:\s|$)")
_MAX_CELL_CHARACTERS = 400
_MAX_CAPTION_CHARACTERS = 1000


@dataclass
class FlatImage:
    """An `<img>`: its element, the block around it (a number in FlatPage.blocks) and where it stands."""

    element: Any
    block: int
    position: int
    is_noscript: bool


@dataclass
class FlatPage:
    """See the module. `blocks` holds (element, parent's number, first position, position behind it).

    `captions` and `links` are the ranges of positions inside of such."""

    events: list[tuple[Kind, Any, int]] = field(default_factory=list)
    images: list[FlatImage] = field(default_factory=list)
    blocks: list[tuple[Any, int, int, int]] = field(default_factory=list)
    captions: list[tuple[int, int]] = field(default_factory=list)
    links: list[tuple[int, int]] = field(default_factory=list)
    stream: str = ""
    num_svg: int = 0


def flatten(tree: Any, max_elements: int) -> FlatPage:
    """The page in reading order. Raises BadRecordError when it has more than `max_elements` elements."""
    page, keys, position, count = FlatPage(), [], 0, 0
    events, blocks = page.events, page.blocks
    open_blocks: list[int] = [-1]
    open_links: list[int] = []
    num_figures = 0
    walk = optional_import("lxml.etree").iterwalk(tree, events=("start", "end"))
    lists: list[int] = []  # the number of the last item; -1 in a list without numbers
    layouts: list[bool] = []
    closers: list[tuple[Kind, int, int] | None] = []  # of open blocks: kind, first position, number of their event
    for action, element in walk:
        tag = element.tag
        if action == "start":
            count += 1
            if count > max_elements:
                raise BadRecordError("too many elements")
            text = element.text
            if tag in _SKIPPED:
                walk.skip_subtree()
                continue
            if tag in _INLINE:
                if tag in ("img", "amp-img"):
                    events.append((Kind.IMAGE, len(page.images), position))
                    page.images.append(FlatImage(element, open_blocks[-1], position, False))
                elif tag == "a":
                    open_links.append(position)
                elif tag == "svg":
                    page.num_svg += 1
                    walk.skip_subtree()
                    continue
            elif tag == "br":
                events.append((Kind.BREAK, LINE, position))
            elif tag == "noscript":
                for image in element.iter("img", "amp-img"):
                    events.append((Kind.IMAGE, len(page.images), position))
                    page.images.append(FlatImage(image, open_blocks[-1], position, True))
                walk.skip_subtree()
                continue
            else:
                kind = _BOUNDARIES.get(tag)
                classes = element.get("class")
                if kind is None and classes:
                    if _FIGURE_CLASS.search(classes):
                        kind = Kind.FIGURE
                    elif _CAPTION_CLASS.search(classes) or (num_figures and "title" in classes.split()):
                        kind = Kind.CAPTION
                if kind is Kind.FIGURE:
                    num_figures += 1
                elif kind is Kind.CAPTION and (num_figures == 0 or any(c and c[0] is Kind.CAPTION for c in closers)):
                    kind = None  # of nothing, or inside another that nobody closed
                if kind is Kind.LIST:
                    lists.append(_first_number(element) - 1 if tag == "ol" else -1)
                elif tag == "table":
                    layouts.append(_is_layout(element))
                    kind = None if layouts[-1] else Kind.TABLE
                if kind is not None:
                    events.append((kind, True, position))
                elif tag == "li":
                    marker = "- "
                    if lists and lists[-1] >= 0:
                        lists[-1] += 1
                        marker = f"{lists[-1]}. "
                    events.append((Kind.ITEM, marker, position))
                elif tag == "tr" and layouts and not layouts[-1]:
                    events.append((Kind.ROW, None, position))
                elif tag in ("td", "th") and layouts and not layouts[-1]:
                    events.append((Kind.CELL, None, position))
                else:
                    events.append((Kind.BREAK, LINE if tag == "dd" else PARAGRAPH, position))
                blocks.append((element, open_blocks[-1], position, position))
                open_blocks.append(len(blocks) - 1)
                closers.append((kind, position, len(events) - 1) if kind is not None else None)
        else:
            text = element.tail
            if tag == "a":
                page.links.append((open_links.pop(), position))
            if tag not in _INLINE and tag not in _SKIPPED and tag not in ("br", "noscript"):
                number = open_blocks.pop()
                block = blocks[number]
                blocks[number] = (block[0], block[1], block[2], position)
                closer = closers.pop()
                if tag == "table":
                    layouts.pop()
                if closer is not None and closer[0] is Kind.CAPTION and position - closer[1] > _MAX_CAPTION_CHARACTERS:
                    # half a page, since nobody closed it
                    events[closer[2]] = (Kind.BREAK, PARAGRAPH, closer[1])
                    events.append((Kind.BREAK, PARAGRAPH, position))
                elif closer is not None:
                    events.append((closer[0], False, position))
                    if closer[0] is Kind.LIST:
                        lists.pop()
                    elif closer[0] is Kind.CAPTION:
                        page.captions.append((closer[1], position))
                    elif closer[0] is Kind.FIGURE:
                        num_figures -= 1
                elif tag not in ("li", "tr", "td", "th"):
                    events.append((Kind.BREAK, LINE if tag == "dt" else PARAGRAPH, position))
                elif layouts and layouts[-1] and tag != "li":
                    events.append((Kind.BREAK, PARAGRAPH, position))
        if text:
            key = "" if text.isspace() else "".join(text.split())
            events.append((Kind.TEXT, (text, len(key)), position))
            if key:
                keys.append(key)
                position += len(key)
    page.stream = "".join(keys)
    return page


def _first_number(element: Any) -> int:
    start = element.get("start") or ""
    return int(start) if re.fullmatch(r"[0-9]{1,9}", start) else 1


def _is_layout(table: Any) -> bool:
    """Whether a table only arranges blocks, and its cells are no cells."""
    if table.get("role") in ("presentation", "none"):
        return True
    has_row_of_two = False
    for inner in table.iterdescendants("td", "th", "tr", "table", "ul", "ol", "pre", "h1", "h2", "h3", "h4"):
        if inner.tag not in ("td", "th", "tr"):
            return True
        if inner.tag == "tr":
            has_row_of_two = has_row_of_two or len(inner) > 1
        elif sum(map(len, inner.itertext())) > _MAX_CELL_CHARACTERS:
            return True
    return not has_row_of_two


class Spans:
    """Disjoint ranges of positions."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self._before = [0]
        for start, end in sorted(spans):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            elif end > start:
                self.starts.append(start)
                self.ends.append(end)
        for start, end in zip(self.starts, self.ends, strict=True):
            self._before.append(self._before[-1] + end - start)

    def until(self, position: int) -> int:
        """How many positions before this one are covered."""
        index = bisect.bisect_right(self.starts, position) - 1
        if index < 0:
            return 0
        return self._before[index] + min(position, self.ends[index]) - self.starts[index]

    def within(self, start: int, end: int) -> int:
        """How many positions of a range are covered."""
        return self.until(end) - self.until(start)


def segments_of(
    page: FlatPage,
    kept: Spans,
    image_of: Callable[[FlatImage], Image | str | None],
    *,
    extra: Iterable[tuple[int, str]] = (),
    captions: Literal["keep", "drop"] = "keep",
    alt: Literal["drop", "text"] = "drop",
) -> list[Segment]:
    """The nodes that are covered by `kept` for half or more, paragraph by paragraph, and the images where they stand.

    `image_of` gives what stands for an image: itself, a text (an emoji that is drawn as an image), or nothing.
    `extra` is text from elsewhere with the position behind which it belongs.
    """
    writer = _Writer(alt)
    others = sorted(extra, reverse=True)
    figures: list[int] = []  # of open figures: how many segments were written before each
    caption: list[str] | None = None
    caption_kept = False
    waiting: list[tuple[int, str, bool]] = []  # captions still without an image: depth of the figure, text, kept or not
    for kind, value, position in page.events:
        while others and others[-1][0] <= position and kind is Kind.TEXT:
            writer.paragraph(others.pop()[1])
        if kind is Kind.TEXT:
            value, length = value
            is_kept = length > 0 and kept.within(position, position + length) * 2 >= length
            if caption is not None:
                caption.append(value)
                caption_kept = caption_kept or is_kept
            elif is_kept:
                writer.text(value)
            elif value[0].isspace() or value[-1].isspace():
                writer.white_space(value if length == 0 else " ")
        elif kind is Kind.IMAGE:
            image = image_of(page.images[value])
            if isinstance(image, str):
                writer.text(image)
            elif image is not None:
                writer.image(image)
                while waiting and waiting[-1][0] == len(figures):
                    writer.caption(waiting.pop()[1], 0)
        elif kind is Kind.FIGURE:
            writer.stop(PARAGRAPH)
            if value:
                figures.append(len(writer.segments))
            else:
                while waiting and waiting[-1][0] == len(figures):
                    _, text, was_kept = waiting.pop()
                    if was_kept:
                        writer.paragraph(text)
                figures.pop()
        elif kind is Kind.CAPTION:
            writer.stop(PARAGRAPH)
            if value:
                caption, caption_kept = [], False
            elif caption is not None:
                text, caption = " ".join("".join(caption).split()), None
                if not text or captions == "drop":
                    continue
                if any(isinstance(s, Image) for s in writer.segments[figures[-1] :]):
                    writer.caption(text, figures[-1])
                else:
                    waiting.append((len(figures), text, caption_kept))
        elif caption is not None:
            caption.append(" ")
        else:
            writer.structure(kind, value)
    for _, text in reversed(others):
        writer.paragraph(text)
    writer.flush()
    return writer.segments


class _Writer:
    """Segments, one character run after the other. The strongest break since the last text decides what joins them."""

    def __init__(self, alt: str) -> None:
        self.segments: list[Segment] = []
        self._alt = alt
        self._parts: list[str] = []
        self._break = 0
        self._is_pre = False
        self._depth_pre = 0
        self._lists: list[bool] = []  # of open lists: whether an item had several paragraphs
        self._marker = ""
        self._fresh_item = False
        self._texts_in_list = 0  # of the innermost list, since it or its first item began
        self._tables = 0
        self._cell = -1  # the cell of its row, from 0
        self._cell_written = -1

    def structure(self, kind: Kind, value: Any) -> None:
        """A boundary of a block."""
        if kind is Kind.BREAK:
            self.stop(value)
        elif kind is Kind.PRE:
            self.stop(PARAGRAPH)
            self._depth_pre += 1 if value else -1
        elif kind is Kind.TABLE:
            self._tables += 1 if value else -1
            self._break = PARAGRAPH
        elif kind is Kind.ROW:
            self._break, self._cell, self._cell_written = max(self._break, LINE), -1, -1
        elif kind is Kind.CELL:
            self._cell += 1
            self._break = max(self._break, SPACE)
        elif kind is Kind.LIST:
            self._marker = ""
            if value:
                self._break = max(self._break, LINE if self._lists else PARAGRAPH)
                self._lists.append(False)
            else:
                self._lists.pop()
                self._break = max(self._break, LINE) if self._lists else PARAGRAPH
            self._texts_in_list = 0 if value and len(self._lists) == 1 else self._texts_in_list
        elif kind is Kind.ITEM and not self._tables:
            self._marker = "  " * max(len(self._lists) - 1, 0) + value
            self._fresh_item = True
            is_first = not self._lists or self._texts_in_list == 0
            self._break = PARAGRAPH if is_first or self._lists[-1] else LINE
        elif kind is Kind.ITEM:
            self.stop(LINE)

    def stop(self, strength: int) -> None:
        """A break. Blocks inside a cell, and the first one of an item, do not break its line."""
        if self._tables:
            self._break = max(self._break, SPACE)
        elif not (self._fresh_item and strength == PARAGRAPH):
            self._break = max(self._break, strength)

    def text(self, value: str) -> None:
        """A kept text node."""
        is_pre = self._depth_pre > 0 and not self._tables
        if self._break == PARAGRAPH or is_pre != self._is_pre:
            if self._lists and self._parts and not self._fresh_item and not is_pre and self._texts_in_list:
                self._lists[-1] = True
            self.flush()
        joint = "\n" if self._break == LINE else " " if self._break == SPACE else ""
        if self._tables and self._cell_written != self._cell:
            if self._parts and self._cell_written >= 0:
                joint = " |" * (self._cell - self._cell_written) + " "
            elif self._cell_written < 0:
                joint += "| " * self._cell
        if not is_pre:
            value = ("x" + value + "x").split()  # type: ignore[assignment]
            value = " ".join(value)[1:-1]
        if self._parts and joint and not is_pre:
            self._parts[-1] = self._parts[-1].rstrip()
        if not is_pre and (joint or not self._parts or self._parts[-1][-1:].isspace()):
            value = value.lstrip()
        self._parts += [joint if self._parts or "|" in joint else "", self._marker, value]
        self._is_pre, self._break, self._marker, self._fresh_item = is_pre, 0, "", False
        self._cell_written = self._cell
        self._texts_in_list += 1

    def white_space(self, value: str) -> None:
        """What stands between two texts and is none itself."""
        if self._depth_pre and self._is_pre and self._parts and self._break < PARAGRAPH:
            self._parts.append("\n" * (self._break == LINE) + value)
            self._break = 0
        else:
            self._break = max(self._break, SPACE)

    def paragraph(self, value: str) -> None:
        """A text that is a paragraph of its own."""
        self.flush()
        if value:
            self.segments.append(Text(value))

    def image(self, image: Image) -> None:
        """An image where it stands."""
        self.flush()
        self.segments.append(image)
        if self._alt == "text" and image.alt:
            self.segments.append(Text(image.alt))

    def caption(self, value: str, start: int) -> None:
        """A caption, behind the last image of the segments from `start`."""
        self.flush()
        index = max(i for i, s in enumerate(self.segments) if isinstance(s, Image) and i >= start)
        if self._alt == "text" and index + 1 < len(self.segments) and self.segments[index + 1] == Text(value):
            return  # the alt text says the same
        self.segments.insert(index + 1, Text(value))

    def flush(self) -> None:
        """End the paragraph."""
        text = "".join(self._parts)
        text = text.strip("\r\n").rstrip() if self._is_pre else text.strip()
        if text:
            self.segments.append(Text(text))
        self._parts, self._cell_written, self._break = [], self._cell, 0
