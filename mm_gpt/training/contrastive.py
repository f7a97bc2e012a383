"""The contrastive stage: tune the vision tower on captioned images with CLIP's symmetric loss."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mm_gpt.config import check_numbers
from mm_gpt.datasets.formats.captioned import clean_caption
from mm_gpt.datasets.loading.index import PairMeasure, index_tables
from mm_gpt.datasets.loading.sources import SourceConfig, StoredRecords
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Record
from mm_gpt.document import Image
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.training.distributed import ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.language import load_vision
from mm_gpt.training.stage import LOWEST_LOSS, Decides, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.contrastive import ContrastiveConfig, ContrastiveModel, gather_features
from mm_gpt.vision.transforms import ImageTransform, ImageTransformConfig, TrainTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe:
    """A complete description of one contrastive run. An epoch shows every image once, with one of its captions."""

    train: TrainConfig
    model: ContrastiveConfig
    image: ImageTransformConfig
    sources: tuple[SourceConfig, ...]
    validation: tuple[SourceConfig, ...]
    decoder: str
    """Whose tokenizer and frozen token embeddings the text tower uses; its width must be the text tower's."""
    vision_weights: str | None = None
    """A registry name (ImageNet trunk) or the folder of a contrastive run."""
    vision_blocks: int = 3
    vision_lr: float = 0.3
    batch_size: int = 96
    """Pairs of a rank in a micro-batch. Each is told from those of all ranks."""
    validation_images: int = 500
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "batch_size", at_least=2)
        check_numbers(self, "validation_images", at_least=1)
        check_numbers(self, "vision_blocks", "vision_lr", at_least=0)
        if self.model.text is None:
            raise ConfigError("contrastive training needs a text tower (model.text)")
        if not self.sources or not self.validation:
            raise ConfigError("give sources, and validation sources")
        if self.train.recompute != "none":
            raise ConfigError("contrastive training recomputes nothing: train.recompute must be none")
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for pairs")


@dataclass
class PairBatch:
    pixel_values: Tensor  # (N, 3, H, W)
    input_ids: Tensor  # (N, T), padded on the right
    lengths: Tensor  # (N,)

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch(self.pixel_values.to(device), self.input_ids.to(device), self.lengths.to(device))


class ContrastiveTask:
    """A `Stage` for the loop. An epoch's order follows from the seed; each rank learns from its own part of a batch."""

    on_policy: bool = False
    decides: Decides = LOWEST_LOSS

    def __init__(self, recipe: ContrastiveRecipe):
        self.recipe = recipe
        torch.manual_seed(recipe.train.seed)
        decoder, self.tokenizer = load_decoder(recipe.decoder)
        self.model = ContrastiveModel(recipe.model)
        if recipe.vision_weights is not None:
            load_vision(self.model.vision, recipe.vision_weights)
        assert self.model.text is not None
        assert recipe.model.text is not None
        table = decoder.embedding.weight.detach()
        if table.shape != self.model.text.token_embedding.weight.shape:
            raise ConfigError(f"the text tower's embeddings must be {tuple(table.shape)}, as the decoder's")
        # Six thousand images teach no vocabulary: the decoder's embeddings already know which words are alike.
        self.model.text.token_embedding = nn.Embedding.from_pretrained(table / table.std() * 0.02, freeze=True)
        self.context_length = recipe.model.text.context_length
        self.errors = ErrorCounter()
        self.records = self._read(recipe.sources)
        self.validation_records = self._read(recipe.validation)
        self.rank, self.world = ranks()
        if len(self.records) < recipe.batch_size * self.world:
            whole = f"{recipe.batch_size * self.world} ({self.world} × {recipe.batch_size})"
            raise MMGPTError(f"{len(self.records)} captioned images are fewer than a batch of {whole}")
        if not len(self.validation_records):
            raise MMGPTError("the validation sources hold no captioned image")

    def prepare(self) -> list[ParameterGroup]:
        self.model.vision.unfreeze(self.recipe.vision_blocks)
        vision = list(self.model.vision.parameters())
        ours = {id(p) for p in vision}
        rest = [p for p in self.model.parameters() if id(p) not in ours]
        return [ParameterGroup("projections and text", rest), ParameterGroup("vision", vision, self.recipe.vision_lr)]

    def micro_batches(self, step: int, count: int) -> list[PairBatch]:
        size, batches = self.recipe.batch_size, []
        per_epoch = len(self.records) // (size * self.world)
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, per_epoch)
            order = epoch_order(len(self.records), self.recipe.train.seed, epoch)
            start = (place * self.world + self.rank) * size
            # A record's caption and crop are its own, so that they do not depend on the number of ranks.
            draws = [random.Random(f"{self.recipe.train.seed}/{epoch}/{start + n}") for n in range(size)]
            batches.append(self._batch(self.records, order[start : start + size], draws))
        return batches

    def _batch(
        self, records: Sequence[Record], places: Sequence[int], draws: Sequence[random.Random] | None
    ) -> PairBatch:
        """`draws` choose a caption and a crop of each; without them, the first caption and the whole image."""
        pairs = [self._pair(records, at, None if draws is None else draws[n]) for n, at in enumerate(places)]
        ids = [self.tokenizer.encode(clean_caption(text))[: self.context_length] for _, text in pairs]
        lengths = torch.tensor([len(i) for i in ids])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)
        return PairBatch(torch.stack([pixels for pixels, _ in pairs]), padded, lengths)

    def _pair(self, records: Sequence[Record], place: int, draw: random.Random | None) -> tuple[Tensor, str]:
        """A record's image and a caption; of the next record where this one cannot be read, which is counted."""
        for at in (*range(place, len(records)), *range(place)):
            try:
                record = records[at]
                image = Image(record.image)
                if draw is None:
                    return ImageTransform(self.recipe.image)(image.load()), record.captions[0]
                generator = torch.Generator().manual_seed(draw.getrandbits(48))
                return TrainTransform(self.recipe.image, generator)(image), draw.choice(record.captions)
            except BadRecordError as error:
                self.errors.add(str(error), f"record {at}")
            except MMGPTError as error:
                self.errors.add("broken image", f"{record.key}: {error}")
        raise MMGPTError(f"none of {len(records)} captioned images can be read: {self.errors.summary()}")

    def counts(self, batch: PairBatch) -> dict[str, float]:
        return {"loss": len(batch.pixel_values)}

    def loss(self, batch: PairBatch) -> dict[str, Term]:
        """The loss among the pairs of all ranks, times those of this one.

        Every rank computes all of it. Its gradient flows back through `gather_features` to the rank whose features they
        are, once from each rank: summed over ranks and divided by all pairs, as the loop does, it is that of one
        process with the whole batch.
        """
        self.model.clamp_logit_scale()
        images = self.model.encode_image(batch.pixel_values)
        texts = self.model.encode_text(batch.input_ids, batch.lengths)
        loss = self.model.loss(gather_features(images), gather_features(texts))
        return {"loss": Term(loss * len(images), len(images))}

    def validate(self) -> dict[str, float]:
        """Contrastive loss among all validation pairs, and how often the right one is found (recall at 1 and 5)."""
        images, texts = [], []
        device = self.model.logit_scale.device
        count = min(len(self.validation_records), self.recipe.validation_images)
        for start in range(0, count, 16):
            batch = self._batch(self.validation_records, range(start, min(start + 16, count)), None).to(device)
            images.append(self.model.encode_image(batch.pixel_values))
            texts.append(self.model.encode_text(batch.input_ids, batch.lengths))
        image, text = torch.cat(images).float(), torch.cat(texts).float()
        similarity = nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T
        found = (similarity >= similarity.diag()[:, None]).sum(dim=1)  # rank of the right text for each image
        return {
            "loss": float(self.model.loss(image, text)),
            "image_to_text_recall_1": float((found <= 1).float().mean()),
            "image_to_text_recall_5": float((found <= 5).float().mean()),
        }

    def samples(self) -> list[str]:
        return []

    def save(self, folder: Path) -> None:
        """The whole model; the language stage takes the tensors under `vision.`."""
        state = {k: v for k, v in self.model.state_dict().items() if k != "text.token_embedding.weight"}
        write_tensors(state, folder / "model.safetensors")

    def _read(self, sources: tuple[SourceConfig, ...]) -> StoredRecords:
        stores = [source.open(Path(self.recipe.data), self.errors) for source in sources]
        measure = PairMeasure(self.tokenizer)
        tables = [
            index_tables(store, measure, source.path, self.errors)
            for store, source in zip(stores, sources, strict=True)
        ]
        records = StoredRecords(stores, tables)
        if self.errors.total:
            logger.warning(self.errors.summary())
        return records
