"""Training of a reward model on comparisons, as InstructGPT does it (2203.02155, 2009.01325).

All completions of a prompt are scored in one batch, each in one forward, and all their pairs are learned: the loss of a
prompt is the mean over its C(K, 2) pairs of -log σ(better - worse - margin), and each prompt counts once. Apart, each
completion would be learned K - 1 times.

Shapes: C completions of all prompts of a batch, N pairs, P prompts.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm_gpt.alignment.completions import CompletionBatch, completion_batch, shares_prompts
from mm_gpt.alignment.losses import centering_loss, comparison_pairs, pairwise_loss
from mm_gpt.alignment.reward_model import (
    RewardModel,
    count_unusable,
    fitting_documents,
    load_head,
    reward_folder,
    save_reward_model,
    score_comparisons,
)
from mm_gpt.alignment.reward_report import NOTHING_BETTER, Judged, RewardReport, judge, write_report
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparison, Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Document
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.distributed import ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.language import LanguageRecipe, build_model, prepare_language
from mm_gpt.training.stage import Decides, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig, use_bf16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """A complete description of one run. An epoch shows every prompt once, with all its completions."""

    train: TrainConfig
    start: str
    """The name or folder of the model that gets the head: the one that writes the answers, usually. A reward model goes
    on with the head that it has."""
    sources: tuple[SourceConfig, ...]
    """Prompts with completions of which some are better than others."""
    validation: tuple[SourceConfig, ...] = ()
    holdout: float = 0.0
    """Without `validation` sources: the share of the prompts that is kept from training to validate on."""
    validation_comparisons: int = 200
    demonstrations: tuple[SourceConfig, ...] = ()
    """Prompts with the answers whose mean score is to be 0; none: the preferred answers of the training prompts."""
    centre_on: int = 128
    """How many of them, for each model that is saved. 0: the bias stays as it is learned."""
    centring: float = 0.0
    """Of (better + worse)², which holds the scores around 0 while they are learned; TRL's 0.01."""
    lora: LoRAConfig | None = None
    """Low-rank adaptation for the decoder of `start`, where it has none and `decoder` is not "full"."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; else its low-rank adaptation alone is trained."""
    train_connector: bool = True
    vision_blocks: int | None = 0
    """How many of the vision tower's last blocks are trained; None trains the whole tower."""
    connector_lr: float = 1.0
    vision_lr: float = 0.1
    head_lr: float = 1.0
    """Learning rates as multiples of `train.lr`."""
    comparisons: int = 4
    """Prompts of a rank in a micro-batch."""
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", at_least=0, below=1)
        if bool(self.validation) == bool(self.holdout):
            raise ConfigError("give either validation sources or a holdout above 0 and below 1")
        if not self.sources:
            raise ConfigError("give sources of comparisons")
        check_numbers(self, "comparisons", "validation_comparisons", at_least=1)
        check_numbers(self, "centre_on", "centring", "vision_blocks", at_least=0)
        check_numbers(self, "connector_lr", "vision_lr", "head_lr", at_least=0)
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for comparisons")

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        return LanguageRecipe(**shared, model=None, image=None)


@dataclass
class RewardBatch:
    """Prompts with all their completions, and the pairs of these."""

    completions: CompletionBatch
    better: Tensor  # (N,) of each pair the better completion's number in the batch
    worse: Tensor  # (N,)
    margins: Tensor  # (N,)
    weights: Tensor  # (N,) 1 over the pairs of its prompt
    prompts: int

    def to(self, device: torch.device | str) -> "RewardBatch":
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "prompts"}
        return dataclasses.replace(self, **moved)

    @classmethod
    def of(cls, comparisons: Sequence[Comparison], completions: CompletionBatch) -> "RewardBatch":
        """`completions` are those of the comparisons, in order."""
        better, worse, margins, weights = [], [], [], []
        sizes = [len(comparison.completions) for comparison in comparisons]
        assert sum(sizes) == len(completions)
        for comparison, first in zip(comparisons, itertools.accumulate(sizes, initial=0), strict=False):
            above, below = comparison_pairs([completion.rank for completion in comparison.completions])
            better.append(above + first)
            worse.append(below + first)
            margins.append(torch.full((len(above),), comparison.margin or 0.0))
            weights.append(torch.full((len(above),), 1 / len(above)))
        return cls(
            completions=completions,
            better=torch.cat(better),
            worse=torch.cat(worse),
            margins=torch.cat(margins),
            weights=torch.cat(weights),
            prompts=len(comparisons),
        )


@dataclass(frozen=True)
class _Read:
    """A comparison that can be learned."""

    number: int
    comparison: Comparison
    documents: list[Document]


class RewardTask:
    """A `Stage` for the loop. What is read follows from the number of the step and the seed."""

    on_policy = False
    decides = Decides("accuracy", higher_is_better=True)

    def __init__(self, recipe: RewardRecipe):
        """Raises MMGPTError without comparisons to train and to validate on, and what loading the model does."""
        self.recipe = recipe
        self.errors = ErrorCounter()
        self.comparisons, self.held_out = self._open()
        self.demonstrations: Comparisons | None = None
        if recipe.demonstrations:
            self.demonstrations = Comparisons.open(recipe.demonstrations, Path(recipe.data), self.errors)
        self._language = recipe.language()
        if (folder := reward_folder(recipe.start)) is not None:
            self._language = dataclasses.replace(self._language, start=str(folder))
        language, self.processor = build_model(self._language, None)
        self.model = RewardModel(language)
        if folder is not None:
            load_head(self.model, folder)
        self._separate = not shares_prompts(language)
        self._check_held_out()
        self._unusable: set[int] = set()
        self._frozen: dict[str, Tensor] = {}
        # What is known of the weights as they are; a step makes it void.
        self._shift: tuple[float, int] | None = None
        self._judged: tuple[RewardReport, list[Judged]] | None = None
        self._findings: tuple[str, ...] = ()
        if self.errors.total:
            logger.warning(self.errors.summary())

    def _open(self) -> tuple[Comparisons, Comparisons]:
        recipe, folder = self.recipe, Path(self.recipe.data)
        found = _with_pairs(Comparisons.open(recipe.sources, folder, self.errors), self.errors)
        if recipe.validation:
            held_out = _with_pairs(Comparisons.open(recipe.validation, folder, self.errors), self.errors)
        else:
            found, held_out = found.split(recipe.holdout, recipe.train.seed)
        for what, comparisons in (("train", found), ("validate", held_out)):
            if not len(comparisons):
                raise MMGPTError(f"{folder}: no comparison to {what} on ({self.errors.summary()})")
        order = epoch_order(len(held_out), recipe.train.seed, 0)
        return found, held_out.only(sorted(order[: recipe.validation_comparisons]))

    def _check_held_out(self) -> None:
        """That there is something to judge by: known now, not after the steps before the first validation."""
        errors = ErrorCounter(max_examples=0)
        for number in range(len(self.held_out)):
            try:
                comparison = self.held_out[number]
                fitting_documents(self.processor, comparison, separate=self._separate)
                if len({completion.rank for completion in comparison.completions}) > 1:
                    return
                errors.add(NOTHING_BETTER, comparison.key)
            except BadRecordError as error:
                errors.add(str(error), f"comparison {number}")
            except MMGPTError as error:
                count_unusable(errors, Comparison(f"comparison {number}", ()), error)
        raise MMGPTError(f"none of {len(self.held_out)} comparisons to validate on can be used: {errors.summary()}")

    def prepare(self) -> list[ParameterGroup]:
        groups, self._frozen = prepare_language(self.model.model, self._language)
        return [*groups, ParameterGroup("head", list(self.model.head.parameters()), self.recipe.head_lr)]

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[RewardBatch]:
        rank, world = ranks()
        size = self.recipe.comparisons
        firsts = [(number * world + rank) * size for number in range(step * count, (step + 1) * count)]
        return [self._batch(range(first, first + size)) for first in firsts]

    def _batch(self, places: Iterable[int]) -> RewardBatch:
        """The comparisons at these places of the epochs. One whose images cannot be read is replaced by another."""
        while True:
            read = [self._read(place) for place in places]
            try:
                completions = self._completions(read)
            except MMGPTError:
                if not self._find_unusable(read):
                    raise
                continue
            return RewardBatch.of([each.comparison for each in read], completions)

    def _completions(self, read: Sequence[_Read]) -> CompletionBatch:
        documents = [document for each in read for document in each.documents]
        return completion_batch(self.processor, documents, separate=self._separate)

    def _find_unusable(self, read: Sequence[_Read]) -> bool:
        """Whether any of these cannot be read even alone: they are counted and not asked for again."""
        before = len(self._unusable)
        for each in {each.number: each for each in read}.values():
            try:
                self._completions([each])
            except MMGPTError as error:
                self._unusable.add(each.number)
                count_unusable(self.errors, each.comparison, error)
        return len(self._unusable) > before

    def _read(self, place: int) -> _Read:
        """The comparison at a place of the epochs; the next one of the epoch where that one cannot be learned."""
        count = len(self.comparisons)
        epoch, at = divmod(place, count)
        order = epoch_order(count, self.recipe.train.seed, epoch)
        for number in (order[(at + more) % count] for more in range(count)):
            if number in self._unusable:
                continue
            key = f"comparison {number}"
            try:
                comparison = self.comparisons[number]
                key = comparison.key
                if len({completion.rank for completion in comparison.completions}) < 2:
                    raise BadRecordError(NOTHING_BETTER)
                documents = fitting_documents(self.processor, comparison, separate=self._separate)
                return _Read(number, comparison, documents)
            except BadRecordError as error:
                self.errors.add(str(error), key)
            except MMGPTError as error:
                count_unusable(self.errors, Comparison(key, ()), error)
            self._unusable.add(number)
        raise MMGPTError(f"none of {count} comparisons can be learned: {self.errors.summary()}")

    def data_state(self, step: int) -> dict[str, Any]:
        return {"comparisons": self.comparisons.digest}

    def load_data_state(self, state: dict[str, Any]) -> None:
        if state != self.data_state(0):
            raise MMGPTError("the comparisons are no longer those that the run began with")

    # ---- what is learned ----

    def counts(self, batch: RewardBatch) -> dict[str, float]:
        counts: dict[str, float] = {"pairwise": batch.prompts}
        return counts | ({"centring": batch.prompts} if self.recipe.centring else {})

    def loss(self, batch: RewardBatch) -> dict[str, Term]:
        self._shift = self._judged = None
        scores = self.model.scores(batch.completions)  # (C,)
        better, worse = scores[batch.better], scores[batch.worse]  # (N,)
        mean = lambda values, weight: Term((batch.weights * values).sum(), batch.prompts, weight)  # noqa: E731
        terms = {"pairwise": mean(pairwise_loss(better, worse, batch.margins), 1.0)}
        if self.recipe.centring:
            terms["centring"] = mean(centering_loss(better, worse), self.recipe.centring)
        better, worse = better.detach(), worse.detach()
        right = ((better - worse).sign() + 1) / 2
        return terms | {
            "rewards/chosen": mean(better, 0.0),
            "rewards/rejected": mean(worse, 0.0),
            "rewards/margins": mean(better - worse, 0.0),
            "rewards/accuracies": mean(right, 0.0),
        }

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """The numbers of a `RewardReport` on held-out prompts; `accuracy` decides."""
        errors = ErrorCounter(max_examples=0) if self._findings else self.errors  # what is skipped is said once
        report, judged = judge(self.model, self.processor, self.held_out, errors, seed=self.recipe.train.seed)
        for finding in report.findings:
            if finding not in self._findings:
                logger.warning("%s", finding)
        self._findings = report.findings
        self._judged = report, judged
        return report.values()

    def samples(self) -> list[str]:
        """The scores of a few held-out prompts, best answers first."""
        if self._judged is None:
            return []
        lines = []
        for each in self._judged[1][:4]:
            order = np.argsort(each.facts.ranks, kind="stable")
            scores = ", ".join(f"{each.scores[at]:.3f}" for at in order)
            lines.append(f"{self.held_out[each.facts.number].key}, best answer first: {scores}")
        return lines

    def save(self, folder: Path) -> None:
        """The model, centred, and the report of these very weights where they have been judged."""
        shift, centred_on = self._centre()
        save_reward_model(self.model, self.processor, folder, frozen=self._frozen, shift=shift, centred_on=centred_on)
        if self._judged is not None:
            write_report(*self._judged, folder)

    def _centre(self) -> tuple[float, int]:
        """What is to be added to the bias so that demonstrations have a mean score of 0, and how many these were."""
        if not self.recipe.centre_on:
            return 0.0, 0
        if self._shift is None:
            device = self.model.device
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(self.recipe.train.precision, device)):
                asked, errors = self._preferred(), ErrorCounter(max_examples=0)
                scored = score_comparisons(self.model, self.processor, asked, errors)
                scores = [score for found in scored for score in found.scores if score is not None]
            self._shift = (-float(np.mean(scores)), len(scores)) if scores else (0.0, 0)
        return self._shift

    def _preferred(self) -> Iterator[Comparison]:
        """Prompts with their best answers alone, up to `centre_on` of them, the same ones each time."""
        chosen = self.comparisons if self.demonstrations is None else self.demonstrations
        for number in epoch_order(len(chosen), self.recipe.train.seed, 0)[: self.recipe.centre_on]:
            try:
                comparison = chosen[number]
            except (BadRecordError, MMGPTError):
                continue
            best = min((completion.rank for completion in comparison.completions), default=0)
            preferred = tuple(completion for completion in comparison.completions if completion.rank == best)
            yield dataclasses.replace(comparison, completions=preferred)


def _with_pairs(comparisons: Comparisons, errors: ErrorCounter) -> Comparisons:
    """Those with at least two completions."""
    for number in np.flatnonzero(comparisons.sizes < 2).tolist():
        errors.add("fewer than two completions", f"comparison {number}")
    return comparisons.only(np.flatnonzero(comparisons.sizes >= 2))
