"""The second and third pass of a build: duplicates over all parts, and what is left, into shards."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.parts import once
from mm_gpt.datasets.building.pipeline import Funnel, as_document, language_of
from mm_gpt.datasets.building.shards import Shard, ShardWriter
from mm_gpt.datasets.building.splits import Split
from mm_gpt.datasets.duplicates.documents import NEAR, find_duplicates
from mm_gpt.datasets.duplicates.images import find_repeated_images
from mm_gpt.datasets.samples import Sample
from mm_gpt.document import Document

DROP = "drop"


# ---- Duplicates ----


def decide(work: Path, splits: Sequence[Split], config: CorpusConfig) -> None:
    """Find duplicates over all splits and write what goes into `work/drop`, a file for each split.

    Runs in one process also where a cluster does the rest: every document must be seen beside every other, while
    fingerprints are small (about 0.6 kB a document), time grows with their number, and memory is bounded.
    """
    once(work / DROP, lambda folder: _decide(work, splits, config, folder))


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


# ---- Shards ----


def write_group(group: int, splits: Sequence[Split], config: CorpusConfig, work: Path) -> dict[str, Any]:
    """What is left of some splits, as shards of the corpus in the folder `group_folder`; returns shards and funnel.

    Does nothing when it is there already.
    """
    return once(group_folder(work, group), lambda folder: _write(group, splits, config, work, folder))


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
