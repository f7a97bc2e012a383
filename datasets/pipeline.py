"""The corpus pipeline: documents through stages, with a count of what came in, what went out and why."""

from collections import Counter
from typing import Protocol

from mm_gpt.document import Document


class Stage(Protocol):
    """One step from raw documents to a corpus. A frozen dataclass: it travels to other processes and machines."""

    @property
    def name(self) -> str: ...

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        """The document with what is left of it, or None when it goes.

        `removed` counts what goes by rule: `"too few words"` (a document), `"text: repeated words"` (a segment),
        `"image: too small"`.
        """
