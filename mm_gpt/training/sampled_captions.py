"""Captions that a model in training samples, many side by side.

The engine serves requests that come and go. Here all prompts are known at once, and so are their images' features,
which the gradient needs afterwards.

Shapes: P prompts, k samples of each, R = P k rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_gpt.model.cache import KVCache
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Batch

TOGETHER = 0.75
"""Rows that have ended are taken out of the batch when at most this share of it is left."""


@torch.no_grad()
def write_captions(
    model: MMGPT,
    prompts: Batch,
    images: Sequence[ImageFeatures],
    *,
    samples: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    generator: torch.Generator | None,
) -> list[list[tuple[int, ...]]]:
    """`samples` answers to each of P prompts, which are padded on their left: tokens up to and with the one that ends.

    They are drawn from the model's own probabilities, or with no `generator` the likeliest token each time. The prompt
    is read once for all of its samples, and all rows go side by side.
    """
    decoder, device = model.decoder, prompts.input_ids.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else decoder.dtype
    num_rows, width = len(prompts.input_ids) * samples, prompts.input_ids.shape[1]
    cache = KVCache(decoder.config, num_rows // samples, width + max_new_tokens, dtype=dtype, device=device)
    logits = decoder.logits(model(prompts, cache, images)[:, -1])
    first = torch.arange(num_rows, device=device) // samples  # the prompt of each row
    cache.select_rows(first)
    logits, live = logits[first], torch.arange(num_rows)
    last = prompts.position_ids[first, -1]
    positions = (last if last.dim() == 1 else last.amax(dim=1)) + 1
    is_prompt = prompts.document_ids[first] > 0  # (R, T): what is padding is never looked at
    # Each row has its own numbers, so that none depends on when others end.
    numbers = None if generator is None else torch.rand(num_rows, max_new_tokens, generator=generator).double()
    ends = torch.tensor(end_ids)
    written = torch.zeros(num_rows, max_new_tokens, dtype=torch.long)
    lengths = torch.full((num_rows,), max_new_tokens)
    for step in range(max_new_tokens):
        if model.config.image_token_id is not None:  # a word of the vocabulary, but none that can be said
            logits[:, model.config.image_token_id] = -torch.inf
        ids = _draw(logits, None if numbers is None else numbers[live, step].to(device))
        written[live, step] = ids.cpu()
        has_ended = torch.isin(written[live, step], ends) & (lengths[live] == max_new_tokens)
        lengths[live[has_ended]] = step + 1
        going = lengths[live] > step + 1
        if step + 1 == max_new_tokens or not going.any():
            break
        if going.sum() <= TOGETHER * len(live):
            kept = going.nonzero().squeeze(1)
            live, kept = live[kept], kept.to(device)
            cache.select_rows(kept)
            ids, positions, is_prompt = ids[kept], positions[kept], is_prompt[kept]
        mask = None
        if not is_prompt.all():
            new = is_prompt.new_ones(len(live), step + 1)
            mask = torch.cat([is_prompt, new], dim=1)[:, None, None]  # (R, 1, 1, T + step + 1)
        hidden = decoder(decoder.embed(ids)[:, None], positions[:, None], mask=mask, cache=cache)
        logits, positions = decoder.logits(hidden[:, -1]), positions + 1
    rows = [tuple(ids[:length]) for ids, length in zip(written.tolist(), lengths.tolist(), strict=True)]
    return [rows[at : at + samples] for at in range(0, num_rows, samples)]


def _draw(logits: Tensor, numbers: Tensor | None) -> Tensor:
    """(R, V) -> (R,): the likeliest ids, or those at `numbers` (R,), 0..1, of the cumulated probabilities."""
    if numbers is None:
        return logits.argmax(dim=-1)
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    places = (numbers[:, None] * cumulated[:, -1:]).contiguous()
    return torch.searchsorted(cumulated, places, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
