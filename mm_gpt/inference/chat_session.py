"""Conversations that go on from where they are, instead of reading everything again at each turn.

Keys and values of all that was said stay in a cache, and a turn costs what it adds. A model with segment memory
(Transformer-XL, 1901.02860) keeps the last `memory_length` tokens of them only: its turns cost the same for ever, and
what is further back than its layers can pass on is forgotten.
"""

import dataclasses
import sys
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_gpt.document import Document, Message, check_document
from mm_gpt.errors import ConfigError, ContextOverflowError
from mm_gpt.inference.engine import Answer, Engine, GenerationConfig, _Row
from mm_gpt.model.cache import KVCache
from mm_gpt.processor import Example, Processor, collate


class ChatSession:
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
        if self.memory_length and (engine.processor.template is not None or engine.model.config.prefix_lm):
            raise ConfigError("segment memory goes with ChatML and causal prompts: other forms need the whole chat")
        self._cache: KVCache | None = None
        # What the next prompt may share with what was read: ids, the images in them, and where in the cache they begin.
        # With memory the next prompt begins with the last answer.
        self._seen: list[int] = []
        self._images: list[tuple[Any, ...]] = []
        self._start = 0
        self.tokens_read = 0
        """Tokens of the prompt that the last turn had to read."""

    def say(self, content: Any) -> Answer:
        """The answer to the user's next message: a text, or a list of texts and images.

        Raises ContextOverflowError when the conversation is longer than the context, for a model without memory.
        """
        for _ in self.stream(content):
            pass
        return self.answer

    @torch.inference_mode()
    def stream(self, content: Any) -> Generator[str, None, None]:
        """`say`, piece by piece; `answer` is complete afterwards."""
        turn: Message = {"role": "user", "content": content}
        example = self._example(turn)
        row = _Row(example, self.engine.processor, self.config, self._room(example))
        hidden, cache = self._read(example, row.limit)
        end = cache.length
        last = torch.full((1, 1), end - 1, device=self.engine.model.device)
        try:
            for (piece,) in self.engine.continue_from(hidden, cache, last, [row], self.config):
                if piece:
                    yield piece
        finally:  # an answer that was interrupted was given as far as it went
            read = row.ids[:-1]  # the last one was chosen, not read
            if self.memory_length:
                self._seen, self._images, self._start = read, [], end
            else:
                self._seen += read
            self.answer = row.answer()
            self.messages += [turn, {"role": "assistant", "content": self.answer.text}]

    def _example(self, turn: Message) -> Example:
        """All messages and `turn`; with memory the last answer and `turn`. `_read` skips what is in the cache.

        The answer comes again because it is not always what was generated: it may have been cut off, or end in a stop
        text; and its last token was not read.
        """
        processor = self.engine.processor
        opened = self.messages[-1:] if self.memory_length else self.messages
        document = processor.chat([*opened, turn])
        check_document(document)
        if not self.memory_length:
            return processor(document)
        # However long, it is read in segments; and a text begins once.
        begins = processor.config.begin_of_text and not self.messages
        config = dataclasses.replace(processor.config, max_length=sys.maxsize, begin_of_text=begins)
        processor = Processor(processor.tokenizer, config, vocab_size=processor.vocab_size)
        return processor(Document(document.segments[len(opened) :]))  # the opening of the answer was in the last prompt

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
        start = 0 if model.config.prefix_lm else self._shared(example, ids)
        new = _from(example, start)
        batch = collate([[new]], self.engine.processor.pixels([new])).to(model.device)
        masks = model.masks(batch) if model.config.prefix_lm else {}
        embedded = model.embed(batch)
        hidden = embedded[:, -1]
        self.tokens_read = len(new)
        segment = model.decoder.config.max_length if self.memory_length else len(new)
        cache = self._cache = self._prepared_cache(start, segment, room)
        self._images = _images(example)
        for at in range(start, len(ids), segment):
            if self.memory_length:
                cache.keep_last(self.memory_length)
            # Said before and after each segment, so that what is interrupted here is still known for what it is.
            self._seen, self._start = ids[:at], cache.length - at
            x = embedded[:, at - start : at - start + segment]
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=model.device)[None]
            hidden = model.decoder(x, positions, **masks, cache=cache)[:, -1]
            self._seen = ids[: at + segment]
        return hidden, cache

    def _shared(self, example: Example, ids: list[int]) -> int:
        """How many tokens of the prompt are in the cache. The last one never counts: its state is needed.

        Templates may write earlier turns in another way than they were, or leave images of them out.
        """
        start = _common(ids[:-1], self._seen)
        for mine, its in zip(_images(example), self._images, strict=False):
            if mine[0] is not its[0] or mine[1:] != its[1:]:
                start = min(start, mine[1])
                break
        is_image = self.engine.processor.is_image
        if start and is_image(ids[start]) and is_image(ids[start - 1]):
            start = max(at for at in example.image_starts if at < start)  # an image is read as a whole
        return start

    def _prepared_cache(self, start: int, segment: int, room: int) -> KVCache:
        """A cache with room for the turn, holding what was read before."""
        model, memory = self.engine.model, self.memory_length
        config = model.decoder.config
        cache = self._cache
        if cache is not None:
            cache.length = max(0, self._start + start)
        needed = (memory or start) + segment + room
        if cache is None or cache.keys.shape[3] < needed:
            capacity = needed if memory else min(config.max_length, 2 * needed)
            cache = KVCache(config, 1, capacity, dtype=model.decoder.dtype, device=model.device)
            if self._cache is not None:
                self._cache.keep_last(memory or start)
                cache.copy_from(self._cache)
        return cache


def _images(example: Example) -> list[tuple[Any, ...]]:
    """What tells the images of a prompt apart: source, place, and how it is cut."""
    parts = zip(example.images, example.image_starts, example.grids, example.sizes, strict=True)
    return [(image.source, at, grid, size, image.mirrored) for image, at, grid, size in parts]


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
        whole=example.whole,
        sizes=example.sizes[first:],
        id=example.id,
    )
