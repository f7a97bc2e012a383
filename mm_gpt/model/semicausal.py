"""MetaLM's semi-causal language model: a causal decoder that docks a bidirectional encoder (2206.06336).

Some spans of a text are read by the encoder, each alone and in both directions. What it makes of them stands, through a
linear connector, in the decoder's input instead of their tokens. Only tokens outside of spans are learned: every state
of a span has seen the whole of it.

Shapes: B rows, T tokens, N spans of all rows, L tokens of the longest one, S tokens of all spans together, D width of
the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.masks import attention_mask
from mm_gpt.processor import IGNORE_INDEX, Batch

Spans = Sequence[tuple[int, int]]
"""[start, end) ranges of one row's tokens that do not overlap."""


@dataclass(frozen=True, kw_only=True)
class SemiCausalConfig:
    decoder: DecoderConfig
    encoder: DecoderConfig
    """Of the same vocabulary, and not causal. Its context is that of one span."""

    def __post_init__(self) -> None:
        if self.encoder.causal or not self.decoder.causal:
            raise ConfigError("the decoder must be causal, and the encoder must not")
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise ConfigError(
                f"the encoder's vocab_size {self.encoder.vocab_size} is not the decoder's {self.decoder.vocab_size}"
            )


class SemiCausalLM(nn.Module):
    """`spans` has one list for each row of the batch; without any span this is the plain language model."""

    def __init__(self, config: SemiCausalConfig, decoder: Decoder | None = None):
        """`decoder` has weights already; None: random ones."""
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder) if decoder is None else decoder
        self.encoder = Decoder(config.encoder)
        for part in (self.encoder,) if decoder is not None else (self.decoder, self.encoder):
            if not part.embedding.weight.is_meta:
                init_weights(part)
        self.connector = nn.Linear(config.encoder.width, config.decoder.width)

    def freeze_encoder(self, *, train_last: int = 2) -> None:
        """Train exactly the last blocks of the encoder; what the decoder and the connector do stays as it is."""
        blocks = self.encoder.blocks
        if not 0 <= train_last <= len(blocks):
            raise ConfigError(f"cannot train the last {train_last} blocks: the encoder has {len(blocks)}")
        self.encoder.requires_grad_(False)
        for block in blocks[len(blocks) - train_last :]:
            block.requires_grad_(True)

    def encode(self, batch: Batch, spans: Sequence[Spans]) -> Tensor:
        """The decoder's input (S, D) at all tokens in spans, row by row. Each span is a text of its own."""
        texts = [ids[start:end] for ids, own in zip(batch.input_ids, spans, strict=True) for start, end in own]
        ids = pad_sequence(texts, batch_first=True)  # (N, L)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        is_token = positions < torch.tensor([len(text) for text in texts], device=ids.device).unsqueeze(1)
        # Padding sees padding only: a row of the mask without any True would make its softmax NaN.
        mask = None if is_token.all() else (is_token.unsqueeze(2) == is_token.unsqueeze(1)).unsqueeze(1)
        states = self.encoder(self.encoder.embed(ids), positions, mask=mask)
        return self.connector(states[is_token])

    def embed(self, batch: Batch, spans: Sequence[Spans]) -> Tensor:
        """Embeddings (B, T, D), before positions. Raises MMGPTError naming the row of a span that cannot be."""
        check_spans(spans, batch)
        x = self.decoder.embed(batch.input_ids)
        if not any(spans):
            return x
        spans = [sorted(own) for own in spans]
        return x.masked_scatter(inside(spans, x).unsqueeze(-1), self.encode(batch, spans).to(x.dtype))

    def forward(self, batch: Batch, spans: Sequence[Spans]) -> Tensor:
        """Hidden states (B, T, D); logits are `decoder.logits` of the positions that need them."""
        return self.decoder(self.embed(batch, spans), batch.position_ids, mask=attention_mask(batch))

    def loss(self, batch: Batch, spans: Sequence[Spans]) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy in nats outside of spans, and the number of supervised positions."""
        return self.decoder.loss(self(batch, spans), outside_labels(batch.labels, spans))


def inside(spans: Sequence[Spans], like: Tensor) -> Tensor:
    """(B, T), True at the tokens of spans; `like` (B, T, …) gives the size and the device."""
    found = torch.zeros(like.shape[:2], dtype=torch.bool)
    for row, own in enumerate(spans):
        for start, end in own:
            found[row, start:end] = True
    return found.to(like.device)


def outside_labels(labels: Tensor, spans: Sequence[Spans]) -> Tensor:
    """Labels (B, T), already shifted, without those of tokens in spans.

    Position t learns token t + 1: the one before a span is silent, the last one of a span learns what follows it.
    Silencing one position less would have the span's last token learned from a state that was made of it.
    """
    next_is_inside = F.pad(inside(spans, labels)[:, 1:], (0, 1))
    return labels.masked_fill(next_is_inside, IGNORE_INDEX)


def check_spans(spans: Sequence[Spans], batch: Batch) -> None:
    """Raises MMGPTError unless each span lies in one document and branch, and none overlaps another."""
    if len(spans) != len(batch.input_ids):
        raise MMGPTError(f"spans of {len(spans)} rows came for {len(batch.input_ids)} rows")
    for row, own in enumerate(spans):
        if not own:
            continue
        parts = list(zip(batch.document_ids[row].tolist(), batch.branch_ids[row].tolist(), strict=True))
        last = 0
        for start, end in sorted(own):
            if not 0 <= start < end <= len(parts):
                raise MMGPTError(f"row {row}: span [{start}, {end}) is empty or outside of the {len(parts)} tokens")
            if start < last:
                raise MMGPTError(f"row {row}: span [{start}, {end}) overlaps the one before it")
            if len(set(parts[start:end])) > 1 or parts[start][0] == 0:
                raise MMGPTError(f"row {row}: span [{start}, {end}) crosses documents or branches, or is padding")
            last = end


def sample_spans(
    length: int,
    *,
    generator: torch.Generator,
    document_ids: Sequence[int] | None = None,
    shortest: int = 64,
    longest: int = 128,
    share: float = 0.25,
) -> list[tuple[int, int]]:
    """Random spans of a row, in order, each of `shortest` to `longest` tokens and in one document.

    Together they have `share` of the tokens that are not padding, as long as documents have room for them, and none
    when that is less than the shortest. document_ids: of each token, 0 is padding; None: one document.
    """
    if not 0 < shortest <= longest:
        raise ConfigError(f"shortest must be positive and at most longest, not {shortest} and {longest}")
    if not 0 <= share < 1:
        raise ConfigError(f"share must be in [0, 1), not {share}")
    if document_ids is not None and len(document_ids) != length:
        raise MMGPTError(f"document_ids of {len(document_ids)} tokens came for {length} tokens")

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    free = _documents([1] * length if document_ids is None else document_ids)
    budget = int(share * sum(end - start for start, end in free))
    spans = []
    while budget >= shortest and free:
        # What a span leaves of the budget is nothing, or enough for another one.
        size = budget if budget <= longest else draw(shortest, max(shortest, min(longest, budget - shortest)))
        size = min(size, max(end - start for start, end in free))
        if size < shortest:
            break
        places = [(n, first) for n, (start, end) in enumerate(free) for first in range(start, end - size + 1)]
        number, first = places[draw(0, len(places) - 1)]
        start, end = free[number]
        free[number : number + 1] = [(start, first), (first + size, end)]
        spans.append((first, first + size))
        budget -= size
    return sorted(spans)


def _documents(document_ids: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of equal ids, padding left out."""
    bounds = [0, *(i for i in range(1, len(document_ids)) if document_ids[i] != document_ids[i - 1])]
    ends = [*bounds[1:], len(document_ids)]
    return [(start, end) for start, end in zip(bounds, ends, strict=True) if start < end and document_ids[start]]
