"""GPT-3's quality classifier: which of many documents look like those of a good corpus.

Logistic regression on hashed word counts. Positives are documents of a corpus you trust, negatives are raw web pages.
A document with score s stays with probability (2 - s)**-alpha, so that some of the unusual ones remain (Brown et al.
2020, https://arxiv.org/abs/2005.14165, appendix A: `np.random.pareto(alpha) > 1 - score`, alpha 9).
"""

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mm_gpt.datasets.filters.document_filters import random_fraction
from mm_gpt.datasets.filters.text_filters import Words
from mm_gpt.document import Document, Text
from mm_gpt.errors import ConfigError, MMGPTError

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "quality.safetensors"
CONFIG_FILE = "quality.json"
MAX_CHARACTERS = 100_000
"""A document is judged by its beginning."""

Features = tuple[np.ndarray, np.ndarray]
"""(buckets of words (N,) int64, their weights (N,) float32)."""


@dataclass(frozen=True, kw_only=True)
class QualityTraining:
    """How the classifier is trained. Both classes weigh the same, whatever their sizes."""

    num_features: int = 2**18
    """Buckets that words are hashed into (Spark's HashingTF has as many)."""
    epochs: int = 10
    batch_size: int = 256
    """Documents."""
    learning_rate: float = 0.05
    """Of Adam, falling to 0."""
    weight_decay: float = 1e-6
    held_out: float = 0.1
    """Part of the documents that are not trained on but measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_features, self.epochs, self.batch_size) < 1:
            raise ConfigError("num_features, epochs and batch_size must be at least 1")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out: must be at least 0 and below 1, is {self.held_out}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ConfigError("learning_rate must be above 0, weight_decay at least 0")


@dataclass(frozen=True)
class QualityReport:
    """What `train_quality` measured on the documents that it held out; NaN where a class had none there."""

    num_positives: int
    num_negatives: int
    auc: float
    """How often a positive scores above a negative: 0.5 by chance, 1 at best."""
    accuracy: float
    """At a score of 0.5, both classes weighing the same."""
    kept_positives: float
    """Expected part that `QualityFilter` keeps with alpha 9."""
    kept_negatives: float


def features(text: str, num_features: int) -> Features:
    """A text's words as hashed counts of length 1, so that a long text scores no higher than a short one.

    The hash is CRC-32: the same on every machine, unlike Python's.
    """
    counts = Counter(Words(text[:MAX_CHARACTERS]).words)
    buckets: Counter[int] = Counter()
    for word, count in counts.items():
        buckets[zlib.crc32(word.encode(errors="surrogatepass")) % num_features] += count
    values = np.fromiter(buckets.values(), dtype=np.float32, count=len(buckets))
    norm = float(np.linalg.norm(values)) or 1.0
    return np.fromiter(buckets, dtype=np.int64, count=len(buckets)), values / np.float32(norm)


def keeps(score: float, fraction: float, alpha: float = 9.0) -> bool:
    """GPT-3's choice, with `fraction`, uniform in (0, 1), turned into numpy's `pareto(alpha)`."""
    return math.expm1(-math.log(fraction) / alpha) > 1.0 - score


def train_quality(
    positives: Iterable[Document],
    negatives: Iterable[Document],
    folder: str | Path,
    config: QualityTraining | None = None,
) -> QualityReport:
    """Train a classifier and write it into `folder`: `quality.safetensors` and `quality.json`, nothing pickled.

    Takes about 12 bytes of memory for each different word of each document. The same input gives the same weights.
    Raises MMGPTError if a class has no document with words to train on.
    """
    import torch
    from safetensors.numpy import save_file

    config = config or QualityTraining()
    train, held_out = _split(positives, negatives, config)
    for name, label in (("positive", 1.0), ("negative", 0.0)):
        if not any(target == label for _, target in train):
            raise MMGPTError(f"quality: no {name} document with words to train on")
    num_good = sum(target == 1.0 for _, target in train)
    class_weights = {1.0: len(train) / (2 * num_good), 0.0: len(train) / (2 * (len(train) - num_good))}

    weight = torch.zeros(config.num_features, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.learning_rate, weight_decay=config.weight_decay)
    num_steps = config.epochs * math.ceil(len(train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    order = np.random.default_rng(config.seed)
    for _ in range(config.epochs):
        shuffled = order.permutation(len(train))
        for start in range(0, len(train), config.batch_size):
            batch = [train[at] for at in shuffled[start : start + config.batch_size]]
            targets = torch.tensor([target for _, target in batch])
            balance = torch.tensor([class_weights[target] for _, target in batch])
            logits = _logits(weight, [item for item, _ in batch]) + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, weight=balance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    weights, offset = weight.detach().numpy(), float(bias.detach())
    scores = np.array([_score(item, weights, offset) for item, _ in held_out])
    good = np.array([target == 1.0 for _, target in held_out], dtype=bool)
    every = [target for _, target in [*train, *held_out]]
    report = _report(scores, good, num_positives=every.count(1.0), num_negatives=every.count(0.0))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weights, "bias": np.array([offset], dtype=np.float32)}, folder / WEIGHTS_FILE)
    # NaN is no JSON.
    measured = {key: None if math.isnan(value) else value for key, value in asdict(report).items()}
    text = json.dumps({"format": 1, "training": asdict(config), "report": measured}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return report


@dataclass(frozen=True, kw_only=True)
class QualityFilter:
    """Keeps a document at random, the likelier the better it scores, and writes its score as `quality` metadata.

    The choice depends on the document's id, the seed and the score alone: it is the same on every machine.
    """

    path: str
    """The folder that `train_quality` wrote."""
    alpha: float = 9.0
    """Higher: stricter."""
    seed: int = 0
    name: str = "quality"

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ConfigError(f"alpha: must be above 0, is {self.alpha}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        score = quality_score(document, self.path)
        if not keeps(score, random_fraction(document, "quality", self.seed), self.alpha):
            removed["low quality"] += 1
            return None
        return replace(document, metadata={**document.metadata, "quality": round(score, 4)})


def quality_score(document: Document, path: str | Path) -> float:
    """From 0 to 1: how much a document looks like the positives. Raises MMGPTError for a classifier it cannot read."""
    weight, bias = _load(str(path))
    return _score(features(_text(document), len(weight)), weight, bias)


@lru_cache(maxsize=4)
def _load(path: str) -> tuple[np.ndarray, float]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = Path(path) / WEIGHTS_FILE
    try:
        config = json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(file)
        weight, bias = tensors["weight"], tensors["bias"]
        num_features = config["training"]["num_features"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MMGPTError(f"{path}: not a quality classifier ({type(error).__name__}: {error})") from None
    if config.get("format") != 1 or weight.shape != (num_features,) or bias.shape != (1,):
        raise MMGPTError(f"{file}: does not fit {CONFIG_FILE}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise MMGPTError(f"{file}: holds numbers that are not finite")
    return weight, float(bias[0])


def _split(
    positives: Iterable[Document], negatives: Iterable[Document], config: QualityTraining
) -> tuple[list[tuple[Features, float]], list[tuple[Features, float]]]:
    """(training, held out) features with their class, 1.0 or 0.0. Documents without words are left out."""
    train: list[tuple[Features, float]] = []
    held_out: list[tuple[Features, float]] = []
    for documents, target in ((positives, 1.0), (negatives, 0.0)):
        for document in documents:
            item = features(_text(document), config.num_features)
            if len(item[0]):
                is_held_out = random_fraction(document, "quality training", config.seed) < config.held_out
                (held_out if is_held_out else train).append((item, target))
    return train, held_out


def _logits(weight: "torch.Tensor", items: list[Features]) -> "torch.Tensor":
    import torch

    buckets = torch.from_numpy(np.concatenate([buckets for buckets, _ in items]))
    values = torch.from_numpy(np.concatenate([values for _, values in items]))
    rows = torch.repeat_interleave(torch.tensor([len(buckets) for buckets, _ in items]))
    return torch.zeros(len(items)).index_add(0, rows, weight[buckets] * values)


def _score(item: Features, weight: np.ndarray, bias: float) -> float:
    buckets, values = item
    logit = float(weight[buckets] @ values) + bias
    return 0.5 * (1.0 + math.tanh(0.5 * logit))  # the sigmoid, without overflow


def _report(scores: np.ndarray, good: np.ndarray, *, num_positives: int, num_negatives: int) -> QualityReport:
    if not good.any() or good.all():
        return QualityReport(num_positives, num_negatives, *[math.nan] * 4)
    # A rank for each score, the mean of their ranks for equal ones: the Mann-Whitney statistic.
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    num_good = int(good.sum())
    auc = float((ranks[good].sum() - num_good * (num_good + 1) / 2) / (num_good * (len(good) - num_good)))
    accuracy = float(((scores[good] > 0.5).mean() + (scores[~good] <= 0.5).mean()) / 2)
    kept = (2.0 - scores) ** -9.0
    return QualityReport(
        num_positives, num_negatives, auc, accuracy, float(kept[good].mean()), float(kept[~good].mean())
    )


def _text(document: Document) -> str:
    return "\n\n".join(s.text for s in document.segments if isinstance(s, Text) and not s.is_control)
