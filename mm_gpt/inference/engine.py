"""The engine: Documents in, answers out. Left-padded batches, a cache of keys and values, streaming, beam search.

Shapes: B rows, T prompt tokens, S tokens so far, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_gpt.document import Document, check_document, check_text
from mm_gpt.errors import ConfigError, ContextOverflowError
from mm_gpt.inference.sampling import Repeats, choose
from mm_gpt.model.cache import KVCache
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Batch, Example, Processor, collate

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""Logits divided by less do not fit into float32."""
MAX_LENGTH_PENALTY = 10.0
MAX_BEAMS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is generated. Raises ConfigError naming a value that is out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token each time; else from 1e-6 to 1e6."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    num_beams: int = 1
    length_penalty: float = 0.6
    """Beam search divides a score by ((5 + length) / 6) ** length_penalty (GNMT, 1609.08144); from -10 to 10."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice in an answer; 0 lets everything repeat."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    seed: int = 0
    """Of sampling, from 0 to 2**63 - 1."""
    logprobs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "num_beams": 1 <= self.num_beams <= MAX_BEAMS,
            "length_penalty": abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            "no_repeat_ngram_size": self.no_repeat_ngram_size >= 0,
            "stop": all(self.stop),
            "seed": 0 <= self.seed <= MAX_SEED,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}")
        for text in self.stop:
            check_text(text, "stop")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search does not sample: set temperature to 0 or num_beams to 1")


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    id: int
    logprob: float
    """Natural logarithm of the model's own probability, before temperature and truncation."""


class Answer(str):
    """The generated text, and what it took. `str(answer)` and everything else that a string does work."""

    text: str
    prompt_tokens: int
    """Tokens of the prompt, images included."""
    image_tokens: int
    completion_tokens: int
    """Tokens generated, the end mark included."""
    finish_reason: str
    """"stop": the model ended, or a stop text came. "length": max_new_tokens or the context was reached."""
    generation: GenerationConfig
    """The options that it was generated with, defaults included."""
    logprobs: list[TokenLogprob] | None

    def __new__(
        cls,
        text: str,
        *,
        prompt_tokens: int,
        image_tokens: int,
        completion_tokens: int,
        finish_reason: str,
        generation: GenerationConfig,
        logprobs: list[TokenLogprob] | None = None,
    ) -> "Answer":
        answer = super().__new__(cls, text)
        answer.text = text
        answer.prompt_tokens, answer.image_tokens = prompt_tokens, image_tokens
        answer.completion_tokens, answer.finish_reason = completion_tokens, finish_reason
        answer.generation, answer.logprobs = generation, logprobs
        return answer

    def __str__(self) -> str:
        return self.text

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.text,), {k: v for k, v in self.__dict__.items() if k != "text"}  # for pickle and copy


HALF = "\ufffd"
"""How bytes that are no whole character are decoded."""


class _Row:
    """One prompt's growing answer: its ids, its text so far, and whether it has ended."""

    def __init__(self, example: Example, processor: Processor, config: GenerationConfig, context: int):
        self.tokenizer, self.config, self.example = processor.tokenizer, config, example
        self.limit = min(config.max_new_tokens, context - len(example))  # its own, whatever else is in the batch
        """Most tokens that the answer may have."""
        self.image_tokens = example.image_tokens
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.repeats = Repeats(config.no_repeat_ngram_size)
        self.text = ""
        """What is certain to be part of the answer."""
        self.finish_reason = ""
        self._settled, self._num_settled, self._window = "", 0, 0

    def add(self, id: int, logprob: float | None) -> str:
        """Take the next token; return the text that is now certain to be part of the answer."""
        if self.finish_reason:
            return ""
        self.ids.append(id)
        self.repeats.add(self.ids)
        if logprob is not None:
            self.logprobs.append(logprob)
        if id in self.tokenizer.end_ids:
            self.finish_reason = "stop"
        text = self._decoded()
        is_last = bool(self.finish_reason) or len(self.ids) == self.limit
        whole = text if is_last else text.rstrip(HALF)  # a stop text of this sign must not match half a character
        # What is certain holds no stop text and no beginning of one.
        cuts = [at for stop in self.config.stop if (at := whole.find(stop, len(self.text))) >= 0]
        if cuts:
            text, self.finish_reason = text[: min(cuts)], "stop"
        elif is_last:
            self.finish_reason = self.finish_reason or "length"
        else:
            text = text[: _certain(text, self.config.stop)]
        new = text[len(self.text) :]
        self.text += new
        return new

    def _decoded(self) -> str:
        """The text of all ids, of which only the last few are decoded anew.

        A tokenizer may write a token by what stands before it (SentencePiece drops a space at the very start), so those
        that are new are decoded behind some that have text, and what those alone give is left away.
        """
        decode = self.tokenizer.decode
        before, now = decode(self.ids[self._window : self._num_settled]), decode(self.ids[self._window :])
        text = self._settled + now[len(before) :]
        if not now.endswith(HALF):
            if decode(self.ids[self._num_settled :]):
                self._window = self._num_settled
            self._settled, self._num_settled = text, len(self.ids)
        return text

    def answer(self) -> Answer:
        pieces = zip(self.ids, self.logprobs, strict=True) if self.config.logprobs else ()
        return Answer(
            self.text.strip(),
            prompt_tokens=len(self.example),
            image_tokens=self.image_tokens,
            completion_tokens=len(self.ids),
            finish_reason=self.finish_reason or "length",
            generation=self.config,
            logprobs=[TokenLogprob(self.tokenizer.decode([i], keep_special=True), i, p) for i, p in pieces]
            if self.config.logprobs
            else None,
        )


def _certain(text: str, stops: Sequence[str]) -> int:
    """How much of `text` cannot change any more: not a half character, nor the beginning of a stop text."""
    end = len(text.rstrip(HALF))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end


class Engine:
    """Generates from a model. It holds no state between calls."""

    def __init__(self, model: MMGPT, processor: Processor):
        self.model, self.processor = model, processor

    def generate(self, documents: Sequence[Document], config: GenerationConfig) -> list[Answer]:
        """One answer for each document, all in one batch. Raises ContextOverflowError naming a prompt too long."""
        if not documents:
            return []
        examples = [self._example(document) for document in documents]
        if config.num_beams > 1:
            return self._beam_search(examples, config)
        rows = [self._row(example, config) for example in examples]
        for _ in self._steps(rows, config):
            pass
        return [row.answer() for row in rows]

    def stream(self, document: Document, config: GenerationConfig) -> "Stream":
        """Pieces of the answer as they are generated."""
        if config.num_beams > 1:
            raise ConfigError("beam search cannot stream: it knows its answer only at the end")
        return Stream(self, self._example(document), config)

    def _example(self, document: Document) -> Example:
        check_document(document)
        return self.processor(document)

    def _row(self, example: Example, config: GenerationConfig) -> _Row:
        return _Row(example, self.processor, config, self.model.decoder.config.max_length)

    # ---- token by token ----

    @torch.inference_mode()
    def _steps(self, rows: list[_Row], config: GenerationConfig) -> Iterator[list[str]]:
        """Run until every row has ended, yielding each step's new text of every row."""
        batch, cache = self._prefill(rows)
        hidden = self.model(batch, cache)[:, -1]
        yield from self.continue_from(
            hidden, cache, batch.position_ids[:, -1:], rows, config, keys=_visible_keys(batch, cache)
        )

    @torch.inference_mode()
    def continue_from(
        self,
        hidden: Tensor,
        cache: KVCache,
        positions: Tensor,
        rows: Sequence[_Row],
        config: GenerationConfig,
        *,
        keys: Tensor | None = None,
    ) -> Iterator[list[str]]:
        """Answer after a prompt that is in the cache, yielding each step's new text of every row.

        hidden (B, D), positions (B, 1): of the prompt's last token. keys (B, 1, 1, capacity): False where the cache
        holds padding.
        """
        decoder = self.model.decoder
        generators = None
        if config.temperature > 0:
            generators = [torch.Generator().manual_seed(config.seed) for _ in rows]
        while True:
            logits = decoder.logits(hidden)  # (B, V)
            tokens = choose(
                _without_repeats(logits, rows, config),
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                generators=generators,
            )
            logprobs: list[float | None] = [None] * len(rows)
            if config.logprobs:
                logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
            yield [row.add(id, p) for row, id, p in zip(rows, tokens.tolist(), logprobs, strict=True)]
            if all(row.finish_reason for row in rows):
                return
            positions = self._next(positions)
            mask = None if keys is None else keys[..., : cache.length + 1]
            hidden = decoder(decoder.embed(tokens[:, None]), positions, mask=mask, cache=cache)[:, -1]

    def _next(self, positions: Tensor) -> Tensor:
        """A row that has reached the context's end is finished, but goes on with the batch: its positions stop."""
        return (positions + 1).clamp_max(self.model.decoder.config.max_length - 1)

    def _prefill(self, rows: Sequence[_Row]) -> tuple[Batch, KVCache]:
        """The left-padded batch of prompts, and an empty cache with room for them and for what follows."""
        config = self.model.decoder.config
        examples = [row.example for row in rows]
        longest = max(examples, key=len)
        if len(longest) >= config.max_length:
            raise ContextOverflowError(
                f"the prompt has {len(longest)} tokens; the context holds {config.max_length} with the answer"
            )
        rows_of_one = [[example] for example in examples]
        batch = collate(rows_of_one, self.processor.pixels(examples), pad_left=True).to(self.model.device)
        capacity = len(longest) + max(row.limit for row in rows)
        dtype = self.model.decoder.dtype
        cache = KVCache(config, len(examples), capacity, dtype=dtype, device=self.model.device)
        return batch, cache

    # ---- beams ----

    @torch.inference_mode()
    def _beam_search(self, examples: list[Example], config: GenerationConfig) -> list[Answer]:
        """Keep the `num_beams` best beginnings of every prompt; an ended one competes with its length penalty."""
        W, B = config.num_beams, len(examples)
        decoder, device = self.model.decoder, self.model.device
        prompts = [self._row(example, config) for example in examples]
        batch, cache = self._prefill(prompts)
        hidden = self.model(batch, cache)[:, -1]
        each = torch.arange(B, device=device).repeat_interleave(W)  # (B·W,) every prompt W times
        cache.select_rows(each)
        keys = _visible_keys(batch, cache)
        keys = None if keys is None else keys[each]
        positions = batch.position_ids[each, -1:]
        hidden = hidden[each]
        rows = [[prompt] * W for prompt in prompts]
        scores = torch.full((B, W), -torch.inf, device=device)
        scores[:, 0] = 0  # all beams are equal at first: only one of them counts
        ended: list[list[tuple[float, _Row]]] = [[] for _ in range(B)]
        done = [False] * B
        for step in range(1, config.max_new_tokens + 1):
            logprobs = decoder.logits(hidden).log_softmax(-1).view(B, W, -1)
            V = logprobs.shape[-1]
            allowed = _without_repeats(logprobs.view(B * W, V), [r for beams in rows for r in beams], config)
            # Enough even when every beam's best tokens are the two end marks.
            best = (scores[:, :, None] + allowed.view(B, W, V)).view(B, -1).topk(min(3 * W, W * V), dim=-1)
            parents, tokens = best.indices // V, best.indices % V
            new_rows: list[list[_Row]] = []
            chosen = torch.zeros(B, W, dtype=torch.long, device=device)
            chosen_tokens = torch.zeros(B, W, dtype=torch.long, device=device)
            for b in range(B):
                if done[b]:
                    new_rows.append(rows[b])
                    continue
                survivors: list[tuple[float, int, int, _Row]] = []
                candidates = zip(best.values[b].tolist(), parents[b].tolist(), tokens[b].tolist(), strict=True)
                for rank, (score, parent, token) in enumerate(candidates):
                    if len(survivors) == W or not math.isfinite(score):
                        break
                    row = _copy(rows[b][parent])
                    row.add(token, float(logprobs[b, parent, token]) if config.logprobs else None)
                    if row.finish_reason == "stop":
                        if rank < W:
                            ended[b].append((score / _length_penalty(step, config), row))
                    else:
                        survivors.append((score, parent, token, row))
                if step == prompts[b].limit:
                    ended[b] += [(score / _length_penalty(step, config), row) for score, _, _, row in survivors]
                    survivors = []
                ended[b] = sorted(ended[b], key=lambda item: -item[0])[:W]
                scores[b] = -torch.inf
                for i, (score, parent, token, _) in enumerate(survivors):
                    scores[b, i], chosen[b, i], chosen_tokens[b, i] = score, parent, token
                new_rows.append([*(row for *_, row in survivors), *[rows[b][0]] * (W - len(survivors))])
                if not survivors:
                    done[b] = True
                elif len(ended[b]) == W:
                    # A score only falls, and the penalty is mildest at one end of the lengths to come: what may come
                    # is not above this.
                    lengths = (step + 1, prompts[b].limit)
                    bound = max(survivors[0][0] / _length_penalty(length, config) for length in lengths)
                    done[b] = ended[b][-1][0] >= bound
            rows = new_rows
            if all(done):
                break
            cache.select_rows((torch.arange(B, device=device)[:, None] * W + chosen).flatten())
            positions = self._next(positions)
            mask = None if keys is None else keys[..., : cache.length + 1]
            embedded = decoder.embed(chosen_tokens.flatten()[:, None])
            hidden = decoder(embedded, positions, mask=mask, cache=cache)[:, -1]
        return [max(answers, key=lambda item: item[0])[1].answer() for answers in ended]


class Stream(Iterator[str]):
    """Pieces of text; when they are used up, `answer` holds the whole."""

    def __init__(self, engine: Engine, example: Example, config: GenerationConfig):
        self._row = engine._row(example, config)
        self._pieces = self._run(engine, config)

    def _run(self, engine: Engine, config: GenerationConfig) -> Iterator[str]:
        for (piece,) in engine._steps([self._row], config):
            if piece:
                yield piece

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The answer so far; complete when the pieces are used up."""
        return self._row.answer()


def _visible_keys(batch: Batch, cache: KVCache) -> Tensor | None:
    """(B, 1, 1, capacity), False at the padding on the left; None when no row is padded."""
    real = batch.document_ids > 0  # (B, T)
    if real.all():
        return None
    B, T = real.shape
    keys = torch.ones(B, cache.keys.shape[3], dtype=torch.bool, device=real.device)
    keys[:, :T] = real
    return keys[:, None, None, :]


def _without_repeats(logits: Tensor, rows: Sequence[_Row], config: GenerationConfig) -> Tensor:
    """(B, V) with what would repeat a run of tokens at -inf. The end marks come once, so they always stay."""
    if config.no_repeat_ngram_size == 0:
        return logits
    logits = logits.clone()  # log-probabilities are reported as the model gave them
    for logit, row in zip(logits, rows, strict=True):
        logit[list(row.repeats.completed_by(row.ids))] = -torch.inf
    return logits


def _length_penalty(length: int, config: GenerationConfig) -> float:
    return ((5 + length) / 6) ** config.length_penalty


def _copy(row: _Row) -> _Row:
    new = object.__new__(_Row)
    new.__dict__.update(row.__dict__)
    new.ids, new.logprobs, new.repeats = list(row.ids), list(row.logprobs), row.repeats.copy()
    return new
