"""The answers that grow: one row that is chosen token by token, or the beams of one prompt.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_gpt.inference.constraints import Grammar
from mm_gpt.inference.detokenizer import Detokenizer, StopMatcher, TokenBytes
from mm_gpt.inference.generation import Answer, GenerationConfig, TokenLogprob, TopToken
from mm_gpt.inference.reading import Prompt
from mm_gpt.inference.sampling import Sampler, constrain, logprobs_of
from mm_gpt.inference.sequences import Sequences
from mm_gpt.model.decoder import Decoder

PROMPT_CHUNK = 128
"""Tokens of a prompt whose logits are in memory at a time."""


class Row:
    """One answer to a prompt: its ids, its text so far, and whether it has ended."""

    def __init__(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        tokens: TokenBytes,
        *,
        context: int,
        end_ids: Many[int],
        index: int = 0,
        grammar: Grammar | None = None,
    ):
        self.prompt, self.config, self.index = prompt, config, index
        self.limit = min(config.max_new_tokens, context - len(prompt))
        """Most tokens that the answer may have, whatever else is in the batch."""
        self.tokens, self.end_ids = tokens, end_ids
        self.sampler = Sampler(config, prompt.example.input_ids, index)
        self.grammar = None if grammar is None else grammar.start()
        self.sequence: Any = None
        """What the model has read: the prompt and the answer but for its last token."""
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        """What is certain to be part of the answer."""
        self.finish_reason = ""
        self._words, self._stops = Detokenizer(tokens), StopMatcher(config.stop)

    def sibling(self, index: int, sequences: Sequences) -> "Row":
        """Another answer to the same prompt, which has not begun either."""
        new = self.copy()
        new.index, new.sampler = index, Sampler(self.config, self.prompt.example.input_ids, index)
        new.sequence = sequences.fork(self.sequence)
        return new

    def add(self, id: int, logprob: TokenLogprob | None = None) -> str:
        """Take the next token; return the text that is now certain to be part of the answer."""
        if self.finish_reason:
            return ""
        self.ids.append(id)
        self.sampler.accept(id)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = id in self.end_ids
        if self.grammar is not None and not ended:
            self.grammar.accept(id)
            ended = self.grammar.finished  # no step for an end mark that must come
        is_last = ended or len(self.ids) == self.limit
        new, stopped = self._stops.add(self._words.add(id))
        if stopped or ended:
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"
        if is_last and not stopped:
            new += self._stops.finish() + self._words.finish()  # half a character is no stop text
        self.text += new
        return new

    def answer(self) -> Answer:
        return Answer(
            self.text if self.grammar is not None else self.text.strip(),
            ids=tuple(self.ids),
            prompt_tokens=len(self.prompt),
            image_tokens=self.prompt.example.image_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.ids),
            finish_reason=self.finish_reason or "length",
            generation=self.config,
            logprobs=list(self.logprobs) if self.config.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )

    def copy(self) -> "Row":
        """The same answer so far, for another beam. It has no sequence yet."""
        new = object.__new__(Row)
        new.__dict__.update(self.__dict__)
        new.ids, new.logprobs, new.sequence = list(self.ids), list(self.logprobs), None
        new.sampler, new._words, new._stops = self.sampler.copy(), self._words.copy(), self._stops.copy()
        new.grammar = None if self.grammar is None else self.grammar.copy()
        return new


def adjusted(logprobs: Tensor, rows: Many[Row]) -> Tensor:
    """(R, V), a copy where rows have penalties, biases or a grammar."""
    masks = grammar_masks(rows, logprobs.shape[-1])
    if not any(row.sampler.adjusts for row in rows) and not any(mask is not None for mask in masks):
        return logprobs
    logprobs = logprobs.clone()
    for values, row, mask in zip(logprobs, rows, masks, strict=True):
        constrain(values, row.sampler, mask)
    return logprobs


def grammar_masks(rows: Many[Row], vocab_size: int) -> list[np.ndarray | None]:
    """What the rows' grammars allow next, (V,) each."""
    masks: list[np.ndarray | None] = []
    for row in rows:
        mask = None
        if row.grammar is not None:
            mask = np.empty(vocab_size, dtype=bool)
            row.grammar.allowed(mask)
        masks.append(mask)
    return masks


def token_logprobs(logits: Tensor, ids: Many[int], rows: Many[Row]) -> list[TokenLogprob | None]:
    """The model's own log-probabilities of the ids chosen, for the rows that ask for them: logits (R, V)."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    wanted = [n for n, row in enumerate(rows) if row.config.logprobs]
    if wanted:
        most = max(rows[n].config.top_logprobs for n in wanted)
        chosen = [ids[n] for n in wanted]
        found = logprobs_of(logits[wanted], torch.tensor(chosen, device=logits.device), most)
        for n, id, value, tops in zip(wanted, chosen, *_lists(found), strict=True):
            tokens = rows[n].tokens
            result[n] = described(tokens, id, value, tops[: rows[n].config.top_logprobs])
    return result


def _lists(found: tuple[Tensor, Tensor, Tensor]) -> tuple[list[float], list[list[tuple[int, float]]]]:
    values, top_values, top_ids = (tensor.tolist() for tensor in found)
    return values, [list(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(top_ids, top_values, strict=True)]


def described(tokens: TokenBytes, id: int, value: float, top: Many[tuple[int, float]] = ()) -> TokenLogprob:
    best = tuple(TopToken(tokens.name(i), i, p, tokens(i)) for i, p in top)
    return TokenLogprob(tokens.name(id), id, value, tokens(id), best)


def prompt_logprobs(decoder: Decoder, prompt: Prompt, hidden: Tensor, row: Row) -> list[TokenLogprob | None]:
    """Of each token of a prompt that was read as a whole, hidden (T, D); None for the first, and for images."""
    ids = prompt.example.input_ids
    result: list[TokenLogprob | None] = [None]
    for start in range(0, len(ids) - 1, PROMPT_CHUNK):
        following = ids[start + 1 : start + 1 + PROMPT_CHUNK]
        logits = decoder.logits(hidden[start : start + len(following)])
        known = following < logits.shape[-1]
        safe = following.where(known, 0).to(logits.device)
        found = _lists(logprobs_of(logits, safe, row.config.top_logprobs))
        for id, is_text, value, top in zip(following.tolist(), known.tolist(), *found, strict=True):
            result.append(described(row.tokens, id, value, top) if is_text else None)
    for start, last in prompt.spans:
        result[start : last + 1] = [None] * (last + 1 - start)
    return result
