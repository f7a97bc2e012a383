"""Knowledge distillation (1503.02531): a student learns from a teacher's probabilities besides the right tokens.

The loss is (1 - alpha) · cross-entropy + alpha · T² · D(teacher ‖ student), with both distributions softened by the
temperature T; T² keeps the gradients of a softer teacher as large. D is the forward KL, the reverse KL, which does not
ask a small student to cover all that the teacher might say, or their generalised Jensen-Shannon divergence. With
`on_policy`, a share of the micro-batches are answers that the student samples itself, judged by the teacher token by
token (GKD, 2306.13649), so that a student is taught where it goes, and not only where the data went.

Teacher and student have one vocabulary. Images are each model's own affair: the teacher reads the same documents
through its own processor.

Shapes: B rows, T tokens, M supervised positions, D width of a model, V vocabulary.
"""

import dataclasses
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_gpt.alignment.losses import distillation_loss
from mm_gpt.config import check_numbers
from mm_gpt.datasets.loading.loader import Loaded
from mm_gpt.datasets.loading.packing import pack
from mm_gpt.datasets.loading.plan import Row
from mm_gpt.datasets.loading.reader import Reader, Skipped
from mm_gpt.datasets.loading.sources import IndexedSource, Unit
from mm_gpt.datasets.samples import BadRecordError
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.flops import batch_flops
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Batch, Example, Processor, collate
from mm_gpt.training.distributed import ranks, sum_over_ranks
from mm_gpt.training.language import LanguageRecipe, LanguageTask, count_targets
from mm_gpt.training.rollouts import Sampler, sampling
from mm_gpt.training.stage import ParameterGroup, Term
from mm_gpt.training.train_config import use_bf16

logger = logging.getLogger(__name__)

Divergence = Literal["forward", "reverse", "jsd"]
CHUNK = 256
"""Positions projected at a time: a tensor of 256 · 49,152 float32 numbers takes 50 MB, and there are several."""


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(LanguageRecipe):
    """A complete description of one run: that of a language run, and a teacher."""

    teacher: str = "default"
    """The name or folder of a model with the student's vocabulary. It is only read."""
    alpha: float = 0.5
    """How much the teacher counts; the right tokens count 1 - alpha. 0 is training without a teacher."""
    temperature: float = 2.0
    """T, what the logits of both are divided by."""
    divergence: Divergence = "forward"
    jsd_beta: float = 0.5
    """β of `jsd`: the mixture is β teacher + (1 - β) student."""
    teacher_vision: bool = False
    """A student from random weights begins with the teacher's vision tower, which must be of the same kind."""
    on_policy: float = 0.0
    """The share of micro-batches whose answers the student samples itself, at temperature 1. Of them it learns the
    teacher's probabilities alone."""
    max_new_tokens: int = 64
    """Of a sampled answer, its end mark included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "alpha", "on_policy", at_least=0, at_most=1)
        check_numbers(self, "temperature", above=0)
        check_numbers(self, "jsd_beta", above=0, below=1)
        check_numbers(self, "max_new_tokens", at_least=1)
        if self.on_policy and self.compile:
            raise ConfigError("on_policy answers have many lengths: compile must be off")
        if self.on_policy and not self.alpha:
            raise ConfigError("on_policy learns from the teacher alone: alpha must be above 0")
        if self.teacher_vision and (self.start is not None or self.vision_weights is not None):
            raise ConfigError("teacher_vision is for a student from random weights, without vision_weights")


# ---- the loss ----


class _ChunkedDistillation(torch.autograd.Function):
    """Like the chunked cross-entropy of `mm_gpt.model.loss`: one chunk of logits exists at a time, and its gradient is
    taken at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_logits: Callable[[slice], Tensor],
        loss_of: Callable[[Tensor, Tensor], Tensor],
        softcap: float | None,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=precise)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        is_learned = grad_hidden is not None or grad_weight is not None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            teacher = teacher_logits(rows)
            logits = F.linear(hidden[rows], weight.to(hidden.dtype)).to(precise).requires_grad_(is_learned)
            with torch.set_grad_enabled(is_learned):
                own = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                loss = loss_of(own, teacher).sum()
            total += loss.detach()
            if not is_learned:
                continue
            grad = torch.autograd.grad(loss, logits)[0].to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[rows]).to(precise)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_output.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def chunked_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_logits: Callable[[slice], Tensor],
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
) -> Tensor:
    """T² · D(teacher ‖ student), summed over the M supervised positions, in nats.

    hidden (B, T, D), weight (V, D) and labels (B, T), already shifted, are the student's; `softcap` is its decoder's
    `logit_softcap`. `teacher_logits(rows)` gives the teacher's logits (rows, V) of a slice of the M positions, in the
    order of `labels`.
    """
    if not torch.is_grad_enabled():  # autograd functions are not told, and would compute gradients for nothing
        hidden, weight = hidden.detach(), weight.detach()
    loss_of = partial(distillation_loss, temperature=temperature, kind=divergence, beta=beta)
    rows = hidden[labels != IGNORE_INDEX]
    total: Tensor = _ChunkedDistillation.apply(rows, weight, teacher_logits, loss_of, softcap)
    return total


# ---- what is read ----


@dataclass
class TaughtBatch(Batch):
    """What the student reads, and beside it what the teacher reads: the same targets, each with its own images."""

    teacher: Batch | None = None
    prompts: list[Document] = field(default_factory=list)
    """Where the student is to answer: the prompt of each row."""
    is_sampled: bool = False
    """The answers are the student's own: they are no right tokens."""

    def to(self, device: torch.device | str) -> "TaughtBatch":
        moved = super().to(device)
        assert isinstance(moved, TaughtBatch)
        return dataclasses.replace(moved, teacher=None if self.teacher is None else self.teacher.to(device))


@dataclass(frozen=True)
class Taught:
    """A document in numbers, as each of the two reads it, with the tiles of its images."""

    document: Document
    student: tuple[Example, list[Tensor]]
    teacher: tuple[Example, list[Tensor]]


class TeacherReader(Reader):
    """Nothing is hidden from a teacher."""

    def _shown(self, image: Image, seed: tuple[int, ...]) -> Image:
        return image


@dataclass
class TaughtReader(Reader):
    """Rows of a plan to micro-batches for a student and a teacher."""

    teacher: Reader = field(kw_only=True)
    on_policy: float = 0.0
    max_new_tokens: int = 0

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> Loaded:
        """What one of them cannot read is skipped and named. Where no document has a prompt to answer, the micro-batch
        is one of right tokens in any case."""
        skipped: Skipped = []
        documents = [list(self._documents(row, skipped)) for _, row in rows]
        rng = random.Random(f"on-policy/{self.seed}/{rows[0][0] if rows else 0}")
        if rng.random() < self.on_policy:
            asked = [self._prompt(document, rng, skipped) for row in documents for document in row]
            prompts = [prompt for prompt in asked if prompt is not None]
            if prompts:
                batch = self.taught([[prompt] for prompt in prompts])
                return Loaded(dataclasses.replace(batch, prompts=[prompt.document for prompt in prompts]), skipped)
        taught = []
        for (number, _), own in zip(rows, documents, strict=True):
            read = [self.both(document, skipped, (self.seed, number, n)) for n, document in enumerate(own)]
            taught.append([found for found in read if found is not None])
        return Loaded(self.taught(taught), skipped)

    def _documents(self, row: Row, skipped: Skipped) -> Iterator[Document]:
        for item in row:
            source = self.sources[item.source]
            try:
                yield source.document(item.unit)
            except (BadRecordError, MMGPTError) as error:
                reason = str(error) if isinstance(error, BadRecordError) else "unreadable"
                skipped.append((reason, f"{source.name}:{item.unit[0]}"))

    def both(self, document: Document, skipped: Skipped, seed: tuple[int, ...] | None = None) -> Taught | None:
        """A document as both read it, augmented alike by `seed`. None where one of them cannot, or where they find
        other targets in it, as with an image that one of them has left out."""
        seeds = [None if seed is None else ((*seed, n) for n in itertools.count()) for _ in range(2)]
        if (student := self.read(document, skipped, seeds[0])) is None:
            return None
        unread: Skipped = []
        if (teacher := self.teacher.read(document, unread, seeds[1])) is None:
            skipped.extend((f"{reason} (teacher)", record) for reason, record in unread)
            return None
        if not torch.equal(*(own.labels[own.labels != IGNORE_INDEX] for own in (student[0], teacher[0]))):
            skipped.append(("the teacher reads other tokens", document.id))
            return None
        return Taught(document, student, teacher)

    def _prompt(self, document: Document, rng: random.Random, skipped: Skipped) -> Taught | None:
        """What comes before the first answer, or before that of one of the branches; not augmented."""
        segments = document.segments
        if document.branches:
            segments = (*segments, *rng.choice(document.branches))
        answer = next((n for n, s in enumerate(segments) if isinstance(s, Text) and s.is_target), len(segments))
        if not answer:
            return None  # a page, which answers nothing
        prompt = self.both(Document(segments[:answer], id=document.id), skipped)
        if prompt is None:
            return None
        contexts = (self.processor.config.max_length, self.teacher.processor.config.max_length)
        for (example, _), length in zip((prompt.student, prompt.teacher), contexts, strict=True):
            if len(example) + self.max_new_tokens > length:
                skipped.append(("too long with an answer", document.id))
                return None
        return prompt

    def taught(self, rows: Sequence[Sequence[Taught]]) -> TaughtBatch:
        """Rows of documents for both."""
        own = self.batch(
            [[taught.student[0] for taught in row] for row in rows],
            [tile for row in rows for taught in row for tile in taught.student[1]],
            pad_to_multiple=self.pad_to_multiple,
        )
        teachers = self.teacher.batch(
            [[taught.teacher[0] for taught in row] for row in rows],
            [tile for row in rows for taught in row for tile in taught.teacher[1]],
        )
        return TaughtBatch(**vars(own), teacher=teachers)


# ---- the stage ----


class DistillationTask(LanguageTask):
    """A `Stage` for the loop. Validation is the student's own loss on held-out documents, which decides, and `kl`, how
    far it is from its teacher there."""

    recipe: DistillationRecipe
    shards = False

    def __init__(self, recipe: DistillationRecipe):
        """Raises ConfigError where the teacher has another vocabulary or vision tower than the student needs."""
        self.teacher, processor = load_model(recipe.teacher)
        self.teacher.merge_lora()
        self.teacher.requires_grad_(False).eval()
        model = recipe.model
        is_new = recipe.start is None and model is not None and not isinstance(model.decoder, str)
        super().__init__(recipe, processor.tokenizer if is_new and recipe.tokenizer is None else None)
        self.on_policy = recipe.on_policy > 0
        _check_vocabularies(recipe, self.processor, processor)
        if recipe.teacher_vision:
            _take_vision(self.model, self.teacher, recipe.teacher)
        plain = self.reader
        teacher = TeacherReader(self.sources, processor, recipe.augment, recipe.train.seed)
        self.reader: TaughtReader = TaughtReader(
            **vars(plain), teacher=teacher, on_policy=recipe.on_policy, max_new_tokens=recipe.max_new_tokens
        )
        self.loader.read = self.reader
        self._sampler = None
        if self.on_policy:
            if self.model.config.prefix_lm:
                raise ConfigError("on_policy needs a causal decoder, not one of prefixes")
            self._sampler = Sampler(self.model, self.processor, max_new_tokens=recipe.max_new_tokens)

    def prepare(self) -> list[ParameterGroup]:
        """As in the language stage. The teacher is only read, in bfloat16 where the student computes in it."""
        groups = super().prepare()
        self.teacher.to(self.model.device)
        if use_bf16(self.recipe.train.precision, self.model.device):
            for parameter in self.teacher.decoder.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        return groups

    def flops(self, batch: Batch) -> float:
        """With the teacher's forward pass, without what it takes to sample answers."""
        taught = batch.teacher if isinstance(batch, TaughtBatch) else None
        return super().flops(batch) + (0.0 if taught is None else batch_flops(self.teacher, taught).forward)

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[Batch]:
        """Those of the language stage; prompts among them are answered by the student as it is now."""
        batches = super().micro_batches(step, count)
        return [self._answered(batch, f"{step}/{number}") for number, batch in enumerate(batches)]

    def _answered(self, batch: Batch, place: str) -> Batch:
        """A batch of prompts with an answer to each, for both to read."""
        assert isinstance(batch, TaughtBatch)
        if not batch.prompts:
            return batch
        assert self._sampler is not None
        assert batch.teacher is not None
        device, seed = self.model.device, self.recipe.train.seed
        seeds = [random.Random(f"{seed}/{place}/{ranks()[0]}/{n}").getrandbits(32) for n in range(len(batch.prompts))]
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(self.recipe.train.precision, device)),
        ):
            with sampling(self.model):
                images = self.model.image_tokens(batch.to(device))
            samples = self._sampler(batch.prompts, 1, seeds, images=images)
        documents = [
            Document((*prompt.segments, Text("", ids=own.ids)), id=prompt.id)
            for prompt, (own,) in zip(batch.prompts, samples, strict=True)
        ]
        read, theirs = (
            collate([[processor(document)] for document in documents], pixels)
            for processor, pixels in (
                (self.processor, batch.pixel_values),
                (self.reader.teacher.processor, batch.teacher.pixel_values),
            )
        )
        return TaughtBatch(**vars(read), teacher=theirs, is_sampled=True)

    # ---- what is learned ----

    def counts(self, batch: Batch) -> dict[str, float]:
        """Of each term."""
        assert isinstance(batch, TaughtBatch)
        count = count_targets(batch)
        counts: dict[str, float] = {} if batch.is_sampled or self.recipe.alpha == 1 else {"nll": count}
        return counts | ({"kl": count} if self.recipe.alpha else {})

    def loss(self, batch: Batch) -> dict[str, Term]:
        """`nll` of the right tokens and `kl`, T² times the divergence from the teacher; what weighs nothing is not
        computed."""
        assert isinstance(batch, TaughtBatch)
        alpha, counts = self.recipe.alpha, self.counts(batch)
        if not counts:
            return {}
        if "kl" not in counts:
            return {"nll": Term(self.model.loss(batch)[0], counts["nll"], 1 - alpha)}
        hidden, terms = self.model(batch), {}
        if "nll" in counts:
            terms["nll"] = Term(self.model.decoder.loss(hidden, batch.labels)[0], counts["nll"], 1 - alpha)
        terms["kl"] = Term(self._divergence(hidden, batch), counts["kl"], alpha)
        return terms

    def _divergence(self, hidden: Tensor, batch: TaughtBatch) -> Tensor:
        """T² times the divergence from the teacher, summed over the targets."""
        decoder, teacher, recipe = self.model.decoder, self.teacher, self.recipe
        assert batch.teacher is not None
        with torch.no_grad():
            known = teacher(batch.teacher)[batch.teacher.labels != IGNORE_INDEX]  # (M, D of the teacher)
        return chunked_distillation_loss(
            hidden,
            decoder.head_weight,
            batch.labels,
            lambda rows: teacher.decoder.logits(known[rows]),
            softcap=decoder.config.logit_softcap,
            temperature=recipe.temperature,
            divergence=recipe.divergence,
            beta=recipe.jsd_beta,
        )

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Mean loss of the right tokens in nats, of all and of each source, and the mean of `kl` as it is learned."""
        divergence, count = 0.0, 0

        def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
            nonlocal divergence, count
            assert isinstance(batch, TaughtBatch)
            hidden = self.model(batch)
            divergence += self._divergence(hidden, batch).item()
            count += count_targets(batch)
            return self.model.decoder.loss(hidden, batch.labels)

        losses = self._validate(loss_of)
        divergence, learned = sum_over_ranks([divergence, float(count)], self.model.device)
        return {**losses, "kl": divergence / max(1, learned)}

    def _held_out_batches(self, held: IndexedSource) -> Iterator[Batch]:
        units = held.some(self.recipe.validation_images)
        lengths = [tokens for _, tokens in units]
        rank, world = ranks()
        for row in pack(lengths, max(self.row_length, *lengths, 1))[rank::world]:
            read = [found for i in row if (found := self._both_held_out(held, units[i][0])) is not None]
            yield self.reader.taught([read])

    def _both_held_out(self, held: IndexedSource, unit: Unit) -> Taught | None:
        skipped: Skipped = []
        try:
            read = self.reader.both(held.document(unit), skipped)
        except (BadRecordError, MMGPTError) as error:
            read, skipped = None, [(str(error), str(unit[0]))]
        for reason, record in skipped:
            logger.warning("not validated on %s:%s: %s", held.name, record, reason)
        return read


def _check_vocabularies(recipe: DistillationRecipe, student: Processor, teacher: Processor) -> None:
    own, theirs = student.tokenizer.backend.get_vocab(), teacher.tokenizer.backend.get_vocab()
    if own != theirs or student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"the student ({recipe.start or 'from random weights'}) has {student.vocab_size} ids and the teacher "
            f"({recipe.teacher}) {teacher.vocab_size}"
            + (", of other tokens" if student.vocab_size == teacher.vocab_size else "")
            + ": probabilities can be learned only of the same vocabulary"
        )


def _take_vision(student: MMGPT, teacher: MMGPT, name: str) -> None:
    """The weights of the teacher's tower."""
    towers = [None if model.vision is None else model.vision for model in (student, teacher)]
    if towers[0] is None or towers[1] is None:
        raise ConfigError(f"teacher_vision needs a student and a teacher ({name}) with vision towers")
    own, theirs = (dataclasses.replace(tower.config, concepts=None) for tower in towers if tower is not None)
    if own != theirs:
        raise ConfigError(
            f"teacher_vision: the student's tower is {own.model_name} at {own.image_size} pixels, that of the teacher "
            f"({name}) {theirs.model_name} at {theirs.image_size}"
        )
    towers[0].tower.load_state_dict(towers[1].tower.state_dict())
