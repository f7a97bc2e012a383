"""What is learned from one image this time: some of its captions under some prompt, and some of its questions.

A draw is a choice of numbers, made from how many captions and questions there are; so the plan of a run can make it
from a table, and a worker makes the same one beside the text.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm_gpt.datasets.formats.captioned import clean_caption
from mm_gpt.datasets.loading.caption_questions import derive_questions
from mm_gpt.datasets.samples import QuestionAnswer, Record
from mm_gpt.document import Document, Image
from mm_gpt.processor import Processor
from mm_gpt.templates.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS, question_prompt

PROMPTS = (CAPTION_PROMPT, *OTHER_CAPTION_PROMPTS)
DERIVED_SETS = 4
"""Sets of questions that are derived from the captions of an image: each pass takes the next one."""


@dataclass(frozen=True)
class RecordSampling:
    """How documents are drawn from records: see the fields of LanguageRecipe."""

    max_captions: int = 5
    max_questions: int = 8
    augment: bool = False
    """The mirror image half the time."""
    separate: bool = False
    """Each caption and answer a document of its own, not a branch of one that they share."""
    derived_share: float = 0.0
    """The share of captioned images that also come with questions derived from their captions."""


@dataclass(frozen=True)
class Draw:
    captions: tuple[int, ...]
    prompt: int
    """Of PROMPTS."""
    questions: tuple[int, ...]
    """Numbers behind those of the record's own questions are derived ones."""
    capitals: tuple[bool, ...]
    """Whether each question begins with a capital letter, as half of the people write it."""
    mirrored: tuple[bool, bool]
    """The image of the captions, of the questions: where no text tells its sides apart."""


def choose(rng: random.Random, num_captions: int, num_questions: int, num_derived: int, how: RecordSampling) -> Draw:
    """The same for the same numbers and state of `rng`."""
    captions: list[int] = []
    prompt, mirrored = 0, [False, False]
    if num_captions:
        captions = rng.sample(range(num_captions), min(num_captions, how.max_captions))
        prompt = 0 if rng.random() < 0.6 else rng.choice(range(1, len(PROMPTS)))
        mirrored[0] = how.augment and rng.random() < 0.5
    questions = rng.sample(range(num_questions), min(num_questions, how.max_questions))
    if num_captions and rng.random() < how.derived_share:
        questions += range(num_questions, num_questions + num_derived)
    capitals = tuple(rng.random() < 0.5 for _ in questions)
    if questions:
        mirrored[1] = how.augment and rng.random() < 0.5
    return Draw(tuple(captions), prompt, tuple(questions), capitals, (mirrored[0], mirrored[1]))


def derived_questions(record: Record, number: int, max_questions: int) -> list[QuestionAnswer]:
    """Set `number` of the questions that the record's captions answer, the same one each time."""
    rng = random.Random(f"derived/{record.key}/{number % DERIVED_SETS}")
    return derive_questions(record.captions, rng, max_questions=max_questions)


def draw_documents(
    record: Record, rng: random.Random, number: int, processor: Processor, how: RecordSampling
) -> list[Document]:
    """The documents of pass `number`: of the captions, and of the questions, as far as there are any."""
    derived = derived_questions(record, number, how.max_questions) if how.derived_share else []
    drawn = choose(rng, len(record.captions), len(record.questions), len(derived), how)
    documents = []
    if drawn.captions:
        captions = [record.captions[n] for n in drawn.captions]
        image = _image(record, captions, drawn.mirrored[0])
        cleaned = [clean_caption(caption) for caption in captions]
        documents.append(processor.captions(image, PROMPTS[drawn.prompt], cleaned, id=record.key))
    if drawn.questions:
        questions = [[*record.questions, *derived][n] for n in drawn.questions]
        pairs = [
            (training_prompt(q.question, q.answer, capital=capital), q.answer)
            for q, capital in zip(questions, drawn.capitals, strict=True)
        ]
        image = _image(record, [text for pair in pairs for text in pair], drawn.mirrored[1])
        documents.append(processor.questions(image, pairs, id=record.key))
    if how.separate:
        documents = [Document(d.segments + branch, id=d.id) for d in documents for branch in d.branches]
    return documents


def training_prompt(question: str, answer: str, *, capital: bool) -> str:
    """A question as users may type it, with a capital letter or without."""
    prompt = question_prompt(question, answer)
    return prompt[:1].upper() + prompt[1:] if capital else prompt


_SIDED = re.compile(r"\b(left|right|sign|sa(ys|ying)|reads?|reading|writing|written|words?|letters?|numbers?)\b", re.I)
"""Texts that a mirror image would make untrue."""


def _image(record: Record, texts: Sequence[str], mirrored: bool) -> Image:
    """The record's image, or its mirror image when `texts` fit that as well."""
    return Image(record.image, mirrored and not any(map(_SIDED.search, texts)))
