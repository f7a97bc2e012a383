"""The language stage: connector alignment, low-rank adaptation or full training on next-token prediction."""

import dataclasses
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_gpt.datasets.caption_questions import derive_questions
from mm_gpt.datasets.captioned import clean_caption, read_records
from mm_gpt.datasets.packing import pack
from mm_gpt.datasets.samples import ErrorCounter, Record
from mm_gpt.datasets.texts import is_text_source, read_texts, text_documents
from mm_gpt.document import Document, Image
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import fill, load_decoder, load_model, save_model
from mm_gpt.hub.vision_towers import load_open_clip
from mm_gpt.model.decoder import Block, Decoder
from mm_gpt.model.lora import LoRAConfig, merge_lora
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import ROLES, Batch, Example, Processor, ProcessorConfig, collate, stack_pixels
from mm_gpt.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS, question_prompt
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.loop import ParameterGroup, TrainConfig, use_bf16
from mm_gpt.vision.transforms import ImageTransformConfig, TrainTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str
    """A tar, a folder of tars or of captioned images, a `.jsonl` of text chats, or a `.txt` or folder of them without
    images; relative to the data folder."""
    repeat: float = 1.0
    """How many times an epoch; 0.5 is half of it, another half each time."""
    derived_share: float = 0.0
    """The share of captioned photos that also come with questions derived by rules from their captions."""


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
    data: str = "."
    """The folder that `sources` are in."""

    def __post_init__(self) -> None:
        if bool(self.validation) == bool(self.holdout) or not 0 <= self.holdout <= 0.5:
            raise ConfigError("give either validation sources or a holdout between 0 and 0.5")
        if self.model is None and self.start is None:
            raise ConfigError("give a model, or one to start from")


class LanguageTask:
    """A `Task` for the loop. The whole plan of an epoch follows from (seed, epoch)."""

    def __init__(self, recipe: LanguageRecipe, tokenizer: Tokenizer | None = None):
        self.recipe = recipe
        self.errors = ErrorCounter()
        sources = (*recipe.sources, *recipe.validation)
        records = [self._records(source) for source in sources]
        texts = [self._texts(source) for source in sources]
        model = recipe.model
        if tokenizer is None and recipe.tokenizer is not None:
            tokenizer = Tokenizer.from_hf_folder(Path(recipe.tokenizer))
        if tokenizer is None and recipe.start is None and model is not None and not isinstance(model.decoder, str):
            written = [text for found in records for record in found for text in _texts(record)]
            written += [text for found in texts for _, text in found]
            written += [text for source in sources for text in self._chat_texts(source)]
            prompts = [*ROLES, CAPTION_PROMPT, *OTHER_CAPTION_PROMPTS] * 4  # often enough to be learned as words
            tokenizer = Tokenizer.train([*written, *prompts], model.decoder.vocab_size)
        self.model, self.processor = build_model(recipe, tokenizer)
        self.row_length = min(recipe.row_length, self.processor.config.max_length)
        documents = [
            self._chats(source) or self._cut(found) or pictures
            for source, found, pictures in zip(sources, texts, records, strict=True)
        ]
        self.records, self.validation_records = documents[: len(recipe.sources)], documents[len(recipe.sources) :]
        if recipe.holdout:
            every = round(1 / recipe.holdout)
            self.validation_records = [records[::every] for records in self.records]
            self.records = [[r for i, r in enumerate(records) if i % every] for records in self.records]
        self._validated = list(recipe.validation or recipe.sources)
        self._plans: dict[int, tuple[list[Document], list[list[list[int]]]]] = {}
        self._first_steps: list[int] = [0]  # the first micro-batch of each epoch
        if self.errors.total:
            logger.warning(self.errors.summary())

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
        return [self._batch(step * count + i) for i in range(count)]

    def epoch_length(self, epoch: int) -> int:
        """Micro-batches in an epoch."""
        return len(self._plan(epoch)[1])

    def _batch(self, index: int) -> Batch:
        epoch = 0
        while True:
            if epoch + 1 == len(self._first_steps):
                self._first_steps.append(self._first_steps[epoch] + self.epoch_length(epoch))
            if index < self._first_steps[epoch + 1]:
                break
            epoch += 1
        documents, plan = self._plan(epoch)
        rows = [[documents[i] for i in row] for row in plan[index - self._first_steps[epoch]]]
        seed = hash((self.recipe.train.seed, epoch, index))
        return self._collate([[self.processor(document) for document in row] for row in rows], seed)

    def _plan(self, epoch: int) -> tuple[list[Document], list[list[list[int]]]]:
        """The documents of an epoch, and its micro-batches as lists of rows of document indices."""
        if epoch not in self._plans:
            rng = random.Random(f"{self.recipe.train.seed}/{epoch}")
            documents: list[Document] = []
            for source, records in zip(self.recipe.sources, self.records, strict=True):
                for record in _share(records, source.repeat, epoch, self.recipe.train.seed):
                    documents += self._documents(record, source, rng, augment=self.recipe.augment)
            rng.shuffle(documents)
            lengths = [self._length(document) for document in documents]
            fits = [i for i, length in enumerate(lengths) if length <= self.row_length]
            longer = [i for i, length in enumerate(lengths) if self.row_length < length < math.inf]
            if len(fits) + len(longer) < len(documents):
                num = len(documents) - len(fits) - len(longer)
                logger.warning("%d documents are longer than the model's context and left out", num)
            rows = [[fits[i] for i in row] for row in pack([int(lengths[i]) for i in fits], self.row_length)]
            rows += [[i] for i in longer]  # some models' images alone take more than a row
            rng.shuffle(rows)
            size = self.recipe.rows
            batches = [rows[i : i + size] for i in range(0, len(rows), size)]
            if not batches:
                raise MMGPTError("the sources hold no usable record: " + self.errors.summary())
            self._plans = {epoch: (documents, batches)}  # one epoch's plan in memory at a time
        return self._plans[epoch]

    def _length(self, document: Document) -> float:
        try:
            return len(self.processor(document))
        except ContextOverflowError:
            return math.inf

    def _documents(
        self, record: Record | Document, source: SourceConfig, rng: random.Random, *, augment: bool
    ) -> list[Document]:
        """A document of the record's captions and one of its questions, as far as it has them."""
        if isinstance(record, Document):
            return [record]
        documents = []
        if record.captions:
            captions = rng.sample(record.captions, min(len(record.captions), self.recipe.max_captions))
            prompt = CAPTION_PROMPT if rng.random() < 0.6 else rng.choice(OTHER_CAPTION_PROMPTS)
            cleaned = [clean_caption(caption) for caption in captions]
            image = _image(record, captions, rng, augment)
            documents.append(self.processor.captions(image, prompt, cleaned, id=record.key))
        if pairs := training_questions(record, source, rng, self.recipe.max_questions):
            image = _image(record, [text for pair in pairs for text in pair], rng, augment)
            documents.append(self.processor.questions(image, pairs, id=record.key))
        # The image is read with the question in view, or distances are those of the row: no two questions share it.
        if self.model.config.prefix_lm or self.model.decoder.config.positions == "relative":
            documents = [Document(d.segments + branch, id=d.id) for d in documents for branch in d.branches]
        return documents

    def _collate(self, rows: Sequence[Sequence[Example]], seed: int | None) -> Batch:
        examples = [example for row in rows for example in row]
        config = self.processor.config
        if seed is not None and self.recipe.augment and config.image is not None and config.tiling is None:
            pixels = []
            for number, image in enumerate(image for example in examples for image in example.images):
                generator = torch.Generator().manual_seed((seed * 31 + number) % 2**63)
                pixels.append(TrainTransform(config.image, generator)(image))
            pixel_values = stack_pixels(pixels, config.image)
        else:
            pixel_values = self.processor.pixels(examples)
        # Blocks are compiled once for each shape: all training batches have the same one.
        multiple = self.row_length if seed is not None and self.recipe.compile else 64
        return collate(rows, pixel_values, pad_to_multiple=multiple)

    def _texts(self, source: SourceConfig) -> list[tuple[str, str]]:
        """Name and text of each file of a source of plain texts."""
        path = Path(self.recipe.data) / source.path
        return list(read_texts(path, self.errors)) if is_text_source(path) else []

    def _cut(self, texts: Sequence[tuple[str, str]]) -> list[Record | Document]:
        return [
            document
            for name, text in texts
            for document in text_documents(text, self.processor.tokenizer, self.row_length, id=name)
        ]

    def _chats(self, source: SourceConfig) -> list[Record | Document]:
        path = Path(self.recipe.data) / source.path
        return list(read_chats(path, self.processor)) if path.suffix == ".jsonl" else []

    def _chat_texts(self, source: SourceConfig) -> list[str]:
        path = Path(self.recipe.data) / source.path
        chats = _read_messages(path) if path.suffix == ".jsonl" else ()
        return [text for _, messages in chats for message in messages for text in _written(message)]

    def _records(self, source: SourceConfig) -> list[Record | Document]:
        path = Path(self.recipe.data) / source.path
        if path.suffix == ".jsonl" or is_text_source(path):
            return []
        records: list[Record | Document] = [*read_whole_records(path, self.errors)]
        logger.info("%s: %d images", source.path, len(records))
        return records

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Mean loss per target in nats: over all validation sources, and of each."""
        return self._validate(self.model.loss)

    def _validate(self, loss_of: Callable[[Batch], tuple[Tensor, Tensor]]) -> dict[str, float]:
        total, count = 0.0, 0
        values: dict[str, float] = {}
        for source, records in zip(self._validated, self.validation_records, strict=True):
            rng = random.Random(0)
            source_total, source_count = 0.0, 0
            documents = []
            for record in records[: self.recipe.validation_images]:
                documents += self._documents(record, source, rng, augment=False)
            examples = [self.processor(document) for document in documents if self._length(document) < math.inf]
            packed = pack([len(e) for e in examples], max(self.row_length, max(map(len, examples), default=1)))
            for row in packed:
                batch = self._collate([[examples[i] for i in row]], None)
                loss, targets = loss_of(batch.to(next(self.model.parameters()).device))
                source_total += loss.item()
                source_count += int(targets)
            values[f"loss {source.path}"] = source_total / max(1, source_count)
            total, count = total + source_total, count + source_count
        return {"loss": total / max(1, count), **values}

    def samples(self) -> list[str]:
        """Greedy captions of the first validation photos."""
        from mm_gpt.inference.engine import Engine, GenerationConfig

        images = [r for records in self.validation_records for r in records[:4] if isinstance(r, Record)][:4]
        engine = Engine(self.model.eval(), self.processor)
        documents = [self.processor.chat([_user(record, CAPTION_PROMPT)]) for record in images]
        answers = engine.generate(documents, GenerationConfig(max_new_tokens=24)) if documents else []
        self.model.train()
        return [f"{record.key}: {answer.text}" for record, answer in zip(images, answers, strict=True)]

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder)


def read_whole_records(path: Path, errors: ErrorCounter) -> list[Record]:
    """The records of a source whose images can be decoded; the others are counted in `errors`.

    Each is decoded once at the start, so that a broken file is known before hours of training.
    """
    records = []
    for record in read_records(path, errors):
        try:
            Image(record.image).load()
        except ImageError as error:
            errors.add("broken image", f"{path.name}:{record.key}: {error}")
            continue
        records.append(record)
    return records


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
    from mm_gpt.hub import download
    from mm_gpt.vision.encoder import load_efficientnet_lite

    path = next(iter(download.fetch(name).values()))
    vision.tower.trunk.load_state_dict(load_efficientnet_lite(path), strict=True)  # type: ignore[union-attr]


_SIDED = re.compile(r"\b(left|right|sign|sa(ys|ying)|reads?|reading|writing|written|words?|letters?|numbers?)\b", re.I)
"""Texts that a mirror image would make untrue."""


def _image(record: Record, texts: Sequence[str], rng: random.Random, augment: bool) -> Image:
    """The record's image; with `augment`, its mirror image half the time when `texts` fit that as well."""
    return Image(record.image, augment and rng.random() < 0.5 and not any(map(_SIDED.search, texts)))


def training_questions(
    record: Record, source: SourceConfig, rng: random.Random, max_questions: int
) -> list[tuple[str, str]]:
    """(question, answer) pairs about one image: its own, and with some chance ones derived from its captions."""
    questions = rng.sample(record.questions, min(len(record.questions), max_questions))
    if record.captions and rng.random() < source.derived_share:
        questions += derive_questions(record.captions, rng, max_questions=max_questions)
    return [(training_prompt(q.question, q.answer, rng), q.answer) for q in questions]


def training_prompt(question: str, answer: str, rng: random.Random) -> str:
    """A question as users may type it: half of them with a capital letter."""
    prompt = question_prompt(question, answer)
    return prompt[:1].upper() + prompt[1:] if rng.random() < 0.5 else prompt


def read_chats(path: Path, processor: Processor) -> list[Document]:
    """Text-only chats from a .jsonl of `{"messages": [...]}`. Raises MMGPTError naming file and line."""
    documents = []
    for number, messages in _read_messages(path):
        try:
            document = processor.chat(messages, answer_starts=False)
        except MMGPTError as error:
            raise MMGPTError(f"{path}:{number}: {error}") from None
        documents.append(dataclasses.replace(document, id=f"{path.name}:{number}"))
    return documents


def _read_messages(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """The messages of each line that is not empty, with its number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 inside a string
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise MMGPTError(f"{path}: not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
        except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
            messages = None
        if not isinstance(messages, list):
            raise MMGPTError(f"{path}:{number}: not an object with a list of 'messages'")
        yield number, messages


def _written(message: Any) -> list[str]:
    """The texts of a message."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def _share(records: Sequence[Record | Document], repeat: float, epoch: int, seed: int) -> list[Record | Document]:
    """`repeat` times the records; a fraction walks through a fixed shuffle, so that all come before one repeats."""
    whole = int(repeat)
    chosen = list(records) * whole
    part = round((repeat - whole) * len(records))
    if part:
        order = list(range(len(records)))
        random.Random(seed).shuffle(order)
        chosen += [records[order[(epoch * part + i) % len(records)]] for i in range(part)]
    return chosen


def _texts(record: Record | Document) -> list[str]:
    if isinstance(record, Document):
        return []
    return [clean_caption(caption) for caption in record.captions] + [
        text for q in record.questions for text in (q.question, q.answer)
    ]


def _user(record: Record, text: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image", "image": record.image}, {"type": "text", "text": text}]}


def _frozen_to_bf16(decoder: nn.Module) -> None:
    """Frozen weights are only read: bf16 halves their memory and saves autocast its casts."""
    for parameter in decoder.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
