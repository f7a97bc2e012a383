"""MetaLM's pretraining (2206.06336): a causal decoder with a bidirectional encoder docked to it, on plain text."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mm_gpt import config as configs
from mm_gpt.config import check_numbers
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import ConfigError
from mm_gpt.hub.checkpoint import fill, load_model, save_model
from mm_gpt.hub.weights import read_json, write_json
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.semicausal import SemiCausalConfig, SemiCausalLM, Spans, outside_labels, sample_spans
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor
from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.training.stage import ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig

CONFIG_FILE, WEIGHTS_FILE = "semicausal.json", "semicausal.safetensors"
"""The encoder and the connector; the decoder beside them is a model folder like any other."""


@dataclass(frozen=True, kw_only=True)
class SemiCausalRecipe:
    """A complete description of one run."""

    train: TrainConfig
    model: SemiCausalConfig
    sources: tuple[SourceConfig, ...]
    """Plain texts, or chats."""
    holdout: float = 0.1
    tokenizer: str | None = None
    row_length: int = 2048
    rows: int = 4
    shortest: int = 64
    longest: int = 128
    """Tokens in a span."""
    share: float = 0.25
    """Of the tokens that are in spans."""
    train_last: int = 2
    """How many of the encoder's last blocks are trained: the others belong to its own pretraining."""
    encoder: str | None = None
    """Weights for the encoder: the folder of a run of this kind. None: random ones, and then all of it is trained."""
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", above=0, below=1)
        check_numbers(self, "share", at_least=0, below=1)
        check_numbers(self, "rows", "shortest", at_least=1)
        check_numbers(self, "row_length", at_least=2)
        check_numbers(self, "train_last", at_least=0)
        if self.longest < self.shortest:
            raise ConfigError(f"longest must be at least shortest, {self.shortest}, not {self.longest}")
        if self.longest > self.model.encoder.max_length:
            raise ConfigError(f"spans of {self.longest} tokens: the encoder reads {self.model.encoder.max_length}")

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        shared |= {"model": ModelConfig(decoder=self.model.decoder), "image": None}
        return LanguageRecipe(**shared, decoder="full", augment=False)


class SemiCausalTask(LanguageTask):
    """A `Stage` for the loop. Spans follow from the seed and the tokens of their row."""

    model: SemiCausalLM  # type: ignore[assignment]
    shards = False
    flops = None  # type: ignore[assignment]  # those of the encoder are not known

    def __init__(self, recipe: SemiCausalRecipe):
        super().__init__(recipe.language())
        self.spans_of = recipe
        self.decoder_alone = cast(MMGPT, self.model)
        self.model = SemiCausalLM(recipe.model, self.decoder_alone.decoder)
        if recipe.encoder is not None:
            _load_docked(self.model, Path(recipe.encoder))

    def prepare(self) -> list[ParameterGroup]:
        last = self.spans_of.train_last if self.spans_of.encoder is not None else len(self.model.encoder.blocks)
        self.model.freeze_encoder(train_last=last)
        if self.spans_of.encoder is None:
            self.model.encoder.requires_grad_(True)
        for part in (self.model.decoder, self.model.encoder):
            recompute_blocks(part, self.recipe.train.recompute)
        return [
            ParameterGroup("decoder", list(self.model.decoder.parameters())),
            ParameterGroup("encoder", [*self.model.encoder.parameters(), *self.model.connector.parameters()]),
        ]

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": int((outside_labels(batch.labels, self._spans(batch)) != IGNORE_INDEX).sum())}

    def loss(self, batch: Batch) -> dict[str, Term]:
        total, count = self._outside(batch)
        return {"loss": Term(total, int(count))}

    def _outside(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.model.loss(batch, self._spans(batch))

    def _spans(self, batch: Batch) -> list[Spans]:
        """Spans of each row. What is sampled follows from the row's own tokens, so that a repeated step is the same."""
        spans: list[Spans] = []
        for ids, documents in zip(batch.input_ids.tolist(), batch.document_ids.tolist(), strict=True):
            generator = torch.Generator().manual_seed(hash((self.recipe.train.seed, *ids)) % 2**63)
            limits = {"shortest": self.spans_of.shortest, "longest": self.spans_of.longest}
            spans.append(
                sample_spans(len(ids), generator=generator, document_ids=documents, share=self.spans_of.share, **limits)
            )
        return spans

    def validate(self) -> dict[str, float]:
        """Mean loss per target in nats outside of spans, and of the decoder alone, without any."""
        docked = self._validate(self._outside)
        alone = self._validate(self.decoder_alone.loss)
        return {**docked, "loss without spans": alone["loss"]}

    def samples(self) -> list[str]:
        return []

    def save(self, folder: Path) -> None:
        save_model(self.decoder_alone, self.processor, folder)
        docked = {k: v for k, v in self.model.state_dict().items() if not k.startswith("decoder.")}
        write_tensors(docked, folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, configs.to_dict(self.model.config))


def load_semicausal(folder: Path) -> tuple[SemiCausalLM, Processor]:
    """The model of a run, docked encoder and all. `mm_gpt.load(folder)` gives its decoder alone.

    Raises CheckpointError naming the file that is missing or does not fit.
    """
    alone, processor = load_model(folder)
    where = folder / CONFIG_FILE
    model = SemiCausalLM(configs.from_dict(SemiCausalConfig, read_json(where), where=str(where)), alone.decoder)
    _load_docked(model, folder)
    return model.eval(), processor


def _load_docked(model: SemiCausalLM, folder: Path) -> None:
    fill(model, folder / WEIGHTS_FILE, skip=lambda name: name.startswith("decoder."))
