"""What to learn from text besides the next token: masked tokens, halves of a document, and translations.

Functions of tensors, for models made of a `Decoder`, with `causal` off where each token is to see the whole text.
GPT-4's report says that its model predicts the next token; these are what the literature around it trains with, to hold
against that (docs/literature.md).

Shapes: B batch, T tokens, D width, L languages.

Papers: BERT (1810.04805), XLM (1901.07291), InfoNCE (1807.03748).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.processor import IGNORE_INDEX
from mm_gpt.vision.contrastive import clip_loss

MASKED, REPLACED = 0.8, 0.1
"""Of the tokens that are to be predicted: how many are shown as the mask, and how many as another token. The rest stay,
so that the model cannot rely on what it sees either."""


def mask_tokens(
    ids: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What a masked language model is shown, and what it is to say: ids and labels, both as `ids` (B, T).

    Each token is chosen with probability `rate`, by itself, so that their number is binomial. Of those chosen 80 %
    become `mask_id`, 10 % a token drawn evenly from the `vocab_size` first ids, and 10 % stay. A label stands at its
    own place, not one before it, and is `IGNORE_INDEX` elsewhere. `maskable` (B, T): False for what is never chosen,
    such as padding. Raises ConfigError for a rate that is no probability.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"the rate of masked tokens must be in [0, 1], not {rate}")
    draws = torch.rand(ids.shape, generator=generator, device=ids.device)
    chosen = draws < rate
    if maskable is not None:
        chosen &= maskable
    labels = ids.masked_fill(~chosen, IGNORE_INDEX)
    fate = torch.rand(ids.shape, generator=generator, device=ids.device)
    others = torch.randint(vocab_size, ids.shape, generator=generator, device=ids.device)
    shown = torch.where(chosen & (fate < MASKED), torch.full_like(ids, mask_id), ids)
    shown = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), others, shown)
    return shown, labels


def mean_state(hidden: Tensor, present: Tensor | None = None) -> Tensor:
    """The mean over a text's tokens: hidden (B, T, D) -> (B, D). `present` (B, T): False for padding."""
    if present is None:
        return hidden.mean(dim=1)
    weight = present.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def contrastive_segment_loss(first: Tensor, second: Tensor, *, temperature: float = 0.07) -> Tensor:
    """InfoNCE between the halves of documents, in nats, summed over the B documents; both sides ask, and are averaged.

    first, second (B, D): states of the two halves, row i of document i; they are compared by cosine. Every other
    document of the batch is a wrong answer, so that not knowing anything costs ln B a document. Raises ConfigError for
    a temperature below 0.01, where the scale of similarities is capped.
    """
    if not temperature >= 0.01:
        raise ConfigError(f"the temperature must be at least 0.01, not {temperature}")
    return clip_loss(first, second, math.log(1 / temperature)) * len(first)


# ---- Languages ----


class LanguageEmbedding(nn.Module):
    """A vector for each language that is added to a token's embedding, beside that of its position (XLM).

    It stands beside the decoder, whose weights and checkpoints know nothing of it.
    """

    def __init__(self, languages: int, width: int):
        super().__init__()
        if languages < 1:
            raise ConfigError(f"languages must be at least 1, not {languages}")
        self.table = nn.Embedding(languages, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, x: Tensor, languages: Tensor) -> Tensor:
        """x (B, T, D) and the language of each token (B, T) -> (B, T, D)."""
        return x + self.table(languages)


def translation_pairs(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    languages: tuple[int, int],
    separator: int,
    max_length: int,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sentences and their translations as rows for the translation objective (TLM): ids, positions, languages, present.

    A row is source, separator, target, separator. Positions of the target begin at 0 again, and each token has the
    language of its side, so that the words of both stand at like places. All (B, T); T is the longest row, and
    `present` is False at the padding behind the shorter ones. Masked with `mask_tokens`, a word can be found in its own
    sentence or in the other. Raises MMGPTError where the lists differ in length, and ContextOverflowError for a row of
    more than `max_length` tokens.
    """
    if len(sources) != len(targets):
        raise MMGPTError(f"{len(sources)} sentences, but {len(targets)} translations")
    rows, places, sides = [], [], []
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        left, right = [*source, separator], [*target, separator]
        if len(left) + len(right) > max_length:
            raise ContextOverflowError(f"pair {number} has {len(left) + len(right)} tokens; a row holds {max_length}")
        rows.append(torch.tensor(left + right))
        places.append(torch.tensor([*range(len(left)), *range(len(right))]))
        sides.append(torch.tensor([languages[0]] * len(left) + [languages[1]] * len(right)))
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad(rows, batch_first=True, padding_value=padding)
    present = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return ids, pad(places, batch_first=True), pad(sides, batch_first=True), present
