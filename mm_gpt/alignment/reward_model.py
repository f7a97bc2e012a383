"""A reward model: any of our models with one linear layer that reads how good an answer is off its last state.

The score is that of the answer's last token, its end mark. Its place is known from how the answer was written into the
batch, and never looked for: neither padding nor an end mark inside the prompt can move it (2009.01325, 2203.02155). The
same layer on every token is a critic, which PPO begins with.

Shapes: B rows, T tokens, C completions of all prompts, D width.
"""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt import config as configs
from mm_gpt.alignment.completions import (
    CompletionBatch,
    completion_batch,
    completion_lengths,
    completions_document,
    last_positions,
    shares_prompts,
)
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparison, Completion
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document
from mm_gpt.errors import CheckpointError, ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.weights import open_safetensors, read_json
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Batch, Processor
from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.system.writing import write_text

logger = logging.getLogger(__name__)
WEIGHTS, CONFIG = "reward_head.safetensors", "reward_model.json"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """What a folder says about its reward model besides the weights."""

    centred_on: int = 0
    """Demonstrations, or preferred answers, whose mean score is 0. 0: the scores have no zero of their own."""

    def __post_init__(self) -> None:
        check_numbers(self, "centred_on", at_least=0)


class RewardModel(nn.Module):
    """`model` with a scalar head: weight (1, D), bias (1,), both float32."""

    def __init__(self, model: MMGPT):
        """Raises ConfigError for a decoder that is not causal: its last state would be no summary of what came before.

        The head is drawn with a standard deviation of 1 / √(D + 1), as in 2009.01325.
        """
        super().__init__()
        if not model.decoder.config.causal:
            raise ConfigError("a reward model needs a causal decoder: its head reads the state at the last token")
        self.model = model
        width = model.decoder.config.width
        self.head = nn.Linear(width, 1, device=model.device)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.head.bias)
        self.eval()

    def train(self, mode: bool = True) -> "RewardModel":
        """Stays in evaluation mode: with dropout a pair would be judged by two different models, and what is learned is
        to be what is judged by."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def scores(self, batch: CompletionBatch, images: Sequence[ImageFeatures] | None = None) -> Tensor:
        """The reward of each completion (C,), float32: the head on the state of its last token.

        `images` are those of `MMGPT.image_tokens`, where they are known already.
        """
        hidden = self.model(batch.batch, images=images)  # (B, T, D)
        return self._score(hidden[batch.rows, last_positions(batch)])

    def values(self, batch: Batch, images: Sequence[ImageFeatures] | None = None) -> Tensor:
        """The head on every token (B, T), float32: a critic's values."""
        return self._score(self.model(batch, images=images))

    def _score(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…). In float32 also inside autocast: pairs are told apart by small differences."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return F.linear(hidden.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype)).squeeze(-1)


# ---- Comparisons -> scores ----


def fitting_documents(processor: Processor, comparison: Comparison, *, separate: bool) -> list[Document]:
    """A prompt with its completions, in order, as `completion_batch` takes them: in one document, or where the context
    is too short for all of them, in as few as there must be.

    `separate`: each completion is to have a row of its own (see `shares_prompts`). Raises ContextOverflowError naming
    the prompt when a completion does not fit even alone: nothing is ever cut.
    """
    document = completions_document(processor, comparison)
    return _fitting(processor, document, separate)


def _fitting(processor: Processor, document: Document, separate: bool) -> list[Document]:
    number = len(document.branches)
    if number == 1 or not separate:
        try:
            processor(document)
            return [document]
        except ContextOverflowError:
            if number == 1:
                raise
    halves = (document.branches[: number // 2], document.branches[number // 2 :])
    return [d for half in halves for d in _fitting(processor, dataclasses.replace(document, branches=half), separate)]


@dataclass(frozen=True)
class Scored:
    """What a reward model says about the completions of one prompt, in their order."""

    scores: tuple[float | None, ...]
    """None for a completion that cannot be read."""
    tokens: tuple[int, ...]
    """Of each completion, its end mark included; 0 for one that cannot be read."""


WINDOW = 64
"""Comparisons among which rows of like length are looked for."""


def score_comparisons(
    model: RewardModel,
    processor: Processor,
    comparisons: Iterable[Comparison],
    errors: ErrorCounter,
    *,
    batch_tokens: int = 4096,
) -> Iterator[Scored]:
    """The scores of every completion, comparison by comparison. What cannot be read is counted and has none.

    Rows of like length are read together, up to `batch_tokens` with their padding. They are the rows that the model was
    trained on: there is one way to write a completion.
    """
    separate, remaining = not shares_prompts(model.model), iter(comparisons)
    while window := list(itertools.islice(remaining, WINDOW)):
        rows = [row for n, c in enumerate(window) for row in _rows_of(processor, c, n, errors, separate=separate)]
        rows.sort(key=lambda row: row.length)
        scores: list[list[float | None]] = [[None] * len(comparison.completions) for comparison in window]
        tokens = [[0] * len(comparison.completions) for comparison in window]
        for group in _groups(rows, batch_tokens):
            for row, found in zip(group, _scored(model, processor, group, errors, separate=separate), strict=True):
                for place, (score, length) in enumerate(found, start=row.first):
                    scores[row.comparison][place], tokens[row.comparison][place] = score, length
        yield from (Scored(tuple(own), tuple(lengths)) for own, lengths in zip(scores, tokens, strict=True))


@dataclass(frozen=True)
class _Row:
    """Completions of one prompt that are read in one row."""

    document: Document
    length: int
    """In tokens."""
    comparison: int
    """Its number in the window."""
    first: int
    """The number of its first completion."""


def _rows_of(
    processor: Processor, comparison: Comparison, number: int, errors: ErrorCounter, *, separate: bool
) -> list[_Row]:
    """The rows of a comparison; of one that does not fit as a whole, those of the completions that do."""
    try:
        documents = fitting_documents(processor, comparison, separate=separate)
    except MMGPTError as error:
        if len(comparison.completions) > 1:
            alone = [dataclasses.replace(comparison, completions=(own,)) for own in comparison.completions]
            apart = [_rows_of(processor, each, number, errors, separate=separate) for each in alone]
            return [dataclasses.replace(row, first=place) for place, rows in enumerate(apart) for row in rows]
        count_unusable(errors, comparison, error)
        return []
    firsts = itertools.accumulate((len(document.branches) for document in documents), initial=0)
    return [
        _Row(document, len(processor(document)), number, first)
        for document, first in zip(documents, firsts, strict=False)
    ]


def count_unusable(errors: ErrorCounter, comparison: Comparison, error: MMGPTError) -> None:
    """Counts a comparison, or a completion, that is skipped, by what is wrong with it."""
    match error:
        case ContextOverflowError():
            reason = "longer than the context"
        case ImageError():
            reason = "image that cannot be read"
        case _:
            reason = "cannot be scored"
    errors.add(reason, f"{comparison.key}: {error}")


def _groups(rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
    """Rows, whose lengths ascend, in batches that take up to `budget` tokens when padded."""
    group: list[_Row] = []
    for row in rows:
        if group and (len(group) + 1) * row.length > budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.no_grad()
def _scored(
    model: RewardModel, processor: Processor, rows: Sequence[_Row], errors: ErrorCounter, *, separate: bool
) -> list[list[tuple[float, int]]]:
    """Of each row, the scores and lengths of its completions; nothing where its images cannot be read."""
    try:
        batch = completion_batch(processor, [row.document for row in rows], separate=separate).to(model.device)
    except MMGPTError as error:
        if len(rows) > 1:  # one of them spoils the batch
            return [found for row in rows for found in _scored(model, processor, [row], errors, separate=separate)]
        count_unusable(errors, Comparison(rows[0].document.id, ()), error)
        return [[]]
    found: list[list[tuple[float, int]]] = [[] for _ in rows]
    scores, lengths = model.scores(batch).tolist(), completion_lengths(batch).tolist()
    for row, score, length in zip(batch.prompts.tolist(), scores, lengths, strict=True):
        found[row].append((score, length))
    return found


class ModelReward:
    """A reward model as a reward: a callable of prompts and their answers, called like its folder or its run.

    Answers are scored by their text and an end mark, as in training, whatever tokens they were sampled as: the model
    may have another tokenizer than who wrote them. One that cannot be scored has None, and is counted in `errors`.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu", batch_tokens: int = 4096):
        """Raises what `load_reward_model` does."""
        model, self.processor = load_reward_model(folder)
        self.model = model.to(device).requires_grad_(False)
        self.folder = reward_folder(folder) or Path(folder)
        """Of the model itself, where `folder` is that of its run."""
        path = self.folder.resolve()
        self.name = path.parent.name if path.name == "best" else path.name
        self.batch_tokens = batch_tokens
        self.errors = ErrorCounter()

    def __call__(
        self, comparisons: Sequence[Comparison], answers: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> list[float | None]:
        """`comparisons[i]` is the prompt that `answers[i]` answers. Those of one prompt share one reading of it."""
        comparisons = list(comparisons)  # alive until the end: they are told apart by their ids
        grouped: dict[int, list[int]] = {}
        for number, comparison in enumerate(comparisons):
            grouped.setdefault(id(comparison), []).append(number)
        asked = [
            dataclasses.replace(comparisons[own[0]], completions=tuple(answer_of(answers[at]) for at in own))
            for own in grouped.values()
        ]
        found: list[float | None] = [None] * len(answers)
        scored = score_comparisons(self.model, self.processor, asked, self.errors, batch_tokens=self.batch_tokens)
        for own, of_prompt in zip(grouped.values(), scored, strict=True):
            for place, score in zip(own, of_prompt.scores, strict=True):
                found[place] = score
        return found


def answer_of(text: str) -> Completion:
    """A completion that says so."""
    return Completion(({"role": "assistant", "content": [text]},))


# ---- Folders ----


def save_reward_model(
    model: RewardModel,
    processor: Processor,
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] | None = None,
    shift: float = 0.0,
    centred_on: int = 0,
) -> None:
    """Write the model, and the head beside it, into an existing folder. What half precision would round is stored in
    float32, so that scores stay what they were.

    `frozen`: as `save_model` takes it. `shift` is added to the bias that is stored: minus the mean score of
    `centred_on` demonstrations, say. Raises CheckpointError naming what cannot be stored.
    """
    if not math.isfinite(shift) or not all(p.isfinite().all() for p in model.head.parameters()):
        raise CheckpointError(f"{folder}: the head of the reward model holds values that are no finite numbers")
    save_model(model.model, processor, folder, frozen=frozen, exact=True)
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach() + shift}
    write_tensors({name: tensor.float() for name, tensor in head.items()}, folder / WEIGHTS)
    config = configs.to_dict(RewardModelConfig(centred_on=centred_on))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def reward_folder(name: str | Path) -> Path | None:
    """The folder of a reward model: `name` itself or, of a run, the best one in it. None for anything else."""
    folder = Path(name)
    return next((path for path in (folder, folder / "best") if (path / CONFIG).is_file()), None)


def is_reward_model(name: str | Path) -> bool:
    """Whether a folder holds what `save_reward_model` writes, or is that of a run that did."""
    return reward_folder(name) is not None


def load_reward_model(name: str | Path) -> tuple[RewardModel, Processor]:
    """A reward model that `mm-gpt train reward` wrote, by its folder or that of the run, on the CPU.

    Raises CheckpointError naming what is missing or does not fit, also where the folder holds another kind of model.
    """
    if not Path(name).is_dir():
        raise CheckpointError(f"{name}: no such folder; a reward model is one that `mm-gpt train reward` wrote")
    folder = reward_folder(name)
    if folder is None:
        raise CheckpointError(f"{name}: not the folder of a reward model: it has no {CONFIG}")
    read_config(folder)
    language, processor = load_model(folder)
    model = RewardModel(language)
    load_head(model, folder)
    return model, processor


def load_head(model: RewardModel, folder: Path) -> None:
    """The head of a reward model's folder. Raises CheckpointError naming what is missing or does not fit."""
    path = folder / WEIGHTS
    with open_safetensors(path) as file:
        names = set(file.keys())
        if names != {"weight", "bias"}:
            raise CheckpointError(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}, not weight and bias")
        for name, target in (("weight", model.head.weight), ("bias", model.head.bias)):
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise CheckpointError(f"{path}: {name} has shape {shape}, not {tuple(target.shape)}")
            with torch.no_grad():
                target.copy_(file.get_tensor(name))
    if not all(p.isfinite().all() for p in model.head.parameters()):
        raise CheckpointError(f"{path}: holds values that are no finite numbers")


def read_config(folder: Path) -> RewardModelConfig:
    """Raises CheckpointError or ConfigError naming the file and key."""
    return configs.from_dict(RewardModelConfig, read_json(folder / CONFIG), where=str(folder / CONFIG))
