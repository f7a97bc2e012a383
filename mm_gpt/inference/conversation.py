"""Conversations that go on from where they are, instead of reading everything again at each turn.

Keys and values of all that was said stay in a cache, and a turn costs what it adds. A model with segment memory
(Transformer-XL, 1901.02860) keeps the last `memory_length` tokens of them only: its turns cost the same for ever, and
what is further back than its layers can pass on is forgotten.
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_gpt.document import Message
from mm_gpt.errors import ConfigError, ContextOverflowError
from mm_gpt.inference.engine import Answer, Engine, GenerationConfig, _Row
from mm_gpt.model.cache import KVCache
from mm_gpt.model.mmgpt import attention_mask
from mm_gpt.processor import Example, collate


class Conversation:
    """Turn after turn with one model. `messages` holds what was said.

    Without segment memory the answers are those of `Assistant.chat` on all messages. A model that reads its prompt in
    both directions (PaliGemma) has to read everything anew at each turn.
    """

    def __init__(self, engine: Engine, config: GenerationConfig):
        if config.num_beams > 1:
            raise ConfigError("a conversation keeps one answer at a time: set num_beams to 1")
        self.engine, self.config = engine, config
        self.messages: list[Message] = []
        self.memory_length = engine.model.decoder.config.memory_length
        self._cache: KVCache | None = None
        self._seen: list[int] = []  # the ids whose keys and values are in the cache, or were
        self.tokens_read = 0
        """Tokens of the prompt that the last turn had to read."""

    def say(self, content: Any) -> Answer:
        """The answer to the user's next message: a text, or a list of texts and images.

        Raises ContextOverflowError when the conversation is longer than the context, for a model without memory.
        """
        for _ in self.stream(content):
            pass
        return self.answer

    def stream(self, content: Any) -> Generator[str, None, None]:
        """`say`, piece by piece; `answer` is complete afterwards."""
        turn: Message = {"role": "user", "content": content}
        example = self._example(turn)
        with torch.inference_mode():
            row = _Row(example, self.engine.processor, self.config, self._room(example))
            hidden, cache = self._read(example, row.limit)
            last = torch.full((1, 1), cache.length - 1, device=self.engine.model.device)
            try:
                for (piece,) in self.engine.continue_from(hidden, cache, last, [row], self.config):
                    if piece:
                        yield piece
            finally:  # an answer that was interrupted was given as far as it went
                self._seen += row.ids[:-1]  # the last one was chosen, not read
                self.answer = row.answer()
                self.messages += [turn, {"role": "assistant", "content": self.answer.text}]

    def _example(self, turn: Message) -> Example:
        """What the turn makes of the prompt: with memory the new part alone, else all of it."""
        processor = self.engine.processor
        if not self.memory_length or not self.messages:
            return processor(processor.chat([*self.messages, turn]))
        example = processor(processor.chat([turn]))
        end = processor.tokenizer.special[processor.tokenizer.end_of_turn]
        ids = torch.tensor([end, *processor.tokenizer.encode("\n"), *example.input_ids.tolist()])
        example.input_ids, example.position_ids = ids, torch.arange(len(ids))
        example.labels, example.branch_ids = torch.full_like(ids, -100), torch.zeros_like(ids)
        return example

    def _room(self, example: Example) -> int:
        """The context, as far as this turn is concerned."""
        context = self.engine.model.decoder.config.max_length
        if self.memory_length:
            return len(example) + context
        if len(example) >= context:
            raise ContextOverflowError(
                f"the conversation has {len(example)} tokens; the context holds {context} with the answer"
            )
        return context

    def _read(self, example: Example, room: int) -> tuple[Tensor, KVCache]:
        """Read what is new of the prompt; the last token's state (1, D), and the cache."""
        model, ids = self.engine.model, example.input_ids.tolist()
        start = 0
        if not self.memory_length and not model.config.prefix_lm:
            start = _common(ids[:-1], self._seen)  # templates may write earlier turns in another way than they were
            if start and self.engine.processor.is_image(ids[start]) and self.engine.processor.is_image(ids[start - 1]):
                start = max(at for at in example.image_starts if at < start)  # an image is read as a whole
        self.tokens_read = len(ids) - start
        segment = model.decoder.config.max_length if self.memory_length else self.tokens_read
        cache = self._cache = self._prepared_cache(start, segment, room)
        new = _from(example, start)
        batch = collate([[new]], self.engine.processor.pixels([new])).to(model.device)
        mask = attention_mask(batch, prefix_lm=True) if model.config.prefix_lm else None
        embedded = model.embed(batch)
        hidden = embedded[:, -1]
        for at in range(0, embedded.shape[1], segment):
            x = embedded[:, at : at + segment]
            if self.memory_length:
                cache.keep_last(self.memory_length)
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=model.device)[None]
            hidden = model.decoder(x, positions, mask=mask, cache=cache)[:, -1]
        self._seen = ids
        return hidden, cache

    def _prepared_cache(self, start: int, segment: int, room: int) -> KVCache:
        """A cache with room for the turn, holding what was read before."""
        model = self.engine.model
        config, weight = model.decoder.config, model.decoder.embedding.weight
        needed = (self.memory_length or start) + segment + room
        cache = self._cache
        if cache is None or cache.keys.shape[3] < needed:
            capacity = needed if self.memory_length else min(config.max_length, 2 * needed)
            cache = KVCache(config, 1, capacity, dtype=weight.dtype, device=model.device)
            if self._cache is not None:
                cache.copy_from(self._cache)
        if not self.memory_length:
            cache.length = start
        return cache


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids at the start two lists share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def _from(example: Example, start: int) -> Example:
    """The rest of an example from token `start` on, with the images in it."""
    first = sum(at < start for at in example.image_starts)
    return Example(
        example.input_ids[start:],
        example.labels[start:],
        example.position_ids[start:],
        example.branch_ids[start:],
        images=example.images[first:],
        grids=example.grids[first:],
        sizes=example.sizes[first:],
        id=example.id,
    )
