"""Choosing the next token from logits: greedy, temperature, top-k, nucleus (1904.09751), without repetition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def next_token_probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distributions that are sampled from: (..., V) logits -> (..., V) probabilities that sum to 1.

    top_k keeps the k most likely tokens (0: all). top_p keeps the smallest set of the most likely whose mass reaches
    p; the most likely token always stays.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kept = torch.topk(logits, top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass of everything more likely
        is_first = torch.arange(ordered.shape[-1], device=ordered.device) == 0
        ordered = ordered.where((before < top_p) | is_first, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


class Repeats:
    """The runs of `size` tokens in a growing answer, so that none comes twice; for size 0 nothing is kept."""

    def __init__(self, size: int):
        self.size = size
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}

    def add(self, ids: Sequence[int]) -> None:
        """To be called after each token, with all of them."""
        if 0 < self.size <= len(ids):
            *start, last = ids[-self.size :]
            self._next[tuple(start)] = (*self._next.get(tuple(start), ()), last)

    def completed_by(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens that, put after `ids`, would make a run that is there already."""
        if not 0 < self.size <= len(ids):
            return ()
        return self._next.get(tuple(ids[len(ids) - self.size + 1 :]), ())

    def copy(self) -> "Repeats":
        new = Repeats(self.size)
        new._next = dict(self._next)
        return new


class Sampler:
    def __init__(self, config, prompt_ids, index):
        self.config = config
        self.ids = []
        self.repeats = Repeats(config.no_repeat_ngram_size)
        self.generator = torch.Generator().manual_seed(config.seed + index)

    @property
    def adjusts(self):
        return self.config.no_repeat_ngram_size > 0

    def adjust(self, values):
        values[list(self.repeats.completed_by(self.ids))] = -torch.inf

    def accept(self, id):
        self.ids.append(id)
        self.repeats.add(self.ids)

    def copy(self):
        new = object.__new__(Sampler)
        new.__dict__.update(self.__dict__)
        new.ids = list(self.ids)
        new.repeats = self.repeats.copy()
        return new


def choose(logits, samplers, masks):
    out = []
    for row, s in zip(logits, samplers):
        if s.adjusts:
            row = row.clone()
            s.adjust(row)
        if s.config.temperature == 0:
            out.append(row.argmax())
        else:
            p = next_token_probabilities(
                row, temperature=s.config.temperature, top_k=s.config.top_k, top_p=s.config.top_p
            )
            out.append(torch.multinomial(p, 1, generator=s.generator)[0])
    return torch.stack(out)


def logprobs_of(logits, ids, top):
    lp = logits.log_softmax(-1)
    t = lp.topk(top)
    return lp.gather(1, ids[:, None])[:, 0], t.values, t.indices
