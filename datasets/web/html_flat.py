"""A tree as one flat line of texts, breaks and images, in which every place has a position.

A position says how many characters that are no white space stand before it. So a text found in `FlatPage.stream` says
which nodes it came from, whatever was done to white space.
"""

import bisect
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from mm_gpt.datasets.samples import BadRecordError, optional_import


class Kind(IntEnum):
    """What an event is; in brackets what its value holds."""

    TEXT = 0  # (text as written)
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

# What a tag is to `flatten`; every other one is a block.
_INLINE, _SKIPPED, _IMAGE, _LINK, _SVG, _LINE_BREAK, _NOSCRIPT, _BLOCK = range(8)
_INLINE_TAGS = (
    "abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q rb rp rt ruby s samp small"
    " span strike strong sub sup time tt u var wbr picture source math"
)
_SKIPPED_TAGS = "script style template head iframe object embed video audio canvas select textarea map"
_ROLES = {
    **dict.fromkeys(_INLINE_TAGS.split(), _INLINE),
    **dict.fromkeys(_SKIPPED_TAGS.split(), _SKIPPED),
    **dict.fromkeys(("img", "amp-img"), _IMAGE),
    "a": _LINK,
    "svg": _SVG,
    "br": _LINE_BREAK,
    "noscript": _NOSCRIPT,
}
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


@dataclass(slots=True)
class FlatImage:
    """An `<img>`: its element, the block around it (a number in FlatPage.blocks) and where it stands."""

    element: Any
    block: int
    position: int
    is_noscript: bool


@dataclass
class FlatPage:
    """See the module. `events` holds (kind, value, first position, position behind it).

    `blocks` holds (element, parent's number, first position, position behind it). `captions` and `links` are the ranges
    of positions inside of such."""

    events: list[tuple[Kind, Any, int, int]] = field(default_factory=list)
    images: list[FlatImage] = field(default_factory=list)
    blocks: list[tuple[Any, int, int, int]] = field(default_factory=list)
    captions: list[tuple[int, int]] = field(default_factory=list)
    links: list[tuple[int, int]] = field(default_factory=list)
    stream: str = ""
    num_svg: int = 0


def flatten(tree: Any, max_elements: int) -> FlatPage:
    """The page in reading order. Raises BadRecordError when it has more than `max_elements` elements."""
    walker = _Walker()
    page = walker.page
    events, keys, links = page.events, [], page.links
    open_links: list[int] = []
    position = count = 0
    # white space next to a boundary says nothing, but in <pre>
    is_after_boundary = False
    roles, text_kind = _ROLES, Kind.TEXT
    walk = optional_import("lxml.etree").iterwalk(tree, events=("start", "end"))
    for action, element in walk:
        tag = element.tag
        role = roles.get(tag, _BLOCK)
        if action == "start":
            count += 1
            if count > max_elements:
                raise BadRecordError("too many elements")
            if role == _BLOCK:
                walker.open(element, tag, position)
                is_after_boundary = walker.num_pre == 0
            elif role == _LINK:
                open_links.append(position)
            elif role == _LINE_BREAK:
                events.append((Kind.BREAK, LINE, position, position))
            elif role == _IMAGE:
                walker.image(element, position, False)
                is_after_boundary = False
            elif role != _INLINE:
                if role == _SVG:
                    page.num_svg += 1
                elif role == _NOSCRIPT:
                    for image in element.iter("img", "amp-img"):
                        walker.image(image, position, True)
                        is_after_boundary = False
                walk.skip_subtree()
                continue
            text = element.text
        else:
            if role == _BLOCK:
                walker.close(tag, position)
                is_after_boundary = walker.num_pre == 0
            elif role == _LINK:
                links.append((open_links.pop(), position))
            text = element.tail
        if text:
            if text.isspace():
                if not is_after_boundary:
                    events.append((text_kind, text, position, position))
                continue
            key = "".join(text.split())
            keys.append(key)
            end = position + len(key)
            events.append((text_kind, text, position, end))
            position = end
            is_after_boundary = False
    page.stream = "".join(keys)
    return page


class _Walker:
    """The blocks that are open, and what they are."""

    def __init__(self) -> None:
        self.page = FlatPage()
        self.num_pre = 0
        self._open: list[int] = [-1]
        self._closers: list[tuple[Kind, int, int] | None] = []  # of open blocks: kind, first position, their event
        self._lists: list[int] = []  # the number of the last item; -1 in a list without numbers
        self._layouts: list[bool] = []  # of open tables
        self._num_figures = 0

    def image(self, element: Any, position: int, is_noscript: bool) -> None:
        self.page.events.append((Kind.IMAGE, len(self.page.images), position, position))
        self.page.images.append(FlatImage(element, self._open[-1], position, is_noscript))

    def open(self, element: Any, tag: str, position: int) -> None:
        page = self.page
        events = page.events
        kind = _BOUNDARIES.get(tag)
        if kind is None and (classes := element.get("class")):
            kind = _kind_of(classes, self._num_figures > 0)
        if kind is Kind.FIGURE:
            self._num_figures += 1
        elif kind is Kind.CAPTION:
            if self._num_figures == 0 or any(c and c[0] is Kind.CAPTION for c in self._closers):
                kind = None  # of nothing, or inside another that nobody closed
        elif kind is Kind.LIST:
            self._lists.append(_first_number(element) - 1 if tag == "ol" else -1)
        elif kind is Kind.PRE:
            self.num_pre += 1
        if tag == "table":
            self._layouts.append(_is_layout(element))
            kind = None if self._layouts[-1] else Kind.TABLE
        if kind is not None:
            events.append((kind, True, position, position))
            self._closers.append((kind, position, len(events) - 1))
        else:
            if tag == "li":
                marker = "- "
                if self._lists and self._lists[-1] >= 0:
                    self._lists[-1] += 1
                    marker = f"{self._lists[-1]}. "
                events.append((Kind.ITEM, marker, position, position))
            elif tag == "tr" and self._layouts and not self._layouts[-1]:
                events.append((Kind.ROW, None, position, position))
            elif tag in ("td", "th") and self._layouts and not self._layouts[-1]:
                events.append((Kind.CELL, None, position, position))
            else:
                self._break(LINE if tag == "dd" else PARAGRAPH, position)
            self._closers.append(None)
        page.blocks.append((element, self._open[-1], position, position))
        self._open.append(len(page.blocks) - 1)

    def close(self, tag: str, position: int) -> None:
        page = self.page
        number = self._open.pop()
        element, parent, start, _ = page.blocks[number]
        page.blocks[number] = (element, parent, start, position)
        closer = self._closers.pop()
        if tag == "table":
            self._layouts.pop()
        if closer is not None:
            kind, start, event = closer
            if kind is Kind.CAPTION and position - start > _MAX_CAPTION_CHARACTERS:
                # half a page, since nobody closed it
                page.events[event] = (Kind.BREAK, PARAGRAPH, start, start)
                self._break(PARAGRAPH, position)
                return
            page.events.append((kind, False, position, position))
            if kind is Kind.LIST:
                self._lists.pop()
            elif kind is Kind.PRE:
                self.num_pre -= 1
            elif kind is Kind.CAPTION:
                page.captions.append((start, position))
            elif kind is Kind.FIGURE:
                self._num_figures -= 1
        elif tag not in ("li", "tr", "td", "th"):
            self._break(LINE if tag == "dt" else PARAGRAPH, position)
        elif self._layouts and self._layouts[-1] and tag != "li":
            self._break(PARAGRAPH, position)

    def _break(self, strength: int, position: int) -> None:
        event = (Kind.BREAK, strength, position, position)
        if not self.page.events or self.page.events[-1] != event:
            self.page.events.append(event)


@functools.lru_cache(maxsize=4096)
def _kind_of(classes: str, in_figure: bool) -> Kind | None:
    if _FIGURE_CLASS.search(classes):
        return Kind.FIGURE
    if _CAPTION_CLASS.search(classes) or (in_figure and "title" in classes.split()):
        return Kind.CAPTION
    return None


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
