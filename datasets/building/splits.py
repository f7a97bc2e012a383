"""The parts of the sources of a corpus, and what is in them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.pipeline import Funnel, Step, as_document
from mm_gpt.datasets.building.shards import Corpus
from mm_gpt.datasets.formats.interleaved import each_of
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Sample
from mm_gpt.datasets.sources import FORMATS, Format, detect, read_samples
from mm_gpt.datasets.web import pages, warc
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name

PAGES_IN_SPLIT = 64


@dataclass(frozen=True)
class Split:
    """A part of the sources that one process reads: small, it travels."""

    number: int
    location: str
    format: str
    images: str | None = None
    files: tuple[str, ...] = ()
    """Of `location`; empty: all of it."""

    @property
    def name(self) -> str:
        return f"split-{self.number:06d}"

    @property
    def fingerprints(self) -> str:
        """Their folder inside of the split's; partitions are told by their names."""
        return f"fingerprints-{self.number:06d}"


def find_splits(sources: Sequence[str], *, format: str = "auto", images: str | None = None) -> list[Split]:
    """The parts of all sources, in an order that never changes. Raises MMGPTError for what is missing or unknown."""
    splits: list[Split] = []
    for location in sources:
        if format != "auto" and format not in FORMATS:
            raise MMGPTError(unknown_name("format", format, FORMATS))
        kind = detect(location) if format == "auto" else FORMATS[format]
        parts = _parts(location, kind)
        if parts == [()] and kind.name != "hf":
            read_samples(location, ErrorCounter(), format=kind.name, images=images)  # raises when nothing is there
        splits += [Split(len(splits) + n, location, kind.name, images, part) for n, part in enumerate(parts)]
    return splits


def _parts(location: str, kind: Format) -> list[tuple[str, ...]]:
    """The files of a source by parts; one that is empty is the whole source."""
    at_once = 1
    match kind.name:
        case "pages":
            names, at_once = pages.page_files(location), PAGES_IN_SPLIT
        case "corpus":
            names = [shard.name for shard in Corpus(location).shards]
        case "captioned":
            names = _tars(location)
        case "text":
            names, at_once = files.list_files(location), PAGES_IN_SPLIT
        case _:
            names = files.list_files(location) if kind.suffixes else []
    if kind.suffixes:
        names = [name for name in names if files.suffix_of(name) in kind.suffixes]
    return [tuple(names[at : at + at_once]) for at in range(0, len(names), at_once)] or [()]


def _tars(location: str) -> list[str]:
    """The tars that `read_records` reads there, in its order; none where it reads something else."""
    names = [name for name in files.list_files(location) if files.suffix_of(name) == ".tar"]
    if not files.is_remote(location) and files.is_folder(location):
        folder = files.local_path(location)
        if any((folder / name).is_file() for name in ("captions.jsonl", "captions.csv")):
            return []
        names = [name for name in names if Path(name).parent == folder]
    return names


def read_split(split: Split, config: CorpusConfig, errors: ErrorCounter, funnel: Funnel) -> Iterator[Sample]:
    """The samples of a split; what cannot be read, and what extraction itself left out, is in the funnel.

    A file that cannot be read, or breaks in the middle, is counted like a bad record.
    """
    bad = ErrorCounter()
    removed: Counter[str] = Counter()
    try:
        for sample in _samples(split, config, bad, removed):
            funnel.count("read", as_document(sample))
            yield sample
    except MMGPTError as error:
        if isinstance(error, ConfigError) or isinstance(error.__context__, ImportError):  # would be so in every split
            raise
        bad.add("unreadable file", str(error))
    errors.merge(bad)
    step = funnel.step("read")
    for reason, count in bad.counts.items():
        removed[reason] = max(removed[reason], count)  # why a page went is in both
    step.removed.update(removed)
    # What could not be read is not among those that came through.
    step.came.documents += Step(removed=removed).removed_documents
    step.came.images += Step(removed=removed).removed_images


def _samples(split: Split, config: CorpusConfig, errors: ErrorCounter, removed: Counter[str]) -> Iterator[Sample]:
    extraction = config.extraction()
    locations = split.files or (split.location,)
    match split.format:
        case "pages":
            return pages.read_page_files(
                split.location, split.files, errors, images=split.images, config=extraction, removed=removed
            )
        case "warc":
            return chain.from_iterable(
                warc.read_warc(location, errors, images=split.images, config=extraction, removed=removed)
                for location in locations
            )
        case "corpus":
            corpus = Corpus(split.location)
            shards = [number for number, shard in enumerate(corpus.shards) if shard.name in split.files]
            return _shard_samples(corpus, shards, errors)
        case _:
            return each_of(
                locations, errors, lambda name: read_samples(name, errors, format=split.format, images=split.images)
            )


def _shard_samples(corpus: Corpus, numbers: Sequence[int], errors: ErrorCounter) -> Iterator[Sample]:
    for number in numbers:
        shard = corpus.shard(number)
        for at in range(len(shard)):
            try:
                yield shard.sample(at)
            except BadRecordError as error:
                errors.add(str(error), f"{corpus.shards[number].name}:{at}")
