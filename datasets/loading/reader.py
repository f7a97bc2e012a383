"""From rows of a plan to batches: samples are read, images decoded, and both turned into numbers.

A `Reader` is what a worker process runs. It is small and can be sent to one: it knows where the data is and how it is
written, and holds no model, no tables, no pixels.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_gpt.datasets.loading.loader import Loaded
from mm_gpt.datasets.loading.plan import Row
from mm_gpt.datasets.loading.sources import IndexedSource
from mm_gpt.datasets.samples import BadRecordError
from mm_gpt.document import Concepts, Document, Image, Segment, Text
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.processor import Batch, Example, Processor, collate, stack_pixels
from mm_gpt.vision.transforms import TrainTransform

Skipped = list[tuple[str, str]]
"""(reason, record) of what could not be read."""


@dataclass
class Reader:
    """Rows of a plan to micro-batches."""

    sources: Sequence[IndexedSource]
    processor: Processor
    augment: bool
    """Random crops and colours, where a model sees an image as one tile."""
    seed: int
    pad_to_multiple: int = 64
    concept_dropout: float = 0.0
    """How often an image of training is shown without its concepts; half as often its concepts are shown alone. Where
    nothing but concepts is known, half of them have the tokens of another image before them."""

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> Loaded:
        """What cannot be read is skipped and named."""
        skipped: Skipped = []
        examples: list[list[Example]] = []
        pixels: list[Tensor] = []
        for number, row in rows:
            examples.append([])
            images = itertools.count()
            for item in row:
                source = self.sources[item.source]
                try:
                    document = source.document(item.unit)
                except (BadRecordError, MMGPTError) as error:
                    skipped.append((_reason(error), f"{source.name}:{item.unit[0]}"))
                    continue
                seeds = ((self.seed, number, count) for count in images)
                if (read := self.read(document, skipped, seeds)) is not None:
                    examples[-1].append(read[0])
                    pixels += read[1]
        return Loaded(self.batch(examples, pixels, pad_to_multiple=self.pad_to_multiple), skipped)

    def read(
        self, document: Document, skipped: Skipped, seeds: Iterator[tuple[int, ...]] | None = None
    ) -> tuple[Example, list[Tensor]] | None:
        """A document in numbers and its tiles, augmented by `seeds`, one for each image.

        A page stands without a broken image; an answer about one does not.
        """
        while True:
            broken: Image | None = None
            tiles: list[Tensor] = []
            try:
                example = self.processor(document)
                for n, grid in enumerate(example.grids):
                    broken, seed = example.images[n], None if seeds is None else next(seeds)
                    tiles.append(self._tiles(broken, grid, seed))
                    if seed is not None:
                        example.images[n] = self._shown(broken, seed)
                return example, tiles
            except MMGPTError as error:
                if broken is None and isinstance(error, ImageError):  # its size is asked for before its pixels
                    broken = next((image for image in document.images if not _has_size(image)), None)
                skipped.append(("broken image" if broken else _reason(error), f"{document.id}: {error}"))
            is_page = all(isinstance(s, Image) or s.is_target for s in document.segments) and not document.branches
            if broken is None or not is_page:
                return None
            left = _without(document.segments, broken)
            if not any(isinstance(segment, Text) and not segment.is_control for segment in left):
                return None
            document = dataclasses.replace(document, segments=left)

    def _shown(self, image: Image, seed: tuple[int, ...]) -> Image:
        if not self.concept_dropout and not isinstance(image.source, Concepts):
            return image
        draw = random.Random(f"shown/{seed}").random()
        if isinstance(image.source, Concepts):
            return dataclasses.replace(image, shown="borrowed" if draw < 0.5 else "concepts")
        if draw >= 1.5 * self.concept_dropout:
            return image
        return dataclasses.replace(image, shown="pixels" if draw < self.concept_dropout else "concepts")

    def _tiles(self, image: Image, grid: tuple[int, int], seed: tuple[int, ...] | None) -> Tensor:
        """(N, 3, H, W) of one image."""
        config = self.processor.config
        is_seen = not isinstance(image.source, Concepts)
        if seed is not None and self.augment and is_seen and config.image is not None and config.tiling is None:
            generator = torch.Generator().manual_seed(hash(seed) % 2**63)
            return TrainTransform(config.image, generator)(image)[None]
        return self.processor.tiles(image, grid)

    def batch(self, rows: Sequence[Sequence[Example]], tiles: Sequence[Tensor], *, pad_to_multiple: int = 64) -> Batch:
        pixel_values = torch.cat(list(tiles)) if tiles else stack_pixels([], self.processor.config.image)
        return collate(rows, pixel_values, pad_to_multiple=pad_to_multiple)


def _has_size(image: Image) -> bool:
    try:
        return bool(image.size())
    except ImageError:
        return False


def _without(segments: Sequence[Segment], image: Image) -> tuple[Segment, ...]:
    """Without an image, in whose place paragraphs stay apart."""
    left: list[Segment] = []
    for before, segment, behind in zip((None, *segments), segments, (*segments[1:], None), strict=False):
        between = all(isinstance(s, Text) and not s.is_control for s in (before, behind))
        if segment is not image:
            left.append(segment)
        elif between:
            left.append(Text("\n\n"))
    return tuple(left)


def _reason(error: Exception) -> str:
    if isinstance(error, BadRecordError):
        return str(error)
    return "too long" if isinstance(error, ContextOverflowError) else "unreadable"
