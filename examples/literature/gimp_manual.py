"""GIMP's manual in several languages, paragraph by paragraph, and generated pages where it is not at hand.

    apt-get download gimp-help-en gimp-help-de && for package in gimp-help-*.deb; do dpkg -x $package debian; done

Pages have the same names in all languages, and most have as many paragraphs, of which the n-th translates the n-th.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.web.pages import read_pages
from mm_gpt.document import Text
from mm_gpt.errors import MMGPTError
from mm_gpt.tokenizer import Tokenizer

HELP = "usr/share/gimp/2.0/help"
TOPICS = {
    "filters": r"gimp-filter|plug-in|script-fu|python-fu",
    "tools": r"gimp-tool",
    "layers": r"gimp-layer|layer-mode",
    "images": r"gimp-image",
    "view": r"gimp-view",
    "tutorials": r"gimp-using|gimp-tutorial",
}
"""Topics of pages, by how their names begin."""


@dataclass(frozen=True)
class Page:
    name: str
    topic: str | None
    paragraphs: dict[str, tuple[str, ...]]
    """By language."""

    def pairs(self, one: str, other: str) -> list[tuple[str, str]]:
        """Paragraphs and their translations; none where the two languages do not have as many, or say the same."""
        first, second = self.paragraphs.get(one, ()), self.paragraphs.get(other, ())
        if len(first) != len(second):
            return []
        return [(a, b) for a, b in zip(first, second, strict=True) if a != b]


def read_manual(folder: Path, languages: tuple[str, ...]) -> list[Page]:
    """The pages that are there in all of the languages, by name. Raises MMGPTError when there are none."""
    found: list[dict[str, tuple[str, ...]]] = []
    for language in languages:
        documents = read_pages(str(folder / HELP / language), ErrorCounter())
        found.append(
            {
                Path(document.id).stem: tuple(s.text for s in document.segments if isinstance(s, Text))
                for document in documents
            }
        )
    names = sorted(set.intersection(*map(set, found)))
    if not names:
        raise MMGPTError(f"{folder}: no page of GIMP's manual is there in {' and '.join(languages)}")
    return [
        Page(name, topic_of(name), {lang: texts[name] for lang, texts in zip(languages, found, strict=True)})
        for name in names
    ]


def topic_of(name: str) -> str | None:
    return next((topic for topic, pattern in TOPICS.items() if re.match(pattern, name)), None)


def generated_manual(languages: tuple[str, ...], *, pages: int = 60, seed: int = 0) -> list[Page]:
    """Pages of made-up words: every topic has words of its own, and a language has its own word for each."""
    rng = random.Random(seed)
    spelled = {
        (topic, number, language): "".join(rng.choice(letters) for letters in ("bdfgklmn", "aeiou") * 2)
        for topic in [*TOPICS, "any"]
        for number in range(10)
        for language in languages
    }
    made = []
    for number in range(pages):
        topic = list(TOPICS)[number % len(TOPICS)]
        sentences = [
            [(topic if rng.random() < 0.5 else "any", rng.randrange(10)) for _ in range(rng.randint(20, 30))]
            for _ in range(8)
        ]
        said = {
            language: tuple(" ".join(spelled[*word, language] for word in words) for words in sentences)
            for language in languages
        }
        made.append(Page(f"{topic}-{number}", topic, said))
    return made


def split(pages: list[Page]) -> dict[str, list[Page]]:
    """`train`, `validation` (of choices) and `test` (of figures): a page is in one of them for good, by its name."""
    parts: dict[str, list[Page]] = {"train": [], "validation": [], "test": []}
    for page in pages:
        draw = hashlib.sha256(page.name.encode()).digest()[0]
        parts["validation" if draw < 26 else "test" if draw < 64 else "train"].append(page)
    return parts


def texts(pages: list[Page], language: str, *, shortest: int = 1) -> list[str]:
    """Different paragraphs in order; a manual says many things again and again."""
    found = (text for page in pages for text in page.paragraphs.get(language, ()) if len(text) >= shortest)
    return list(dict.fromkeys(found))


def token_rows(pages: list[Page], language: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """(N, length): pages one after the other, an end of text behind each, cut into rows; the remainder is left out."""
    stream: list[int] = []
    for page in pages:
        stream += [*tokenizer.encode("\n".join(page.paragraphs[language])), tokenizer.special[tokenizer.end_of_text]]
    count = len(stream) // length
    if not count:
        raise MMGPTError(f"{len(stream)} tokens are fewer than a row of {length}")
    return torch.tensor(stream[: count * length]).view(count, length)
