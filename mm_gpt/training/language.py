"""The language stage: connector alignment, low-rank adaptation or full training on next-token prediction."""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_gpt.config import check_numbers
from mm_gpt.datasets.building.shards import ShardFolder
from mm_gpt.datasets.formats.captioned import clean_caption
from mm_gpt.datasets.loading.draws import RecordSampling
from mm_gpt.datasets.loading.index import Measure
from mm_gpt.datasets.loading.loader import Loader
from mm_gpt.datasets.loading.packing import pack
from mm_gpt.datasets.loading.plan import Plan, SourceWeight
from mm_gpt.datasets.loading.reader import Reader
from mm_gpt.datasets.loading.sources import IndexedSource, SourceConfig, Unit, open_sources
from mm_gpt.datasets.loading.store import cache_of, only_here
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, Sample
from mm_gpt.document import Document, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import compact, fill, load_decoder, load_model, save_model
from mm_gpt.hub.vision_towers import load_open_clip
from mm_gpt.hub.weights import unfilled
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.flops import batch_flops
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig, pick_device
from mm_gpt.processor import IGNORE_INDEX, ROLES, Batch, Example, Processor, ProcessorConfig
from mm_gpt.system.writing import write_text
from mm_gpt.templates.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.distributed import ranks, sum_over_ranks
from mm_gpt.training.features import use_frozen_tower
from mm_gpt.training.parallel import is_sharded, shard_model, sharing
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.training.schedules import step_sizes
from mm_gpt.training.stage import LOWEST_LOSS, Decides, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig, use_bf16
from mm_gpt.vision.concepts import ConceptsConfig
from mm_gpt.vision.transforms import ImageTransformConfig

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
    concepts: ConceptsConfig | None = None
    """Concepts for the tower of `start`, where it has none."""
    concept_weights: str = "efficientnet-lite2"
    """The registry's trunk whose classifier gives their scores: the one that the tower was tuned from."""
    concept_dropout: float = 0.1
    """How often an image is shown without its concepts, where the model has any; half as often they are shown alone."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; with `model.lora` it stays frozen under its adaptation. Without
    `model`, the adaptation that `start` has becomes part of its weights."""
    dropout: float | None = None
    """Of the decoder while it trains: embeddings, attention weights, and what each layer adds. None: the model's own.
    It is not saved with the model."""
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
    feature_cache: int | None = None
    """Megabytes for what a frozen vision tower has seen, so that it need not see it again; None: 1,024 where images are
    not augmented, for then each epoch has the same ones."""
    compile: bool = False
    """Compile the decoder's blocks for training (torch.compile). On a CPU this needs a C++ compiler, and is for blocks
    that have no function of their own there, which Llama's have."""
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
        check_numbers(self, "holdout", at_least=0, below=1)
        if bool(self.validation) == bool(self.holdout):
            raise ConfigError("give either validation sources or a holdout above 0 and below 1")
        check_numbers(self, "row_length", "rows", "window_rows", "validation_images", at_least=1)
        check_numbers(self, "max_captions", "max_questions", "workers", "vision_blocks", "feature_cache", at_least=0)
        check_numbers(self, "connector_lr", "vision_lr", at_least=0)
        check_numbers(self, "exponent", at_least=0, at_most=1)
        check_numbers(self, "concept_dropout", at_least=0, at_most=0.5)
        check_numbers(self, "dropout", at_least=0, below=1)
        if self.model is None and self.start is None:
            raise ConfigError("give a model, or one to start from")


TOKENIZER_CHARACTERS = 50_000_000
"""Of the sources' texts, for a tokenizer that is learned."""


class LanguageTask:
    """A stage for the loop. The plan of the run follows from the seed and the sources."""

    on_policy: bool = False
    decides: Decides = LOWEST_LOSS
    shards: bool = True

    def __init__(
        self,
        recipe: LanguageRecipe,
        tokenizer: Tokenizer | None = None,
        *,
        built: tuple[MMGPT, Processor] | None = None,
    ):
        """`built`: a model that there is already, with its processor, in place of what the recipe says."""
        self.recipe = recipe
        self.errors = ErrorCounter()
        configs = (*recipe.sources, *recipe.validation)
        stores = [config.open(Path(recipe.data), self.errors) for config in configs]
        model = recipe.model
        if tokenizer is None and recipe.tokenizer is not None:
            tokenizer = Tokenizer.from_hf_folder(Path(recipe.tokenizer))
        is_new = built is None and tokenizer is None and recipe.start is None
        if is_new and model is not None and not isinstance(model.decoder, str):
            tokenizer = learn_tokenizer(stores, model.decoder.vocab_size)
        # Ranks that share a model get its weights from rank 0: they hold none of their own before.
        empty = self.shards and sharing(recipe.train.shard) > 1 and ranks()[0] > 0
        self.model, self.processor = build_model(recipe, tokenizer, empty=empty) if built is None else built
        self.row_length = min(recipe.row_length, self.processor.config.max_length)
        rank, world = ranks()
        self.step_sizes = step_sizes(recipe.train, recipe.rows * self.row_length * world)
        # The image is read with the question in view, or distances are those of the row: no two questions share it.
        separate = self.model.config.prefix_lm or self.model.decoder.config.positions == "relative"
        sampling = RecordSampling(recipe.max_captions, recipe.max_questions, recipe.augment, separate)
        measure, seed = Measure(self.processor, self.row_length), recipe.train.seed
        folder = Path(recipe.data)
        sources = open_sources(configs, stores, measure, sampling, seed=seed, folder=folder, errors=self.errors)
        self.sources = sources[: len(recipe.sources)]
        self.held_out = [source.plain() for source in sources[len(recipe.sources) :]]
        if recipe.holdout:
            halves = [source.split(recipe.holdout) for source in self.sources]
            self.sources, self.held_out = [a for a, _ in halves], [b for _, b in halves]
        if not any(len(source) for source in self.sources):
            raise MMGPTError("the sources hold no usable record: " + self.errors.summary())
        plan = Plan(
            self.sources,
            [SourceWeight(repeat=source.repeat, weight=source.weight) for source in recipe.sources],
            row_length=self.row_length,
            seed=seed,
            window_rows=recipe.window_rows,
            exponent=recipe.exponent,
            wait=recipe.wait,
        )
        # Blocks are compiled once for each shape: all training batches have the same one.
        multiple = self.row_length if recipe.compile else 64
        dropout = 0.0 if self.model.concepts is None else recipe.concept_dropout
        self.reader = Reader(self.sources, self.processor, recipe.augment, seed, multiple, dropout)
        self.loader = Loader(
            plan,
            self.reader,
            rows=recipe.rows,
            accumulate=self.step_sizes,
            rank=rank,
            world=world,
            workers=recipe.workers,
            errors=self.errors,
        )
        self._frozen: dict[str, Tensor] = {}
        if self.errors.total:
            logger.warning(self.errors.summary())

    # ---- what is trained ----

    def prepare(self) -> list[ParameterGroup]:
        """Freeze, cast and compile what the recipe says; what is trained."""
        recipe = self.recipe
        groups, self._frozen = prepare_language(self.model, recipe)
        if use_bf16(recipe.train.precision, self.model.device) and not is_sharded(self.model):
            megabytes = (0 if recipe.augment else 1024) if recipe.feature_cache is None else recipe.feature_cache
            use_frozen_tower(self.model, max_bytes=megabytes * 2**20)
        return groups

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": count_targets(batch)}

    def loss(self, batch: Batch) -> dict[str, Term]:
        return {"loss": Term(self.model.loss(batch)[0], count_targets(batch))}

    def tokens(self, batch: Batch) -> int:
        return int((batch.document_ids != 0).sum())

    def flops(self, batch: Batch) -> float:
        return batch_flops(self.model, batch).total

    # ---- what it is trained on ----

    def micro_batches(self, step: int, count: int) -> list[Batch]:
        assert count == self.step_sizes.count(step)
        return self.loader.micro_batches(step)

    def data_state(self, step: int) -> dict[str, Any]:
        return self.loader.state(step)

    def load_data_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Mean loss per target in nats: over all validation sources, and of each."""
        return self._validate(self.model.loss)

    def _validate(self, loss_of: Callable[[Batch], tuple[Tensor, Tensor]]) -> dict[str, float]:
        total, count = 0.0, 0.0
        values: dict[str, float] = {}
        device = next(self.model.parameters()).device
        for config, held in zip(self.recipe.validation or self.recipe.sources, self.held_out, strict=True):
            source_total, source_count = 0.0, 0.0
            for batch in self._held_out_batches(held):
                loss, targets = loss_of(batch.to(device))
                source_total += loss.item()
                source_count += int(targets)
            source_total, source_count = sum_over_ranks([source_total, source_count], device)
            values[f"loss {config.label(Path(self.recipe.data))}"] = source_total / max(1, source_count)
            total, count = total + source_total, count + source_count
        return {"loss": total / max(1, count), **values}

    def _held_out_batches(self, held: IndexedSource) -> Iterator[Batch]:
        """This rank's part of the same held-out documents each time, a row a batch, with no more images in memory than
        that."""
        rank, world = ranks()
        units = held.some(self.recipe.validation_images)
        lengths = [tokens for _, tokens in units]
        rows = pack(lengths, max(self.row_length, *lengths, 1))
        # Ranks that share a model go through it equally often: the last of them on empty rows.
        ends = -(-len(rows) // world) * world if is_sharded(self.model) else len(rows)
        for number in range(rank, ends, world):
            row = rows[number] if number < len(rows) else []
            read = [found for i in row if (found := self._read_held_out(held, units[i][0])) is not None]
            yield self.reader.batch([[example for example, _ in read]], [tile for _, tiles in read for tile in tiles])

    def _read_held_out(self, held: IndexedSource, unit: Unit) -> tuple[Example, list[Tensor]] | None:
        skipped: list[tuple[str, str]] = []
        try:
            read = self.reader.read(held.document(unit), skipped)
        except (BadRecordError, MMGPTError) as error:
            read, skipped = None, [(str(error), str(unit[0]))]
        for reason, record in skipped:
            logger.warning("not validated on %s:%s: %s", held.name, record, reason)
        return read

    def samples(self) -> list[str]:
        """Greedy captions of the first validation photos."""
        from mm_gpt.inference.engine import Engine
        from mm_gpt.inference.generation import GenerationConfig

        if is_sharded(self.model):
            logger.info("no sample outputs: each rank has a part of the model only")
            return []
        records: list[Record] = []
        for held in self.held_out:
            for number in dict.fromkeys(unit[0] for unit, _ in held.some(4)):
                try:
                    sample = held.sample(number)
                except (BadRecordError, MMGPTError):
                    continue  # validation has named it
                records += [sample] if isinstance(sample, Record) else []
        records = records[:4]
        engine = Engine(self.model.eval(), self.processor)
        documents = [self.processor.chat([_user(record, CAPTION_PROMPT)]) for record in records]
        answers = engine.generate(documents, GenerationConfig(max_new_tokens=24)) if documents else []
        self.model.train()
        return [f"{record.key}: {answer.text}" for record, answer in zip(records, answers, strict=True)]

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder, frozen=self._frozen)


def prepare_language(model: MMGPT, recipe: LanguageRecipe) -> tuple[list[ParameterGroup], dict[str, Tensor]]:
    """Freeze, cast, compile and shard what the recipe says: what is trained, and what `save_model` is to store in place
    of the frozen weights that were rounded."""
    for parameter in _connector_parameters(model):
        parameter.requires_grad_(recipe.train_connector)
    if model.vision is not None:
        model.vision.unfreeze(recipe.vision_blocks)
    if model.config.lora is None:
        model.decoder.requires_grad_(recipe.decoder == "full")
    number, recompute = sharing(recipe.train.shard), recipe.train.recompute
    device = model.device if number == 1 else pick_device(recipe.train.device)
    bf16 = use_bf16(recipe.train.precision, device)
    frozen = _frozen_to_bf16(model) if bf16 else {}
    if recipe.compile:
        compile_blocks(model.decoder, recompute=recompute, device=device)
    else:
        recompute_blocks(model.decoder, recompute)
    if number > 1:
        shard_model(model, number, device, bf16=bf16)
    groups = [ParameterGroup("decoder", [p for p in model.decoder.parameters() if p.requires_grad])]
    if model.vision is not None:
        groups.append(ParameterGroup("connector", _connector_parameters(model), recipe.connector_lr))
        groups.append(ParameterGroup("vision", list(model.vision.parameters()), recipe.vision_lr))
    return groups, frozen


def _connector_parameters(model: MMGPT) -> list[nn.Parameter]:
    """All between the tower and the decoder. Sharding replaces them."""
    found = [] if model.connector is None else [*model.connector.parameters()]
    found += [mark for mark in (model.image_marks, model.image_newline) if mark is not None]
    return found + ([] if model.concepts is None else [*model.concepts.parameters()])


def count_targets(batch: Batch) -> int:
    """The tokens that are learned."""
    return int((batch.labels != IGNORE_INDEX).sum())


def learn_tokenizer(stores: Sequence[ShardFolder], vocab_size: int) -> Tokenizer:
    """A tokenizer of what is written in the sources, up to `TOKENIZER_CHARACTERS` of it.

    It is kept beside the first source: a run that goes on, and other ranks, learn nothing again.
    """
    content = [[shard.digest for shard in store.shards] for store in stores]
    about = [vocab_size, TOKENIZER_CHARACTERS, CAPTION_PROMPT, OTHER_CAPTION_PROMPTS, content]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = cache_of(stores[0]) / f"tokenizer-{name}.json"
    with only_here(path.with_suffix(".lock")):
        if path.is_file():
            return Tokenizer.from_file(path, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
        tokenizer = Tokenizer.train(_texts_to_learn(stores), vocab_size)
        write_text(path, tokenizer.backend.to_str())
    return tokenizer


def _texts_to_learn(stores: Sequence[ShardFolder]) -> Iterator[str]:
    left = TOKENIZER_CHARACTERS
    for sample in itertools.chain.from_iterable(store.samples(ErrorCounter()) for store in stores):
        written = written_texts(sample)
        yield from written
        left -= sum(map(len, written))
        if left < 0:
            break
    yield from [*ROLES, CAPTION_PROMPT, *OTHER_CAPTION_PROMPTS] * 4  # often enough to be learned as words


def written_texts(sample: Sample) -> list[str]:
    """All that is written in a sample, for a tokenizer to learn from."""
    match sample:
        case Document():
            return [segment.text for segment in sample.segments if isinstance(segment, Text)]
        case Conversation():
            return [text for message in sample.messages for text in _message_texts(message)]
        case Record():
            captions = [clean_caption(caption) for caption in sample.captions]
            return captions + [text for q in sample.questions for text in (q.question, q.answer)]


def _message_texts(message: Any) -> list[str]:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def build_model(recipe: LanguageRecipe, tokenizer: Tokenizer | None, *, empty: bool = False) -> tuple[MMGPT, Processor]:
    """The recipe's model, from `start` or from the decoder's own weights (random ones for a complete config).

    `empty`: on the meta device, without weights. Random ones are then not drawn; others are read, and forgotten."""
    torch.manual_seed(recipe.train.seed)
    if recipe.start is not None:
        model, processor = load_model(recipe.start)
        if recipe.model is not None and model.config != recipe.model:
            raise ConfigError(f"{recipe.start} holds another model than the recipe describes")
        if recipe.lora is not None and model.config.lora is None and recipe.decoder != "full":
            model.add_lora(recipe.lora)
        if recipe.model is None and recipe.decoder == "full" and model.config.lora is not None:
            model.merge_lora()
    else:
        assert recipe.model is not None
        decoder: Decoder | None = None
        if isinstance(recipe.model.decoder, str):
            decoder, tokenizer = load_decoder(recipe.model.decoder)
        if tokenizer is None:
            raise ConfigError("a decoder that is not in the registry needs a tokenizer")
        with unfilled() if empty and decoder is None and recipe.concepts is None else nullcontext():
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
        if not empty:
            load_vision(model.vision, recipe.vision_weights)
    if recipe.concepts is not None and model.concepts is None:
        add_concepts(model, recipe.concepts, recipe.concept_weights, processor.tokenizer)
        sized = dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image)
        processor = Processor(
            processor.tokenizer, sized, vocab_size=model.decoder.config.vocab_size, template=processor.template
        )
    if recipe.decoder == "full" and isinstance(model.config.decoder, str) and model.config.lora is None:
        # Its weights are no longer those that the name stands for: they are saved with the model.
        model.config = dataclasses.replace(model.config, decoder=model.decoder.config)
    if recipe.dropout is not None:
        model.decoder.set_dropout(recipe.dropout)
    return model.to("meta") if empty else model, processor


def add_concepts(model: MMGPT, config: ConceptsConfig, name: str, tokenizer: Tokenizer) -> None:
    """Concepts from a trunk of the registry. Raises ConfigError, CheckpointError, DownloadError."""
    from mm_gpt.hub.fetching import download
    from mm_gpt.vision.efficientnet import load_efficientnet_lite

    path = next(iter(download.fetch(name).values()))
    model.add_concepts(config, load_efficientnet_lite(path, with_classifier=True), tokenizer)


def load_vision(vision: nn.Module, name: str) -> None:
    """Weights for a vision tower: a registry name (ImageNet trunk), the folder of a contrastive run, or an open_clip
    tag such as ViT-L-14/laion2b_s32b_b82k."""
    from mm_gpt.hub.fetching import download, registry
    from mm_gpt.vision.efficientnet import load_efficientnet_lite

    if name not in registry.REGISTRY and Path(name).is_dir():  # a folder must not hide what a name stands for
        fill(vision, Path(name) / "model.safetensors", prefix="vision.")
    elif "/" in name:
        vision.load_state_dict(load_open_clip(name)[0].state_dict(), strict=True)
    else:
        path = next(iter(download.fetch(name).values()))
        vision.tower.trunk.load_state_dict(load_efficientnet_lite(path), strict=True)  # type: ignore[union-attr]


def _user(record: Record, text: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image", "image": record.image}, {"type": "text", "text": text}]}


def _frozen_to_bf16(model: MMGPT) -> dict[str, Tensor]:
    """Frozen weights are only read: bf16 halves their memory and saves autocast its casts.

    Gives what is to be saved in their place: the weights as they were, in the form that a model folder stores.
    """
    kept = {}
    for name, parameter in model.decoder.named_parameters(prefix="decoder"):
        if not parameter.requires_grad:
            # Where the decoder has a name, that stands for them, and they are not saved
            if ranks()[0] == 0 and not isinstance(model.config.decoder, str):
                kept[name] = compact(parameter.detach().cpu(), name).clone()
            parameter.data = parameter.data.to(torch.bfloat16)
    return kept
