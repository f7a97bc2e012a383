"""Choosing the next token of many answers at once, each with its own settings.

The order is that of transformers and vLLM: logit bias; repetition, frequency and presence penalties; what a grammar or
an n-gram forbids; then, where it is sampled, temperature, top-k, nucleus (1904.09751), min-p (2407.01082). Of tokens
that are equally likely at the border of top-k or of the nucleus all are kept. An answer's draw depends on nothing but
its own logits and its own generator.

Shapes: R rows, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mm_gpt.errors import MMGPTError

SORTED = 1000
"""Weights that are sorted at once."""
BLOCK = 256
"""Weights that are summed before one of them is looked for."""


class Settings(Protocol):
    """The part of a GenerationConfig that says how tokens are chosen."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def no_repeat_ngram_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def row_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of several to one prompt: the first keeps `seed`, the others' have nothing of it."""
    if index == 0:
        return seed
    mixed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1


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


class _Counts:
    """Which ids were there, and how often: arrays that grow in place, so that a token costs the same at any length."""

    def __init__(self, ids: Iterable[int] = ()):
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.zeros(64, np.int64), np.zeros(64, np.float32)
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        place = self._places.setdefault(id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = id
        self._counts[place] += 1

    def of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """ids (n,) and counts (n,), where the values (V,) are."""
        size = len(self._places)
        counts = torch.from_numpy(self._counts[:size]).to(values)
        return torch.from_numpy(self._ids[:size]).to(values.device), counts

    def copy(self) -> "_Counts":
        new = _Counts()
        new._places, new._ids, new._counts = dict(self._places), self._ids.copy(), self._counts.copy()
        return new


class Sampler:
    """What one answer has so far, as far as its next token depends on it, and its own generator.

    prompt_ids: those beyond the vocabulary, as of images, have no penalty. index: which of several answers to one
    prompt; each has a seed of its own. Prompts with other ids draw other numbers by the same seed: answers to many
    would else all end where the numbers are small.
    """

    def __init__(self, settings: Settings, prompt_ids: Sequence[int] | Tensor, index: int = 0):
        self.settings = settings
        self.adjusts = bool(
            settings.logit_bias
            or settings.repetition_penalty != 1
            or settings.presence_penalty
            or settings.frequency_penalty
            or settings.no_repeat_ngram_size
        )
        """Whether logits are changed before a token is chosen."""
        self._bias = dict(settings.logit_bias)
        self._prompt = prompt_ids if settings.repetition_penalty != 1 else ()
        self._seen: _Counts | None = None
        self._counts = _Counts()
        self._ids: list[int] = []
        self._repeats = Repeats(settings.no_repeat_ngram_size)
        self._generator = None
        if settings.temperature > 0:
            ids = np.asarray(prompt_ids, dtype=np.int64).tobytes()
            prompt = int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")
            key = np.array([row_seed(settings.seed, index), prompt], dtype=np.uint64)
            self._generator = np.random.Generator(np.random.Philox(key=key))

    @property
    def is_greedy(self) -> bool:
        return self._generator is None

    def adjust(self, values: Tensor) -> None:
        """Bias and penalties, in place: values (V,) are logits, or log-probabilities of beams."""
        settings = self.settings
        if self._bias:
            known = [id for id in self._bias if id < len(values)]
            values[known] += torch.tensor([self._bias[id] for id in known]).to(values)
        if settings.repetition_penalty != 1:
            ids, _ = self._all_seen(len(values)).of(values)
            seen = values[ids]
            penalty = settings.repetition_penalty
            values[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if settings.frequency_penalty or settings.presence_penalty:
            ids, counts = self._counts.of(values)
            values[ids] -= settings.frequency_penalty * counts + settings.presence_penalty

    def _all_seen(self, vocab_size: int) -> _Counts:
        """The tokens of the prompt and of the answer."""
        if self._seen is None:
            ids = np.unique(np.asarray(self._prompt, dtype=np.int64))
            self._seen = _Counts([*ids[(ids >= 0) & (ids < vocab_size)].tolist(), *self._ids])
        return self._seen

    def forbid_repeats(self, values: Tensor) -> None:
        """-inf for what would repeat a run of tokens, in place; where nothing else is left, repeating is better."""
        repeats = list(self._repeats.completed_by(self._ids))
        if repeats:
            before = values[repeats]
            values[repeats] = -torch.inf
            if values.max() == -torch.inf:
                values[repeats] = before

    def accept(self, id: int) -> None:
        self._ids.append(id)
        self._repeats.add(self._ids)
        self._counts.add(id)
        if self._seen is not None:
            self._seen.add(id)

    def uniform(self) -> float:
        """The next number of its generator, from 0 to below 1."""
        assert self._generator is not None
        return float(self._generator.random())

    def copy(self) -> "Sampler":
        new = object.__new__(Sampler)
        new.__dict__.update(self.__dict__)
        new._ids, new._repeats, new._counts = list(self._ids), self._repeats.copy(), self._counts.copy()
        new._seen = None if self._seen is None else self._seen.copy()
        if self._generator is not None:
            new._generator = np.random.Generator(np.random.Philox())
            new._generator.bit_generator.state = self._generator.bit_generator.state
        return new


def constrain(values: Tensor, sampler: Sampler, mask: np.ndarray | None) -> None:
    """All that changes logits (V,) before a token is chosen, in place. mask (V,) bool: what a grammar allows."""
    sampler.adjust(values)
    if mask is not None:
        values[~torch.from_numpy(mask).to(values.device)] = -torch.inf
    sampler.forbid_repeats(values)


def choose(logits: Tensor, samplers: Sequence[Sampler], masks: Sequence[np.ndarray | None]) -> Tensor:
    """One token for each row: logits (R, V), which stay as they are -> ids (R,) on their device."""
    plain = [s.is_greedy and not s.adjusts and mask is None for s, mask in zip(samplers, masks, strict=True)]
    if all(plain):
        return logits.argmax(dim=-1)
    others = [n for n, is_plain in enumerate(plain) if not is_plain]
    ids = logits.argmax(dim=-1) if len(others) < len(plain) else torch.zeros_like(logits[:, 0], dtype=torch.long)
    for n in others:
        values, sampler = logits[n], samplers[n]
        if sampler.adjusts or masks[n] is not None:
            values = values.clone()
            constrain(values, sampler, masks[n])
        if sampler.is_greedy:
            ids[n] = values.argmax()
        else:
            kept, weights = candidates(values.float().cpu().numpy(), sampler.settings)
            ids[n] = int(kept[draw(weights, sampler.uniform())])
    return ids


def candidates(logits: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The ids (n,) that may be drawn and their weights (n,) relative to the likeliest one: logits (V,) float32."""
    highest = logits.max()
    if not np.isfinite(highest):
        raise MMGPTError("no token can be drawn: the model's logits are not finite")
    with np.errstate(over="ignore"):  # far below the highest is -inf, and never drawn
        scaled = (logits - highest) / np.float32(settings.temperature)
    ids = np.arange(len(logits))
    if 0 < settings.top_k < len(logits):
        ids = np.flatnonzero(scaled >= torch.from_numpy(scaled).topk(settings.top_k).values[-1].item())
        scaled = scaled[ids]
    weights = np.exp(scaled)
    least = settings.min_p
    if settings.top_p < 1:
        least = max(least, _least_of_nucleus(weights, settings.top_p))
    if least > 0:
        kept = np.flatnonzero(weights >= least)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _least_of_nucleus(weights: np.ndarray, top_p: float) -> float:
    """The smallest weight in the smallest set of the largest whose share reaches `top_p`."""
    needed = top_p * weights.sum(dtype=np.float64)
    above = 0.0
    while len(weights) > SORTED:  # halves without the border are only summed, not sorted
        is_large = weights >= weights.mean()
        large = weights[np.flatnonzero(is_large)]
        if len(large) in (0, len(weights)):
            break
        mass = large.sum(dtype=np.float64)
        if above + mass >= needed:
            weights = large
        else:
            above += mass
            weights = weights[np.flatnonzero(~is_large)]
    ordered = np.sort(weights)[::-1]
    reached = int(np.searchsorted(above + ordered.cumsum(dtype=np.float64), needed))
    return float(ordered[min(reached, len(ordered) - 1)])


def draw(weights: np.ndarray, uniform: float) -> int:
    """Where the cumulative weights (n,) pass the share `uniform` of their sum, from 0 to below 1."""
    if len(weights) > BLOCK:
        sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)
        before = np.concatenate([[0.0], sums.cumsum()])
        target = uniform * before[-1]
        block = _passing(before[1:], target)
        start = block * BLOCK
        return start + draw(weights[start : start + BLOCK], (target - before[block]) / sums[block])
    cumulative = weights.cumsum(dtype=np.float64)
    return _passing(cumulative, uniform * cumulative[-1])


def _passing(cumulative: np.ndarray, target: float) -> int:
    """The first place above the target; for a target that rounding put at the end, the last that adds anything."""
    place = int(np.searchsorted(cumulative, target, side="right"))
    return place if place < len(cumulative) else int(np.searchsorted(cumulative, cumulative[-1]))


def logprobs_of(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own log-probabilities: logits (R, V), ids (R,) -> theirs (R,), and the `top` highest with their ids.

    (R, min(top, V)) each, from the highest on.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Row by row: a sum over several may add in another order.
    norms = torch.stack([row.logsumexp(dim=-1) for row in logits]) if len(logits) else logits.new_zeros(0)
    best = logits.topk(min(top, logits.shape[-1]))
    return logits.gather(1, ids[:, None])[:, 0] - norms, best.values - norms[:, None], best.indices
