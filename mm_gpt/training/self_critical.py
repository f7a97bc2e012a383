"""Self-critical sequence training (1612.00563): a captioner learns from the CIDEr-D of captions that it samples itself.

Of each photo the model samples k captions. A caption's advantage is its reward less the mean reward of the other
samples of its photo (2003.09971), and its log-probability is raised or lowered by so much: the policy gradient of the
expected reward. The end of a caption is sampled and rewarded like its words, as a word of its own behind the last one:
without it captions learn to end in "on a", since n-grams that stop in the middle of a phrase are matched all the same.

Shapes: P photos, k samples of each, R = P k captions, T tokens, V vocabulary.
"""

import dataclasses
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm_gpt.config import check_numbers
from mm_gpt.datasets.loading.draws import RecordSampling, draw_documents
from mm_gpt.datasets.loading.index import RECORD, Table
from mm_gpt.datasets.loading.sources import SourceConfig, StoredRecords
from mm_gpt.datasets.samples import BadRecordError, Record
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.eval.metrics.captions import (
    CiderD,
    Ngram,
    bleu,
    bleu_counts,
    bleu_from_counts,
    cider_d,
    ngram_counts,
)
from mm_gpt.eval.metrics.tokenize import ptb_tokenize
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.loss import next_token_loss
from mm_gpt.model.mmgpt import ImageFeatures
from mm_gpt.processor import IGNORE_INDEX, Batch, Example, collate
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.training.distributed import ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.rollouts import Sampler
from mm_gpt.training.stage import Term
from mm_gpt.training.train_config import TrainConfig

logger = logging.getLogger(__name__)

END = "\n"
"""The word that stands for a caption's end. No caption holds it: words are divided at spaces."""
VALIDATION_PHOTOS = 16
"""Photos that are described side by side in validation."""


@dataclass(frozen=True, kw_only=True)
class SelfCriticalRecipe:
    """A complete description of one run. An epoch shows every captioned photo once; the vision tower is frozen."""

    train: TrainConfig
    start: str
    """The name or folder of a model that can describe photos already: what it never says is never rewarded."""
    sources: tuple[SourceConfig, ...]
    """Captioned photos; what else the sources hold is left out."""
    validation: tuple[SourceConfig, ...] = ()
    holdout: float = 0.0
    """Without `validation` sources: the share of each training source that is kept from training to validate on."""
    photos: int = 8
    """In a micro-batch."""
    samples: int = 5
    """Captions that are sampled of each photo, at temperature 1; at least 2, since each is judged by the others."""
    max_new_tokens: int = 24
    """Of a sampled caption, its end mark included. One that is longer is cut off, and has no end to be rewarded for."""
    bleu_weight: float = 0.0
    """The reward is CIDEr-D (0..10) and so many times BLEU-4 (0..1)."""
    end_mark: bool = True
    """A caption's end is a word of its n-grams. False: as in the paper, whose captions may end in the middle."""
    nll_weight: float = 0.1
    """The photo's own captions are learned as well, each like a sample with this advantage. 0: they are not."""
    max_captions: int = 5
    """Of the photo's own captions that are learned so; all of them are references of the reward."""
    lora: LoRAConfig | None = None
    """Low-rank adaptation for the decoder of `start`, where it has none and `decoder` is not "full"."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; else its low-rank adaptation alone is trained."""
    train_connector: bool = True
    connector_lr: float = 1.0
    """Learning rate as a multiple of `train.lr`."""
    augment: bool = True
    """The mirror image half the time, where no caption tells its sides apart."""
    validation_images: int = 200
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", at_least=0, below=1)
        if bool(self.validation) == bool(self.holdout):
            raise ConfigError("give either validation sources or a holdout above 0 and below 1")
        if not self.sources:
            raise ConfigError("give sources of captioned photos")
        check_numbers(self, "photos", "max_new_tokens", "max_captions", "validation_images", at_least=1)
        check_numbers(self, "samples", at_least=2)
        check_numbers(self, "bleu_weight", "nll_weight", "connector_lr", at_least=0)
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for photos")
        for source in self.sources:
            if source.repeat != 1 or source.weight is not None or source.derived_share:
                raise ConfigError(f"{source.path}: repeat, weight and derived_share are of the language stage alone")

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        return LanguageRecipe(**shared, model=None, image=None, vision_blocks=0)


class CiderReward:
    """CIDEr-D of one caption, with document frequencies that stay those of the training captions."""

    def __init__(self, images: Iterable[Sequence[str]], *, end_mark: bool = True, bleu_weight: float = 0.0):
        """`images`: of each training image its captions. Read once; their n-grams stay in memory."""
        self.end_mark, self.bleu_weight = end_mark, bleu_weight
        self._cider = CiderD([self._ngrams(caption) for caption in captions] for captions in images)

    def __call__(self, caption: str, references: Sequence[str], *, is_whole: bool = True) -> float:
        """`is_whole`: the caption was ended by the model, and not cut off."""
        words, others = self._words(caption, is_whole), [self._words(reference) for reference in references]
        reward = self._cider.score(ngram_counts(words), [ngram_counts(other) for other in others])
        if self.bleu_weight:
            counts = np.array([bleu_counts(words, others)], dtype=np.float64)
            reward += self.bleu_weight * float(bleu_from_counts(counts)[0, -1])
        return reward

    def _words(self, caption: str, is_whole: bool = True) -> list[str]:
        return ptb_tokenize(caption).split() + ([END] if is_whole and self.end_mark else [])

    def _ngrams(self, caption: str) -> Counter[Ngram]:
        return ngram_counts(self._words(caption))


@dataclass
class Photo:
    """A photo to be described, with the captions that people gave it."""

    prompt: tuple[Segment, ...]
    example: Example
    """The prompt in numbers."""
    captions: tuple[tuple[Segment, ...], ...]
    """The prompt with a caption behind it, for each that is learned."""
    references: tuple[str, ...]
    id: str


@dataclass
class Photos:
    """A micro-batch."""

    photos: list[Photo]
    pixel_values: Tensor  # (N, 3, H, W) the tiles of all photos
    seed: int
    """Of the captions that are sampled."""

    def to(self, device: torch.device | str) -> "Photos":
        return dataclasses.replace(self, pixel_values=self.pixel_values.to(device))


class SelfCriticalTask(LanguageTask):
    """A `Stage` for the loop. Photos follow from the number of the step and the seed, and so do the samples of given
    weights. The loss that is logged is minus the mean reward of the samples; that of validation minus the CIDEr-D of
    greedy captions.
    """

    def __init__(self, recipe: SelfCriticalRecipe):
        """Raises ConfigError for a model whose captions cannot share the reading of their photo, and MMGPTError under
        torchrun, and without captioned photos."""
        if ranks()[1] > 1:
            raise MMGPTError("self-critical training runs in one process: start it without torchrun")
        super().__init__(recipe.language())
        self.critical = recipe
        decoder = self.model.decoder.config
        if self.model.vision is None:
            raise ConfigError(f"{recipe.start} reads text alone: self-critical training needs a model that sees photos")
        if self.model.config.prefix_lm or decoder.positions == "relative" or decoder.memory_length:
            raise ConfigError("self-critical training needs a causal decoder without segment memory")
        tables = [[_captioned(table) for table in source.tables] for source in self.sources]
        self.records = StoredRecords([source.store for source in self.sources], tables)
        if not len(self.records):
            raise MMGPTError("the sources hold no captioned photo")
        self.reward = CiderReward(self._captions(), end_mark=recipe.end_mark, bleu_weight=recipe.bleu_weight)
        self._sampler = Sampler(self.model, self.processor, max_new_tokens=recipe.max_new_tokens)
        self._draws = RecordSampling(recipe.max_captions, max_questions=0, augment=recipe.augment)

    def _captions(self) -> Iterator[tuple[str, ...]]:
        """Those of all training photos. What cannot be read is counted when its turn comes."""
        for number in range(len(self.records)):
            try:
                yield self.records[number].captions
            except (BadRecordError, MMGPTError):
                continue

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[Photos]:  # type: ignore[override]
        return [self._photos(number) for number in range(step * count, (step + 1) * count)]

    def _photos(self, number: int) -> Photos:
        """Micro-batch `number`."""
        size, seed = self.critical.photos, self.critical.train.seed
        read = [self._photo(*divmod(place, len(self.records))) for place in range(number * size, (number + 1) * size)]
        return Photos([photo for photo, _ in read], torch.cat([tiles for _, tiles in read]), seed * 1_000_003 + number)

    def _photo(self, epoch: int, place: int) -> tuple[Photo, Tensor]:
        """A photo and its tiles; the next one of the epoch where this one cannot be read, which is counted."""
        seed, count = self.critical.train.seed, len(self.records)
        order = epoch_order(count, seed, epoch)
        for number in (order[(place + more) % count] for more in range(count)):
            key = f"record {number}"
            try:
                record = self.records[number]
                key = record.key
                return self._read(record, random.Random(f"{seed}/{epoch}/{number}"), epoch)
            except BadRecordError as error:
                self.errors.add(str(error), key)
            except MMGPTError as error:
                self.errors.add("cannot be described", f"{key}: {error}")
        raise MMGPTError(f"none of {count} captioned photos can be read: {self.errors.summary()}")

    def _read(self, record: Record, rng: random.Random, epoch: int) -> tuple[Photo, Tensor]:
        document = draw_documents(record, rng, epoch, self.processor, self._draws)[0]
        first = document.branches[0]
        answer = next(at for at, segment in enumerate(first) if isinstance(segment, Text) and segment.is_target)
        prompt, recipe = first[:answer], self.critical
        captions = document.branches if recipe.nll_weight else ()
        example = self.processor(Document(prompt, id=record.key))
        longest = len(self.processor(document)) + recipe.samples * (recipe.max_new_tokens + 1)
        if longest > (room := self.processor.config.max_length):
            raise MMGPTError(f"up to {longest} tokens with its captions and samples; the context holds {room}")
        photo = Photo(prompt, example, captions, record.captions, record.key)
        return photo, self.processor.pixels([example])

    def data_state(self, step: int) -> dict[str, Any]:
        return {"sources": [source.digest for source in self.sources], "photos": len(self.records)}

    def load_data_state(self, state: dict[str, Any]) -> None:
        if state != self.data_state(0):
            raise MMGPTError("the sources are no longer those that the run began with")

    # ---- what is learned ----

    tokens = flops = None  # type: ignore[assignment]  # what will be sampled is not known

    def counts(self, batch: Photos) -> dict[str, float]:  # type: ignore[override]
        return {"loss": len(batch.photos) * self.critical.samples}

    def loss(self, batch: Photos) -> dict[str, Term]:  # type: ignore[override]
        """Minus the summed reward of the samples, with the policy gradient, and the number of samples.

        The photos are encoded once, for the samples and for the gradient."""
        photos, k = batch.photos, self.critical.samples
        prompts = collate([[photo.example] for photo in photos], batch.pixel_values, pad_left=True)
        prompts = prompts.to(batch.pixel_values.device)
        images = self.model.image_tokens(prompts)
        sampled = self._write(photos, images, k, batch.seed)
        rewards = torch.tensor(
            [[self._reward(ids, photo.references) for ids in own] for own, photo in zip(sampled, photos, strict=True)]
        )  # (P, k)
        advantages = advantages_of(rewards)
        learned, scales = self._learned(photos, sampled, advantages)
        learned, scales = learned.to(prompts.input_ids.device), scales.to(prompts.input_ids.device)
        hidden, decoder = self.model(learned, images=images), self.model.decoder
        total, _ = next_token_loss(
            hidden, decoder.head_weight, learned.labels, softcap=decoder.config.logit_softcap, scales=scales
        )
        # The value is what the gradient is an estimate of; that of the weighted log-probabilities says nothing.
        return {"loss": Term(total - total.detach() - rewards.sum().to(total), rewards.numel())}

    def _write(
        self, photos: Sequence[Photo], images: Sequence[ImageFeatures], samples: int, seed: int | None
    ) -> list[list[tuple[int, ...]]]:
        """Captions of each photo, drawn at temperature 1, or with no seed the likeliest."""
        seeds = [((seed or 0) * 1_009 + n) % 2**63 for n in range(len(photos))]
        documents = [Document(photo.prompt, id=photo.id) for photo in photos]
        found = self._sampler(documents, samples, seeds, images=images, greedy=seed is None)
        return [[sample.ids for sample in own] for own in found]

    def _reward(self, ids: Sequence[int], references: Sequence[str]) -> float:
        return self.reward(self.text(ids), references, is_whole=self.is_whole(ids))

    def text(self, ids: Sequence[int]) -> str:
        """What a sampled caption says."""
        return self.processor.tokenizer.decode(ids[:-1] if self.is_whole(ids) else ids).strip()

    def is_whole(self, ids: Sequence[int]) -> bool:
        """Whether the model ended it."""
        return ids[-1] in self.processor.tokenizer.end_ids

    def _learned(
        self, photos: Sequence[Photo], sampled: Sequence[Sequence[tuple[int, ...]]], advantages: Tensor
    ) -> tuple[Batch, Tensor]:
        """Samples and captions as branches of a document for each photo, a row each, with what each of their tokens
        is multiplied by, (P, T). The batch has no pixels."""
        examples, factors = [], []
        for photo, own, values in zip(photos, sampled, advantages, strict=True):
            samples = tuple((*photo.prompt, Text("", ids=ids)) for ids in own)
            examples.append(self.processor(Document((), samples + photo.captions, id=photo.id)))
            factors.append(torch.cat([values.new_zeros(1), values, self._captions_factor(photo, values)]))
        batch = collate([[example] for example in examples], self.processor.pixels([]))
        scales = torch.stack([own[branches] for own, branches in zip(factors, batch.branch_ids, strict=True)])
        return batch, scales.where(batch.labels != IGNORE_INDEX, 0)

    def _captions_factor(self, photo: Photo, like: Tensor) -> Tensor:
        return like.new_full((len(photo.captions),), self.critical.nll_weight)

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Of greedy captions of held-out photos: CIDEr-D, whose document frequencies are those of these photos, BLEU-4,
        words, the share that the model ended, and the mean reward; and the nats per token of all that is held out."""
        nats = super().validate()["loss"]
        written: list[tuple[int, ...]] = []
        references: list[tuple[str, ...]] = []
        held = self._held_out_photos()
        while few := list(itertools.islice(held, VALIDATION_PHOTOS)):
            pixels = torch.cat([tiles for _, tiles in few])
            prompts = collate([[photo.example] for photo, _ in few], pixels, pad_left=True).to(self.model.device)
            photos = [photo for photo, _ in few]
            written += [ids for (ids,) in self._write(photos, self.model.image_tokens(prompts), 1, None)]
            references += [photo.references for photo in photos]
        if not written:
            raise MMGPTError("the validation sources hold no captioned photo that can be read")
        texts = [self.text(ids) for ids in written]
        score = cider_d(texts, references).score
        rewards = [self._reward(ids, own) for ids, own in zip(written, references, strict=True)]
        return {
            "loss": -score,
            "cider_d": score,
            "bleu_4": bleu(texts, references)[-1].score,
            "reward": sum(rewards) / len(rewards),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            "ended": sum(map(self.is_whole, written)) / len(written),
            "nats": nats,
        }

    def _held_out_photos(self) -> Iterator[tuple[Photo, Tensor]]:
        """Those of up to `validation_images` samples of each validation source, with their tiles."""
        for held in self.held_out:
            for number in dict.fromkeys(unit[0] for unit, _ in held.some(self.critical.validation_images)):
                try:
                    record = held.sample(number)
                    if not isinstance(record, Record) or not record.captions:
                        continue
                    content = [Image(record.image), CAPTION_PROMPT]
                    document = self.processor.chat([{"role": "user", "content": content}])
                    example = self.processor(document)
                    photo = Photo(document.segments, example, (), record.captions, record.key)
                    read = photo, self.processor.pixels([example])
                except (BadRecordError, MMGPTError) as error:
                    logger.warning("not described, %s:%d: %s", held.name, number, error)
                    continue
                yield read


def _captioned(table: Table) -> Table:
    """Its records that have captions."""
    has_captions = table.records[:, RECORD.index("captions")] > 0
    return table.only(np.concatenate([np.zeros(len(table.pieces), dtype=bool), has_captions]))


def advantages_of(rewards: Tensor) -> Tensor:
    """Rewards (P, k), each less the mean of the others in its row."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))
