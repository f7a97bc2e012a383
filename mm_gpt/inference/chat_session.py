"""Conversations that go on from where they are, instead of reading everything again at each turn.

The engine keeps what it has read, and a turn costs what it adds. A model with segment memory (Transformer-XL,
1901.02860) keeps the last `memory_length` tokens only: its turns cost the same for ever, and what is further back than
its layers can pass on is forgotten.
"""

import dataclasses
import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch

from mm_gpt.document import Document, Message, check_document
from mm_gpt.errors import ConfigError, ContextOverflowError
from mm_gpt.inference.engine import Engine, Job, Run
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.inference.reading import Key, Prompt, Reading, common_start
from mm_gpt.inference.rows import Row
from mm_gpt.inference.sequences import TorchSequence
from mm_gpt.model.cache import KVCache
from mm_gpt.processor import Example, Processor, collate


class ChatSession:
    """Turn after turn with one model. `messages` holds what was said.

    Without segment memory the answers are those of `Assistant.chat` on all messages. A model that reads its prompt in
    both directions (PaliGemma) has to read everything anew at each turn.
    """

    def __init__(self, engine: Engine, config: GenerationConfig):
        if config.num_beams > 1 or config.n > 1:
            raise ConfigError("a conversation keeps one answer at a time: set num_beams and n to 1")
        self.engine, self.config = engine, config
        self.messages: list[Message] = []
        memory = engine.model.decoder.config.memory_length
        if memory and (engine.processor.template is not None or engine.model.config.prefix_lm):
            raise ConfigError("segment memory goes with ChatML and causal prompts: other forms need the whole chat")
        self._memory = _Memory(engine) if memory else None
        self._known: dict[Any, Key] = {}
        """Digests of the images that `messages` holds."""
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
        job = self._job(turn)
        run = Run(self.engine)
        run.waiting.append(job)
        try:
            with closing(run):
                while run.is_busy:
                    for _, _, piece in run.step():
                        if piece:
                            yield piece
                    if job.error is not None:
                        raise job.error
        finally:  # an answer that was interrupted was given as far as it went
            if job.rows:
                self.answer = job.rows[0].answer()
                self.tokens_read = len(job.example) - self.answer.cached_tokens
                self.messages += [turn, {"role": "assistant", "content": self.answer.text}]

    def _job(self, turn: Message) -> Job:
        processor = self.engine.processor
        if self._memory is not None:
            return self._memory.job(self.messages[-1:], turn, self.config, begins=not self.messages)
        document = processor.chat([*self.messages, turn])
        check_document(document)
        example, context = processor(document), self.engine.model.decoder.config.max_length
        if len(example) >= context:
            raise ContextOverflowError(
                f"the conversation has {len(example)} tokens; the context holds {context} with the answer"
            )
        return Job(self.engine, example, self.config, known=self._known)


class _Memory:
    """What a model with segment memory carries from one turn to the next."""

    def __init__(self, engine: Engine):
        self.engine, self.length = engine, engine.model.decoder.config.memory_length
        self.cache: KVCache | None = None
        self.seen: list[int] = []
        """Ids of the last answer that were read, with which the next prompt begins."""
        self.start = 0
        """Where in the cache they begin."""

    def job(self, opened: list[Message], turn: Message, config: GenerationConfig, *, begins: bool) -> "_MemoryJob":
        """The last answer and `turn`. The answer comes again because it is not always what was generated: it may have
        been cut off, or end in a stop text; and its last token was not read. What of it was read is skipped."""
        processor = self.engine.processor
        document = processor.chat([*opened, turn])
        check_document(document)
        # However long, it is read in segments; and a text begins once.
        begins = processor.config.begin_of_text and begins
        settings = dataclasses.replace(processor.config, max_length=sys.maxsize, begin_of_text=begins)
        processor = Processor(processor.tokenizer, settings, vocab_size=processor.vocab_size)
        segments = document.segments[len(opened) :]  # the opening of the answer was in the last prompt
        return _MemoryJob(self, processor(Document(segments)), config)

    def prepared(self, start: int, segment: int, room: int) -> KVCache:
        """A cache with room for the turn, holding what was read before."""
        model, old = self.engine.model, self.cache
        if old is not None:
            old.length = max(0, self.start + start)
        needed = self.length + segment + room
        if old is None or old.keys.shape[3] < needed:
            dtype = next(model.decoder.parameters()).dtype
            new = KVCache(model.decoder.config, 1, needed, dtype=dtype, device=model.device)
            if old is not None:
                old.keep_last(self.length)
                new.copy_from(old)
            self.cache = new
        assert self.cache is not None
        return self.cache


class _MemoryJob(Job):
    def __init__(self, memory: _Memory, example: Example, config: GenerationConfig):
        self.memory = memory
        super().__init__(memory.engine, example, config)

    def _room(self) -> int:
        return len(self.example) + self.engine.model.decoder.config.max_length

    def read(self, prompt: Prompt) -> Reading:
        """Segment after segment, each with the memory of those before."""
        memory, model = self.memory, self.engine.model
        ids = prompt.example.input_ids.tolist()
        start = common_start(ids[:-1], memory.seen)
        batch = collate([[prompt.tail(start)]], self.engine.processor.pixels([prompt.tail(start)])).to(model.device)
        embedded = model.embed(batch).x
        hidden, segment = embedded[0], model.decoder.config.max_length
        room = min(self.config.max_new_tokens, segment)
        cache = memory.prepared(start, segment, room)
        for at in range(start, len(ids), segment):
            cache.keep_last(memory.length)
            # Said before and after each segment, so that what is interrupted here is still known for what it is.
            memory.seen, memory.start = ids[:at], cache.length - at
            x = embedded[:, at - start : at - start + segment]
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=model.device)[None]
            hidden = model.decoder(x, positions, cache=cache)[0]
            memory.seen = ids[: at + segment]
        memory.seen, memory.start = [], cache.length
        return Reading(TorchSequence(cache, 0, cache.length, cache.length, cache.length), hidden, start)

    def finish(self, row: Row) -> None:
        """The next turn goes on from here: the last token of the answer was chosen, not read."""
        self.memory.cache, self.memory.seen = row.sequence.cache, row.ids[:-1]
        row.sequence = None
