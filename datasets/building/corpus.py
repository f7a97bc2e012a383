"""A corpus from raw sources, in three passes that run the same on a laptop and on a cluster:

1. `process_split`: one part of the sources through extraction, filters and image fetching, into a folder of its own.
2. `decide`: duplicates over the fingerprints of all parts.
3. `write_group`: what is left, into shards.

Each part appears under its name only when it is finished, and is not made again: a build that was killed continues with
the same command. Nothing depends on which process made which part.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.merge import decide, group_folder, write_group
from mm_gpt.datasets.building.parts import read_json
from mm_gpt.datasets.building.pipeline import Funnel
from mm_gpt.datasets.building.process import process_split
from mm_gpt.datasets.building.runner import Runner
from mm_gpt.datasets.building.shards import CORPUS_FILE, ShardInfo, index_path, write_corpus_file
from mm_gpt.datasets.building.splits import Split, find_splits
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.sources import FORMATS, count_unread
from mm_gpt.errors import MMGPTError

WORK = ".build"


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
    splits = find_splits(sources, format=format, images=images)
    work = _continued(out / WORK, splits, config)
    sizes: list[int] = []
    for report in runner("read and filter", _Process(config, work), splits):
        funnel.merge(Funnel.from_json(report["funnel"]))
        errors.merge(ErrorCounter(counts=Counter(report["errors"]["counts"]), examples=report["errors"]["examples"]))
        sizes.append(sum(shard["num_bytes"] for shard in report["shards"]))
    # A split that is a whole source has told of them.
    for location, kind in dict.fromkeys((split.location, split.format) for split in splits if split.files):
        count_unread(location, FORMATS[kind], errors)
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
    shutil.rmtree(out / WORK, ignore_errors=True)  # a machine that was given up may still be writing into it
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


def _continued(work: Path, splits: Sequence[Split], config: CorpusConfig) -> Path:
    """The folder for the parts of this build, begun or new.

    A build continues only as what it was; one that has nothing to show for itself yet may become another. The folder is
    named by sources and settings: a machine may still be at work for the other one, and ends in a folder of that.
    """
    plan = work / "build.json"
    values = json.loads(json.dumps({"splits": [asdict(split) for split in splits], "config": asdict(config)}))
    parts = work / sha256(json.dumps(values).encode()).hexdigest()[:16]
    try:
        if plan.is_file() and any(work.glob("*/split-*")):
            before = read_json(plan)
            for key in ("splits", "config"):
                if before.get(key) != values[key]:
                    what = "sources" if key == "splits" else "settings"
                    raise MMGPTError(f"{work.parent} holds a build with other {what}: repeat those, or remove {work}")
            return parts
        if not work.is_dir() and work.parent.is_dir() and any(work.parent.iterdir()):
            raise MMGPTError(f"{work.parent} is not empty; choose a new folder")
        parts.mkdir(parents=True, exist_ok=True)
        temporary = work / "build.json.tmp"
        temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
        temporary.rename(plan)
        return parts
    except OSError as error:
        raise MMGPTError(f"{work.parent}: cannot be written ({error.strerror or error})") from None
