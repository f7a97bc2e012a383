"""GPT-1's transfer (Radford et al. 2018): a task becomes token sequences, and one linear layer reads the last state.

Four kinds of task, with ⟨s⟩ start, $ delimiter and ⟨e⟩ extract:
classification ⟨s⟩ text ⟨e⟩; entailment ⟨s⟩ premise $ hypothesis ⟨e⟩; similarity both orders of ⟨s⟩ a $ b ⟨e⟩, their
states added; multiple choice ⟨s⟩ context question $ choice ⟨e⟩, each scored, and a softmax over the scores.

New parameters are the head W_y and the embeddings of the three marks, which are ids right behind the vocabulary. The
loss is L3 = L2 + λ L1: L2 of the label, L1 of the next tokens of the labelled inputs, on all sequences of an example.
The marks are read, never predicted. L1 is the mean over a batch's tokens (the released code takes each sequence's mean
first).

Shapes: E examples, N sequences of all of them, T tokens, D width, K answers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.model.decoder import Decoder
from mm_gpt.processor import IGNORE_INDEX
from mm_gpt.tokenizer import Tokenizer

Kind = Literal["classification", "entailment", "similarity", "multiple_choice"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("a", "b"),
    "multiple_choice": ("context", "question", "choices"),
}
"""What a row of each kind holds. All are texts; `choices` is a list of them."""


# ---- Rows -> sequences ----


def kind_of(row: object) -> Kind:
    """Which task a row belongs to. Raises MMGPTError that says what is wrong with it."""
    if not isinstance(row, Mapping):
        raise MMGPTError("not an object")
    kind = next((kind for kind, fields in FIELDS.items() if all(field in row for field in fields)), None)
    if kind is None:
        known = "; ".join(", ".join(fields) for fields in FIELDS.values())
        raise MMGPTError(f"not the fields of a task ({known})")
    texts = [row[field] for field in FIELDS[kind] if field != "choices"]
    if kind == "multiple_choice":
        if not isinstance(row["choices"], list | tuple) or len(row["choices"]) < 2:
            raise MMGPTError("choices are not a list of at least two")
        texts = ["".join(texts) if all(isinstance(t, str) for t in texts) else None, *row["choices"]]
    if not all(isinstance(text, str) for text in texts):
        raise MMGPTError("a text is not a string")
    if not all(text.strip() for text in texts):
        raise MMGPTError("empty text")
    return kind


def sequences(row: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The token sequences of a row: one, two for similarity, as many as choices. `vocab_size` is the decoder's."""
    kind, encode = kind_of(row), tokenizer.encode
    start, delimiter, extract = range(vocab_size, vocab_size + 3)
    if kind == "classification":
        return [[start, *encode(row["text"]), extract]]
    if kind == "multiple_choice":
        first = encode(f"{row['context']} {row['question']}".strip())
        pairs = [(first, encode(choice)) for choice in row["choices"]]
    else:
        one, other = (encode(row[field]) for field in FIELDS[kind])
        pairs = [(one, other), (other, one)] if kind == "similarity" else [(one, other)]
    return [[start, *first, delimiter, *second, extract] for first, second in pairs]


@dataclass
class ClassifierBatch:
    """Sequences of several examples, padded on the right: a causal decoder needs no mask for that."""

    input_ids: Tensor  # (N, T)
    lengths: Tensor  # (N,)
    examples: Tensor  # (N,) the example that each sequence belongs to, ascending
    slots: Tensor  # (N,) its number in that example
    labels: Tensor  # (E,) the right answer; IGNORE_INDEX where it is not known

    def to(self, device: torch.device | str) -> "ClassifierBatch":
        return ClassifierBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate_sequences(
    examples: Sequence[Sequence[Sequence[int]]], labels: Sequence[int] | None = None, *, pad_to: int = 0
) -> ClassifierBatch:
    """`pad_to`: at least so many tokens."""
    flat = [(n, slot, ids) for n, example in enumerate(examples) for slot, ids in enumerate(example)]
    length = max(pad_to, max(len(ids) for _, _, ids in flat))
    return ClassifierBatch(
        input_ids=torch.tensor([[*ids, *[0] * (length - len(ids))] for _, _, ids in flat]),
        lengths=torch.tensor([len(ids) for _, _, ids in flat]),
        examples=torch.tensor([n for n, _, _ in flat]),
        slots=torch.tensor([slot for _, slot, _ in flat]),
        labels=torch.tensor([IGNORE_INDEX] * len(examples) if labels is None else list(labels)),
    )


# ---- The model ----


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    kind: Kind
    labels: tuple[str, ...] = ()
    """The answers, in the order of the head's outputs; none for multiple choice."""
    dropout: float = 0.1
    """Of the state that the head reads; the same for all sequences of an example."""

    def __post_init__(self) -> None:
        if self.kind == "multiple_choice" and self.labels:
            raise ConfigError("multiple choice has no labels: each row brings its own")
        if self.kind != "multiple_choice" and len(self.labels) < 2:
            raise ConfigError(f"{self.kind} needs at least two labels, not {len(self.labels)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")


class Classifier(nn.Module):
    def __init__(self, config: ClassifierConfig, decoder: Decoder):
        super().__init__()
        if not decoder.config.causal:
            raise ConfigError("a classifier needs a causal decoder: its head reads the state at the last token")
        self.config, self.decoder = config, decoder
        width, table = decoder.config.width, decoder.embedding.weight
        self.marks = nn.Parameter(torch.randn(3, width) * table.detach().float().std().item())
        self.head = nn.Linear(width, len(config.labels) or 1, bias=False)  # W_y
        nn.init.normal_(self.head.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)

    def states(self, batch: ClassifierBatch) -> Tensor:
        """Hidden states (N, T, D)."""
        ids, vocab = batch.input_ids, self.decoder.config.vocab_size
        N, T = ids.shape
        longest = self.decoder.config.max_length
        if longest < T:
            raise ContextOverflowError(f"{T} tokens do not fit into the model's context of {longest}")
        is_mark = ids >= vocab
        x = self.decoder.embed(ids.masked_fill(is_mark, 0))
        marks = self.marks[(ids - vocab).clamp_min(0)] * self.decoder.config.embedding_scale
        x = torch.where(is_mark.unsqueeze(-1), marks.to(x.dtype), x)
        return self.decoder(x, torch.arange(T, device=ids.device).expand(N, T))

    def logits(self, states: Tensor, batch: ClassifierBatch) -> Tensor:
        """(E, K), float32 or more precise; -inf where an example has fewer choices than others."""
        E, rows = len(batch.labels), torch.arange(len(states), device=states.device)
        read = states[rows, batch.lengths - 1]  # (N, D), at ⟨e⟩
        read = read * self.dropout(read.new_ones(E, read.shape[-1]))[batch.examples]
        if self.config.kind == "multiple_choice":
            scores = self.head(read)[:, 0]
            logits = scores.new_full((E, int(batch.slots.max()) + 1), -torch.inf)
            logits[batch.examples, batch.slots] = scores
        else:
            logits = self.head(read.new_zeros(E, read.shape[-1]).index_add(0, batch.examples, read))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, batch: ClassifierBatch) -> Tensor:
        return self.logits(self.states(batch), batch)

    def loss(self, batch: ClassifierBatch, *, auxiliary: float) -> tuple[Tensor, Tensor]:
        """L2 + `auxiliary` · L1, summed over the examples, and their number."""
        states = self.states(batch)
        loss = F.cross_entropy(self.logits(states, batch), batch.labels, reduction="sum")
        count = torch.tensor(len(batch.labels), device=loss.device)
        if auxiliary:
            targets = self.text_targets(batch)
            nats, tokens = self.decoder.loss(states, targets)
            loss = loss + auxiliary * count * nats / tokens
        return loss, count

    def text_targets(self, batch: ClassifierBatch) -> Tensor:
        """(N, T), the next token of each, where that is neither a mark nor padding."""
        targets = F.pad(batch.input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        real = (places < batch.lengths.unsqueeze(1)) & (targets < self.decoder.config.vocab_size)
        return targets.masked_fill(~real, IGNORE_INDEX)

    @torch.inference_mode()
    def probabilities(self, rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, float]]:
        """For each row its answers and their probabilities; those of multiple choice are numbered from 0.

        Raises MMGPTError for a row of another kind, ContextOverflowError for one that is too long.
        """
        for number, row in enumerate(rows):
            if (kind := kind_of(row)) != self.config.kind:
                raise MMGPTError(f"row {number} is {kind}; this model does {self.config.kind}")
        if not rows:
            return []
        vocab_size = self.decoder.config.vocab_size
        batch = collate_sequences([sequences(row, tokenizer, vocab_size) for row in rows]).to(self.marks.device)
        found = self(batch).softmax(dim=-1).tolist()
        names = [self.config.labels or tuple(map(str, range(len(row["choices"])))) for row in rows]
        return [dict(zip(names, values, strict=False)) for names, values in zip(names, found, strict=True)]


# ---- Without any training: the paper's heuristics ----


def mean_logprob(decoder: Decoder, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """The average natural log-probability of the continuation's tokens after the prompt."""
    total, count = _logprob(decoder, prompt, continuation)
    return total / count


def sentiment(
    decoder: Decoder, tokenizer: Tokenizer, text: str, *, words: Sequence[str] = ("positive", "negative")
) -> str:
    """Sentiment (SST-2): "very" is appended, and the word is taken that more likely comes then."""
    prompt = tokenizer.encode(f"{text} very")
    return max(words, key=lambda word: _logprob(decoder, prompt, tokenizer.encode(f" {word}"))[0])


def likeliest_choice(decoder: Decoder, tokenizer: Tokenizer, prompt: str, choices: Sequence[str]) -> int:
    """Multiple choice (RACE): the number of the choice whose tokens have the highest mean log-probability."""
    ids = tokenizer.encode(prompt)
    scores = [mean_logprob(decoder, ids, tokenizer.encode(f" {choice}")) for choice in choices]
    return max(range(len(scores)), key=scores.__getitem__)


@torch.inference_mode()
def _logprob(decoder: Decoder, prompt: Sequence[int], continuation: Sequence[int]) -> tuple[float, int]:
    if not prompt or not continuation:
        raise MMGPTError("a log-probability needs at least a token before, and one to score")
    ids = torch.tensor([[*prompt, *continuation]], device=decoder.device)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, len(prompt) - 1 : -1] = ids[0, len(prompt) :]
    hidden = decoder(decoder.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None])
    nats, count = decoder.loss(hidden, labels)
    return -float(nats), int(count)
