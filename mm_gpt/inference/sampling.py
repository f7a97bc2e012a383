"""Choosing the next token from logits: greedy, temperature, top-k, nucleus (1904.09751), without repetition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def next_token_probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that is sampled from: (V,) logits -> (V,) probabilities that sum to 1.

    top_k keeps the k most likely tokens (0: all). top_p keeps the smallest set of the most likely whose mass reaches
    p; the most likely token always stays.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kept = torch.topk(logits, top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass of everything more likely
        ordered = ordered.where((before < top_p) | (torch.arange(len(ordered), device=ordered.device) == 0), 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum()
    return probabilities


def completes_repeat(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that, put after `ids`, would make a run of `size` tokens that `ids` already holds; none for size 0."""
    if size == 0:
        return []
    starts = range(len(ids) - size + 1)
    last = ids[len(ids) - size + 1 :]
    return [ids[start + size - 1] for start in starts if ids[start : start + size - 1] == last]


def choose(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generators: list[torch.Generator] | None
) -> Tensor:
    """One token for each row: (B, V) -> (B,). Each row has its own generator, so that its batch changes nothing."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    assert generators is not None
    rows = [
        torch.multinomial(
            next_token_probabilities(row, temperature=temperature, top_k=top_k, top_p=top_p).cpu(), 1, generator=g
        )
        for row, g in zip(logits, generators, strict=True)
    ]
    return torch.cat(rows).to(logits.device)
