"""Which items of evaluation sets stand in a training corpus: one pass over it answers for every method at once.

`find_hits` (pure; a sample and the index -> small arrays) runs anywhere, `Scan` adds up what it finds, scans of shards
merge, and `report` says for each set and method which items are dirty. The methods are those of the GPT-2, GPT-3 and
GPT-4 reports, and two for images: see `evaluation_index`. `mm-gpt eval --contamination` splits scores by the report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.evaluation_index import (
    EvaluationIndex,
    EvaluationItem,
    EvaluationSet,
    IndexConfig,
    file_hash,
    is_fetched,
)
from mm_gpt.datasets.image_hash import perceptual_hash
from mm_gpt.datasets.overlap import composed, find_words, letters_of, window_hashes
from mm_gpt.datasets.samples import Conversation, Record, Sample
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ImageError, MMGPTError
from mm_gpt.images import ImageSource, load_image

METHODS = ("n-gram", "13-gram", "substring", "image", "same file")
COMMON_DOCUMENTS = 10
"""A 13-gram in more documents than this is a phrase, not a copy (GPT-3, appendix C)."""
PARAGRAPH = "\n\n"
"""Stands between the segments of a document, and for its images."""
_VERSION = 1
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
                owner = index.owners.get((method, length))
                mine = np.flatnonzero(owner[keys] >= 0) if owner is not None and method not in examples else ()
                if owner is not None and len(mine):
                    place = places[mine[0]]
                    shared = text[words.starts[place] : words.ends[place + length - 1]]
                    examples[method] = (int(owner[keys[mine[0]]]), shared)
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
        return sample.key, [*sample.captions, *asked], [sample.image]
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
    with ProcessPoolExecutor(workers, initializer=_set_index, initargs=(index,)) as pool:
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


# ---- the report ----


def report(index: EvaluationIndex, found: Scan) -> dict[str, Any]:
    """For each set: items, dirty ones by method, examples. JSON values; see docs/evaluation.md."""
    dirty = _dirty(index, found)
    in_corpus = _overlap(index, found)
    return {
        "version": _VERSION,
        "corpus": {name: found.counts[name] for name in ("samples", "images", "image not fetched", "broken image")},
        "config": asdict(index.config),
        "sets": {s.name: _report_set(s, index, dirty, in_corpus, found) for s in index.sets},
    }


def _dirty(index: EvaluationIndex, found: Scan) -> dict[str, np.ndarray]:
    """Method -> whether each item of all sets is dirty, bool (I,)."""
    dirty = {method: np.zeros(index.num_items, bool) for method in METHODS}
    for method in ("n-gram", "13-gram"):
        for words, counts in found.grams.items():
            rows = index.grams[method][index.grams[method][:, 1] == words]
            seen = counts > 0 if method == "n-gram" else (counts > 0) & (counts <= COMMON_DOCUMENTS)
            dirty[method][rows[seen[rows[:, 2]], 0]] = True
    dirty["substring"][index.string_items[found.strings[index.string_items[:, 1]] > 0, 0]] = True
    dirty["image"][index.image_items[found.images > 0]] = True
    dirty["same file"][index.image_items[found.files > 0]] = True
    dirty["any"] = np.logical_or.reduce([dirty[method] for method in METHODS if method != "13-gram"])
    return dirty


def _overlap(index: EvaluationIndex, found: Scan) -> np.ndarray:
    """(2, I): of each item, its 8-grams and those that are in the corpus."""
    rows = index.grams["overlap"]
    seen = np.zeros(len(rows), bool)
    for words, counts in found.grams.items():
        of_length = rows[:, 1] == words
        seen[of_length] = counts[rows[of_length, 2]] > 0
    count = index.num_items
    return np.stack([np.bincount(rows[:, 0], minlength=count), np.bincount(rows[seen, 0], minlength=count)])


def _report_set(
    s: EvaluationSet, index: EvaluationIndex, dirty: Mapping[str, np.ndarray], in_corpus: np.ndarray, found: Scan
) -> dict[str, Any]:
    mine = slice(s.first, s.first + len(s))
    ids = list(s.fingerprints)
    grams, seen = in_corpus[:, mine].sum(axis=1).tolist()
    return {
        "items": len(s),
        "ngram_words": s.ngram_words,
        "too_short": s.too_short,
        "broken_images": s.broken_images,
        "look_alikes": _look_alikes(index, s),
        "overlap_8grams": seen / grams if grams else 0.0,
        "methods": {
            method: {
                "dirty": int(flags[mine].sum()),
                "fraction": float(flags[mine].mean()),
                "ids": [ids[i] for i in np.flatnonzero(flags[mine])],
            }
            for method, flags in dirty.items()
        },
        "examples": {m: found.examples[s.name, m] for m in METHODS if (s.name, m) in found.examples},
        "fingerprints": dict(s.fingerprints),
    }


def _look_alikes(index: EvaluationIndex, s: EvaluationSet, max_images: int = 500) -> float:
    """The fraction of images that look like a different file of their own set: there the image method proves little."""
    mine = (index.image_items >= s.first) & (index.image_items < s.first + len(s))
    looks: dict[str, int] = {}
    for number in np.flatnonzero(mine).tolist():
        looks.setdefault(index.image_files[number], int(index.image_hashes[number]))
    some = list(looks)[:: max(1, len(looks) // max_images)]
    alike = 0
    for file in some:
        near = {index.image_files[n] for n in index.near_images(looks[file]).tolist() if mine[n]}
        alike += len(near - {file}) > 0
    return alike / len(some) if some else 0.0


def markdown(values: Mapping[str, Any]) -> str:
    """A report as a table: dirty items by method, in per cent, and then what was found first."""
    corpus = values["corpus"]
    lines = [
        f"{corpus['samples']:,} samples and {corpus['images']:,} images were searched; of the images "
        f"{corpus['image not fetched']:,} were not fetched and {corpus['broken image']:,} broken.",
        "",
        "| evaluation set | items | N | 8-grams in corpus | " + " | ".join((*METHODS, "any")) + " | too short |",
        "|---|" + "---|" * (len(METHODS) + 5),
    ]
    for name, s in values["sets"].items():
        cells = [f"{s['methods'][m]['dirty']:,} ({100 * s['methods'][m]['fraction']:.1f} %)" for m in (*METHODS, "any")]
        numbers = [f"{s['items']:,}", str(s["ngram_words"]), f"{100 * s['overlap_8grams']:.2f} %"]
        lines.append(f"| {' | '.join([_cell(name), *numbers, *cells, format(s['too_short'], ',')])} |")
    for name, s in values["sets"].items():
        if s["look_alikes"] > 0.01:
            lines += ["", f"{_cell(name)}: {100 * s['look_alikes']:.0f} % of its images look like another one of the set; "
                      "`image` counts too many here."]  # fmt: skip
    rows = [(n, m, e) for n, s in values["sets"].items() for m, found in s["examples"].items() for e in found]
    if rows:
        lines += ["", "| evaluation set | item | method | sample | shared |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, (n, e['item'], m, e['sample'], e['shared'])))} |" for n, m, e in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """One line that cannot end its cell: pages hold anything."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def run(
    samples: Iterable[Sample],
    evaluations: Mapping[str, Iterable[EvaluationItem]],
    out: Path,
    *,
    config: IndexConfig = IndexConfig(),
    workers: int = 1,
) -> dict[str, Any]:
    """Search `samples` for the items of all sets; write `contamination.json` and `contamination.md` into folder `out`.

    Returns what the JSON file holds. Raises MMGPTError for a set without items and a folder that cannot be written.
    """
    index = EvaluationIndex.build(evaluations, config)
    values = report(index, scan_parallel(samples, index, workers=workers))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "contamination.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (out / "contamination.md").write_text(markdown(values), encoding="utf-8")
    except OSError as error:
        raise MMGPTError(f"{error.filename or out}: {error.strerror or error}") from None
    return values


def read_report(path: Path) -> dict[str, Any]:
    """A `contamination.json`. Raises MMGPTError for anything else."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sound = values["version"] == _VERSION and all(
            isinstance(s["fingerprints"], dict) and all(isinstance(m["ids"], list) for m in s["methods"].values())
            for s in values["sets"].values()
        )
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise MMGPTError(f"{path}: not a contamination report of this version")
    return values
