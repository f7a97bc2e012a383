"""A flat page, less what is not wanted, as segments: paragraphs, lists, tables, code, captions and images."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from mm_gpt.datasets.web.html_flat import LINE, PARAGRAPH, SPACE, FlatImage, FlatPage, Kind, Spans
from mm_gpt.document import Image, Segment, Text


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
    text_kind, break_kind = Kind.TEXT, Kind.BREAK
    starts, ends = [*kept.starts, len(page.stream) + 1], [*kept.ends, len(page.stream) + 1]
    span = 0  # the first that ends behind where we are
    for kind, value, position, end in page.events:
        while others and others[-1][0] <= position and (kind is text_kind or kind is Kind.IMAGE):
            writer.paragraph(others.pop()[1])
        if kind is text_kind:
            while ends[span] <= position:
                span += 1
            if starts[span] >= end:
                is_kept = False
            elif starts[span] <= position and end <= ends[span]:
                is_kept = end > position
            else:
                is_kept = end > position and kept.within(position, end) * 2 >= end - position
            if caption is not None:
                caption.append(value)
                caption_kept = caption_kept or is_kept
            elif is_kept:
                writer.text(value)
            elif value[0].isspace() or value[-1].isspace():
                writer.white_space(value if end == position else " ")
        elif kind is break_kind and caption is None:
            writer.stop(value)
        elif kind is Kind.IMAGE:
            image = image_of(page.images[value])
            if isinstance(image, str):
                writer.text(image)
            elif image is not None:
                writer.image(image)
                while waiting and waiting[-1][0] == len(figures):
                    writer.caption(waiting.pop()[1])
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
                if writer.last_image >= figures[-1]:
                    writer.caption(text)
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
        self.last_image = -1
        """Its number in the segments."""
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
        """A boundary of a list, a table, or code."""
        if kind is Kind.PRE:
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
        self.last_image = len(self.segments)
        self.segments.append(image)
        if self._alt == "text" and image.alt:
            self.segments.append(Text(image.alt))

    def caption(self, value: str) -> None:
        """A caption, behind the last image."""
        self.flush()
        index = self.last_image
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
