"""The first pass of a build: one part of the sources through extraction, filters and image fetching."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.parts import once
from mm_gpt.datasets.building.pipeline import Funnel, as_document, language_of, num_images, run_stages
from mm_gpt.datasets.building.shards import ShardWriter
from mm_gpt.datasets.building.splits import Split, read_split
from mm_gpt.datasets.contamination.decontaminate import RemoveContamination
from mm_gpt.datasets.duplicates.fingerprints import write_fingerprints
from mm_gpt.datasets.filters.published_filters import Filters
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, Sample
from mm_gpt.document import Concepts, Document, Image, Segment, Text
from mm_gpt.errors import ImageError, MMGPTError
from mm_gpt.images import (
    DEFAULT_LIMITS,
    STORED_FORMATS,
    ImageSource,
    image_bytes,
    image_format,
    is_url,
    load_image,
    to_file,
)

FETCHES = 16
"""Images of one document that are fetched at a time."""


def process_split(split: Split, config: CorpusConfig, work: Path) -> dict[str, Any]:
    """Read, filter and fetch one split into `work/SPLIT`: shards, fingerprints and `report.json`, which is returned.

    Does nothing when it is there already. Raises MMGPTError when the split cannot be read at all.
    """
    return once(work / split.name, lambda folder: _process(split, config, folder))


def _process(split: Split, config: CorpusConfig, folder: Path) -> dict[str, Any]:
    funnel, errors = Funnel(), ErrorCounter()
    writer = ShardWriter(folder, shard_bytes=config.shard_mb * 2**20)
    stages = config.stages()

    def written() -> Iterator[Document]:
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
            for number, sample in enumerate(read_split(split, config, errors, funnel)):
                kept = _prepared(sample, stages, config, funnel, errors, pool)
                if kept is None:
                    continue
                try:
                    writer.add(kept)
                except BadRecordError as error:
                    funnel.count("store", as_document(kept), str(error))
                    errors.add(str(error), as_document(kept).id)
                    continue
                document = as_document(kept)
                funnel.count("store", document)
                yield dataclasses.replace(document, id=document.id or f"{split.name}:{number}")

    write_fingerprints(written(), folder / split.fingerprints, errors, minhash=config.minhash())
    shards = writer.close()
    return {
        "funnel": funnel.to_json(),
        "errors": {"counts": dict(errors.counts), "examples": errors.examples},
        "shards": [asdict(shard) for shard in shards],
    }


def _prepared(
    sample: Sample,
    stages: Filters,
    config: CorpusConfig,
    funnel: Funnel,
    errors: ErrorCounter,
    pool: ThreadPoolExecutor,
) -> Sample | None:
    """A sample behind all filters, its images in memory."""
    if not isinstance(sample, Document):
        whole = as_document(sample)
        fetched = _fetched(whole, config, errors, pool)
        if num_images(fetched) < num_images(whole):
            funnel.count("fetch images", whole, "image missing or broken")
            return None
        funnel.count("fetch images", fetched)
        if config.contamination is not None and _is_contaminated(fetched, config.contamination, funnel):
            return None
        return _with_images(sample, (segment for segment in fetched.segments if isinstance(segment, Image)))
    document = run_stages(stages.before_fetch, sample, funnel)
    if document is None:
        return None
    step = funnel.step("fetch images", language_of(document))
    step.came.add(document)
    fetched = _fetched(document, config, errors, pool)
    if lost := num_images(document) - num_images(fetched):
        step.removed["image: missing or broken"] += lost
    if not fetched.segments:
        step.removed["nothing left"] += 1
        return None
    step.left.add(fetched)
    return run_stages(stages.after_fetch, fetched, funnel)


def _is_contaminated(document: Document, index: str, funnel: Funnel) -> bool:
    """Whether a record or conversation shares anything with an evaluation set: a part of one is of no use."""
    stage = RemoveContamination(index_path=index)
    removed: Counter[str] = Counter()
    stage(document, removed)
    funnel.count(stage.name, document, "in an evaluation set" if removed else None)
    return bool(removed)


def _fetched(document: Document, config: CorpusConfig, errors: ErrorCounter, pool: ThreadPoolExecutor) -> Document:
    """The document with the bytes of its images; those that cannot be had are left out, and counted."""

    def load(segment: Segment) -> Any:
        """What the threads do: wait. Pictures are decoded one after the other, since each may take a lot of memory."""
        if isinstance(segment, Text) or not isinstance(segment.source, str | os.PathLike | bytes):
            return segment
        source = segment.source
        try:
            if isinstance(source, str) and "://" in source and source[:5].lower() != "data:" and not config.fetch:
                raise ImageError(f"{source}: not fetched")
            return _file(source)
        except MMGPTError as error:
            return error

    kept: list[Segment] = []
    for start in range(0, len(document.segments), FETCHES):
        segments = document.segments[start : start + FETCHES]
        for segment, found in zip(segments, pool.map(load, segments), strict=True):
            if isinstance(segment, Text):
                kept.append(segment)
                continue
            try:
                if isinstance(found, MMGPTError):
                    raise found
                source = found if isinstance(found, bytes) else segment.source
                kept.append(dataclasses.replace(segment, source=_stored(source, config.image_side)))
            except MMGPTError as error:
                errors.add("image missing or broken", f"{document.id}: {error}")
    return dataclasses.replace(document, segments=tuple(kept))


def _file(source: str | os.PathLike[str] | bytes) -> bytes:
    """The image file behind a path, URL, or address of an object store. Raises MMGPTError."""
    if isinstance(source, str) and "://" in source and not is_url(source):
        with files.open_file(source) as file:
            data = file.read(DEFAULT_LIMITS.max_bytes + 1)
        if len(data) > DEFAULT_LIMITS.max_bytes:
            raise ImageError(f"{source}: larger than the limit of {DEFAULT_LIMITS.max_bytes:,} bytes")
        return data
    return image_bytes(source)


def _stored(source: ImageSource, side: int | None) -> bytes:
    """An image as the file that is stored: as it came, but smaller where it is large, and of a format of shards.

    Decodes it, so that what is stored can be read. Raises ImageError.
    """
    image = load_image(source)
    large = side is not None and max(image.size) > side
    suffix = image_format(source) if isinstance(source, bytes) else ""
    if isinstance(source, bytes) and not large and suffix in STORED_FORMATS:
        return source
    if large:
        assert side is not None
        image.thumbnail((side, side), PILImage.Resampling.BICUBIC, reducing_gap=3.0)
    return to_file(image, suffix if suffix in ("jpg", "webp") else "png")


def _with_images(sample: Record | Conversation, images: Iterator[Image]) -> Sample:
    """The sample with other image sources, in order."""
    if isinstance(sample, Record):
        if isinstance(sample.image, Concepts):
            return sample
        source = next(images).source
        assert isinstance(source, bytes)
        return dataclasses.replace(sample, image=source)
    turns = [
        {**turn, "content": [next(images) if isinstance(part, Image) else part for part in turn["content"]]}
        if isinstance(turn["content"], list | tuple)
        else turn
        for turn in sample.messages
    ]
    return dataclasses.replace(sample, messages=tuple(turns))
