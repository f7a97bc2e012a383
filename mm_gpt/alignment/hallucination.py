"""Hallucination pairs: an answer that says what its prompt does not support, and the same answer without it.

The loop for closed domains of GPT-4's system card (2303.08774, section 3.1 of the card): an answer is given, what the
picture or the text does not support is listed, the answer is rewritten without it, and the rewritten one is listed
again. Once nothing is listed any more, the rewritten answer is preferred to the first one; after five rounds there is
no pair. Lister and rewriter are the model itself, another one, or a check against what is known of the prompt. A list
that cannot be read is no empty list: it ends the loop, and is counted.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mm_gpt.alignment.grading import quoted
from mm_gpt.datasets.comparisons import Comparison, Completion
from mm_gpt.datasets.loading.caption_words import word_set
from mm_gpt.datasets.samples import Record
from mm_gpt.document import Image, Message
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.eval.objects import Known, named_objects
from mm_gpt.images import Concepts
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.vision.imagenet import read_classes

MAX_ROUNDS = 5
"""Rewritings of one answer at most."""
KNOWN = "known"
"""The column of a comparison with texts about its image, such as people's captions of it."""

End = Literal["kept", "supported", "unreadable list", "no rewriting", "unchanged", "unsolved"]
"""How a loop ends: with a pair; with an answer of which everything is supported; with a list that cannot be read;
with a rewriter that has nothing; with a rewritten answer that is the first one; after the last round."""


class NothingKnownError(MMGPTError):
    """A check has nothing to hold an answer against."""


class Lister(Protocol):
    """What of `answer` its prompt does not support; None where that cannot be told."""

    def __call__(self, prompt: Comparison, answer: str) -> list[str] | None: ...


class Rewriter(Protocol):
    """`answer` without what is `unsupported`; None where there is no such text. `round`: 1 for the first rewriting."""

    def __call__(self, prompt: Comparison, answer: str, unsupported: Sequence[str], round: int) -> str | None: ...


Ask = Callable[[Sequence[Message], int], str]
"""A model's answer to a chat, for a seed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one answer."""

    answer: str
    end: End
    rewritten: str | None = None
    """The last rewriting; of a pair the preferred one."""
    unsupported: tuple[str, ...] = ()
    """What was listed of the answer itself."""
    rounds: int = 0
    """Rewritings."""


def rewrite_until_supported(
    prompt: Comparison, answer: str, lister: Lister, rewriter: Rewriter, *, max_rounds: int = MAX_ROUNDS
) -> Outcome:
    """The loop for one answer. Raises ConfigError for `max_rounds` other than 1 to 5."""
    if not 1 <= max_rounds <= MAX_ROUNDS:
        raise ConfigError(f"max_rounds must be 1 to {MAX_ROUNDS}, not {max_rounds}")
    first = lister(prompt, answer)
    if first is None:
        return Outcome(answer, "unreadable list")
    if not first:
        return Outcome(answer, "supported")
    text, listed = answer, first
    for number in range(1, max_rounds + 1):
        rewritten = rewriter(prompt, text, listed, number)
        if rewritten is None or not rewritten.strip():
            return Outcome(answer, "no rewriting", None, tuple(first), number - 1)
        text = rewritten.strip()
        again = lister(prompt, text)
        if again is None:
            return Outcome(answer, "unreadable list", text, tuple(first), number)
        if not again:
            end: End = "unchanged" if text.split() == answer.split() else "kept"
            return Outcome(answer, end, text, tuple(first), number)
        listed = again
    return Outcome(answer, "unsolved", text, tuple(first), max_rounds)


def pair(prompt: Comparison, outcome: Outcome, *, name: str = "") -> Comparison:
    """The rewritten answer preferred to the first one. Raises MMGPTError for an outcome without a pair."""
    if outcome.end != "kept" or outcome.rewritten is None:
        raise MMGPTError(f"{prompt.key}: no pair ({outcome.end})")
    completions = tuple(
        Completion(({"role": "assistant", "content": [text]},), rank=rank)
        for rank, text in enumerate((outcome.rewritten, outcome.answer))
    )
    columns = {"unsupported": list(outcome.unsupported), "rounds": outcome.rounds}
    return Comparison(prompt.key + name, prompt.prompt, completions, prompt.is_text, columns=columns)


# ---- a model as lister and rewriter ----

LIST_INSTRUCTION = (
    "Above are a task and, quoted behind it, an answer to it. Which statements of the answer are not supported by the "
    "task's text or pictures? Write each on a line of its own that begins with '- ', in the answer's own words. "
    "Write only NONE if there are none."
)
REWRITE_INSTRUCTION = (
    "Above are a task and, quoted behind it, an answer to it. These statements of the answer are not supported by the "
    "task's text or pictures:\n{unsupported}\nWrite the answer again without them, and change nothing else. Write the "
    "answer alone."
)


class ModelLister:
    """A model lists. One whose list cannot be read is asked no second time."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def __call__(self, prompt: Comparison, answer: str) -> list[str] | None:
        return read_list(self.ask(_about(prompt, answer, LIST_INSTRUCTION), 0))


class ModelRewriter:
    """A model rewrites. Each round has another seed: a model that samples does not repeat itself."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def __call__(self, prompt: Comparison, answer: str, unsupported: Sequence[str], round: int) -> str | None:
        instruction = REWRITE_INSTRUCTION.format(unsupported="\n".join(f"- {' '.join(u.split())}" for u in unsupported))
        return self.ask(_about(prompt, answer, instruction), round).strip() or None


_ITEM = re.compile(r"(?:[-*•]|\d{1,2}[.)])\s+(\S.*)")


def read_list(text: str) -> list[str] | None:
    """A model's list: a line for each thing, or a JSON array of strings; NONE or [] is an empty one.

    Everything else is None, which says nothing: an empty text, one with words before or behind its list, an item that
    says that there is none.
    """
    text = text.strip()
    if text.casefold() in ("none", "none."):
        return []
    items: Any
    if text.startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(item, str) and item.strip() for item in items):
            return None
    else:
        matches = [_ITEM.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
        if not matches or None in matches:
            return None
        items = [match[1] for match in matches if match]
    if any(item.strip(" .").casefold() in ("none", "nothing", "n/a") for item in items):
        return None
    return list(dict.fromkeys(item.strip() for item in items))


def _about(prompt: Comparison, answer: str, instruction: str) -> list[Message]:
    """A chat about an answer. Task and answer are quoted line by line: nothing in them can end the quotation."""
    parts: list[Any] = []
    for message in prompt.prompt:
        content = message["content"]
        for part in [content] if isinstance(content, str) else content:
            parts.append(part if isinstance(part, Image) else _text(f"{message['role']}:\n{quoted(part)}\n"))
    parts += [_text(f"answer:\n{quoted(answer)}\n"), _text(instruction)]
    return [{"role": "user", "content": parts}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# ---- checks against what is known ----


def caption_prompt(record: Record) -> Comparison:
    """What is asked about a photo, with all that is known of it. Raises MMGPTError where nothing is."""
    if isinstance(record.image, Concepts):
        raise MMGPTError(f"{record.key}: has no pixels")
    texts = [text for text in record.captions if text.strip()]
    index = record.metadata.get("class")
    if type(index) is int and 0 <= index < len(read_classes()):
        texts += [name for name in (read_classes()[index].plain, read_classes()[index].kind) if name]
    if not texts:
        raise MMGPTError(f"{record.key}: nothing is known of the image: no captions, no class")
    message: Message = {"role": "user", "content": [Image(record.image), CAPTION_PROMPT]}
    return Comparison(record.key, (message,), columns={KNOWN: texts})


def known_texts(prompt: Comparison) -> list[str]:
    """Its column `known`. Raises NothingKnownError where there is none."""
    texts = prompt.columns.get(KNOWN)
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise NothingKnownError(f"nothing is known of the image: there is no column {KNOWN!r} of texts")
    return list(texts)


def list_objects(prompt: Comparison, answer: str) -> list[str]:
    """A lister of captions: the objects that no known text about the photo names or implies (`mm_gpt.eval.objects`)."""
    return Known(known_texts(prompt)).unsupported(answer)


def list_names_and_numbers(prompt: Comparison, answer: str) -> list[str]:
    """A lister of answers about a text: numbers, and words with a capital inside a sentence, that the prompt lacks.

    It cannot see that two names of the text were swapped: see `examples/alignment/grounded_pairs.py` for how often.
    """
    said = set(re.findall(r"\w+", " ".join(_words(prompt)).casefold()))
    found = re.findall(r"\d[\d.,]*\d|\d+|(?<![.!?]\s)(?<!^)\b[A-Z]\w+", answer.strip())
    return list(dict.fromkeys(w for w in found if not set(re.findall(r"\w+", w.casefold())) <= said))


def _words(prompt: Comparison) -> Iterable[str]:
    for message in prompt.prompt:
        content = message["content"]
        yield from (p for p in ([content] if isinstance(content, str) else content) if isinstance(p, str))


class SamplesRewriter:
    """The rewriting is another sample of the model for the same prompt: one that names none of what was listed.

    Of these the one of most words that are known of the photo, among those of about the answer's length that name
    as many objects: what is learned is to see better, and not to say less. Each round takes the next best.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[str]], *, max_longer: int = 2, fewer: int = 0, grounded: float = 0.5
    ) -> None:
        """`samples`: the answers by the key of their prompt. `max_longer`: words that a rewriting may be longer or
        shorter. `fewer`: objects that it may name less. `grounded`: the share of its content words, at least, that
        known texts have; sampled nonsense is no better than a thing that is not there."""
        self.samples, self.max_longer, self.fewer, self.grounded = samples, max_longer, fewer, grounded

    def __call__(self, prompt: Comparison, answer: str, unsupported: Sequence[str], round: int) -> str | None:
        known = set(_content_words(" ".join(known_texts(prompt))))
        objects, length = len(named_objects(answer)), len(answer.split())
        rated = []
        for text in dict.fromkeys(self.samples.get(prompt.key, ())):
            words = _content_words(text)
            differs = len(text.split()) - length
            if not words or abs(differs) > self.max_longer or len(named_objects(text)) < objects - self.fewer:
                continue
            if any(re.search(rf"\b{re.escape(word)}\b", text.casefold()) for word in unsupported):
                continue
            grounded = sum(word in known for word in words) / len(words)
            if grounded < self.grounded:
                continue
            rated.append((-grounded, abs(differs), text))
        rated.sort()
        return rated[round - 1][2] if len(rated) >= round else None


_FUNCTION_WORDS = word_set(
    "a an the of in on at to is are and with by for from its it his her their as that this while be being"
)


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.casefold()) if word not in _FUNCTION_WORDS]
