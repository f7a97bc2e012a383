"""Comparisons in numbers: what a step of preference learning reads, with its pairs and what is known of the reference.

Shapes: C completions, N pairs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_gpt.alignment.completions import CompletionBatch, completion_batch
from mm_gpt.alignment.losses import comparison_pairs
from mm_gpt.alignment.reward_model import count_unusable, fitting_documents
from mm_gpt.datasets.comparisons import Comparison, Comparisons
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Document
from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.processor import Processor
from mm_gpt.training.epochs import epoch_order


@dataclass(frozen=True)
class Read:
    """A comparison in numbers."""

    number: int
    """Among the comparisons that it is one of."""
    documents: list[Document]
    """The prompt with its answers as branches; more than one where the context is too short for all of them."""
    pixel_values: Tensor  # (tiles, 3, H, W)
    better: list[int]
    worse: list[int]
    """The answers of each pair."""
    best: list[bool]
    """Of each answer: whether none is better."""
    labels: list[bool]
    """Of each answer: whether it is good."""
    logprobs: list[float]
    """Of each answer: the reference's, in nats; NaN where the row says nothing."""
    other: list[Document] = dataclasses.field(default_factory=list)
    """The prompt with an answer that belongs to another one, for KTO."""


@dataclass(frozen=True)
class PreferenceBatch:
    """A micro-batch."""

    completions: CompletionBatch
    better: Tensor  # (N,) the completion that is preferred in each pair
    worse: Tensor  # (N,)
    best: Tensor  # (C,) bool
    labels: Tensor  # (C,) bool
    reference: Tensor | None  # (C,) log-probabilities that are known already
    other: CompletionBatch | None = None
    """KTO's answers that belong to other prompts."""
    kl: float = 0.0
    """KTO's zero point, in nats: of the whole step."""

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | CompletionBatch)}
        return dataclasses.replace(self, **moved)


class PreferenceReader:
    """Comparisons, read and encoded one at a time. What cannot be used is counted once."""

    def __init__(
        self,
        comparisons: Comparisons,
        processor: Processor,
        errors: ErrorCounter,
        *,
        separate: bool,
        labelled: bool,
        stored: bool,
    ):
        """`separate`: see `completions.shares_prompts`. `labelled`: single answers are learned, each with an answer to
        another prompt beside it. `stored`: rows must have the log-probabilities of the reference."""
        self.comparisons, self.processor, self.errors = comparisons, processor, errors
        self.separate, self.labelled, self.stored = separate, labelled, stored
        self.known: Tensor | None = None
        """Of all completions, the reference's log-probability, where it was computed beforehand."""
        self._unusable: set[int] = set()

    def __len__(self) -> int:
        return len(self.comparisons)

    # ---- one comparison ----

    def at(self, place: int, seed: int) -> Read:
        """The comparison at a place of all epochs, or the next one that can be used. Raises MMGPTError without any."""
        epoch, start = divmod(place, len(self))
        order = epoch_order(len(self), seed, epoch)
        for number in (*order[start:], *order[:start]):
            read = self.read(number)
            if read is not None and self.labelled:
                read = self.with_other(read, order)
            if read is not None:
                return read
        raise MMGPTError(f"none of {len(self)} comparisons can be learned from: {self.errors.summary()}")

    def read(self, number: int) -> Read | None:
        """None for a comparison that cannot be used."""
        if number in self._unusable:
            return None
        comparison = None
        try:
            comparison = self.comparisons[number]
            return self._numbers(comparison, number)
        except BadRecordError as error:
            self.errors.add(str(error), f"comparison {number}" if comparison is None else comparison.key)
        except MMGPTError as error:
            if comparison is None:
                self.errors.add("cannot be read", f"comparison {number}: {error}")
            else:
                count_unusable(self.errors, comparison, error)
        self._unusable.add(number)
        return None

    def _numbers(self, comparison: Comparison, number: int) -> Read:
        """Raises BadRecordError for a comparison that says nothing, and what reading it raises."""
        answers = comparison.completions
        best = [answer.rank == min(other.rank for other in answers) for answer in answers]
        better, worse = comparison_pairs([answer.rank for answer in answers])
        if self.labelled and not len(better) and any(answer.label is None for answer in answers):
            raise BadRecordError("neither a label nor a better answer")
        if not self.labelled and not len(better):
            raise BadRecordError("no answer that is better than another")
        if self.stored and any(answer.logprob is None for answer in answers):
            raise BadRecordError("no log-probability of the reference")
        documents = fitting_documents(self.processor, comparison, separate=self.separate)
        return Read(
            number,
            documents,
            completion_batch(self.processor, documents, separate=self.separate).batch.pixel_values,
            better.tolist(),
            worse.tolist(),
            best,
            [is_best if answer.label is None else answer.label for answer, is_best in zip(answers, best, strict=True)],
            [float("nan") if answer.logprob is None else answer.logprob for answer in answers],
        )

    def with_other(self, read: Read, order: Sequence[int]) -> Read | None:
        """With the prompt and an answer of the first comparison behind it in `order` that has another prompt; None
        where there is none."""
        own, place = self.comparisons[read.number], order.index(read.number)
        for number in (*order[place + 1 :], *order[:place]):
            try:
                comparison = self.comparisons[number]
                if comparison.prompt == own.prompt or not comparison.completions:
                    continue
                answer = comparison.completions[read.number % len(comparison.completions)]
                asked = dataclasses.replace(own, completions=(answer,))
                documents = fitting_documents(self.processor, asked, separate=self.separate)
            except (BadRecordError, MMGPTError):
                continue  # counted when its own turn comes
            return dataclasses.replace(read, other=documents)
        self.errors.add("no answer to another prompt that fits behind this one", own.key)
        self._unusable.add(read.number)
        return None

    # ---- many ----

    def batch(self, read: Sequence[Read]) -> PreferenceBatch:
        """Each comparison a row, with its answers as branches."""
        documents = [document for one in read for document in one.documents]
        pixels = torch.cat([one.pixel_values for one in read])
        completions = completion_batch(self.processor, documents, separate=self.separate, pixel_values=pixels)
        starts = torch.tensor([0, *(len(one.best) for one in read)]).cumsum(0).tolist()
        pairs = [
            torch.tensor(
                [start + at for one, start in zip(read, starts, strict=False) for at in getattr(one, name)],
                dtype=torch.long,
            )
            for name in ("better", "worse")
        ]
        reference = None
        if self.stored:
            reference = torch.tensor([value for one in read for value in one.logprobs])
        elif self.known is not None:
            reference = torch.cat([self.known[self.places(one.number)] for one in read])
        other = None
        if self.labelled:
            foreign = [document for one in read for document in one.other]
            shared = pixels if not self.separate and len(foreign) == len(documents) else None  # one row a prompt
            other = completion_batch(self.processor, foreign, separate=self.separate, pixel_values=shared)
        return PreferenceBatch(
            completions,
            pairs[0],
            pairs[1],
            torch.tensor([value for one in read for value in one.best]),
            torch.tensor([value for one in read for value in one.labels]),
            reference,
            other,
        )

    def places(self, number: int) -> slice:
        """Of a comparison's completions among all."""
        start = int(self.comparisons.sizes[:number].sum())
        return slice(start, start + int(self.comparisons.sizes[number]))

    def take_known(self, values: Tensor | None) -> None:
        """What a checkpoint has for `known`. Raises CheckpointError where it is not of these comparisons."""
        if values is None or values.shape != (int(self.comparisons.sizes.sum()),):
            raise CheckpointError("the checkpoint has no log-probabilities of the reference for these comparisons")
        self.known = values
