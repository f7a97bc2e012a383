"""A corpus from raw sources, in three passes that run the same on a laptop and on a cluster:

1. `process_split`: one part of the sources through extraction, filters and image fetching, into a folder of its own.
2. `decide`: duplicates over the fingerprints of all parts.
3. `write_group`: what is left, into shards.

Each part appears under its name only when it is finished, and is not made again: a build that was killed continues with
the same command. Nothing depends on which process made which part.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from PIL import Image as PILImage
from tqdm import tqdm

from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.pipeline import Funnel, Step, as_document, language_of, num_images, run_stages
from mm_gpt.datasets.building.shards import (
    CORPUS_FILE,
    Corpus,
    Shard,
    ShardInfo,
    ShardWriter,
    index_path,
    write_corpus_file,
)
from mm_gpt.datasets.contamination.decontaminate import RemoveContamination
from mm_gpt.datasets.duplicates.documents import NEAR, find_duplicates
from mm_gpt.datasets.duplicates.fingerprints import write_fingerprints
from mm_gpt.datasets.duplicates.images import find_repeated_images
from mm_gpt.datasets.filters.published_filters import Filters
from mm_gpt.datasets.formats.interleaved import each_of
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import (
    BadRecordError,
    Conversation,
    ErrorCounter,
    Record,
    Sample,
)
from mm_gpt.datasets.sources import FORMATS, Format, detect, read_samples
from mm_gpt.datasets.web import pages, warc
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError, ImageError, MMGPTError, unknown_name
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

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

WORK = ".build"
DROP = "drop"
PAGES_IN_SPLIT = 64
FETCHES = 16
"""Images of one document that are fetched at a time."""


# ---- Parts ----


def _once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` writes into the folder that it is given, under the name `folder`; what it returns, as `report.json`.

    Nothing is made that is there already. Attempts may run at the same time, on any machines, and be killed at any
    point: each writes into a folder of its own, and the first that is finished takes the name.
    """
    report = folder / "report.json"
    if report.is_file():
        return _json(report)
    # Not told by host and process: containers on two machines may agree in both.
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        values = json.dumps(make(temporary)) + "\n"
        (temporary / report.name).write_text(values, encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not report.is_file():  # else another attempt was faster, with the same result
                raise
    except OSError as error:  # a full disk, say
        raise MMGPTError(f"{folder}: cannot be made on {os.uname().nodename} ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _json(report)


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


def _read(split: Split, config: CorpusConfig, errors: ErrorCounter, funnel: Funnel) -> Iterator[Sample]:
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


# ---- Pass 1 ----


def process_split(split: Split, config: CorpusConfig, work: Path) -> dict[str, Any]:
    """Read, filter and fetch one split into `work/SPLIT`: shards, fingerprints and `report.json`, which is returned.

    Does nothing when it is there already. Raises MMGPTError when the split cannot be read at all.
    """
    return _once(work / split.name, lambda folder: _process(split, config, folder))


def _process(split: Split, config: CorpusConfig, folder: Path) -> dict[str, Any]:
    funnel, errors = Funnel(), ErrorCounter()
    writer = ShardWriter(folder, shard_bytes=config.shard_mb * 2**20)
    stages = config.stages()

    def written() -> Iterator[Document]:
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
            for number, sample in enumerate(_read(split, config, errors, funnel)):
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


# ---- Pass 2 ----


def decide(work: Path, splits: Sequence[Split], config: CorpusConfig) -> None:
    """Find duplicates over all splits and write what goes into `work/drop`, a file for each split.

    Runs in one process also where a cluster does the rest: every document must be seen beside every other, while
    fingerprints are small (about 0.6 kB a document), time grows with their number, and memory is bounded.
    """
    _once(work / DROP, lambda folder: _decide(work, splits, config, folder))


def _decide(work: Path, splits: Sequence[Split], config: CorpusConfig, folder: Path) -> dict[str, Any]:
    partitions = [work / split.name / split.fingerprints for split in splits]
    names = {split.fingerprints: split.name for split in splits}
    rows: dict[str, list[dict[str, Any]]] = {}
    counts: Counter[str] = Counter()
    waiting = 0

    def note(partition: str, row: dict[str, Any]) -> None:
        nonlocal waiting
        rows.setdefault(names[partition], []).append(row)
        counts[row["reason"]] += 1
        waiting += 1
        if waiting > 100_000:
            flush()

    def flush() -> None:
        nonlocal waiting
        for name, found in rows.items():
            with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        rows.clear()
        waiting = 0

    near = config.near_duplicates is not None
    for copy in find_duplicates(partitions, keep=config.keep, near=near, minhash=config.minhash(), scratch=work):
        note(copy.partition, {"row": copy.row, "reason": copy.reason, "of": copy.duplicate_of})
    flush()
    if config.image_documents is not None:
        found = find_repeated_images(
            partitions,
            max_documents=config.image_documents,
            once_per_document=False,
            without=_dropped(folder, splits),
            scratch=work,
        )
        for image in found:
            note(image.partition, {"row": image.row, "image": image.image, "reason": image.reason})
    flush()
    return {"counts": dict(counts)}


def _dropped(folder: Path, splits: Sequence[Split]) -> Iterator[tuple[str, int]]:
    """(partition, row) of the duplicates. Read as a whole before anything is added to these files."""
    for split in splits:
        file = folder / f"{split.name}.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8") as lines:
                yield from ((split.fingerprints, json.loads(line)["row"]) for line in lines)


# ---- Pass 3 ----


def write_group(group: int, splits: Sequence[Split], config: CorpusConfig, work: Path) -> dict[str, Any]:
    """What is left of some splits, as shards of the corpus in the folder `group_folder`; returns shards and funnel.

    Does nothing when it is there already.
    """
    return _once(group_folder(work, group), lambda folder: _write(group, splits, config, work, folder))


def group_folder(work: Path, group: int) -> Path:
    return work / f"group-{group:05d}"


def _write(group: int, splits: Sequence[Split], config: CorpusConfig, work: Path, folder: Path) -> dict[str, Any]:
    funnel = Funnel()
    writer = ShardWriter(folder, prefix=f"shard-{group:05d}", shard_bytes=config.shard_mb * 2**20)
    for split in splits:
        documents: dict[int, str] = {}
        images: dict[int, dict[int, str]] = {}
        drop = work / DROP / f"{split.name}.jsonl"
        for line in drop.read_text(encoding="utf-8").split("\n") if drop.is_file() else ():
            if line:
                row = json.loads(line)
                if "image" in row:
                    images.setdefault(row["row"], {})[row["image"]] = row["reason"]
                else:
                    documents[row["row"]] = row["reason"]
        number = -1
        for shard_file in sorted((work / split.name).glob("shard-*.tar")):
            shard = Shard(shard_file)
            for at in range(len(shard)):
                number += 1
                sample = shard.sample(at)
                whole = as_document(sample)
                reason = documents.get(number)
                # Two pictures with much the same questions and answers are two.
                if reason == NEAR and whole.images and not isinstance(sample, Document):
                    reason = None
                funnel.count("duplicates", whole, reason)
                if reason is not None:
                    continue
                kept = _without_images(sample, images.get(number, {}), funnel)
                if kept is not None:
                    funnel.count("written", as_document(kept))
                    writer.add(kept)
    return {"shards": [asdict(shard) for shard in writer.close()], "funnel": funnel.to_json()}


def _without_images(sample: Sample, drop: dict[int, str], funnel: Funnel) -> Sample | None:
    whole = as_document(sample)
    step = funnel.step("repeated images", language_of(whole))
    step.came.add(whole)
    # A question about an image is nothing without it; that it is a popular one is no reason to lose the question.
    if drop and isinstance(sample, Document):
        gone = {id(image): reason for n, image in enumerate(sample.images) if (reason := drop.get(n)) is not None}
        for reason in gone.values():
            step.removed[reason] += 1
        segments = tuple(segment for segment in sample.segments if id(segment) not in gone)
        if not segments:
            step.removed["nothing left"] += 1
            return None
        sample = dataclasses.replace(sample, segments=segments)
    step.left.add(as_document(sample))
    return sample


# ---- All of it ----


class Runner:
    """Runs a function over items in processes of this machine; `datasets.cluster.RayRunner` on many machines."""

    def __init__(self, workers: int | None = None, *, progress: bool = True):
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers}")
        self.workers = workers or os.cpu_count() or 1
        self.progress = progress

    def __call__(self, what: str, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The results in the order of items. What `function` raises is raised here."""
        yield from tqdm(
            self.results(function, items), total=len(items), desc=what, unit="part", disable=not self.progress
        )

    def results(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        if self.workers == 1 or len(items) < 2:
            yield from map(function, items)
            return
        with ProcessPoolExecutor(min(self.workers, len(items)), mp_context=get_context("spawn")) as pool:
            try:
                yield from pool.map(function, items)
            except BrokenProcessPool:
                raise MMGPTError(
                    "a worker process was killed, for its memory perhaps; what is finished is kept"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass(frozen=True)
class _Process:
    """Pass 1 as something that can be pickled."""

    config: CorpusConfig
    work: Path

    def __call__(self, split: Split) -> dict[str, Any]:
        _check_visible(self.work, split.location)
        return process_split(split, self.config, self.work)


@dataclass(frozen=True)
class _Write:
    config: CorpusConfig
    work: Path

    def __call__(self, item: tuple[int, list[Split]]) -> dict[str, Any]:
        _check_visible(self.work)
        return write_group(item[0], item[1], self.config, self.work)


def _check_visible(*locations: str | Path) -> None:
    """A machine that does not see the sources must not count all of them as unreadable; nor write where nobody looks.

    Raises MMGPTError.
    """
    for location in map(str, locations):
        is_pattern = any(character in location for character in "*?[{")
        if not files.is_remote(location) and not is_pattern and not files.local_path(location).exists():
            raise MMGPTError(f"{location}: not there on {os.uname().nodename}; all machines must see it")


@dataclass
class CorpusSummary:
    shards: int
    documents: int
    images: int
    characters: int
    funnel: Funnel
    errors: ErrorCounter


def build_corpus(
    sources: Sequence[str],
    out: Path,
    config: CorpusConfig | None = None,
    *,
    format: str = "auto",
    images: str | None = None,
    runner: Runner | None = None,
) -> CorpusSummary:
    """Make the corpus `out` of `sources`: shards, `corpus.json` and the funnel as table, JSON and picture.

    Stopped or killed, it continues when it is called again with the same arguments. With a runner for a cluster,
    sources and `out` must be where all machines see them. Raises MMGPTError when a source is missing, when nothing of
    them is left, when `out` cannot be written or holds anything but this build.
    """
    config, runner = config or CorpusConfig(), runner or Runner()
    if (out / CORPUS_FILE).exists():
        raise MMGPTError(f"{out} already holds a corpus; choose another folder, or remove it")
    funnel, errors = Funnel(config.steps()), ErrorCounter()
    work = out / WORK
    splits = find_splits(sources, format=format, images=images)
    _check_same(work, splits, config)
    sizes: list[int] = []
    for report in runner("read and filter", _Process(config, work), splits):
        funnel.merge(Funnel.from_json(report["funnel"]))
        errors.merge(ErrorCounter(counts=Counter(report["errors"]["counts"]), examples=report["errors"]["examples"]))
        sizes.append(sum(shard["num_bytes"] for shard in report["shards"]))
    decide(work, splits, config)
    shards: list[ShardInfo] = []
    groups = _groups(splits, sizes, config.shard_mb * 2**20)
    for (group, _), result in zip(groups, runner("write shards", _Write(config, work), groups), strict=True):
        for shard in result["shards"]:
            _move(group_folder(work, group) / shard["name"], out / shard["name"])
            shards.append(ShardInfo(**shard))
        funnel.merge(Funnel.from_json(result["funnel"]))
    if not shards:
        reasons = Counter[str]()
        for name in funnel.steps:
            reasons.update(funnel.total(name).removed)
        why = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(8))
        raise MMGPTError(f"{', '.join(sources)}: no document is left ({why or 'there was none'}; {errors.summary()})")
    total = funnel.total("written").left
    languages = {name: vars(step.left) for name, step in sorted(funnel.steps["written"].items())}
    about = {"counts": vars(total), "languages": languages, "sources": list(sources), "config": asdict(config)}
    funnel.save(out)
    write_corpus_file(out, shards, about)
    shutil.rmtree(work, ignore_errors=True)  # a machine that was given up may still be writing into it
    return CorpusSummary(len(shards), total.documents, total.images, total.characters, funnel, errors)


def _move(shard: Path, target: Path) -> None:
    """A shard and its index to where they stay; a build that continues may have done so before."""
    for source, to in ((index_path(shard), index_path(target)), (shard, target)):
        try:
            source.rename(to)
        except FileNotFoundError:
            if not to.is_file():
                raise MMGPTError(f"{to}: lost; remove {shard.parent} and try again") from None


def _groups(splits: Sequence[Split], sizes: Sequence[int], shard_bytes: int) -> list[tuple[int, list[Split]]]:
    """Splits in a row that fill a shard or more."""
    groups: list[tuple[int, list[Split]]] = []
    size = shard_bytes
    for split, own in zip(splits, sizes, strict=True):
        if size >= shard_bytes:
            groups.append((len(groups), []))
            size = 0
        groups[-1][1].append(split)
        size += own
    return groups


def _check_same(work: Path, splits: Sequence[Split], config: CorpusConfig) -> None:
    """A build continues only as what it was; one that has nothing to show for itself yet may become another."""
    plan = work / "build.json"
    values = json.loads(json.dumps({"splits": [asdict(split) for split in splits], "config": asdict(config)}))
    try:
        if plan.is_file() and any(work.glob("split-*")):
            before = _json(plan)
            for key in ("splits", "config"):
                if before.get(key) != values[key]:
                    what = "sources" if key == "splits" else "settings"
                    raise MMGPTError(f"{work.parent} holds a build with other {what}: repeat those, or remove {work}")
            return
        if not work.is_dir() and work.parent.is_dir() and any(work.parent.iterdir()):
            raise MMGPTError(f"{work.parent} is not empty; choose a new folder")
        work.mkdir(parents=True, exist_ok=True)
        temporary = work / "build.json.tmp"
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
        temporary.rename(plan)
    except OSError as error:
        raise MMGPTError(f"{work.parent}: cannot be written ({error.strerror or error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MMGPTError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise MMGPTError(f"{path}: not an object")
    return values
