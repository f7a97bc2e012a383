"""The index of a source: for each of its samples what planning needs to know, made once and mapped by every run.

A web document has its pieces, a conversation is one piece, and a record (an image with captions and questions) has the
tokens of its image and of each text. Made in parallel on first use, and kept beside the data under a name of the
tokenizer, the settings and the data; other ranks wait for it, later runs map it. A run that is planned from it reads no
text and no image before a worker needs them.
"""

import dataclasses
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image as PILImage
from tqdm import tqdm

from mm_gpt.datasets.building.shards import ShardFolder
from mm_gpt.datasets.formats.captioned import clean_caption
from mm_gpt.datasets.loading.draws import DERIVED_SETS, PROMPTS, derived_questions, training_prompt
from mm_gpt.datasets.loading.pieces import sample_pieces
from mm_gpt.datasets.loading.store import cache_of, only_here, read_skipped, write_array, write_skipped
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, QuestionAnswer, Record, Sample, sample_name
from mm_gpt.document import Concepts, Document, Image
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.images import is_url
from mm_gpt.processor import Processor
from mm_gpt.system.processes import process_pool
from mm_gpt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VERSION = 5
PIECE = ("sample", "start_segment", "start_char", "end_segment", "end_char", "tokens", "images")
"""Columns of a piece. It ends before (end_segment, end_char)."""
RECORD = (
    *("sample", "image_tokens", "height", "width", "first_text", "captions", "questions"),
    *(f"derived_{n}" for n in range(DERIVED_SETS)),
)
"""Columns of a record. The size of an image behind a URL, or of concepts alone, is 0. Its texts, from `first_text` on,
are its captions, its questions, and each derived set."""
CHUNK = 512
"""Samples that a process indexes at a time."""
MAPPED_BYTES = 2**20
"""A smaller table is read into memory: maps are few."""


@dataclass(frozen=True)
class Table:
    """What is known of one shard, int32."""

    pieces: np.ndarray  # (P, 7), see PIECE
    records: np.ndarray  # (R, 11), see RECORD
    texts: np.ndarray  # (T,) the tokens that a caption, or a question with its answer, adds to what it shares

    def __len__(self) -> int:
        """Units: pieces, then records."""
        return len(self.pieces) + len(self.records)

    def only(self, keep: np.ndarray) -> "Table":
        """The units (units,) that are True in `keep`."""
        count = len(self.pieces)
        return Table(self.pieces[keep[:count]], self.records[keep[count:]], self.texts)

    @property
    def samples(self) -> np.ndarray:
        """The number of each unit's sample: (units,)."""
        return np.concatenate([self.pieces[:, 0], self.records[:, 0]])

    def pack(self) -> np.ndarray:
        sizes = [VERSION, len(self.pieces), len(self.records), len(self.texts)]
        parts = [np.array(sizes), self.pieces.ravel(), self.records.ravel(), self.texts]
        return np.concatenate(parts).astype(np.int32)

    @staticmethod
    def unpack(array: np.ndarray) -> "Table | None":
        """None for what `pack` never made."""
        if array.dtype != np.int32 or array.ndim != 1 or len(array) < 4 or array[0] != VERSION or (array < 0).any():
            return None
        _, pieces, records, texts = (int(value) for value in array[:4])
        ends = np.cumsum([4, pieces * len(PIECE), records * len(RECORD), texts])
        if ends[-1] != len(array):
            return None
        return Table(
            array[ends[0] : ends[1]].reshape(-1, len(PIECE)),
            array[ends[1] : ends[2]].reshape(-1, len(RECORD)),
            array[ends[2] :],
        )

    @staticmethod
    def join(tables: "Iterable[Table]") -> "Table":
        """Tables of following samples of one shard as one."""
        pieces, records, texts, count = [np.zeros((0, len(PIECE)))], [np.zeros((0, len(RECORD)))], [np.zeros(0)], 0
        for table in tables:
            shifted = table.records.copy()
            shifted[:, RECORD.index("first_text")] += count
            pieces.append(table.pieces)
            records.append(shifted)
            texts.append(table.texts)
            count += len(table.texts)
        return Table(*(np.concatenate(parts).astype(np.int32) for parts in (pieces, records, texts)))


class Measured(Protocol):
    """What makes tables of samples. It is sent to other processes."""

    @property
    def fingerprint(self) -> str:
        """Names all that a table depends on besides the samples: 16 hexadecimal digits."""

    def table(self, samples: Iterable[tuple[int, Sample]], name: str, errors: ErrorCounter) -> Table:
        """Of (number in the shard, sample) pairs. What is of no use is counted."""


@dataclass
class PairMeasure:
    """Images with captions, for contrastive training: how many captions, and their tokens."""

    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(["pairs", VERSION, self.tokenizer.fingerprint]).encode()).hexdigest()[:16]

    def table(self, samples: Iterable[tuple[int, Sample]], name: str, errors: ErrorCounter) -> Table:
        records, texts = list[tuple[int, ...]](), list[int]()
        for number, sample in samples:
            if isinstance(sample, Record) and isinstance(sample.image, Concepts):
                errors.add("concepts without an image", _full_name(name, sample, number))
            elif isinstance(sample, Record) and sample.captions:
                records.append((number, 0, 0, 0, len(texts), len(sample.captions), 0, *[0] * DERIVED_SETS))
                texts += [len(self.tokenizer.encode(clean_caption(text))) for text in sample.captions]
            else:
                errors.add("no captions", _full_name(name, sample, number))
        return table_of([], records, texts)


@dataclass
class Measure:
    """What samples take in tokens: of one processor, with the settings that change it."""

    processor: Processor
    max_tokens: int
    """Of a piece."""
    derived: int = 0
    """Questions derived from the captions of an image, at most; 0: none."""

    @property
    def fingerprint(self) -> str:
        """Names all that a table depends on besides the samples: 16 hexadecimal digits."""
        config = dataclasses.asdict(self.processor.config)
        tokenizer, template = self.processor.tokenizer, self.processor.template
        names = [tokenizer.fingerprint, tokenizer.names, self.processor.vocab_size]
        parts = [VERSION, self.max_tokens, self.derived, names, template and template.source, config, PROMPTS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # ---- records: what their documents share, and what each text adds ----

    @cached_property
    def caption_heads(self) -> list[int]:
        """Tokens before the captions under each prompt, without the image's own."""
        return [self._extent(prompt, "A photo.")[0] - self._probe_tokens for prompt in PROMPTS]

    @cached_property
    def question_head(self) -> int:
        """Tokens that all questions about one image share at least, without the image's own."""
        image = self._probe
        some = [("a", "b"), ("Is it?", "yes"), ("9.", "b"), ("True or false: c", "true"), ("¿", "b")]
        documents = [self.processor.questions(image, [pair]) for pair in some]
        ids = [self.processor(Document(document.branches[0])).input_ids.tolist() for document in documents]
        heads = [self._extent(*pair)[0] for pair in some]
        same = next((at for at, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), len(ids[0]))
        return min(same, *heads) - self._probe_tokens

    @cached_property
    def tail(self) -> int:
        """Tokens that the template writes behind an answer, which nobody reads where documents share their image."""
        _, end, total = self._extent(PROMPTS[0], "A photo.")
        return total - end

    def caption(self, text: str) -> int:
        """Tokens that a caption adds."""
        _, end, _ = self._extent(PROMPTS[0], clean_caption(text))
        return max(1, end - self._probe_tokens - self.caption_heads[0])

    def question(self, pair: QuestionAnswer) -> int:
        """Tokens that a question and its answer add at most, with a capital letter or without."""
        prompts = {training_prompt(pair.question, pair.answer, capital=capital) for capital in (True, False)}
        ends = [self._extent(prompt, pair.answer)[1] for prompt in prompts]
        return max(1, max(ends) - self._probe_tokens - self.question_head)

    def image_tokens(self, image: Image) -> int:
        """Raises ImageError when the tokens depend on a size that cannot be read."""
        return self.processor.count(Document((image,))) - self._empty_tokens

    @cached_property
    def _probe(self) -> Image:
        return Image(PILImage.new("RGB", (32, 32)))

    @cached_property
    def _probe_tokens(self) -> int:
        return self.image_tokens(self._probe)

    @cached_property
    def _empty_tokens(self) -> int:
        return self.processor.count(Document(()))

    def _extent(self, prompt: str, answer: str) -> tuple[int, int, int]:
        document = self.processor.questions(self._probe, [(prompt, answer)])
        return self.processor.extent(document.branches[0])

    # ---- tables ----

    def table(self, samples: Iterable[tuple[int, Sample]], name: str, errors: ErrorCounter) -> Table:
        """Of (number in the shard, sample) pairs. What cannot be trained on is counted."""
        pieces: list[tuple[int, ...]] = []
        records: list[tuple[int, ...]] = []
        texts: list[int] = []
        for number, sample in samples:
            try:
                if isinstance(sample, Record):
                    row, own = self._record(sample)
                    records.append((number, *row[:3], len(texts), *row[3:]))
                    texts += own
                else:
                    found = sample_pieces(sample, self.processor, self.max_tokens)
                    pieces += [(number, *piece.start, *piece.end, tokens, images) for piece, tokens, images in found]
            except BadRecordError as error:
                errors.add(str(error), _full_name(name, sample, number))
        return table_of(pieces, records, texts)

    def _record(self, record: Record) -> tuple[list[int], list[int]]:
        """Columns of a record from `image_tokens` on, but `first_text`; and the tokens of its texts."""
        if self.processor.config.image is None:
            raise BadRecordError("an image, and this model reads text alone")
        sets = [derived_questions(record, n, self.derived) if self.derived else [] for n in range(DERIVED_SETS)]
        try:
            image = Image(record.image)
            is_unseen = isinstance(record.image, Concepts) or is_url(record.image)
            size = (0, 0) if is_unseen else image.size()  # what is broken is known before hours of training
            tokens = self.image_tokens(image)
            texts = [self.caption(text) for text in record.captions]
            texts += [self.question(pair) for pairs in (record.questions, *sets) for pair in pairs]
        except ContextOverflowError:
            raise BadRecordError("longer than the context") from None
        except ImageError:
            raise BadRecordError("broken image") from None
        except MMGPTError as error:
            raise BadRecordError(f"cannot be written ({str(error)[:80]})") from None
        return [tokens, *size, len(record.captions), len(record.questions), *map(len, sets)], texts


def table_of(pieces: list[tuple[int, ...]], records: list[tuple[int, ...]], texts: list[int]) -> Table:
    return Table(
        np.array(pieces, dtype=np.int32).reshape(-1, len(PIECE)),
        np.array(records, dtype=np.int32).reshape(-1, len(RECORD)),
        np.array(texts, dtype=np.int32),
    )


def _full_name(source: str, sample: Sample, number: int) -> str:
    """Some samples are called by their file and line already."""
    own = sample_name(sample) or str(number)
    return own if Path(source).name in own.partition(":")[0].split("/") else f"{source}:{own}"


def index_tables(store: ShardFolder, measure: Measured, name: str, errors: ErrorCounter) -> list[Table]:
    """The table of each shard, made now if nobody has yet. `name` is what progress and errors call the source.

    Raises MMGPTError when tables cannot be kept.
    """
    folder = cache_of(store) / measure.fingerprint
    names = [f"{shard.name}.{shard.digest}" if shard.digest else shard.name for shard in store.shards]
    with only_here(folder.parent / f".{folder.name}.lock"):
        missing = [number for number, own in enumerate(names) if _load_table(folder / f"{own}.npy") is None]
        if missing:
            _make_tables(store, measure, name, errors, missing, [folder / own for own in names])
    tables = []
    for number, own in enumerate(names):
        table = _load_table(folder / f"{own}.npy")
        tables.append(Table.join([]) if table is None else table)
        if number not in missing:
            errors.merge(read_skipped(folder / f"{own}.json"))
    return tables


def _make_tables(
    store: ShardFolder, measure: Measured, name: str, errors: ErrorCounter, missing: list[int], paths: list[Path]
) -> None:
    chunks = [
        (shard, start, min(start + CHUNK, store.shards[shard].samples))
        for shard in missing
        for start in range(0, max(1, store.shards[shard].samples), CHUNK)
    ]
    total = sum(store.shards[shard].samples for shard in missing)
    found: list[Table] = []
    own = ErrorCounter()
    with tqdm(total=total, desc=f"indexing {name}", unit=" samples", delay=2) as bar:
        results = _results(_Indexer(store, measure, name), chunks)
        for number, ((shard, start, end), (table, skipped, is_whole)) in enumerate(results):
            bar.update(end - start)
            found.append(table)
            for reason, record in skipped:
                own.add(reason, record)
            if number + 1 == len(chunks) or chunks[number + 1][0] != shard:
                if is_whole:  # a shard that is out of reach may be there the next time
                    write_skipped(Path(f"{paths[shard]}.json"), own)
                    write_array(Path(f"{paths[shard]}.npy"), Table.join(found).pack())
                errors.merge(own)
                found, own = [], ErrorCounter()


Chunk = tuple[int, int, int]
"""A shard, and the numbers of its samples from the first to before the last."""


@dataclass
class _Indexer:
    """What a process runs."""

    store: ShardFolder
    measure: Measured
    name: str

    def __call__(self, chunk: Chunk) -> tuple[Table, list[tuple[str, str]], bool]:
        """The table, what was skipped, and whether the shard could be read at all."""
        shard, start, end = chunk
        counted = _Skipped()
        try:
            opened = self.store.shard(shard)
        except MMGPTError as error:
            counted.add("missing shard", str(error))
            return Table.join([]), counted.all, False

        def samples() -> Iterator[tuple[int, Sample]]:
            for number in range(start, end):
                try:
                    yield number, opened.sample(number)
                except BadRecordError as error:
                    counted.add(str(error), f"{self.name}:{self.store.shards[shard].name}:{number}")

        return self.measure.table(samples(), self.name, counted), counted.all, True


@dataclass
class _Skipped(ErrorCounter):
    """Every skipped record by name, in order, without a word: the process that asked counts and logs them."""

    all: list[tuple[str, str]] = field(default_factory=list)

    def add(self, reason: str, record: str) -> None:
        self.all.append((reason, record))


_indexer: _Indexer | None = None


def _start(indexer: _Indexer) -> None:
    global _indexer
    _indexer = indexer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(chunk: Chunk) -> tuple[Table, list[tuple[str, str]], bool]:
    assert _indexer is not None
    return _indexer(chunk)


def _results(
    indexer: _Indexer, chunks: list[Chunk]
) -> Iterator[tuple[Chunk, tuple[Table, list[tuple[str, str]], bool]]]:
    """In order; in several processes where that pays."""
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    if len(chunks) < 4 or processes < 2:
        yield from ((chunk, indexer(chunk)) for chunk in chunks)
        return
    try:
        # Where the system forks, scripts without `if __name__ == "__main__":` work; nothing else has started yet.
        with process_pool(processes, _start, (indexer,), start_method=None) as pool:
            yield from zip(chunks, pool.map(_run, chunks), strict=True)
    except BrokenProcessPool:
        why = 'for want of memory perhaps, or the script that started it lacks if __name__ == "__main__":'
        raise MMGPTError(f"a process that indexes the data has died, {why}") from None


def _load_table(path: Path) -> Table | None:
    """None when there is none, or a broken one."""
    try:
        size = path.stat().st_size
        array = np.load(path, mmap_mode="r" if size > MAPPED_BYTES else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return Table.unpack(array) if isinstance(array, np.ndarray) else None
