"""Naming: does a model say what the main thing in a photo is? For photos of ImageNet's classes.

A record's "class" is the index of its class. The photo is described, and a question about it is answered. A text names
the class strictly when it holds one of WordNet's names or the last word of one ("retriever" for a golden retriever),
and by its kind when it holds that or a broader word ("dog"): see `mm_gpt.vision.imagenet`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mm_gpt.datasets.samples import Record
from mm_gpt.document import Document
from mm_gpt.eval.base import ImageTask, Instance, Score
from mm_gpt.inference.assistant import GenerationOptions
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.vision.imagenet import CLASSES, is_kind, is_named

QUESTION = "What is the main thing in the picture?"
CRITERIA: dict[str, Callable[[str, int], bool]] = {"strict": is_named, "kind": is_kind}


class Naming(ImageTask):
    """The share of photos whose caption or answer names the class, or its kind; the same of answers and of captions."""

    name = "naming"

    def generation(self) -> GenerationConfig:
        """How the answers are generated."""
        return self.assistant.chat_config(self._chosen(num_beams=1, max_new_tokens=32))

    def caption_generation(self) -> GenerationConfig:
        """How the captions are generated: as in the task `captioning`."""
        return self.assistant.caption_config(self._chosen(num_beams=3, max_new_tokens=40))

    def _chosen(self, *, num_beams: int, max_new_tokens: int) -> GenerationOptions:
        """What the config says, or else these."""
        return {
            "num_beams": self.config.num_beams or num_beams,
            "max_new_tokens": self.config.max_new_tokens or max_new_tokens,
            "seed": self.config.seed,
        }

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        index = record.metadata.get("class")
        if type(index) is not int or not 0 <= index < len(CLASSES):  # True is no class
            return []
        return [("", QUESTION, {"class": index, "name": CLASSES[index].plain})]

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [()]  # nobody wrote anything about it: the photo alone is what a corpus must not hold

    def predict(self, instances: Sequence[Instance], control: str) -> list[dict[str, Any]]:
        def documents(prompt: str) -> list[Document]:
            return [self._document(prompt, self._image(instance.group, control)) for instance in instances]

        answers = self.assistant.engine.generate(documents(QUESTION), self.generation())
        captions = self.assistant.engine.generate(documents(CAPTION_PROMPT), self.caption_generation())
        return [{"answer": str(a), "caption": str(c)} for a, c in zip(answers, captions, strict=True)]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        texts = {"": ("caption", "answer"), " answer": ("answer",), " caption": ("caption",)}
        return {
            f"{criterion}{suffix}": self._ratio(any(says(row[f], row["class"]) for f in fields) for row in rows)
            for suffix, fields in texts.items()
            for criterion, says in CRITERIA.items()
        }
