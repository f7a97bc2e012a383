"""The language stage: connector alignment, low-rank adaptation or full training on next-token prediction."""

import dataclasses
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_gpt.datasets.building.shards import Corpus
from mm_gpt.datasets.loading.loader import CorpusSource, Loaded, Loader
from mm_gpt.datasets.loading.packing import pack
from mm_gpt.datasets.loading.plan import Plan, Row, Share
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Record, Sample
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import fill, load_decoder, load_model, save_model
from mm_gpt.hub.vision_towers import load_open_clip
from mm_gpt.model.decoder import Block, Decoder
from mm_gpt.model.lora import LoRAConfig, merge_lora
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import ROLES, Batch, Example, Processor, ProcessorConfig, collate, stack_pixels
from mm_gpt.templates.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.data import (
    Drawing,
    SampleSource,
    SourceConfig,
    check_chats,
    cut_documents,
    draw,
    length_of,
    read_source,
    source_location,
    written_texts,
)
from mm_gpt.training.distributed import ranks
from mm_gpt.training.loop import ParameterGroup, TrainConfig, use_bf16
from mm_gpt.vision.transforms import ImageTransformConfig, TrainTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """A complete description of one language-stage run."""

    train: TrainConfig
    model: ModelConfig | None
    """None: what `start` holds."""
    image: ImageTransformConfig | None
    """None: what `start` does, or a model of text alone."""
    sources: tuple[SourceConfig, ...]
    validation: tuple[SourceConfig, ...] = ()
    holdout: float = 0.0
    """Without `validation` sources: the share of each training source that is kept from training to validate on."""
    start: str | None = None
    """The name or folder of a model to start from; its configuration must be `model`, where that is given."""
    tokenizer: str | None = None
    """Folder of a tokenizer (tokenizer.json, or vocab.json and merges.txt) for a model from random weights; None learns
    one from the sources."""
    lora: LoRAConfig | None = None
    """Low-rank adaptation for the decoder of `start`, where it has none and `decoder` is not "full"."""
    vision_weights: str | None = None
    """Folder of a contrastive run whose vision tower is taken."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; with `model.lora` it stays frozen under its adaptation. Without
    `model`, the adaptation that `start` has becomes part of its weights."""
    train_connector: bool = True
    vision_blocks: int | None = 0
    """How many of the vision tower's last blocks are trained; None trains the whole tower."""
    connector_lr: float = 1.0
    vision_lr: float = 0.1
    """Learning rates as multiples of `train.lr`."""
    row_length: int = 512
    """Tokens in a packed row, at most the model's context unless it has segment memory. A longer document has a row of
    its own."""
    rows: int = 6
    """Rows in a micro-batch."""
    max_captions: int = 5
    max_questions: int = 8
    """Captions and questions of one image that are learned together in one document."""
    augment: bool = True
    """Random crops and colour jitter, and the mirror image where no text of the document tells its sides apart. Models
    that cut images into tiles get the mirror image alone."""
    compile: bool = False
    """Compile the decoder's blocks for training (torch.compile): 1.4 times as fast on a CPU after a minute; needs a C++
    compiler."""
    validation_images: int = 200
    exponent: float | None = None
    """Weighs the sources by (tokens)^exponent, as XLM does, instead of by their size; 0.7 favours the small ones."""
    wait: bool = True
    """A source that has run out waits for the end of the epoch; False: it begins again at once, so that shares hold."""
    window_rows: int = 256
    """Rows that are packed and shuffled at a time."""
    workers: int = 0
    """Processes that read and decode; 0: a thread of the training process. Their number changes nothing else."""
    data: str = "."
    """The folder that `sources` are in."""

    def __post_init__(self) -> None:
        if bool(self.validation) == bool(self.holdout) or not 0 <= self.holdout <= 0.5:
            raise ConfigError("give either validation sources or a holdout between 0 and 0.5")
        if self.model is None and self.start is None:
            raise ConfigError("give a model, or one to start from")


TOKENIZER_CHARACTERS = 50_000_000
"""Of the sources' texts, for a tokenizer that is learned."""


class LanguageTask:
    """A `Task` for the loop. The plan of the run follows from the seed and the sources."""

    def __init__(self, recipe: LanguageRecipe, tokenizer: Tokenizer | None = None):
        self.recipe = recipe
        self.errors = ErrorCounter()
        configs = (*recipe.sources, *recipe.validation)
        found = [read_source(source, Path(recipe.data), self.errors) for source in configs]
        corpora = [
            Corpus(source_location(source, Path(recipe.data))) if samples is None else None
            for source, samples in zip(configs, found, strict=True)
        ]
        model = recipe.model
        if tokenizer is None and recipe.tokenizer is not None:
            tokenizer = Tokenizer.from_hf_folder(Path(recipe.tokenizer))
        if tokenizer is None and recipe.start is None and model is not None and not isinstance(model.decoder, str):
            prompts = [*ROLES, CAPTION_PROMPT, *OTHER_CAPTION_PROMPTS] * 4  # often enough to be learned as words
            tokenizer = Tokenizer.train([*self._written(found, corpora), *prompts], model.decoder.vocab_size)
        self.model, self.processor = build_model(recipe, tokenizer)
        self.row_length = min(recipe.row_length, self.processor.config.max_length)
        config = self.model.config
        # The image is read with the question in view, or distances are those of the row: no two questions share it.
        separate = config.prefix_lm or self.model.decoder.config.positions == "relative"
        self._drawing = Drawing(recipe.max_captions, recipe.max_questions, recipe.augment, separate)
        sources = [
            self._source(*each, held=number >= len(recipe.sources))
            for number, each in enumerate(zip(configs, found, corpora, strict=True))
        ]
        self.sources, self.held_out = sources[: len(recipe.sources)], sources[len(recipe.sources) :]
        if recipe.holdout:
            halves = [self._split(*each) for each in zip(configs, self.sources, corpora, strict=True)]
            self.sources, self.held_out = [a for a, _ in halves], [b for _, b in halves]
        self._validated = list(recipe.validation or recipe.sources)
        if not any(len(source) for source in self.sources):
            raise MMGPTError("the sources hold no usable record: " + self.errors.summary())
        plan = Plan(
            self.sources,
            [Share(repeat=source.repeat, weight=source.weight) for source in recipe.sources],
            row_length=self.row_length,
            seed=recipe.train.seed,
            window_rows=recipe.window_rows,
            exponent=recipe.exponent,
            wait=recipe.wait,
        )
        rank, world = ranks()
        self.loader = Loader(
            plan,
            self.load,
            rows=recipe.rows,
            accumulate=recipe.train.accumulate,
            rank=rank,
            world=world,
            workers=recipe.workers,
            errors=self.errors,
        )
        if self.errors.total:
            logger.warning(self.errors.summary())

    def _written(self, found: Sequence[Sequence[Sample] | None], corpora: Sequence[Corpus | None]) -> list[str]:
        """What a tokenizer is learned from."""
        texts: list[str] = []
        left = TOKENIZER_CHARACTERS
        for samples, corpus in zip(found, corpora, strict=True):
            for sample in samples or (() if corpus is None else corpus.samples(ErrorCounter())):
                written = written_texts(sample)
                texts += written
                left -= sum(map(len, written)) if corpus is not None else 0
                if left < 0:
                    break
        return texts

    def _source(
        self, config: SourceConfig, samples: list[Sample] | None, corpus: Corpus | None, *, held: bool = False
    ) -> SampleSource | CorpusSource:
        if corpus is not None:
            return self._corpus_source(config, corpus)
        assert samples is not None
        check_chats(samples, self.processor, Path(self.recipe.data) / config.path)
        samples = cut_documents(samples, self.processor, self.row_length, self.errors)
        logger.info("%s: %d samples", config.path, len(samples))
        return self._sample_source(config, samples, augment=not held)

    def _sample_source(self, config: SourceConfig, samples: list[Sample], *, augment: bool) -> SampleSource:
        how = dataclasses.replace(self._drawing, augment=self._drawing.augment and augment)

        def draw_from(sample: Sample, rng: random.Random) -> list[Document]:
            return draw(sample, config, rng, self.processor, how)

        return SampleSource(config.path, samples, draw_from, self.processor, self.recipe.train.seed, self.errors)

    def _corpus_source(
        self, config: SourceConfig, corpus: Corpus, every: tuple[int, int] | None = None
    ) -> CorpusSource:
        source = CorpusSource(
            corpus, self.processor, max_tokens=self.row_length, errors=self.errors, name=config.path, every=every
        )
        logger.info("%s: %d pieces, %.0f tokens, %d images", config.path, len(source), source.tokens, source.images)
        return source

    def _split(
        self, config: SourceConfig, source: SampleSource | CorpusSource, corpus: Corpus | None
    ) -> tuple[SampleSource | CorpusSource, SampleSource | CorpusSource]:
        """Training and held-out part of a source."""
        every = round(1 / self.recipe.holdout)
        if corpus is not None:
            return self._corpus_source(config, corpus, (-every, every)), self._corpus_source(config, corpus, (0, every))
        assert isinstance(source, SampleSource)
        train = [sample for number, sample in enumerate(source.samples) if number % every]
        held = list(source.samples[::every])
        return self._sample_source(config, train, augment=True), self._sample_source(config, held, augment=False)

    # ---- what is trained ----

    def parameter_groups(self) -> list[ParameterGroup]:
        recipe, model = self.recipe, self.model
        connector = [] if model.connector is None else [*model.connector.parameters()]
        connector += [mark for mark in (model.image_marks, model.image_newline) if mark is not None]
        for parameter in connector:
            parameter.requires_grad_(recipe.train_connector)
        if model.vision is not None:
            model.vision.unfreeze(recipe.vision_blocks)
        if model.config.lora is None:
            model.decoder.requires_grad_(recipe.decoder == "full")
        if use_bf16(recipe.train.precision, model.device):
            _frozen_to_bf16(model.decoder)
        if recipe.compile:
            compile_blocks(model.decoder)
        groups = [ParameterGroup("decoder", [p for p in model.decoder.parameters() if p.requires_grad])]
        if model.vision is not None:
            groups.append(ParameterGroup("connector", connector, recipe.connector_lr))
            groups.append(ParameterGroup("vision", list(model.vision.parameters()), recipe.vision_lr))
        return groups

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.model.loss(batch)

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[Batch]:
        assert count == self.loader.accumulate
        return self.loader.micro_batches(step)

    def data_state(self, step: int) -> dict[str, Any]:
        return self.loader.state(step)

    def load_data_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)

    def load(self, rows: Sequence[tuple[int, Row]]) -> Loaded:
        """Rows of a plan as a micro-batch. What cannot be read is skipped and named; a worker process may run this."""
        skipped: list[tuple[str, str]] = []
        examples: list[list[Example]] = []
        pixels: list[Tensor] = []
        for number, row in rows:
            examples.append([])
            images = itertools.count()
            for item in row:
                source = self.sources[item.source]
                try:
                    document = source.document(item.unit)
                except (BadRecordError, MMGPTError) as error:
                    skipped.append((_reason(error), f"{source.name}:{item.unit}"))
                    continue
                seeds = ((self.recipe.train.seed, number, count) for count in images)
                if (read := self._read(document, skipped, seeds)) is not None:
                    examples[-1].append(read[0])
                    pixels += read[1]
        return Loaded(self._collate(examples, pixels, train=True), skipped)

    def _read(
        self, document: Document, skipped: list[tuple[str, str]], seeds: Iterator[tuple[int, ...]] | None = None
    ) -> tuple[Example, list[Tensor]] | None:
        """A document in numbers and its tiles, augmented by `seeds`, one for each image.

        A page stands without a broken image; an answer about one does not.
        """
        while True:
            broken: Image | None = None
            tiles: list[Tensor] = []
            try:
                example = self.processor(document)
                for broken, grid in zip(example.images, example.grids, strict=True):
                    tiles.append(self._tiles(broken, grid, seeds))
                return example, tiles
            except MMGPTError as error:
                if broken is None and isinstance(error, ImageError):  # its size is asked for before its pixels
                    broken = next((image for image in document.images if not _has_size(image)), None)
                skipped.append(("broken image" if broken else _reason(error), f"{document.id}: {error}"))
            is_page = all(isinstance(s, Image) or s.is_target for s in document.segments) and not document.branches
            if broken is None or not is_page:
                return None
            left = _without(document.segments, broken)
            if not any(isinstance(segment, Text) and not segment.is_control for segment in left):
                return None
            document = dataclasses.replace(document, segments=left)

    def _tiles(self, image: Image, grid: tuple[int, int], seeds: Iterator[tuple[int, ...]] | None) -> Tensor:
        """(N, 3, H, W) of one image."""
        config = self.processor.config
        if seeds is not None and self.recipe.augment and config.image is not None and config.tiling is None:
            generator = torch.Generator().manual_seed(hash(next(seeds)) % 2**63)
            return TrainTransform(config.image, generator)(image)[None]
        return self.processor.tiles(image, grid)

    def _collate(self, rows: Sequence[Sequence[Example]], tiles: Sequence[Tensor], *, train: bool) -> Batch:
        pixel_values = torch.cat(list(tiles)) if tiles else stack_pixels([], self.processor.config.image)
        # Blocks are compiled once for each shape: all training batches have the same one.
        multiple = self.row_length if train and self.recipe.compile else 64
        return collate(rows, pixel_values, pad_to_multiple=multiple)

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Mean loss per target in nats: over all validation sources, and of each."""
        return self._validate(self.model.loss)

    def _validate(self, loss_of: Callable[[Batch], tuple[Tensor, Tensor]]) -> dict[str, float]:
        total, count = 0.0, 0
        values: dict[str, float] = {}
        for source, held in zip(self._validated, self.held_out, strict=True):
            source_total, source_count = 0.0, 0
            lengths = [(length_of(d, self.processor), d) for d in self._first(held)]
            documents = [(int(length), d) for length, d in lengths if length < math.inf]
            longest = max((length for length, _ in documents), default=1)
            for row in pack([length for length, _ in documents], max(self.row_length, longest)):
                found = [read for i in row if (read := self._read(documents[i][1], [])) is not None]
                tiles = [tile for _, tiles in found for tile in tiles]
                batch = self._collate([[example for example, _ in found]], tiles, train=False)
                loss, targets = loss_of(batch.to(next(self.model.parameters()).device))
                source_total += loss.item()
                source_count += int(targets)
            values[f"loss {source.path}"] = source_total / max(1, source_count)
            total, count = total + source_total, count + source_count
        return {"loss": total / max(1, count), **values}

    def _first(self, held: SampleSource | CorpusSource) -> list[Document]:
        """The same held-out documents each time."""
        if isinstance(held, SampleSource):
            units = [(0, at) for at in range(min(len(held), self.recipe.validation_images))]
            return [document for unit in units for document in held.documents(*unit)]
        found: list[Document] = []
        for documents in itertools.islice(held.units(0, 0, 0), self.recipe.validation_images):
            for unit, _ in documents:
                try:
                    found.append(held.document(unit))
                except (BadRecordError, MMGPTError) as error:
                    logger.warning("not validated on %s:%s: %s", held.name, unit, error)
        return found

    def samples(self) -> list[str]:
        """Greedy captions of the first validation photos."""
        from mm_gpt.inference.engine import Engine, GenerationConfig

        lists = [held.samples[:4] for held in self.held_out if isinstance(held, SampleSource)]
        images = [record for records in lists for record in records if isinstance(record, Record)][:4]
        engine = Engine(self.model.eval(), self.processor)
        documents = [self.processor.chat([_user(record, CAPTION_PROMPT)]) for record in images]
        answers = engine.generate(documents, GenerationConfig(max_new_tokens=24)) if documents else []
        self.model.train()
        return [f"{record.key}: {answer.text}" for record, answer in zip(images, answers, strict=True)]

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder)


def build_model(recipe: LanguageRecipe, tokenizer: Tokenizer | None) -> tuple[MMGPT, Processor]:
    """The recipe's model, from `start` or from the decoder's own weights (random ones for a complete config)."""
    torch.manual_seed(recipe.train.seed)
    if recipe.start is not None:
        model, processor = load_model(recipe.start)
        if recipe.model is not None and model.config != recipe.model:
            raise ConfigError(f"{recipe.start} holds another model than the recipe describes")
        if recipe.lora is not None and model.config.lora is None and recipe.decoder != "full":
            model.add_lora(recipe.lora)
        if recipe.model is None and recipe.decoder == "full" and model.config.lora is not None:
            merge_lora(model.decoder)
            model.config = dataclasses.replace(model.config, lora=None)
    else:
        assert recipe.model is not None
        decoder: Decoder | None = None
        if isinstance(recipe.model.decoder, str):
            decoder, tokenizer = load_decoder(recipe.model.decoder)
        if tokenizer is None:
            raise ConfigError("a decoder that is not in the registry needs a tokenizer")
        model = MMGPT(recipe.model, decoder)
        length, vocab_size = model.decoder.config.max_length, model.decoder.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the decoder {vocab_size}")
        if model.decoder.config.memory_length:  # rows are read in segments, and none is too long
            length = max(length, recipe.row_length)
        config = ProcessorConfig(image=recipe.image, tokens_per_image=model.tokens_per_image, max_length=length)
        processor = Processor(tokenizer, config, vocab_size=vocab_size)
    if recipe.vision_weights is not None:
        if model.vision is None:
            raise ConfigError("vision_weights need a model with a vision encoder")
        load_vision(model.vision, recipe.vision_weights)
    if recipe.decoder == "full" and isinstance(model.config.decoder, str) and model.config.lora is None:
        # Its weights are no longer those that the name stands for: they are saved with the model.
        model.config = dataclasses.replace(model.config, decoder=model.decoder.config)
    return model, processor


def compile_blocks(decoder: Decoder) -> None:
    """Run each block compiled while it trains. Evaluation, with its many shapes, stays as it is."""
    compiled = torch.compile(Block.forward, dynamic=False)
    for block in decoder.blocks:
        plain = block.forward
        block.forward = lambda *args, block=block, plain=plain: (
            compiled(block, *args) if block.training else plain(*args)
        )


def load_vision(vision: nn.Module, name: str) -> None:
    """Weights for a vision tower: a registry name (ImageNet trunk), the folder of a contrastive run, or an open_clip
    tag such as ViT-L-14/laion2b_s32b_b82k."""
    if Path(name).is_dir():
        fill(vision, Path(name) / "model.safetensors", prefix="vision.")
        return
    if "/" in name:
        vision.load_state_dict(load_open_clip(name)[0].state_dict(), strict=True)
        return
    from mm_gpt.hub.fetching import download
    from mm_gpt.vision.encoder import load_efficientnet_lite

    path = next(iter(download.fetch(name).values()))
    vision.tower.trunk.load_state_dict(load_efficientnet_lite(path), strict=True)  # type: ignore[union-attr]


def _has_size(image: Image) -> bool:
    try:
        return bool(image.size())
    except ImageError:
        return False


def _without(segments: Sequence[Segment], image: Image) -> tuple[Segment, ...]:
    """Without an image, in whose place paragraphs stay apart."""
    left: list[Segment] = []
    for before, segment, behind in zip((None, *segments), segments, (*segments[1:], None), strict=False):
        between = all(isinstance(s, Text) and not s.is_control for s in (before, behind))
        if segment is not image:
            left.append(segment)
        elif between:
            left.append(Text("\n\n"))
    return tuple(left)


def _reason(error: Exception) -> str:
    if isinstance(error, BadRecordError):
        return str(error)
    return "too long" if isinstance(error, ContextOverflowError) else "unreadable"


def _user(record: Record, text: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image", "image": record.image}, {"type": "text", "text": text}]}


def _frozen_to_bf16(decoder: nn.Module) -> None:
    """Frozen weights are only read: bf16 halves their memory and saves autocast its casts."""
    for parameter in decoder.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
