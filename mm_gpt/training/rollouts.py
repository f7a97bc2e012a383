"""Rollouts: what a model that is being trained answers, many prompts and many answers to each side by side.

The engine serves requests that come and go, from weights that stay. Here all prompts are known at once, their weights
have just changed, and of each token the trainer wants the log-probability that it was drawn with, exactly: a policy
gradient is that of the distribution that was sampled from.

Shapes: P prompts, R rows (one a sample), T tokens, V vocabulary.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mm_gpt.config import check_numbers
from mm_gpt.document import Document
from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.inference.sampling import row_seed
from mm_gpt.inference.side_by_side import CompiledRows, DecoderCopy, Rows, TorchRows, can_copy
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Example, Processor, collate

MAX_TOKENS = 1 << 15
"""Tokens of all rows that are sampled side by side, prompts included: what keys and values may take."""
BLOCK = 256
"""Probabilities that are summed before one of them is looked for."""
VISION_TOKENS = re.compile(r"image|img|video|vision|<row_\d+_col_\d+>")
"""What the special tokens of public families are called that stand for images, or around them."""


@dataclass(frozen=True)
class Sample:
    """An answer that was drawn, token by token."""

    ids: tuple[int, ...]
    """The end mark included, when the model ended it."""
    logprobs: tuple[float, ...]
    """Of each id, in nats: log softmax(logits / temperature), of the whole vocabulary."""
    finished: bool
    """The model ended it. False: it was cut off, by `max_new_tokens` or by the context."""


class Sampler:
    """Draws answers from a model's own probabilities: temperature alone, no top-k, no nucleus, no penalties.

    Only what stands for images is never drawn; in the log-probabilities it counts, as in training. Weights are those
    that the model has when it is called. What is drawn follows from weights, prompts and seeds.
    """

    def __init__(
        self,
        model: MMGPT,
        processor: Processor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        max_tokens: int = MAX_TOKENS,
        compiled: bool = True,
    ):
        """`max_new_tokens`: of a sample, its end mark included. temperature 0: the likeliest token each time, with
        log-probabilities of temperature 1. `max_tokens`: of the rows that are sampled side by side, in memory.
        `compiled`: on the CPU, from a copy of the decoder's weights, where it can be (see `DecoderCopy`); off: by the
        model's own modules.

        Raises ConfigError for numbers out of bounds, and for decoders whose answers have no one probability.
        """
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature, self.max_tokens = max_new_tokens, temperature, max_tokens
        self.compiled = compiled
        check_numbers(self, "max_new_tokens", "max_tokens", at_least=1)
        check_numbers(self, "temperature", at_least=0)
        decoder = model.decoder.config
        if decoder.positions == "relative" or decoder.memory_length or not decoder.causal:
            raise ConfigError("answers are sampled from a causal decoder without segment memory")
        self._copy: DecoderCopy | None = None
        self._end_ids = torch.tensor(processor.tokenizer.end_ids, dtype=torch.long)
        self._never = torch.tensor(vision_ids(processor), dtype=torch.long)

    def __call__(
        self,
        documents: Sequence[Document],
        n: int,
        seeds: Sequence[int],
        *,
        images: Sequence[ImageFeatures] | None = None,
        greedy: bool = False,
    ) -> list[list[Sample]]:
        """`n` samples for each prompt, prompt by prompt. Each is a document that ends where its answer begins.

        seeds: one for each prompt, from 0. images: what `MMGPT.image_tokens` gives for all images in order, where it is
        known already; else they are decoded and encoded here. greedy: as at temperature 0, for this call.
        Raises ContextOverflowError naming a prompt that leaves no room, ImageError, and MMGPTError for logits that are
        not finite.
        """
        if n < 1 or len(seeds) != len(documents) or any(seed < 0 for seed in seeds):
            raise ConfigError("give at least one sample, and a seed of at least 0 for each prompt")
        examples = [self.processor(document) for document in documents]
        context = self.model.decoder.config.max_length
        for document, example in zip(documents, examples, strict=True):
            if len(example) >= context:
                name = f" ({document.id})" if document.id else ""
                raise ContextOverflowError(
                    f"the prompt{name} has {len(example)} tokens; the context holds {context} with the answer"
                )
        own, temperature = _by_prompt(images, examples), 0.0 if greedy else self.temperature
        found: list[list[Sample]] = [[] for _ in documents]
        with torch.no_grad(), sampling(self.model):
            self._take_weights()
            for group in self._groups(examples, n):
                jobs = [_Job(examples[place], seeds[place], numbers, own[place]) for place, numbers in group]
                for (place, _), samples in zip(group, self._sample(jobs, temperature), strict=True):
                    found[place] += samples
        return found

    def _take_weights(self) -> None:
        decoder = self.model.decoder
        if not (self.compiled and can_copy(decoder)):
            self._copy = None
        elif self._copy is None or not self._copy.fits(decoder):
            self._copy = DecoderCopy(decoder)
        else:
            self._copy.update()

    def _groups(self, examples: Sequence[Example], n: int) -> Iterator[list[tuple[int, range]]]:
        """Prompts and the numbers of their samples that go side by side, prompts of about the same length together."""
        group: list[tuple[int, range]] = []
        rows = 0
        for place in sorted(range(len(examples)), key=lambda place: -len(examples[place])):
            first = 0
            while first < n:
                longest = len(examples[group[0][0] if group else place]) + self.max_new_tokens
                room = self.max_tokens // longest - rows
                if group and room < n - first:
                    yield group
                    group, rows = [], 0
                    continue
                count = min(n - first, max(1, room))
                group.append((place, range(first, first + count)))
                rows, first = rows + count, first + count
        if group:
            yield group

    def _sample(self, jobs: Sequence["_Job"], temperature: float) -> list[list[Sample]]:
        draws = _Draws(self, jobs, temperature)
        rows = self._rows(jobs)
        try:
            live, logits = torch.arange(draws.num_rows), rows.logits
            for step in range(self.max_new_tokens):
                ids = draws.add(logits, live, step)
                going = ~draws.ended[live]
                live, ids = live[going], ids[going]
                if not len(live):
                    break
                logits = rows.step(live, ids)
        finally:
            rows.close()
        return draws.samples()

    def _rows(self, jobs: Sequence["_Job"]) -> Rows:
        model, counts = self.model, [len(job.numbers) for job in jobs]
        examples = [job.example for job in jobs]
        known = [image for job in jobs for image in job.images or ()]
        prompts = collate([[e] for e in examples], self.processor.pixels([] if known else examples), pad_left=True)
        prompts = prompts.to(model.device)
        images = known or model.image_tokens(prompts)
        if self._copy is None:
            return TorchRows(model, prompts, images, counts, self.max_new_tokens)
        own = iter(images)
        features = [[next(own) for _ in example.images] for example in examples]
        return CompiledRows(model, self._copy, examples, features, counts)


@dataclass(frozen=True)
class _Job:
    """Samples of one prompt."""

    example: Example
    seed: int
    numbers: range
    """Which samples of the prompt these are."""
    images: Sequence[ImageFeatures] | None


class _Draws:
    """What the rows have drawn so far."""

    def __init__(self, sampler: Sampler, jobs: Sequence[_Job], temperature: float):
        context, longest = sampler.model.decoder.config.max_length, sampler.max_new_tokens
        self.sampler, self.temperature, self.counts = sampler, temperature, [len(job.numbers) for job in jobs]
        limits = [min(longest, context - len(job.example)) for job in jobs for _ in job.numbers]
        self.limits, self.num_rows = torch.tensor(limits), len(limits)
        num_rows = self.num_rows
        self.uniform: Tensor | None = None
        if temperature > 0:  # each row has its own numbers, so that none depends on who is beside it
            seeds = [row_seed(job.seed, number) for job in jobs for number in job.numbers]
            self.uniform = torch.from_numpy(np.stack([np.random.default_rng(s).random(longest) for s in seeds]))
        self.ids = torch.zeros(num_rows, longest, dtype=torch.long)
        self.logprobs = torch.zeros(num_rows, longest)
        self.lengths = torch.zeros(num_rows, dtype=torch.long)
        self.finished = torch.zeros(num_rows, dtype=torch.bool)
        self.ended = torch.zeros(num_rows, dtype=torch.bool)

    def add(self, logits: Tensor, live: Tensor, step: int) -> Tensor:
        """Draw an id for each of the rows `live`, of their logits (R, V): (R,), on the CPU."""
        uniform = None if self.uniform is None else self.uniform[live, step].to(logits.device)
        drawn = draw(logits, uniform, self.temperature or 1.0, self.sampler._never.to(logits.device))
        ids, logprobs = (values.cpu() for values in drawn)
        if not logprobs.isfinite().all():
            raise MMGPTError("no token can be drawn: logits are not finite, or leave nothing but images")
        self.ids[live, step], self.logprobs[live, step] = ids, logprobs.float()
        is_end = torch.isin(ids, self.sampler._end_ids)
        self.lengths[live], self.finished[live] = step + 1, is_end
        self.ended[live] = is_end | (self.limits[live] == step + 1)
        return ids

    def samples(self) -> list[list[Sample]]:
        """Of each job, those of its numbers."""
        lists = zip(
            *(t.tolist() for t in (self.ids, self.logprobs, self.lengths, self.finished)),
            strict=True,
        )
        flat = iter([Sample(tuple(ids[:k]), tuple(values[:k]), ended) for ids, values, k, ended in lists])
        return [[next(flat) for _ in range(count)] for count in self.counts]


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, never: Tensor) -> tuple[Tensor, Tensor]:
    """An id for each row of logits (R, V), and its log-probability at a temperature: (R,), (R,).

    uniform (R,), from 0 to below 1: where in the cumulated probabilities. None: the likeliest. The ids `never` are not
    drawn, but are part of the sum that the probabilities are divided by.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - highest).div_(temperature).exp_()  # (R, V), at most 1
    forbidden = weights[:, never].sum(dim=-1, dtype=torch.float64)
    weights.index_fill_(1, never, 0)
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = [weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)]
    blocks = torch.cat(sums, dim=1).double()  # (R, V / BLOCK + 1)
    total = blocks.sum(dim=-1) + forbidden
    if uniform is None:
        ids = logits.index_fill(1, never, -torch.inf).argmax(dim=-1)
    else:
        block, rest = _passing(blocks, uniform)
        inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
        own = weights.gather(1, inside.clamp(max=weights.shape[1] - 1)).where(inside < weights.shape[1], 0)
        ids = (block * BLOCK + _passing(own.double(), rest)[0]).clamp(max=weights.shape[1] - 1)
    chosen = (logits.gather(1, ids[:, None]) - highest).squeeze(1).double() / temperature
    return ids, (chosen - total.log()).where(blocks.sum(dim=-1) > 0, torch.nan)


def _passing(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of weights (R, N) where their cumulated share passes `share` (R,), and what part of that place's
    own weight is passed by then (R,): where a place is divided further."""
    cumulated = weights.cumsum(dim=-1)
    target = share[:, None] * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, target.contiguous(), right=True)
    # What rounding put at the end is the last place that adds anything
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    places = torch.minimum(places, last).clamp(max=weights.shape[1] - 1)  # where all is NaN nothing passes
    own = weights.gather(1, places)
    rest = (target - (cumulated.gather(1, places) - own)) / own
    return places.squeeze(1), rest.squeeze(1).clamp(0, 1)


def vision_ids(processor: Processor) -> list[int]:
    """The ids of the vocabulary that stand for images, or for where they begin and end: an answer holds none."""
    tokenizer, config = processor.tokenizer, processor.config.image_text
    written = "" if config is None else "".join([config.token, config.before, config.after, config.mark, config.whole])
    found = {
        id
        for token, id in tokenizer.special.items()
        if processor.is_image(id) or token in written or VISION_TOKENS.search(token)
    }
    return sorted(id for id in found - set(tokenizer.end_ids) if id < processor.vocab_size)


def _by_prompt(
    images: Sequence[ImageFeatures] | None, examples: Sequence[Example]
) -> list[Sequence[ImageFeatures] | None]:
    """The features of each prompt's images, without their graph."""
    if images is None:
        return [None] * len(examples)
    if len(images) != (count := sum(len(example.images) for example in examples)):
        raise MMGPTError(f"features of {len(images)} images came for prompts with {count}")
    bare = iter([ImageFeatures(i.tokens.detach(), tuple(level.detach() for level in i.deepstack)) for i in images])
    return [[next(bare) for _ in example.images] for example in examples]


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """The model without dropout; every part of it is as it was afterwards."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    torch.clear_autocast_cache()  # inside autocast it has the weights of before
    try:
        yield
    finally:
        for module, was in were:
            module.training = was
