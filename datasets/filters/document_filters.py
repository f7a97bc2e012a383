"""Rules on a document's images taken together: how many and where; and random choices that repeat."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError


def random_fraction(document: Document, purpose: str, seed: int) -> float:
    """A number in (0, 1) that depends on the document, the purpose and the seed, and on nothing else.

    The same on every machine and in any order. The purpose keeps two decisions about one document independent. A
    document is told by its id, one without by its text.
    """
    key = document.id or "\n".join(segment.text for segment in document.segments if isinstance(segment, Text))
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode(errors="surrogatepass")).digest()
    return ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """Drops documents with fewer or more images than this."""

    minimum: int = 1
    maximum: int | None = 30
    name: str = "number of images"

    def __post_init__(self) -> None:
        if self.minimum < 0 or (self.maximum is not None and self.maximum < self.minimum):
            raise ConfigError(f"number of images: from {self.minimum} to {self.maximum} is no range")

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        images = _num_images(document)
        if images < self.minimum:
            removed["too few images"] += 1
            return None
        if self.maximum is not None and images > self.maximum:
            removed["too many images"] += 1
            return None
        return document


@dataclass(frozen=True, kw_only=True)
class ImageLimit:
    """Keeps the first images of a document and removes the others, the text stays (KOSMOS-1: five)."""

    maximum: int = 5
    name: str = "image limit"

    def __post_init__(self) -> None:
        if self.maximum < 0:
            raise ConfigError(f"maximum: must be at least 0, is {self.maximum}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        kept: list[Text | Image] = []
        images = 0
        for segment in document.segments:
            images += isinstance(segment, Image)
            if isinstance(segment, Image) and images > self.maximum:
                removed["image: over the document's limit"] += 1
            else:
                kept.append(segment)
        return replace(document, segments=tuple(kept))


@dataclass(frozen=True, kw_only=True)
class Interspersed:
    """Drops documents in which no image stands between texts: those are galleries above or below an article.

    KOSMOS-1 keeps pages with "images interspersed in text" and says no more; this is how we read it.
    """

    name: str = "interspersed images"

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        kinds = [isinstance(s, Image) for s in document.segments if isinstance(s, Image) or s.text.strip()]
        texts = [at for at, is_image in enumerate(kinds) if not is_image]
        if not texts or not any(kinds[texts[0] : texts[-1]]):
            removed["images not interspersed"] += 1
            return None
        return document


@dataclass(frozen=True, kw_only=True)
class OneImageSample:
    """Keeps a random part of the documents that have exactly one image (KOSMOS-1: half, for diversity)."""

    keep: float = 0.5
    seed: int = 0
    name: str = "one-image sample"

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep: must be from 0 to 1, is {self.keep}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        if _num_images(document) == 1 and random_fraction(document, "one image", self.seed) >= self.keep:
            removed["one image only"] += 1
            return None
        return document


def _num_images(document: Document) -> int:
    return sum(isinstance(segment, Image) for segment in document.segments)
