"""Evaluation tasks: what is asked of a model, and how the answers are scored. One small class each, in `TASKS`.

A control is a second run that should do worse if the model looks at the picture: with another record's picture
(`shuffled`), a grey one (`blank`) or none (`no-image`). For text perplexity it is the decoder `before` it was adapted.
"""

import functools
import hashlib
import itertools
import logging
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image as PILImage

from mm_gpt.datasets.contamination.evaluation_index import EvaluationItem
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer, Record, sample_name
from mm_gpt.datasets.sources import read_samples
from mm_gpt.document import Document, Image
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.metrics.captions import bleu, cider_d, rouge_l
from mm_gpt.eval.metrics.statistics import bootstrap_statistic, wilson_interval
from mm_gpt.eval.metrics.vqa import exact_match, vqa_accuracy
from mm_gpt.eval.perplexity import WINDOW, read_text, window_nats, windows
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.images import image_bytes
from mm_gpt.inference.assistant import Assistant, GenerationOptions, load
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.decoder import Decoder
from mm_gpt.templates.prompts import CAPTION_PROMPT, question_prompt

logger = logging.getLogger(__name__)

MIN_ANNOTATORS = 4
"""From so many answers on, the VQA accuracy can reach 1."""


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

    controls = ("shuffled", "blank", "no-image")
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
        return self.images[group]

    @functools.cached_property
    def _partners(self) -> list[int]:
        return derangement(len(self.images), self.config.seed)

    def check_control(self, control: str) -> None:
        if control == "shuffled" and self.num_groups < 2:
            raise MMGPTError("the control 'shuffled' needs at least two images")


class Captioning(ImageTask):
    """CIDEr-D, BLEU-4 and ROUGE-L of one caption for each image against all its references."""

    name = "captioning"
    num_beams = 3
    max_new_tokens = 40

    def generation(self) -> GenerationConfig:
        return self.assistant.caption_config(self._options())

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        return [("", CAPTION_PROMPT, {"references": list(record.captions)})] if record.captions else []

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [record.captions]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        predictions, references = [r["prediction"] for r in rows], [r["references"] for r in rows]
        return {
            "CIDEr-D": cider_d(predictions, references),
            "BLEU-4": bleu(predictions, references)[3],
            "ROUGE-L": rouge_l(predictions, references),
        }


class VQA(ImageTask):
    """Exact match of short answers; the VQA accuracy too where every question has the answers of 4 or more people."""

    name = "vqa"
    num_beams = 1
    max_new_tokens = 32

    def generation(self) -> GenerationConfig:
        return self.assistant.chat_config(self._options())

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        asked = []
        for number, pair in enumerate(record.questions):
            prompt = question_prompt(pair.question, pair.answer)
            row = {"question": prompt, "answer": pair.answer, "references": accepted_answers(pair)}
            asked.append((f"#{number}", prompt, row))
        return asked

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [(f"{pair.question} {pair.answer}",) for pair in record.questions]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        return self._scores([row["prediction"] for row in rows])

    def baselines(self) -> dict[str, tuple[str, dict[str, Score]]]:
        """Always the commonest answer of the evaluation set itself, which no model can know: a hard baseline."""
        answer = Counter(instance.row["answer"] for instance in self.instances).most_common(1)[0][0]
        return {"majority_answer_of_this_set": (answer, self._scores([answer] * len(self.instances)))}

    def _scores(self, predictions: list[str]) -> dict[str, Score]:
        references = [instance.row["references"] for instance in self.instances]
        pairs = list(zip(predictions, references, strict=True))
        scores: dict[str, Score] = {}
        enough = [len(answers) >= MIN_ANNOTATORS for answers in references]
        if all(enough):
            scores["VQA accuracy"] = self._ratio(vqa_accuracy(p, answers) for p, answers in pairs)
        elif any(enough):
            logger.warning(
                "no VQA accuracy: %d of %d questions have %d answers", sum(enough), len(enough), MIN_ANNOTATORS
            )
        scores["exact match"] = self._ratio(exact_match(p, answers) for p, answers in pairs)
        return scores


class Perplexity(Task):
    """Nats per token and perplexity of plain text files, for the model and for its decoder before adaptation."""

    name = "perplexity"
    controls = default_controls = ("before",)
    unit = "windows"
    scale = 1.0
    lower_is_better = True

    def _instances(self) -> list[Instance]:
        self._before: Decoder | None = None
        self._pieces: dict[str, list[int]] = {}
        instances: list[Instance] = []
        for id, piece in itertools.islice(self._windows(self.config, self.assistant, self.errors), self.config.limit):
            self._pieces[id] = piece
            instances.append(Instance(id=id, group=len(instances), length=len(piece), row={"tokens": len(piece) - 1}))
            self._digest.update(repr(piece).encode())
        if not instances:
            raise MMGPTError(f"{', '.join(self.config.data)}: no text to evaluate")
        return instances

    @classmethod
    def _windows(
        cls, config: EvalConfig, assistant: Assistant, errors: ErrorCounter
    ) -> Iterator[tuple[str, list[int]]]:
        """(id, token ids) of each window of each text."""
        length = min(WINDOW, assistant.model.decoder.config.max_length)
        count = itertools.count()
        for number, path in enumerate(map(Path, config.data)):
            ids = assistant.processor.tokenizer.encode(read_text(path))
            if len(ids) < 2:
                errors.add("text of fewer than two tokens", str(path))
            for piece in windows(ids, length):
                yield f"{number}:{path.name}#{next(count)}", piece

    @classmethod
    def sources(cls, config: EvalConfig, assistant: Assistant | None) -> Iterator[EvaluationItem]:
        assistant = assistant or load(config.model, device=config.device, dtype=config.dtype)
        for id, piece in cls._windows(config, assistant, ErrorCounter()):
            yield EvaluationItem(id, (assistant.processor.tokenizer.decode(piece),))

    def predict(self, instances: Sequence[Instance], control: str) -> list[dict[str, Any]]:
        decoder = self._untouched() if control == "before" else self.assistant.model.decoder
        return [{"nats": nats} for nats in window_nats(decoder, [self._pieces[instance.id] for instance in instances])]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        nats = np.array([row["nats"] for row in rows])
        tokens = np.array([float(row["tokens"]) for row in rows])
        groups = np.arange(len(rows))
        return {
            "perplexity": RatioScore(nats, tokens, groups, exponential=True),
            "nats per token": RatioScore(nats, tokens, groups),
        }

    def check_control(self, control: str) -> None:
        if not isinstance(self.assistant.base_decoder, str):
            raise MMGPTError("the model has a decoder of its own: there is nothing 'before' to compare it with")

    def _untouched(self) -> Decoder:
        """The decoder that the model's configuration names, as it was before training, with the same precision."""
        if self._before is None:
            name = self.assistant.base_decoder
            assert isinstance(name, str)
            ours = self.assistant.model.decoder
            self._before = load_decoder(name)[0].to(ours.device, ours.dtype).eval().requires_grad_(False)
        return self._before


TASKS: dict[str, type[Task]] = {task.name: task for task in (Captioning, VQA, Perplexity)}


def accepted_answers(pair: QuestionAnswer) -> list[str]:
    """Every answer that counts as right; people's answers stay as often as they were given.

    Sets such as DAQUAR list the members of one answer ("plant, books"): there only the whole is right.
    """
    is_set = len(pair.answers) > 1 and pair.answer == ", ".join(pair.answers)
    if is_set or not pair.answers:
        return [pair.answer]
    return list(pair.answers) if pair.answer in pair.answers else [pair.answer, *pair.answers]


def derangement(n: int, seed: int) -> list[int]:
    """A permutation of n > 1 things that leaves none in its place: one cycle through a seeded shuffle."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    result = [0] * n
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        result[here] = there
    return result
