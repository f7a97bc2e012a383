"""Learning from preferences without a reward model: DPO (2305.18290), its relatives, and KTO (2402.01306), with images.

The answers to one prompt are branches of one row: prompt and images are read once for all of them. Of an answer counts
the sum of its tokens' log-probabilities, under the policy and under the reference that it began as; a loss compares the
two answers of a pair by them. Of K ranked answers all pairs are learned. KTO takes single answers, labelled good or
bad, and judges them against how far the policy has moved on answers that belong to other prompts.

Dropout is off: a pair would be compared by two different models, and the first loss would not be ln 2.

Shapes: B rows, T tokens, C completions, N pairs.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm_gpt.alignment.completions import (
    CompletionBatch,
    completion_lengths,
    completion_sums,
    logprobs_and_entropy,
    prompt_document,
    shares_prompts,
)
from mm_gpt.alignment.losses import (
    BY_LENGTH,
    PREFERENCE_KINDS,
    check_preference_kind,
    kto_loss,
    preference_loss,
)
from mm_gpt.alignment.preference_batches import PreferenceBatch, PreferenceReader
from mm_gpt.alignment.reference import Reference
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name
from mm_gpt.hub.checkpoint import save_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.distributed import ranks, sum_over_ranks
from mm_gpt.training.language import LanguageRecipe, build_model, prepare_language
from mm_gpt.training.rollouts import sampling
from mm_gpt.training.stage import LOWEST_LOSS, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig, use_bf16

logger = logging.getLogger(__name__)
KTO = "kto"
NO_REFERENCE = ("simpo",)
"""The kinds that look at the policy alone."""
SAMPLES = 4
"""Answers that are logged with each validation."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """One of the losses that are learned together."""

    kind: str
    """One of `mm_gpt.alignment.losses.PREFERENCE_KINDS`, or `kto`, which learns from labels and stands alone."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "weight", above=0)
        if self.kind != KTO and self.kind not in PREFERENCE_KINDS:
            raise ConfigError(unknown_name("preference loss", self.kind, [*PREFERENCE_KINDS, KTO]))


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """A complete description of one run. An epoch shows each comparison once."""

    train: TrainConfig
    start: str
    """The name or folder of the model that is aligned: the first policy, and the reference."""
    sources: tuple[SourceConfig, ...]
    """Comparisons: pairs, ranked answers, or for `kto` single answers with labels; of ranked ones it takes the best to
    be good and the others to be bad."""
    validation: tuple[SourceConfig, ...] = ()
    holdout: float = 0.0
    """Without `validation` sources: the share of the comparisons that is kept from training to validate on."""
    validation_comparisons: int = 200
    losses: tuple[PreferenceLoss, ...] = (PreferenceLoss(kind="sigmoid"),)
    """`sigmoid` is DPO; several are added up by their weights."""
    beta: float = 0.1
    """How closely the policy is held to the reference."""
    label_smoothing: float = 0.0
    """The share of pairs that is taken to be the wrong way round, for the kinds that know of it."""
    gamma: float = 0.0
    """Of `simpo`: the margin that the chosen answer is to win by, times beta."""
    sft_weight: float = 0.0
    """Of the chosen answers' own loss (nats a token), which keeps them likely (RPO, 2404.19733)."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    """Of `kto`: what good and bad answers weigh. Where one kind is rarer, the paper has weight x number within 1 to 4/3
    of each other."""
    reference: Literal["model", "precomputed", "stored"] = "model"
    """`model`: the policy as it began, computed in each step. `precomputed`: once, before the first step, and kept with
    the checkpoints. `stored`: as the rows have them (`ref_chosen_logps` and the like)."""
    use_dropout: bool = False
    """The model's own dropout in training, in the policy."""
    batch_size: int = 4
    """Comparisons of a rank in a micro-batch."""
    lora: LoRAConfig | None = None
    """Low-rank adaptation for the decoder of `start`, where it has none and `decoder` is not "full"."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; else its low-rank adaptation alone is trained."""
    train_connector: bool = False
    connector_lr: float = 1.0
    """Learning rate as a multiple of `train.lr`."""
    vision_blocks: int | None = 0
    """How many of the vision tower's last blocks are trained; None trains the whole tower."""
    vision_lr: float = 0.1
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", at_least=0, below=1)
        if bool(self.validation) == bool(self.holdout):
            raise ConfigError("give either validation sources or a holdout above 0 and below 1")
        if not self.sources:
            raise ConfigError("give sources of comparisons")
        check_numbers(self, "validation_comparisons", "batch_size", at_least=1)
        check_numbers(self, "vision_blocks", "connector_lr", "vision_lr", "sft_weight", at_least=0)
        check_numbers(self, "desirable_weight", "undesirable_weight", "gamma", at_least=0)
        check_numbers(self, "beta", above=0)
        kinds = [loss.kind for loss in self.losses]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ConfigError(f"give each loss once: {', '.join(kinds) or 'none was given'}")
        if KTO in kinds:
            if len(kinds) > 1:
                raise ConfigError("kto learns from single answers: it does not go with losses of pairs")
            if self.label_smoothing or self.gamma:
                raise ConfigError("kto has neither label_smoothing nor gamma")
            if self.reference != "model":
                raise ConfigError("kto needs the reference on answers to other prompts: reference must be model")
        elif self.desirable_weight != 1 or self.undesirable_weight != 1:
            raise ConfigError("desirable_weight and undesirable_weight are of kto")
        else:
            for kind in kinds:
                check_preference_kind(kind, beta=self.beta, label_smoothing=self.label_smoothing, gamma=self.gamma)
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for comparisons")

    @property
    def is_kto(self) -> bool:
        return self.losses[0].kind == KTO

    @property
    def needs_reference(self) -> bool:
        return any(loss.kind not in NO_REFERENCE for loss in self.losses)

    @property
    def by_length(self) -> bool:
        """Rewards are those of a token: the first loss compares averages."""
        return self.losses[0].kind in BY_LENGTH

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        return LanguageRecipe(**shared, model=None, image=None)


# ---- what is learned ----


@dataclass(frozen=True)
class Answers:
    """What the losses look at, of the completions of one or several batches."""

    logps: Tensor  # (C,) summed log-probabilities of the policy, in nats
    reference: Tensor | None  # (C,) of the reference
    lengths: Tensor  # (C,) tokens
    entropy: Tensor  # (C,) summed over the tokens, in nats
    better: Tensor  # (N,)
    worse: Tensor  # (N,)
    best: Tensor  # (C,) bool
    labels: Tensor  # (C,) bool

    @classmethod
    def together(cls, parts: Sequence["Answers"]) -> "Answers":
        """As if they had been one batch."""
        joined: dict[str, Any] = {}
        for name in ("logps", "reference", "lengths", "entropy", "best", "labels"):
            values = [getattr(part, name) for part in parts]
            joined[name] = None if values[0] is None else torch.cat(values)
        starts = torch.tensor([0, *(len(part.logps) for part in parts)]).cumsum(0).tolist()
        for name in ("better", "worse"):
            joined[name] = torch.cat([getattr(p, name) + start for p, start in zip(parts, starts, strict=False)])
        return cls(**joined)


class PreferenceTask:
    """A `Stage` for the loop. Comparisons follow from the number of the step and the seed. The loss on held-out ones
    decides."""

    decides = LOWEST_LOSS

    def __init__(self, recipe: PreferenceRecipe):
        """Raises MMGPTError without comparisons to train and to validate on."""
        self.recipe = recipe
        self.on_policy = recipe.is_kto  # its zero point is that of the weights before each step
        self.errors = ErrorCounter()
        self._language = recipe.language()
        self.model, self.processor = build_model(self._language, None)
        self.rows, self.held = (self._reader(comparisons) for comparisons in self._open())
        self.reference: Reference | None = None
        self._frozen: dict[str, Tensor] = {}
        if self.errors.total:
            logger.warning(self.errors.summary())

    def _open(self) -> tuple[Comparisons, Comparisons]:
        recipe, folder = self.recipe, Path(self.recipe.data)
        rows = Comparisons.open(recipe.sources, folder, self.errors)
        if recipe.validation:
            held = Comparisons.open(recipe.validation, folder, self.errors)
        else:
            rows, held = rows.split(recipe.holdout, recipe.train.seed)
        count = min(len(held), recipe.validation_comparisons)
        return rows, held.only([n * len(held) // count for n in range(count)])

    def _reader(self, comparisons: Comparisons) -> PreferenceReader:
        recipe = self.recipe
        return PreferenceReader(
            comparisons,
            self.processor,
            self.errors,
            separate=not shares_prompts(self.model),
            labelled=recipe.is_kto,
            stored=recipe.reference == "stored" and recipe.needs_reference,
        )

    # ---- what is trained ----

    def prepare(self) -> list[ParameterGroup]:
        """Freeze and cast what the recipe says, and keep what the reference needs."""
        groups, self._frozen = prepare_language(self.model, self._language)
        if not any(parameter.requires_grad for group in groups for parameter in group.parameters):
            raise ConfigError("nothing is trained: give lora.rank and lora.alpha, or decoder=full")
        if self.recipe.needs_reference and self.recipe.reference == "model":
            self.reference = Reference(self.model)
        return groups

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[PreferenceBatch]:
        if self._is_precomputed and self.rows.known is None:
            self._precompute()
        (rank, world), recipe = ranks(), self.recipe
        batches = []
        for number in range(step * count, (step + 1) * count):
            first = (number * world + rank) * recipe.batch_size
            places = range(first, first + recipe.batch_size)
            batches.append(self.rows.batch([self.rows.at(place, recipe.train.seed) for place in places]))
        return self._with_zero_point(batches) if recipe.is_kto else batches

    def data_state(self, step: int) -> dict[str, Any]:
        return {"comparisons": self.rows.comparisons.digest, "held out": self.held.comparisons.digest}

    def load_data_state(self, state: dict[str, Any]) -> None:
        if state != self.data_state(0):
            raise MMGPTError("the comparisons are no longer those that the run began with")

    # ---- the reference ----

    @property
    def _is_precomputed(self) -> bool:
        return self.recipe.reference == "precomputed" and self.recipe.needs_reference

    def _precompute(self) -> None:
        """The log-probabilities of all completions under the model as it is, each rank its share of them."""
        (rank, world), size = ranks(), self.recipe.batch_size
        for reader in (self.rows, self.held):
            found = torch.zeros(int(reader.comparisons.sizes.sum()))
            mine = range(rank, len(reader), world)
            for first in range(0, len(mine), size):
                read = [one for number in mine[first : first + size] if (one := reader.read(number)) is not None]
                if not read:
                    continue
                completions = reader.batch(read).completions.to(self.model.device)
                with torch.no_grad(), self._precision(), sampling(self.model):
                    logps = completion_sums(self._logprobs(completions)[0], completions).cpu()
                for one, own in zip(read, logps.split([len(one.best) for one in read]), strict=True):
                    found[reader.places(one.number)] = own
            reader.known = torch.tensor(sum_over_ranks(found.tolist(), self.model.device), dtype=torch.float32)

    def state_tensors(self) -> dict[str, Tensor]:
        """The precomputed log-probabilities: the weights that they are of are gone."""
        known = {"reference.rows": self.rows.known, "reference.held": self.held.known}
        return {name: values for name, values in known.items() if values is not None}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self._is_precomputed:
            self.rows.take_known(tensors.get("reference.rows"))
            self.held.take_known(tensors.get("reference.held"))

    # ---- what is learned ----

    def _precision(self) -> torch.autocast:
        """As in a step of the loop."""
        device = self.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=use_bf16(self.recipe.train.precision, self.model.device))

    def _logprobs(self, completions: CompletionBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of the model as it is now."""
        return logprobs_and_entropy(self.model, completions.batch)

    def _answers(self, batch: PreferenceBatch) -> Answers:
        completions, reference = batch.completions, batch.reference
        if reference is None and self.reference is not None:
            with self.reference.active():
                reference = completion_sums(self._logprobs(completions)[0], completions)
        with nullcontext() if self.recipe.use_dropout else sampling(self.model):
            logprobs, entropy = self._logprobs(completions)
        return Answers(
            completion_sums(logprobs, completions),
            reference,
            completion_lengths(completions),
            completion_sums(entropy, completions),
            batch.better,
            batch.worse,
            batch.best,
            batch.labels,
        )

    def counts(self, batch: PreferenceBatch) -> dict[str, float]:
        number = len(batch.labels) if self.recipe.is_kto else len(batch.better)
        counts: dict[str, float] = {f"loss/{loss.kind}": number for loss in self.recipe.losses}
        if self.recipe.sft_weight:
            chosen = batch.labels if self.recipe.is_kto else batch.best
            counts["nll"] = int(completion_lengths(batch.completions)[chosen].sum())
        return counts

    def loss(self, batch: PreferenceBatch) -> dict[str, Term]:
        """The losses of pairs (or answers), and gauges by TRL's names: `rewards/chosen`, `rewards/rejected`,
        `rewards/margins`, `rewards/accuracies`, `logps/chosen`, `logps/rejected`, `entropy`."""
        answers = self._answers(batch)
        return self._kto_terms(answers, batch.kl) if self.recipe.is_kto else self._pair_terms(answers)

    def _pair_terms(self, answers: Answers) -> dict[str, Term]:
        recipe, (better, worse) = self.recipe, (answers.better, answers.worse)
        policy, reference, lengths = answers.logps, answers.reference, answers.lengths
        terms = {}
        for loss in recipe.losses:
            each = preference_loss(
                loss.kind,
                policy[better],
                policy[worse],
                None if reference is None else reference[better],
                None if reference is None else reference[worse],
                beta=recipe.beta,
                label_smoothing=recipe.label_smoothing,
                chosen_lengths=lengths[better],
                rejected_lengths=lengths[worse],
                gamma=recipe.gamma,
            )
            terms[f"loss/{loss.kind}"] = Term(each.sum(), len(better), loss.weight)
        rewards = self._rewards(answers)
        chosen, rejected = rewards[better], rewards[worse]
        gauges = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen),
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy[better].detach(),
            "logps/rejected": policy[worse].detach(),
        }
        return terms | _gauges(gauges) | self._more(answers, answers.best)

    def _kto_terms(self, answers: Answers, kl: float) -> dict[str, Term]:
        recipe, labels = self.recipe, answers.labels
        assert answers.reference is not None
        each = kto_loss(
            answers.logps,
            answers.reference,
            labels,
            kl,
            beta=recipe.beta,
            desirable_weight=recipe.desirable_weight,
            undesirable_weight=recipe.undesirable_weight,
        )
        rewards, policy = self._rewards(answers), answers.logps.detach()
        gauges = {
            "rewards/chosen": rewards[labels],
            "rewards/rejected": rewards[~labels],
            "logps/chosen": policy[labels],
            "logps/rejected": policy[~labels],
            "kl": policy.new_tensor([kl]),
        }
        return (
            {"loss/kto": Term(each.sum(), len(labels), recipe.losses[0].weight)}
            | _gauges(gauges)
            | self._more(answers, labels)
        )

    def _rewards(self, answers: Answers) -> Tensor:
        """beta times the log-ratio of each completion (C,), of a token where averages are compared."""
        ratio = answers.logps.detach()
        if self.recipe.losses[0].kind not in NO_REFERENCE and answers.reference is not None:
            ratio = ratio - answers.reference
        return self.recipe.beta * (ratio / answers.lengths if self.recipe.by_length else ratio)

    def _more(self, answers: Answers, chosen: Tensor) -> dict[str, Term]:
        """What chosen answers cost by themselves, and the entropy of a token."""
        terms = {"entropy": Term(answers.entropy.sum(), float(answers.lengths.sum()), 0.0)}
        if self.recipe.sft_weight:
            nats = -answers.logps[chosen].sum()
            terms["nll"] = Term(nats, float(answers.lengths[chosen].sum()), self.recipe.sft_weight)
        return terms

    @torch.no_grad()
    def _movement(self, batch: PreferenceBatch) -> Tensor:
        """log policy - log reference of the answers that belong to other prompts (C',)."""
        assert batch.other is not None
        assert self.reference is not None
        other = batch.other.to(self.model.device)
        with self._precision():
            with sampling(self.model):
                policy = completion_sums(self._logprobs(other)[0], other)
            with self.reference.active():
                return policy - completion_sums(self._logprobs(other)[0], other)

    def _with_zero_point(self, batches: Sequence[PreferenceBatch]) -> list[PreferenceBatch]:
        """With the mean movement over all of a step's batches and ranks, which is never below 0."""
        moved = torch.cat([self._movement(batch) for batch in batches])
        total, count = sum_over_ranks([float(moved.sum()), float(len(moved))], self.model.device)
        return [dataclasses.replace(batch, kl=max(0.0, total / count)) for batch in batches]

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """On held-out comparisons: the loss as it is learned, each of its parts, and the gauges of `loss`."""
        device = self.model.device
        found, moved = [], []
        for batch in self._held_out_batches():
            batch = batch.to(device)
            found.append(self._answers(batch))
            if self.recipe.is_kto:
                moved.append(self._movement(batch))
        if not found:
            raise MMGPTError(f"no held-out comparison can be judged by: {self.errors.summary()}")
        answers = Answers.together(found)
        if self.recipe.is_kto:
            terms = self._kto_terms(answers, max(0.0, float(torch.cat(moved).mean())))
        else:
            terms = self._pair_terms(answers)
        means = {name: float(term.total) / term.count for name, term in terms.items() if term.count}
        if self.recipe.is_kto and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return {"loss": sum(term.weight * means.get(name, 0.0) for name, term in terms.items()), **means}

    def _held_out_batches(self) -> Iterator[PreferenceBatch]:
        """The same ones each time, with no more images in memory than those of a batch."""
        order = range(len(self.held))
        for first in range(0, len(order), self.recipe.batch_size):
            numbers = order[first : first + self.recipe.batch_size]
            read = [one for number in numbers if (one := self.held.read(number)) is not None]
            if self.recipe.is_kto:
                read = [more for one in read if (more := self.held.with_other(one, order)) is not None]
            if read:
                yield self.held.batch(read)

    def samples(self) -> list[str]:
        """Greedy answers to the first held-out prompts."""
        from mm_gpt.inference.engine import Engine
        from mm_gpt.inference.generation import GenerationConfig

        keys, documents = [], []
        for number in range(min(SAMPLES, len(self.held))):
            if self.held.read(number) is not None:
                comparison = self.held.comparisons[number]
                keys.append(comparison.key)
                documents.append(prompt_document(self.processor, comparison))
        if not documents:
            return []
        with sampling(self.model):
            engine = Engine(self.model, self.processor)
            answers = engine.generate(documents, GenerationConfig(max_new_tokens=48))
        return [f"{key}: {answer.text}" for key, answer in zip(keys, answers, strict=True)]

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder, frozen=self._frozen)


def _gauges(values: dict[str, Tensor]) -> dict[str, Term]:
    return {name: Term(each.sum(), len(each), 0.0) for name, each in values.items()}
