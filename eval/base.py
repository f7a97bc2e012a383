"""What every evaluation task is: items in a fixed order, a way to predict them, and metrics; and tasks about images.

A control is a second run that should do worse if the model looks at the picture: with another record's picture
(`shuffled`), a grey one (`blank`) or none (`no-image`). For a model with concepts (`mm_gpt.vision.concepts`),
`no-concepts` leaves these out and `concepts-alone` everything else.
"""

import dataclasses
import functools
import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image as PILImage

from mm_gpt.datasets.contamination.evaluation_index import EvaluationItem
from mm_gpt.datasets.samples import ErrorCounter, Record, sample_name
from mm_gpt.datasets.sources import read_samples
from mm_gpt.document import Concepts, Document, Image, Shown
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.metrics.statistics import bootstrap_statistic, wilson_interval
from mm_gpt.images import image_bytes
from mm_gpt.inference.assistant import Assistant, GenerationOptions
from mm_gpt.inference.generation import GenerationConfig

SHOWN: dict[str, Shown] = {"no-concepts": "pixels", "concepts-alone": "concepts"}
"""The controls of models with concepts, and what each shows of an image."""


class Score(Protocol):
    """One metric of a whole set; `CaptionScore` is one."""

    @property
    def score(self) -> float: ...
    @property
    def per_item(self) -> np.ndarray: ...
    def interval(self, *, seed: int = 0) -> tuple[float, float]: ...
    def resampled(self, indices: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class RatioScore:
    """Sum of `totals` over sum of `weights`: an accuracy, or nats per token. Resampled by group, not by item.

    The questions about one image are not independent, so the bootstrap draws images.
    """

    totals: np.ndarray  # (N,) points, or nats
    weights: np.ndarray  # (N,) 1, or tokens
    groups: np.ndarray  # (N,) the image of each item, 0 .. G-1
    exponential: bool = False
    """True: the score is exp(sum / sum), a perplexity."""

    @property
    def score(self) -> float:
        return float(self._shape(self.totals.sum() / self.weights.sum()))

    @property
    def per_item(self) -> np.ndarray:
        return self._shape(self.totals / self.weights)

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The score of each resample, (R,), for group indices (R, G)."""
        totals = np.bincount(self.groups, self.totals)
        weights = np.bincount(self.groups, self.weights)
        return self._shape(totals[indices].sum(axis=1) / weights[indices].sum(axis=1))

    def interval(self, *, seed: int = 0) -> tuple[float, float]:
        """95 %. Wilson's for right-or-wrong items with one in each group, or all alike; else the bootstrap."""
        num_groups = int(self.groups.max()) + 1
        values = set(self.totals.tolist())
        is_proportion = not self.exponential and values <= {0.0, 1.0} and bool((self.weights == 1).all())
        if is_proportion and (num_groups == len(self.totals) or len(values) == 1):
            return wilson_interval(int(self.totals.sum()), len(self.totals))
        return bootstrap_statistic(self.resampled, num_groups, seed=seed)

    def _shape(self, ratio: np.ndarray) -> np.ndarray:
        return np.exp(ratio) if self.exponential else ratio


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One thing to predict."""

    id: str
    group: int
    """Number of its image (of its window, for text): what the bootstrap draws."""
    length: int
    """Tokens of the prompt; a batch holds prompts of similar length."""
    row: dict[str, Any]
    """What the sample log says about it beside the prediction."""


class Task(ABC):
    """A set of items with a fixed order, a way to predict them, and metrics."""

    name: ClassVar[str]
    controls: ClassVar[tuple[str, ...]]
    default_controls: ClassVar[tuple[str, ...]] = ()
    num_beams: ClassVar[int | None] = None
    max_new_tokens: ClassVar[int | None] = None
    unit: ClassVar[str]
    """What the bootstrap draws: images or windows."""
    scale: ClassVar[float]
    """What a score is multiplied by when it is printed; results files hold the plain score."""
    lower_is_better: ClassVar[bool] = False

    def __init__(self, config: EvalConfig, assistant: Assistant):
        self.config, self.assistant = config, assistant
        self.errors = ErrorCounter()
        self._digest = hashlib.sha256()
        self.instances: list[Instance] = self._instances()

    @abstractmethod
    def _instances(self) -> list[Instance]: ...

    @classmethod
    @abstractmethod
    def sources(cls, config: EvalConfig, assistant: Assistant | None) -> Iterator[EvaluationItem]:
        """The texts and images of all items, whatever the limit, under the ids of `items`: what a corpus must not hold.

        `assistant` is needed where the items depend on the tokenizer; None loads the config's model for that.
        """

    @abstractmethod
    def check_control(self, control: str) -> None:
        """Raises MMGPTError when this data or model cannot have the control."""

    @abstractmethod
    def predict(self, instances: Sequence[Instance], control: str) -> list[dict[str, Any]]:
        """For each item the fields that the prediction adds to its row."""

    def generation(self) -> GenerationConfig | None:
        """How answers are generated; None where nothing is."""
        return None

    @abstractmethod
    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        """Metrics of the rows of all items, in their order. The first one is the task's headline."""

    def baselines(self) -> dict[str, tuple[str, dict[str, Score]]]:
        """What an answer without any model scores: name -> (the answer, its metrics)."""
        return {}

    @property
    def data_sha256(self) -> str:
        """Of everything that is evaluated: texts, images and their order."""
        return self._digest.hexdigest()

    @property
    def num_groups(self) -> int:
        return self.instances[-1].group + 1

    def _ratio(self, totals: Iterable[float]) -> RatioScore:
        values = np.array(list(totals), dtype=np.float64)
        return RatioScore(values, np.ones(len(values)), np.array([instance.group for instance in self.instances]))


class ImageTask(Task):
    """Something is asked about each image, and the engine answers."""

    controls = ("shuffled", "blank", "no-image", *SHOWN)
    unit = "images"
    scale = 100.0

    @classmethod
    @abstractmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        """(what is added to the record's key, prompt, row) of each item about this image."""

    @classmethod
    @abstractmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        """What people wrote, of each item of `_asked`."""

    def _instances(self) -> list[Instance]:
        self.images: list[Image] = []
        self.prompts: dict[str, str] = {}
        instances: list[Instance] = []
        for key, record in self._records(self.config, self.errors):
            about = [self._instance(key, len(self.images), record, *asked) for asked in self._asked(record)]
            if fitting := [instance for instance in about if instance is not None]:
                instances += fitting
                self.images.append(Image(record.image))
                self._digest.update(repr([(instance.id, instance.row) for instance in fitting]).encode())
                assert not isinstance(record.image, Concepts)  # these have no pixels that `_records` could open
                self._digest.update(hashlib.sha256(image_bytes(record.image)).digest())
            if len(self.images) == self.config.limit:
                break
        if not instances:
            raise MMGPTError(f"{', '.join(self.config.data)}: nothing to evaluate: {self.errors.summary()}")
        return instances

    @classmethod
    def _records(cls, config: EvalConfig, errors: ErrorCounter) -> Iterator[tuple[str, Record]]:
        """Records that have something to ask and an image that opens, with keys that stay apart.

        Every condition sees the same ones.
        """
        seen: Counter[str] = Counter()
        sources = [read_samples(path, errors) for path in config.data]  # a wrong path is known at once
        for record in itertools.chain.from_iterable(sources):
            if not isinstance(record, Record) or not cls._asked(record):
                errors.add(f"nothing for {cls.name}", sample_name(record))
                continue
            try:
                Image(record.image).load()
            except ImageError as error:
                errors.add("broken image", f"{record.key}: {error}")
                continue
            seen[record.key] += 1
            yield record.key if seen[record.key] == 1 else f"{record.key}@{seen[record.key]}", record

    @classmethod
    def sources(cls, config: EvalConfig, assistant: Assistant | None) -> Iterator[EvaluationItem]:
        for key, record in cls._records(config, ErrorCounter()):
            for (suffix, _, _), texts in zip(cls._asked(record), cls._texts(record), strict=True):
                yield EvaluationItem(key + suffix, texts, (record.image,))

    def _instance(
        self, key: str, group: int, record: Record, suffix: str, prompt: str, row: dict[str, Any]
    ) -> Instance | None:
        id = key + suffix
        try:
            length = len(self.assistant.processor(self._document(prompt, Image(record.image))))
            if length >= self.assistant.model.decoder.config.max_length:
                raise ContextOverflowError(id)
        except ContextOverflowError:
            self.errors.add("prompt too long", id)
            return None
        self.prompts[id] = prompt
        return Instance(id=id, group=group, length=length, row=row)

    def _document(self, prompt: str, image: Image | None) -> Document:
        content = [prompt] if image is None else [image, prompt]
        return self.assistant.processor.chat([{"role": "user", "content": content}])

    def predict(self, instances: Sequence[Instance], control: str) -> list[dict[str, Any]]:
        documents = [
            self._document(self.prompts[instance.id], self._image(instance.group, control)) for instance in instances
        ]
        return [{"prediction": str(answer)} for answer in self.assistant.engine.generate(documents, self.generation())]

    @abstractmethod
    def generation(self) -> GenerationConfig: ...

    def _options(self) -> GenerationOptions:
        assert self.config.num_beams is not None  # the harness has filled them in
        assert self.config.max_new_tokens is not None
        return {
            "num_beams": self.config.num_beams,
            "max_new_tokens": self.config.max_new_tokens,
            "seed": self.config.seed,
        }

    def _image(self, group: int, control: str) -> Image | None:
        if control == "no-image":
            return None
        if control == "blank":
            return Image(PILImage.new("RGB", (224, 224), (128, 128, 128)))
        if control == "shuffled":
            return self.images[self._partners[group]]
        if control in SHOWN:
            return dataclasses.replace(self.images[group], shown=SHOWN[control])
        return self.images[group]

    @functools.cached_property
    def _partners(self) -> list[int]:
        return derangement(len(self.images), self.config.seed)

    def check_control(self, control: str) -> None:
        if control == "shuffled" and self.num_groups < 2:
            raise MMGPTError("the control 'shuffled' needs at least two images")
        if control in SHOWN and self.assistant.model.concepts is None:
            raise MMGPTError(f"the control {control!r} needs a model with concepts, and this one has none")


def derangement(n: int, seed: int) -> list[int]:
    """A permutation of n > 1 things that leaves none in its place: one cycle through a seeded shuffle."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    result = [0] * n
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        result[here] = there
    return result
