"""Prompts with their completions in numbers.

The completions of one prompt are the branches of one document: the prompt and its images are encoded once, and each
completion sees the prompt and itself alone. What is learned or scored of a completion is its text and its end mark.

Shapes: B rows, T tokens, C completions of the whole batch, D width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm_gpt.datasets.comparisons import Comparison, Completion
from mm_gpt.document import Document, Image, Message, Segment, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.model.loss import label_logprobs
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor, collate


def prompt_document(processor: Processor, comparison: Comparison) -> Document:
    """The prompt, opened for the answer. Nothing of it is a target."""
    if comparison.is_text:
        return Document(tuple(_plain(comparison.prompt)), id=comparison.key)
    return dataclasses.replace(processor.chat(_unlearned(comparison.prompt)), id=comparison.key)


def completions_document(processor: Processor, comparison: Comparison) -> Document:
    """The prompt with a branch for each completion, in their order.

    Raises MMGPTError for a comparison without completions, and what the template does.
    """
    if not comparison.completions:
        raise MMGPTError(f"{comparison.key}: a prompt without completions")
    branches = tuple(_branch(processor, comparison, completion) for completion in comparison.completions)
    return Document((), branches, id=comparison.key)


def sampled_document(processor: Processor, comparison: Comparison, sampled: Sequence[Sequence[int]]) -> Document:
    """The prompt with a branch for each run of sampled ids: they are learned as they were sampled, never from text."""
    prompt = prompt_document(processor, comparison).segments
    return Document((), tuple((*prompt, Text("", ids=tuple(ids))) for ids in sampled), id=comparison.key)


def shares_prompts(model: MMGPT) -> bool:
    """Whether completions can be branches of one row. Not where a prompt is read with its answer in view (prefix LM),
    nor where distances are those of the row: each completion is then a row of its own."""
    decoder = model.decoder.config
    return not model.config.prefix_lm and decoder.positions != "relative" and not decoder.memory_length


def _branch(processor: Processor, comparison: Comparison, completion: Completion) -> tuple[Segment, ...]:
    if comparison.is_text:
        end = Text(processor.tokenizer.end_of_text, is_control=True)
        return (*_plain(comparison.prompt), *_plain(completion.messages, is_target=True), end)
    messages = [*_unlearned(comparison.prompt), *completion.messages]
    return processor.training_chat(messages).segments


def _unlearned(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in messages]


def _plain(messages: Sequence[Message], *, is_target: bool = False) -> list[Segment]:
    """Text that is continued as it is."""
    segments: list[Segment] = []
    for message in messages:
        content = message["content"]
        for part in [content] if isinstance(content, str) else content:
            segments.append(part if isinstance(part, Image) else Text(part, is_target=is_target))
    return segments


@dataclass
class CompletionBatch:
    """Completions in a model's batch."""

    batch: Batch
    rows: Tensor  # (C,) the row of each completion
    branches: Tensor  # (C,) and its branch
    prompts: Tensor  # (C,) the number of its prompt in the batch
    keys: list[str] = field(default_factory=list)
    """Of the prompts."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "CompletionBatch":
        moved = {name: getattr(self, name).to(device) for name in ("batch", "rows", "branches", "prompts")}
        return dataclasses.replace(self, **moved)

    @property
    def belongs(self) -> Tensor:
        """(B, T), which completion the token that each position predicts belongs to; -1 for none."""
        batch = self.batch
        most = int(self.branches.max()) + 1 if len(self) else 1
        table = torch.full((len(batch.labels), most), -1, device=batch.labels.device)
        table[self.rows, self.branches] = torch.arange(len(self), device=batch.labels.device)
        own = table.gather(1, batch.branch_ids.clamp(max=most - 1))
        return own.where(batch.labels != IGNORE_INDEX, -1)


def completion_batch(
    processor: Processor,
    documents: Sequence[Document],
    *,
    separate: bool = False,
    pixel_values: Tensor | None = None,
    pad_left: bool = False,
    pad_id: int = 0,
) -> CompletionBatch:
    """Each document a row, its branches the completions; with `separate` each branch a row (see `shares_prompts`).

    `pixel_values` (N, 3, H, W) where the images are decoded already. Raises ContextOverflowError for a document that
    is too long, ImageError for a broken image, MMGPTError for a completion with nothing to learn.
    """
    rows = [(number, document) for number, document in enumerate(documents)]
    if separate:
        rows = [
            (number, dataclasses.replace(document, segments=(), branches=(document.segments + branch,)))
            for number, document in rows
            for branch in document.branches
        ]
    examples = [processor(document) for _, document in rows]
    if pixel_values is None:
        pixel_values = processor.pixels(examples)
    batch = collate([[example] for example in examples], pixel_values, pad_left=pad_left, pad_id=pad_id)
    where = [(row, branch) for row, (_, document) in enumerate(rows) for branch in range(1, len(document.branches) + 1)]
    found = CompletionBatch(
        batch,
        torch.tensor([row for row, _ in where], dtype=torch.long),
        torch.tensor([branch for _, branch in where], dtype=torch.long),
        torch.tensor([rows[row][0] for row, _ in where], dtype=torch.long),
        keys=[document.id for document in documents],
    )
    if len(found) and int((lengths := completion_lengths(found)).min()) == 0:
        empty = int(found.prompts[int(lengths.argmin())])
        raise MMGPTError(f"{documents[empty].id}: a completion without a token")
    return found


def completion_sums(values: Tensor, batch: CompletionBatch) -> Tensor:
    """(B, T) -> (C,): values at the positions that predict a completion's tokens, added up."""
    owner = batch.belongs
    inside = owner >= 0
    return values.new_zeros(len(batch)).index_add(0, owner[inside], values[inside])


def completion_lengths(batch: CompletionBatch) -> Tensor:
    """(C,), the tokens of each completion, its end mark included."""
    owner = batch.belongs
    return torch.bincount(owner[owner >= 0], minlength=len(batch))


def last_positions(batch: CompletionBatch) -> Tensor:
    """(C,), the place in its row of each completion's last token, which is its end mark unless it was cut off."""
    owner = batch.belongs
    places = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    inside = owner >= 0
    last = places.new_full((len(batch),), -1).scatter_reduce(0, owner[inside], places[inside], "amax")
    return last + 1  # the position that predicts it stands before it


def token_values(batch: CompletionBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) -> (C, N) and its mask: values at the positions that predict each completion's tokens, from the left.

    N is the longest completion's length; 0 where a completion has ended.
    """
    owner = batch.belongs
    inside = owner >= 0
    flat_owner = owner[inside]  # row by row: a completion's positions come in their order
    order = torch.argsort(flat_owner, stable=True)
    lengths = torch.bincount(flat_owner, minlength=len(batch))
    mask = torch.arange(int(lengths.max()), device=owner.device) < lengths[:, None]
    return values.new_zeros(mask.shape).masked_scatter(mask, values[inside][order]), mask


def logprobs_and_entropy(
    model: MMGPT, batch: Batch, *, temperature: float = 1.0, images: Sequence[ImageFeatures] | None = None
) -> tuple[Tensor, Tensor]:
    """(B, T) each, in nats: of every label the log-probability under logits / `temperature`, which has a gradient, and
    the entropy in its place, which has none. 0 where nothing is learned. `images`: see `MMGPT.forward`."""
    decoder = model.decoder
    hidden = model(batch, images=images)
    return label_logprobs(
        hidden, decoder.head_weight, batch.labels, softcap=decoder.config.logit_softcap, temperature=temperature
    )


def token_logprobs(
    model: MMGPT, batch: Batch, *, temperature: float = 1.0, images: Sequence[ImageFeatures] | None = None
) -> Tensor:
    """(B, T), the log-probability in nats of every label under logits / `temperature`; 0 where nothing is learned."""
    return logprobs_and_entropy(model, batch, temperature=temperature, images=images)[0]
