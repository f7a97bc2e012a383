"""Evaluation sets cut out of training documents, as for GPT-3 (arXiv:2005.14165, appendix C), images included.

Every 13-gram that a document shares with an evaluation set goes, with 200 characters on each side; what is left is
split there. Pieces under 200 characters go, and so do documents that fall into more than 10 pieces. 13-grams that are
in more than 10 documents of the corpus are common phrases and stay.

That last rule needs the whole corpus before the first document can be cut, so there are two phases: first the corpus is
searched (`contamination.run`; or scans of its shards are merged and saved by `contamination.save_scan`), and then
`RemoveContamination` cuts, on any number of machines.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mm_gpt.datasets.contamination.check import COMMON_DOCUMENTS, COUNTS_FILE, PARAGRAPH, image_hits, joined
from mm_gpt.datasets.contamination.evaluation_index import EvaluationIndex
from mm_gpt.datasets.contamination.overlap import Words, composed, find_words, window_hashes
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ImageError, MMGPTError


@dataclass(frozen=True, kw_only=True)
class RemoveContamination:
    """Removes text and images of evaluation sets from documents. Place it after images are fetched.

    `split` gives each piece as a document, as GPT-3 did. As a stage it gives one document in which the pieces follow
    each other as paragraphs. A text shorter than 13 words counts as one gram, from 8 words on. A branch that shares a
    gram with a set goes whole. Documents without hits come out as they are; others in Unicode's NFC.
    """

    index_path: str
    """The folder that `contamination.save_scan` has written."""
    window: int = 200
    """Characters that go on each side of a shared gram, and the rest of a word that this cuts."""
    min_piece: int = 200
    """Characters of the shortest piece that stays."""
    max_pieces: int = 10
    ignore_common: bool = True
    """Grams in more than 10 documents stay. False: the folder may hold a bare index, without the counts."""
    check_images: bool = True
    """Images of the sets go, and images that cannot be compared: broken or not fetched."""
    name: str = "contamination"

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        pieces = self.split(document, removed)
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return replace(pieces[0], id=document.id, segments=tuple(s for piece in pieces for s in piece.segments))

    def split(self, document: Document, removed: Counter[str]) -> list[Document]:
        """What is left of a document, piece by piece, with ids `ID#0`, `ID#1`, ... where there are several."""
        index, removable = _load(self.index_path, self.ignore_common)
        if self.check_images and document.images:
            document = self._without_images(document, index, removed)
        if document.branches:
            return self._without_branches(document, removable, index, removed)
        segments = tuple(replace(s, text=composed(s.text)) if isinstance(s, Text) else s for s in document.segments)
        text = joined(segments)
        words = find_words(text)
        cuts = self._cuts(words, _shared(words, index, removable), len(text))
        if not cuts:
            return [document] if document.segments else []
        removed["text: in an evaluation set"] += len(cuts)
        spans = list(_between(cuts, len(text)))
        if len(spans) > self.max_pieces:
            removed[f"evaluation sets leave more than {self.max_pieces} pieces"] += 1
            return []
        placed = list(_placed(segments))
        kept = []
        for start, end in spans:
            if end - start < self.min_piece:
                removed[f"text: piece under {self.min_piece} characters"] += 1
            else:
                kept.append(tuple(_piece(placed, start, end)))
        lost = len(document.images) - len({id(s) for piece in kept for s in piece if isinstance(s, Image)})
        if lost:
            removed["image: beside text of an evaluation set"] += lost
        if not kept:
            removed["evaluation sets leave nothing"] += 1
        if len(kept) == 1:
            return [replace(document, segments=kept[0])]
        return [replace(document, segments=piece, id=f"{document.id}#{n}") for n, piece in enumerate(kept)]

    def _cuts(self, words: Words, shared: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
        """Character ranges that go, merged, for shared grams given as (first word, word after the last)."""
        cuts: list[tuple[int, int]] = []
        for first, last in sorted(shared):
            start, end = max(0, words.starts[first] - self.window), min(length, words.ends[last - 1] + self.window)
            before = np.searchsorted(words.starts, start, side="right") - 1  # the word that the cut falls into, if any
            if before >= 0 and words.ends[before] > start:
                start = words.starts[before]
            after = np.searchsorted(words.ends, end, side="right")
            if after < len(words) and words.starts[after] < end:
                end = words.ends[after]
            if cuts and start <= cuts[-1][1]:
                cuts[-1] = (cuts[-1][0], max(cuts[-1][1], int(end)))
            else:
                cuts.append((int(start), int(end)))
        return cuts

    def _without_branches(
        self, document: Document, removable: Mapping[int, np.ndarray], index: EvaluationIndex, removed: Counter[str]
    ) -> list[Document]:
        kept = []
        for branch in document.branches:
            words = find_words(composed(joined((*document.segments, *branch))))
            if _shared(words, index, removable):
                removed["branch: in an evaluation set"] += 1
            else:
                kept.append(branch)
        if not kept:
            removed["evaluation sets leave nothing"] += 1
            return []
        return [document if len(kept) == len(document.branches) else replace(document, branches=tuple(kept))]

    def _without_images(self, document: Document, index: EvaluationIndex, removed: Counter[str]) -> Document:
        drop: set[int] = set()
        for image in document.images:
            try:
                alike, same = image_hits(image.source, index)
                reason = "image: in an evaluation set" if alike or same else ""
            except ImageError:
                reason = "image: cannot be compared with evaluation sets"
            if reason:
                removed[reason] += 1
                drop.add(id(image))
        if not drop:
            return document
        return replace(
            document,
            segments=tuple(s for s in document.segments if id(s) not in drop),
            branches=tuple(tuple(s for s in branch if id(s) not in drop) for branch in document.branches),
        )


@lru_cache(maxsize=2)
def _load(folder: str, ignore_common: bool) -> tuple[EvaluationIndex, dict[int, np.ndarray]]:
    """The index and, by the words of a gram, which keys are cut out. Once in each process."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    index = EvaluationIndex.load(Path(folder))
    removable = {
        words: index.owners["13-gram", words] >= 0 for words in index.gram_keys if ("13-gram", words) in index.owners
    }
    if ignore_common:
        try:
            counts = load_file(Path(folder) / COUNTS_FILE)
            removable = {words: keys & (counts[str(words)] <= COMMON_DOCUMENTS) for words, keys in removable.items()}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise MMGPTError(
                f"{folder}: no counts of the corpus that fit the index ({error}); search it first, "
                "or set ignore_common to false"
            ) from None
    return index, removable


def _shared(words: Words, index: EvaluationIndex, removable: Mapping[int, np.ndarray]) -> list[tuple[int, int]]:
    """(first word, word after the last) of each gram that is to go."""
    shared = []
    for length, keys in removable.items():
        places, numbers = index.tables[length].find(window_hashes(words.hashes, length))
        shared += [(place, place + length) for place in places[keys[numbers]].tolist()]
    return shared


def _between(cuts: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """What the cuts leave of a text, without empty pieces."""
    start = 0
    for cut_start, cut_end in [*cuts, (length, length)]:
        if cut_start > start:
            yield start, cut_start
        start = cut_end


def _placed(segments: Iterable[Segment]) -> Iterator[tuple[Segment, int]]:
    """Each segment with its position in the joined text; images stand between two paragraphs."""
    position = 0
    for segment in segments:
        if isinstance(segment, Text):
            yield segment, position
            position += len(segment.text) + len(PARAGRAPH)
        else:
            yield segment, max(0, position - len(PARAGRAPH))


def _piece(placed: Iterable[tuple[Segment, int]], start: int, end: int) -> Iterator[Segment]:
    """The segments between two positions; a paragraph in part where the cut goes through it."""
    for segment, position in placed:
        if isinstance(segment, Image):
            if start <= position <= end:
                yield segment
            continue
        text = segment.text[max(0, start - position) : max(0, end - position)]
        if text.strip():
            yield segment if len(text) == len(segment.text) else replace(segment, text=text.strip())
