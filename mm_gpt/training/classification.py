"""Supervised fine-tuning of a decoder on a labelled task, as GPT-1 does it (`mm_gpt.model.classification`)."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mm_gpt import config as configs
from mm_gpt.config import check_numbers
from mm_gpt.datasets.building.shards import ShardFolder
from mm_gpt.datasets.formats.labelled import ROW
from mm_gpt.datasets.loading import index
from mm_gpt.datasets.loading.holdout import held_out
from mm_gpt.datasets.loading.store import open_store
from mm_gpt.datasets.samples import ErrorCounter, Sample, sample_name
from mm_gpt.document import Document
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.weights import open_safetensors, read_json
from mm_gpt.model.classification import (
    Classifier,
    ClassifierBatch,
    ClassifierConfig,
    Kind,
    collate_sequences,
    kind_of,
    sequences,
)
from mm_gpt.model.lora import merge_lora
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.distributed import ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.training.stage import LOWEST_LOSS, Decides, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig

logger = logging.getLogger(__name__)
WEIGHTS, CONFIG = "classifier.safetensors", "classifier.json"


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe:
    """A complete description of one run on a labelled task."""

    train: TrainConfig
    start: str
    """The name or folder of a model whose decoder is fine-tuned, every weight of it."""
    rows: str = "train.jsonl"
    """Labelled rows, in the data folder: {"text"}, {"premise", "hypothesis"}, {"a", "b"} or {"context", "question",
    "choices"}, each with a "label"; that of multiple choice is the right one's number, from 0."""
    validation: str | None = None
    holdout: float = 0.0
    """Without `validation` rows: the share of `rows` that is kept from training to validate on."""
    auxiliary: float = 0.5
    """λ, how much the next tokens of the labelled inputs count besides their labels. It helps large sets, not small
    ones: the paper's mean over nine tasks is 74.7 with it and 75.0 without."""
    dropout: float = 0.1
    """Of the state that the head reads."""
    batch_size: int = 32
    """Rows of a rank in a micro-batch."""
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", "dropout", at_least=0, below=1)
        check_numbers(self, "auxiliary", at_least=0)
        check_numbers(self, "batch_size", at_least=1)
        if (self.validation is None) != bool(self.holdout):
            raise ConfigError("give either validation rows or a holdout above 0")
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for labelled rows")


@dataclass(frozen=True)
class Labelled:
    """A labelled row in numbers."""

    kind: Kind
    label: str
    sequences: list[list[int]]


@dataclass
class LabelledMeasure:
    """What labelled rows take in tokens, and which of them can be used: an index is made with it."""

    tokenizer: Tokenizer
    vocab_size: int
    """Of the decoder."""
    max_length: int

    @property
    def fingerprint(self) -> str:
        parts = ["labelled", index.VERSION, self.tokenizer.fingerprint, self.vocab_size, self.max_length]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def table(self, samples: Iterable[tuple[int, Sample]], name: str, errors: ErrorCounter) -> index.Table:
        pieces: list[tuple[int, ...]] = []
        for number, sample in samples:
            try:
                assert isinstance(sample, Document)
                tokens = sum(map(len, self.encode(sample.metadata.get(ROW)).sequences))
                pieces.append((number, 0, 0, 0, 0, tokens, 0))
            except MMGPTError as error:
                errors.add(str(error), sample_name(sample))
        return index.table_of(pieces, [], [])

    def encode(self, row: Any) -> Labelled:
        """Raises MMGPTError that says why a row cannot be used."""
        kind, label = label_of(row)
        found = sequences(row, self.tokenizer, self.vocab_size)
        if max(map(len, found)) > self.max_length:
            raise MMGPTError("row longer than the context")
        return Labelled(kind, label, found)


def label_of(row: Any) -> tuple[Kind, str]:
    """The kind of a row, and its label. Raises MMGPTError that says what is wrong with it."""
    kind, label = kind_of(row), row.get("label")
    if not isinstance(label, str | int):
        raise MMGPTError("no label that is a text or a whole number")
    if kind == "multiple_choice" and (not isinstance(label, int) or not 0 <= label < len(row["choices"])):
        raise MMGPTError("label that is no choice's number")
    return kind, str(int(label) if kind == "multiple_choice" else label)


class LabelledRows(Sequence[Labelled]):
    """The usable rows of a source, read and encoded one at a time."""

    def __init__(self, store: ShardFolder, measure: LabelledMeasure, places: Sequence[tuple[int, int]]):
        """`places`: shard and number of each row."""
        self._store, self._measure, self._places = store, measure, places
        self.labels = [label_of(self._row(place)) for place in places]
        """Kind and label of each row."""

    @classmethod
    def of(cls, path: Path, measure: LabelledMeasure, errors: ErrorCounter) -> "LabelledRows":
        """All of a file. Raises MMGPTError when it cannot be read."""
        store = open_store(str(path), errors, format="labelled")
        tables = index.index_tables(store, measure, path.name, errors)
        places = [(shard, number) for shard, table in enumerate(tables) for number in table.samples.tolist()]
        return cls(store, measure, places)

    def only(self, chosen: Sequence[int]) -> "LabelledRows":
        return LabelledRows(self._store, self._measure, [self._places[at] for at in chosen])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        return self._measure.encode(self._row(self._places[at]))

    def _row(self, place: tuple[int, int]) -> Any:
        sample = self._store.shard(place[0]).sample(place[1])
        assert isinstance(sample, Document)
        return sample.metadata[ROW]


class ClassificationTask:
    """A `Stage` for the loop. An epoch shows every row once, to one of the ranks."""

    on_policy: bool = False
    decides: Decides = LOWEST_LOSS

    def __init__(self, recipe: ClassificationRecipe):
        self.recipe = recipe
        torch.manual_seed(recipe.train.seed)
        model, self.processor = load_model(recipe.start)
        merge_lora(model.decoder)
        decoder, folder = model.decoder.requires_grad_(True), Path(recipe.data)
        self.errors = ErrorCounter()
        measure = LabelledMeasure(self.processor.tokenizer, decoder.config.vocab_size, decoder.config.max_length)
        rows = LabelledRows.of(folder / recipe.rows, measure, self.errors)
        if recipe.validation is None:
            # Files are often sorted by label, or take turns.
            order = epoch_order(len(rows), recipe.train.seed, 0)
            held = rows.only([at for number, at in enumerate(order) if held_out(number, recipe.holdout)])
            rows = rows.only([at for number, at in enumerate(order) if not held_out(number, recipe.holdout)])
        else:
            held = LabelledRows.of(folder / recipe.validation, measure, self.errors)
        if not len(rows) or not len(held):
            raise MMGPTError(f"{folder}: no usable rows to train or to validate on ({self.errors.summary()})")
        kind = rows.labels[0][0]
        labels = () if kind == "multiple_choice" else tuple(sorted({own for each, own in rows.labels if each == kind}))
        config = ClassifierConfig(kind=kind, labels=labels, dropout=recipe.dropout)
        self.model = Classifier(config, decoder)
        self.rows, self.held = self._fitting(rows, recipe.rows), self._fitting(held, recipe.validation or recipe.rows)
        if not len(self.held):
            raise MMGPTError(f"{folder}: no usable rows to validate on ({self.errors.summary()})")
        if self.errors.total:
            logger.warning(self.errors.summary())

    def _fitting(self, rows: "LabelledRows", name: str) -> "LabelledRows":
        """The rows of the task's kind with a known label; the first training row decides on the kind."""
        config, kept = self.model.config, []
        for at, (kind, label) in enumerate(rows.labels):
            if kind != config.kind:
                self.errors.add(f"{kind} among {config.kind}", name)
            elif config.labels and label not in config.labels:
                self.errors.add("label that no training row has", f"{name}: {label}")
            else:
                kept.append(at)
        return rows.only(kept)

    def prepare(self) -> list[ParameterGroup]:
        recompute_blocks(self.model.decoder, self.recipe.train.recompute)
        return [
            ParameterGroup("decoder", list(self.model.decoder.parameters())),
            ParameterGroup("head and marks", [*self.model.head.parameters(), self.model.marks]),
        ]

    def micro_batches(self, step: int, count: int) -> list[ClassifierBatch]:
        rank, world = ranks()
        size, batches = self.recipe.batch_size * world, []
        per_epoch = -(-len(self.rows) // size)
        for batch_number in range(step * count, (step + 1) * count):
            epoch, place = divmod(batch_number, per_epoch)
            order = epoch_order(len(self.rows), self.recipe.train.seed, epoch)
            whole = order[place * size : (place + 1) * size]
            # An epoch's last batch may be too small for every rank to have a row of it.
            if mine := whole[rank * len(whole) // world : (rank + 1) * len(whole) // world]:
                batches.append(self._batch([self.rows[i] for i in mine]))
        return batches

    def counts(self, batch: ClassifierBatch) -> dict[str, float]:
        return {"loss": len(batch.labels)}

    def loss(self, batch: ClassifierBatch) -> dict[str, Term]:
        total, count = self.model.loss(batch, auxiliary=self.recipe.auxiliary)
        return {"loss": Term(total, int(count))}

    def validate(self) -> dict[str, float]:
        """Mean loss of the label in nats, accuracy, and what always giving the most frequent answer would have."""
        loss, right, size = 0.0, 0, self.recipe.batch_size
        for start in range(0, len(self.held), size):
            found = [self.held[at] for at in range(start, min(start + size, len(self.held)))]
            batch = self._batch(found).to(self.model.marks.device)
            logits = self.model(batch)
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            right += int((logits.argmax(dim=-1) == batch.labels).sum())
        most = Counter(label for _, label in self.held.labels).most_common(1)[0][1]
        count = len(self.held)
        return {"loss": loss / count, "accuracy": right / count, "most frequent": most / count, "rows": count}

    def samples(self) -> list[str]:
        return []

    def save(self, folder: Path) -> None:
        save_classifier(self.model, self.processor, folder)

    def _batch(self, rows: list[Labelled]) -> ClassifierBatch:
        labels = self.model.config.labels
        numbers = [labels.index(row.label) if labels else int(row.label) for row in rows]
        return collate_sequences([row.sequences for row in rows], numbers)


def count_rows(path: Path) -> int:
    """The lines of a `.jsonl` that hold something; 0 when there is no such file."""
    if not path.is_file():
        return 0
    with path.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def save_classifier(model: Classifier, processor: Processor, folder: Path) -> None:
    """Write the decoder as a model of text, and the head and the marks beside it, into an existing folder."""
    text = ProcessorConfig(max_length=model.decoder.config.max_length)
    vocab_size = model.decoder.config.vocab_size
    plain = Processor(processor.tokenizer, text, vocab_size=vocab_size, template=processor.template)
    save_model(MMGPT(ModelConfig(decoder=model.decoder.config), model.decoder), plain, folder)
    new = {"head": model.head.weight, "marks": model.marks}
    write_tensors({name: tensor.float() for name, tensor in new.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(configs.to_dict(model.config), indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: str | Path) -> tuple[Classifier, Processor]:
    """A classifier that `mm-gpt train classify` wrote; `classifier.probabilities(rows, processor.tokenizer)` uses it.

    Raises CheckpointError naming what is missing or does not fit.
    """
    folder = Path(folder)
    config = configs.from_dict(ClassifierConfig, read_json(folder / CONFIG), where=str(folder / CONFIG))
    decoder, processor = load_model(folder)
    model = Classifier(config, decoder.decoder)
    with open_safetensors(folder / WEIGHTS) as file:
        for name, target in (("head", model.head.weight), ("marks", model.marks)):
            tensor = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (not a dict)
            if tensor is None or tensor.shape != target.shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise CheckpointError(f"{folder / WEIGHTS}: {name} {found}, not {tuple(target.shape)}")
            with torch.no_grad():
                target.copy_(tensor)
    return model.eval(), processor
