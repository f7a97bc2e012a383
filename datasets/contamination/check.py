"""Which items of evaluation sets stand in a training corpus: one pass over it answers for every method at once.

`find_hits` (pure; a sample and the index -> small arrays) runs anywhere, `Scan` adds up what it finds, scans of shards
merge, and `report` says for each set and method which items are dirty. The methods are those of the
GPT-2, GPT-3 and GPT-4 reports, and two for images: see `evaluation_index`. `mm-gpt eval --contamination` splits scores
by the report.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.contamination.evaluation_index import (
    EvaluationIndex,
    file_hash,
    is_fetched,
)
from mm_gpt.datasets.contamination.overlap import composed, find_words, letters_of, window_hashes
from mm_gpt.datasets.duplicates.image_hash import perceptual_hash
from mm_gpt.datasets.samples import Conversation, Record, Sample
from mm_gpt.document import Concepts, Image, Segment, Text
from mm_gpt.errors import ImageError
from mm_gpt.images import ImageSource, load_image
from mm_gpt.system.processes import process_pool

METHODS = ("n-gram", "13-gram", "substring", "image", "same file")
COMMON_DOCUMENTS = 10
"""A 13-gram in more documents than this is a phrase, not a copy (GPT-3, appendix C)."""
PARAGRAPH = "\n\n"
"""Stands between the segments of a document, and for its images."""
COUNTS_FILE = "counts.safetensors"
_BATCH = 64  # samples that travel to a process together
_EXAMPLES = 3  # of each set and method
_SNIPPET = 160  # characters


@dataclass(frozen=True)
class Hits:
    """What one sample shares with the evaluation sets."""

    sample: str = ""
    """Its id."""
    grams: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Words of a gram -> numbers of the keys found, each once."""
    strings: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    """Numbers of the evaluation images that look like one of the sample's."""
    files: tuple[int, ...] = ()
    """Numbers of the evaluation images whose file the sample has."""
    num_images: int = 0
    unread: Mapping[str, int] = field(default_factory=dict)
    """Images that could not be compared: "image not fetched", "broken image"."""
    examples: tuple[tuple[str, int, str], ...] = ()
    """(method, item, what they share): the first of each method."""


def find_hits(sample: Sample, index: EvaluationIndex) -> Hits:
    """What `sample` shares with the sets of `index`. Images that are still at a URL are counted, never fetched."""
    name, texts, images = contents(sample)
    grams: dict[int, list[np.ndarray]] = {}
    strings: set[int] = set()
    examples: dict[str, tuple[int, str]] = {}
    for text in map(composed, texts):
        words = find_words(text)
        for length, table in index.tables.items():
            places, keys = table.find(window_hashes(words.hashes, length))
            if not len(keys):
                continue
            grams.setdefault(length, []).append(keys)
            for method in ("n-gram", "13-gram"):
                owners = index.owners.get((method, length))
                if owners is None or method in examples or not (owned := owners[keys] >= 0).any():
                    continue
                first = int(owned.argmax())
                shared = text[words.starts[places[first]] : words.ends[places[first] + length - 1]]
                examples[method] = (int(owners[keys[first]]), shared)
        found = index.substrings.find(letters_of(text))
        strings.update(found)
        if found and "substring" not in examples:
            examples["substring"] = (int(index.string_owners[found[0]]), index.strings[found[0]])
    near: set[int] = set()
    same: set[int] = set()
    unread: Counter[str] = Counter()
    if len(index.image_hashes):
        for image in images:
            try:
                alike, equal = image_hits(image, index)
            except ImageError:
                unread["broken image" if is_fetched(image) else "image not fetched"] += 1
                continue
            near.update(alike)
            same.update(equal)
    for method, numbers in (("image", near), ("same file", same)):
        if numbers:
            number = min(numbers)
            examples[method] = (int(index.image_items[number]), index.image_files[number][:16])
    return Hits(
        name,
        {length: np.unique(np.concatenate(keys)) for length, keys in grams.items()},
        tuple(sorted(strings)),
        tuple(sorted(near)),
        tuple(sorted(same)),
        len(images),
        dict(unread),
        tuple((method, item, shared[:_SNIPPET]) for method, (item, shared) in examples.items()),
    )


def image_hits(image: ImageSource, index: EvaluationIndex) -> tuple[list[int], list[int]]:
    """Numbers of the evaluation images that look like `image`, and of those with the same file.

    Raises ImageError for an image that is broken or not fetched.
    """
    if not is_fetched(image):
        raise ImageError("not fetched")
    same = index.files.get(file_hash(image), [])
    return index.near_images(perceptual_hash(load_image(image))).tolist(), same


def contents(sample: Sample) -> tuple[str, list[str], list[ImageSource]]:
    """(id, the texts of a sample, its images). Paragraphs are one text, so that a copy may cross them.

    Branches and captions are texts of their own, each after what all of them begin with.
    """
    if isinstance(sample, Record):
        asked = [f"{pair.question} {pair.answer}" for pair in sample.questions]
        own: list[ImageSource] = [] if isinstance(sample.image, Concepts) else [sample.image]
        return sample.key, [*sample.captions, *asked], own
    if isinstance(sample, Conversation):
        parts: list[Any] = []
        for message in sample.messages:
            content = message["content"]
            parts += [content] if isinstance(content, str) else content
        texts = [part if isinstance(part, str) else str(part.get("text", "")) for part in parts if _is_text(part)]
        images = [part.source for part in parts if isinstance(part, Image)]
        return sample.key, [PARAGRAPH.join(texts)], images
    branches = sample.branches or ((),)
    return sample.id, [joined((*sample.segments, *b)) for b in branches], [image.source for image in sample.images]


def joined(segments: Iterable[Segment]) -> str:
    """The text of segments."""
    return PARAGRAPH.join(segment.text for segment in segments if isinstance(segment, Text))


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and "text" in part)


class Scan:
    """What a corpus, or a part of it, shares with the evaluation sets. Its size is that of the index."""

    def __init__(self, index: EvaluationIndex):
        self.counts: Counter[str] = Counter()
        """samples, images, "broken image", "image not fetched"."""
        self.grams = {words: np.zeros(len(keys), np.uint32) for words, keys in index.gram_keys.items()}
        """In how many samples each gram of the index stands."""
        self.strings = np.zeros(len(index.strings), np.uint32)
        self.images = np.zeros(len(index.image_hashes), np.uint32)
        self.files = np.zeros(len(index.image_hashes), np.uint32)
        self.examples: dict[tuple[str, str], list[dict[str, str]]] = {}
        """(set, method) -> the first few hits."""

    def add(self, hits: Hits, index: EvaluationIndex) -> None:
        """Count one sample."""
        self.counts["samples"] += 1
        self.counts["images"] += hits.num_images
        self.counts.update(hits.unread)
        for words, keys in hits.grams.items():
            self.grams[words][keys] += 1
        self.strings[list(hits.strings)] += 1
        self.images[list(hits.images)] += 1
        self.files[list(hits.files)] += 1
        for method, item, shared in hits.examples:
            example = {"item": index.ids[item], "sample": hits.sample, "shared": shared}
            self._add_examples((index.set_of(item).name, method), [example])

    def merge(self, other: "Scan") -> None:
        """Add the scan of another part of the corpus with the same index."""
        self.counts.update(other.counts)
        for words in self.grams:
            self.grams[words] += other.grams[words]
        self.strings += other.strings
        self.images += other.images
        self.files += other.files
        for key, examples in other.examples.items():
            self._add_examples(key, examples)

    def _add_examples(self, key: tuple[str, str], examples: list[dict[str, str]]) -> None:
        known = self.examples.setdefault(key, [])
        known += [e for e in examples if all(e["item"] != k["item"] for k in known)][: _EXAMPLES - len(known)]


def scan(samples: Iterable[Sample], index: EvaluationIndex) -> Scan:
    """Look all samples up in the index: one shard on one machine, say."""
    result = Scan(index)
    for sample in samples:
        result.add(find_hits(sample, index), index)
    return result


def scan_parallel(samples: Iterable[Sample], index: EvaluationIndex, *, workers: int) -> Scan:
    """`scan` over `workers` processes, with the same result. At most two batches a process are in flight."""
    if workers <= 1:
        return scan(samples, index)
    result = Scan(index)
    with process_pool(workers, _set_index, (index,)) as pool:
        pending: list[Any] = []
        for batch in _batches(samples):
            pending.append(pool.submit(_scan_batch, batch))
            if len(pending) > 2 * workers:
                _add_all(result, pending.pop(0).result(), index)
        for future in pending:
            _add_all(result, future.result(), index)
    return result


_worker: list[EvaluationIndex] = []  # of this worker process: sent once, not with every batch


def _set_index(index: EvaluationIndex) -> None:
    _worker[:] = [index]


def _scan_batch(samples: list[Sample]) -> list[Hits]:
    return list(map(partial(find_hits, index=_worker[0]), samples))


def _add_all(result: Scan, hits: list[Hits], index: EvaluationIndex) -> None:
    for of_sample in hits:
        result.add(of_sample, index)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def save_scan(folder: Path, index: EvaluationIndex, found: Scan) -> None:
    """The index, and in how many samples of the corpus each of its grams stands."""
    from safetensors.numpy import save_file

    index.save(folder)
    save_file({str(words): counts for words, counts in found.grams.items()}, folder / COUNTS_FILE)
