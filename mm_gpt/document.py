"""Document: everything that people feed the model, as text and images in order.

Pretraining pages, captions, questions, chats and few-shot prompts differ only in how they build Documents.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image as PILImage
from PIL import ImageOps

from mm_gpt.errors import MMGPTError
from mm_gpt.images import Concepts as Concepts
from mm_gpt.images import ImageSource, image_size, load_image, load_pixels, source_name

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Text:
    """A run of text. Special tokens written inside it stay plain text unless it is `is_control`."""

    text: str
    is_target: bool = True
    """True: the model learns to write it. False: the model only reads it."""
    is_control: bool = False
    """True for text that the chat template wrote: there, and only there, special tokens are recognised."""
    ids: tuple[int, ...] | None = None
    """Its tokens, where somebody has chosen them: `text` is then only what they say."""


Shown = Literal["all", "pixels", "concepts", "borrowed"]


@dataclass(frozen=True)
class Image:
    """An image: path, bytes, PIL image, array or http(s) URL. Decoded when it is needed, with every check."""

    source: ImageSource
    mirrored: bool = False
    """Left and right swapped, for training: a caption without sides or written words fits that as well."""
    alt: str = ""
    """What the page says in place of the image. Not fed to the model: see `datasets.extract`."""
    shown: Shown = "all"
    """What a model with concepts is given of it: `pixels` leaves the concepts out, `concepts` everything else. For
    training alone: `borrowed` puts the tokens of the next image in the batch before its concepts."""

    def load(self) -> PILImage.Image:
        """The decoded RGB image. Raises ImageError naming the source."""
        image = load_image(self.source)
        return ImageOps.mirror(image) if self.mirrored else image

    def pixels(self, *, at_least: tuple[int, int]) -> "np.ndarray":
        """uint8 (H, W, 3), for training: at a part of its size where `at_least` (height, width) allows that.

        See `load_pixels`. Raises ImageError naming the source.
        """
        pixels = load_pixels(self.source, at_least=at_least)
        return pixels[:, ::-1] if self.mirrored else pixels

    def size(self) -> tuple[int, int]:
        """(height, width) of the decoded image, from the file's header alone. Raises ImageError."""
        return image_size(self.source)

    @property
    def name(self) -> str:
        return source_name(self.source)


Segment = Text | Image


@dataclass(frozen=True)
class Document:
    """Text and images in order.

    `branches` are alternative continuations of `segments`, each blind to the others: five captions of one photo, or
    many questions about it, share one encoding of that photo instead of repeating it. What all of them begin with is
    encoded once, whether it stands in `segments` or at the start of each.
    """

    segments: tuple[Segment, ...]
    branches: tuple[tuple[Segment, ...], ...] = ()
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What is known about it besides: `url`, `title`, `language`, `licence`, ... JSON values, not fed to the model."""

    @property
    def images(self) -> list[Image]:
        """Each image once, in order."""
        everything = [*self.segments, *(s for branch in self.branches for s in branch)]
        return list({id(s): s for s in everything if isinstance(s, Image)}.values())


Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": str | [part, ...]}`; a part is
`{"type": "text", "text": ...}` or `{"type": "image", "image": source}` (also `url`, `path` or `image_url`).
An assistant turn with `"complete": False` was cut off: its end is not learned. One with `"weight": 0` is not learned at
all."""


def check_text(text: str, where: str) -> None:
    """Raises MMGPTError naming `where` for half a character: a lone surrogate, which no UTF-8 text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise MMGPTError(f"{where}: half a character ({half}, a lone surrogate) at position {error.start}") from None


def check_document(document: Document, where: str = "the prompt") -> None:
    """`check_text` of every text in it."""
    for segment in (*document.segments, *(s for branch in document.branches for s in branch)):
        if isinstance(segment, Text):
            check_text(segment.text, where)


def interleave(parts: str | Iterable[Any], *, is_target: bool = False) -> list[Segment]:
    """A list of strings and image sources as segments. Strings are text; wrap a path or URL in `Image`.

    `interleave(["Left: ", Image("a.jpg"), "right: ", pil_image])`
    """
    if isinstance(parts, str | Text | Image):
        parts = [parts]
    segments: list[Segment] = []
    for part in parts:
        if isinstance(part, Text | Image):
            segments.append(part)
        elif isinstance(part, str):
            segments.append(Text(part, is_target=is_target))
        else:
            segments.append(Image(part))
    return segments
