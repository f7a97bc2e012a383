"""Prompts with answers of which some are better than others: what reward models, DPO and on-policy learning read."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.building.shards import ShardFolder
from mm_gpt.datasets.formats.preferences import CHAT_COLUMNS, IMAGE_COLUMNS, check_comparison, comparison_in
from mm_gpt.datasets.formats.preferences import Comparison as Comparison
from mm_gpt.datasets.formats.preferences import Completion as Completion
from mm_gpt.datasets.loading.index import Table, index_tables, table_of
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Sample, sample_name
from mm_gpt.datasets.sources import detect
from mm_gpt.document import Concepts, Image, Message
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.images import STORED_FORMATS, image_format, load_image, to_file
from mm_gpt.system.writing import naming, whole_file

VERSION = 1
"""Of what is kept of each comparison."""


class ComparisonMeasure:
    """What is known of each comparison without reading it: an index is made with it."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"comparisons {VERSION}".encode()).hexdigest()[:16]

    def table(self, samples: Iterable[tuple[int, Sample]], name: str, errors: ErrorCounter) -> Table:
        """A comparison is a piece of (number, two halves of what its prompt is about, 0, 0, completions, images)."""
        pieces: list[tuple[int, ...]] = []
        for number, sample in samples:
            try:
                if not isinstance(sample, Conversation):
                    raise BadRecordError("no prompt")
                comparison = comparison_in(sample)
                about = topic(comparison.prompt)
                images = len(_images(comparison.prompt))
                pieces.append((number, about >> 31, about & 2**31 - 1, 0, 0, len(comparison.completions), images))
            except BadRecordError as error:
                errors.add(str(error), f"{name}: {sample_name(sample)}")
        return table_of(pieces, [], [])


def topic(prompt: Sequence[Message]) -> int:
    """A number of 62 bits for what a prompt is about: all of its images or, without any, its words.

    Prompts of one number belong on one side of a split. Raises BadRecordError for an image file that cannot be read.
    """
    images = _images(prompt)
    digest = hashlib.sha256()
    for image in images:
        digest.update(_digest(image))
    if not images:
        digest.update(json.dumps(list(prompt), sort_keys=True, default=str).encode("utf-8", "backslashreplace"))
    return int.from_bytes(digest.digest()[:8], "big") >> 2


class Comparisons(Sequence[Comparison]):
    """The usable comparisons of several sources, read one at a time; images are not decoded.

    In memory are their places alone. `[number]` raises BadRecordError or MMGPTError for one that cannot be read.
    """

    def __init__(self, stores: Sequence[ShardFolder], places: np.ndarray, about: np.ndarray):
        """`places` (N, 3): store, shard and number; `about` (N, 3): `topic`, completions and images."""
        self._stores, self._places, self._about = stores, places, about

    @classmethod
    def open(cls, sources: Sequence[SourceConfig], folder: Path, errors: ErrorCounter) -> "Comparisons":
        """All of `sources`, paths below `folder`: rows as `read_comparisons` takes them, or corpora of conversations.

        What cannot be used is counted. `repeat` of a source shows it so many times, a whole number.
        Raises MMGPTError when a source cannot be opened, or nothing in any of them can be used.
        """
        stores: list[ShardFolder] = []
        places, about = [np.zeros((0, 3), dtype=np.int32)], [np.zeros((0, 3), dtype=np.int64)]
        for source in sources:
            if source.repeat != int(source.repeat) or source.weight is not None or source.derived_share:
                raise ConfigError(f"{source.path}: comparisons take a whole repeat, no weight and no derived_share")
            if source.format == "auto" and detect(source.location(folder)).name == "rows":
                source = dataclasses.replace(source, format="comparisons")  # a prompt counts more than a text beside it
            store = source.open(folder, errors)
            stores.append(store)
            for shard, table in enumerate(index_tables(store, ComparisonMeasure(), source.label(folder), errors)):
                pieces = table.pieces.astype(np.int64)
                place = np.stack([np.full(len(pieces), len(stores) - 1), np.full(len(pieces), shard), pieces[:, 0]], 1)
                known = np.stack([(pieces[:, 1] << 31) + pieces[:, 2], pieces[:, 5], pieces[:, 6]], axis=1)
                places += [place.astype(np.int32)] * int(source.repeat)
                about += [known] * int(source.repeat)
        found = cls(stores, np.concatenate(places), np.concatenate(about))
        if not len(found):
            names = ", ".join(source.label(folder) for source in sources)
            raise MMGPTError(f"{names or folder}: no usable comparisons ({errors.summary()})")
        return found

    def only(self, chosen: Sequence[int] | np.ndarray) -> "Comparisons":
        """Those with these numbers, in this order."""
        numbers = np.asarray(chosen, dtype=np.int64)
        return Comparisons(self._stores, self._places[numbers], self._about[numbers])

    def split(self, share: float, seed: int) -> "tuple[Comparisons, Comparisons]":
        """What is trained on, and at least the `share` that is held out: a function of the prompts and the seed alone.

        The same image, or the same prompt without images, is never on both sides. (Of several images it is the whole
        list that counts.) Raises ConfigError for a share outside of [0, 1), MMGPTError when one side would be empty.
        """
        if not 0 <= share < 1:
            raise ConfigError(f"the share that is held out must be from 0 to below 1, not {share}")
        topics, of_topic, sizes = np.unique(self._about[:, 0], return_inverse=True, return_counts=True)
        keys = [hashlib.sha256(f"{seed}/{number}".encode()).digest() for number in topics.tolist()]
        order = sorted(range(len(topics)), key=keys.__getitem__)
        before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]]).astype(np.int64)
        is_held = np.zeros(len(topics), dtype=bool)
        is_held[order] = before < math.ceil(Fraction(str(share)) * len(self))  # 0.1 in binary is a little more
        held = is_held[of_topic.reshape(-1)]
        if share and (held.all() or not len(self)):
            raise MMGPTError(f"{len(self)} comparisons with {len(topics)} different prompts: too few to hold some out")
        return self.only(np.flatnonzero(~held)), self.only(np.flatnonzero(held))

    @property
    def sizes(self) -> np.ndarray:
        """(N,) completions of each."""
        return self._about[:, 1]

    @property
    def images(self) -> np.ndarray:
        """(N,) images of each prompt."""
        return self._about[:, 2]

    @property
    def digest(self) -> str:
        """Of what the sources hold and which of it is chosen: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for store in self._stores:
            digest.update("".join(shard.digest for shard in store.shards).encode())
        digest.update(self._places.tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.only(np.arange(len(self))[at])
        store, shard, number = self._places[at].tolist()
        sample = self._stores[store].shard(shard).sample(number)
        if not isinstance(sample, Conversation):
            raise BadRecordError("not the sample that was indexed")
        return comparison_in(sample)


# ---- Writing ----


def write_comparisons(comparisons: Iterable[Comparison], path: Path) -> int:
    """JSON lines in TRL's layouts, images as files of `images/` beside them; how many were written.

    `Comparisons.open` reads them again, equal but for where their images are. Images behind URLs stay there. The file
    appears when it is whole. Raises MMGPTError naming the file or the comparison that cannot be written.
    """
    count = 0
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for comparison in comparisons:
            try:
                check_comparison(comparison)
                line = json.dumps(_row(comparison, path.parent), ensure_ascii=False, allow_nan=False)
                line.encode()
            except BadRecordError as error:
                raise MMGPTError(f"{path}: {comparison.key}: {error}") from None
            except (TypeError, ValueError, RecursionError) as error:
                raise MMGPTError(f"{path}: {comparison.key}: not JSON ({error})") from None
            file.write(line + "\n")
            count += 1
    return count


def _row(comparison: Comparison, folder: Path) -> dict[str, Any]:
    completions = comparison.completions
    if comparison.is_text:
        texts = [_only_text(messages) for messages in (comparison.prompt, *(c.messages for c in completions))]
        row: dict[str, Any] = {"id": comparison.key, "prompt": texts[0]}
        answers: list[Any] = texts[1:]
    else:
        images = [_stored(image, folder) for image in _images(comparison.prompt)]
        row = {"id": comparison.key} | ({"images": images} if images else {})
        row["prompt"] = [_written(message) for message in comparison.prompt]
        answers = [[_written(message) for message in c.messages] for c in completions]
    ranks, labels, logprobs = ([getattr(c, name) for c in completions] for name in ("rank", "label", "logprob"))
    if len(completions) == 1 and ranks == [0] and comparison.margin is None:
        row |= {"completion": answers[0], "label": labels[0], "ref_logps": logprobs[0]}
    elif ranks == [0, 1] and labels == [None, None]:
        row |= {"chosen": answers[0], "rejected": answers[1], "margin": comparison.margin}
        row |= {"ref_chosen_logps": logprobs[0], "ref_rejected_logps": logprobs[1]}
    elif completions:
        row |= {"completions": answers, "ranks": ranks, "margin": comparison.margin}
        row |= {"labels": labels} if any(label is not None for label in labels) else {}
        row |= {"ref_logps": logprobs} if any(value is not None for value in logprobs) else {}
    elif comparison.margin is not None:
        raise BadRecordError("a margin without completions")
    row = {name: value for name, value in row.items() if value is not None}
    layouts = {"chosen", "rejected", "completion", "completions", "output_1", "output_2"}
    taken = {*row, *IMAGE_COLUMNS, *layouts, *(() if completions else CHAT_COLUMNS)}
    if {"completion", "label"} - {*row} == {"label"}:
        taken.add("label")
    if clash := sorted(taken & set(comparison.columns)):
        raise BadRecordError(f"a column of the name {clash[0]!r}, which the layout needs")
    return row | dict(comparison.columns)


def _only_text(messages: Sequence[Message]) -> str:
    parts = messages[0]["content"] if len(messages) == 1 and set(messages[0]) == {"role", "content"} else []
    if len(parts) != 1 or not isinstance(parts[0], str):
        raise BadRecordError("more than one text where a text is continued")
    return parts[0]


def _written(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str) or (len(content) == 1 and isinstance(content[0], str)):
        return {**message, "content": content if isinstance(content, str) else content[0]}
    parts = [{"type": "image"} if isinstance(p, Image) else {"type": "text", "text": p} for p in content]
    return {**message, "content": parts}


def _stored(image: Image, folder: Path) -> str:
    """The name of an image's file in `folder`, or its URL."""
    source = image.source
    if image.mirrored or image.shown != "all" or isinstance(source, Concepts):
        raise BadRecordError("an image that is more than a file")
    if isinstance(source, str) and "://" in source:
        return source
    if isinstance(source, str | os.PathLike):
        source = _bytes(Path(source))
    data = source if isinstance(source, bytes) else to_file(load_image(source))
    suffix = image_format(data)
    if suffix not in STORED_FORMATS:
        raise BadRecordError(f"an image of format {suffix or 'unknown'}")
    name = f"images/{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
    place = folder / name
    if not place.is_file():
        with naming(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as temporary:
            temporary.write_bytes(data)
    return name


def _images(prompt: Sequence[Message]) -> list[Image]:
    parts = [part for message in prompt if not isinstance(message["content"], str) for part in message["content"]]
    return [part for part in parts if isinstance(part, Image)]


def _digest(image: Image) -> bytes:
    """Of the file's content; of an image behind a URL, of that."""
    source = image.source
    if isinstance(source, os.PathLike):
        source = _bytes(Path(source))
    elif isinstance(source, str):
        source = source.encode("utf-8", "backslashreplace")
    elif not isinstance(source, bytes):
        raise BadRecordError("an image that is no file")
    return hashlib.sha256(source).digest()


def _bytes(path: Path) -> bytes:
    with contextlib.suppress(OSError, ValueError):
        return path.read_bytes()
    raise BadRecordError("unreadable image file")
