"""Who grades: one of our models, any server of OpenAI's protocol, a classifier of ours or a Python function.

What a grader does not answer clearly is counted and named.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm_gpt.alignment.functions import load_function
from mm_gpt.alignment.grading import YES_NO, Grade, Grader, Question, grading_prompt, parse, shares
from mm_gpt.config import check_numbers
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Image, Message, check_text
from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.model.classification import sequences
from mm_gpt.network.urls import short_name

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant
    from mm_gpt.inference.engine import Engine
    from mm_gpt.model.classification import Classifier
    from mm_gpt.processor import Processor

SERVER_TOKENS, TOP_LOGPROBS = 16, 20
"""Of a server's answer; the most likely tokens that OpenAI's protocol shows."""
SILENT_AFTER = 8
"""Questions in a row to which a server gave no answer at all; the rest of a call is not even asked then."""
BACKOFF_S = 0.5
ROWS_TOGETHER = 32
"""Of a classifier."""


@dataclass(frozen=True, kw_only=True)
class GraderConfig:
    """Who grades. Raises ConfigError naming a value that is out of range."""

    source: str
    """The name or folder of a model; the folder of a classifier; the http(s) URL of a server, whose key is what
    MM_GPT_API_KEY says; `file.py:function` or `package.module:function`."""
    model: str = ""
    """Of a server: which of its models; "" takes the first."""
    timeout_s: float = 60.0
    """Of a server: how long it may be silent."""
    attempts: int = 3
    """Of a server: how often a question is asked."""
    parallel: int = 8
    """Of a server: questions at a time."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("source of the grader is empty")
        check_numbers(self, "timeout_s", above=0)
        check_numbers(self, "attempts", "parallel", at_least=1)


def load_grader(config: GraderConfig, *, device: str = "auto") -> Grader:
    """Raises MMGPTError for a grader that is not there."""
    source = config.source
    if source.startswith(("http://", "https://")):
        return ServerGrader(config)
    if re.fullmatch(r".+:\w+", source) and not Path(source).exists():
        return FunctionGrader(load_function(source), name=source)
    from mm_gpt.training.classification import CONFIG, load_classifier

    if (Path(source) / CONFIG).is_file():
        return ClassifierGrader(*load_classifier(source), name=Path(source).name)
    from mm_gpt.inference.assistant import load

    return ModelGrader(load(source, device=device), name=Path(source).name)


# ---- One of our models ----


class ModelGrader:
    """One of our models, which sees the images of the prompt as well.

    The probabilities are those of the next token, among the tokens that begin an option: the answer is constrained to
    the options, and one step says all of it."""

    def __init__(self, assistant: "Assistant", *, name: str = "model"):
        self.name, self.errors, self._assistant = name, ErrorCounter(), assistant
        self._ids: dict[tuple[str, ...], list[list[int]]] = {}

    def grade(self, questions: Sequence[Question]) -> list[Grade]:
        return [self._grade(question) for question in questions]

    def _grade(self, question: Question) -> Grade:
        try:
            document = self._assistant.processor.chat(grading_prompt(question))
            probabilities = _next_token(self._assistant.engine, document).exp()
        except MMGPTError as error:  # too long, an image that does not load, half a character
            self.errors.add(f"not readable for grader {self.name}", f"{question.where}: {error}")
            return None
        grade = shares([float(probabilities[ids].sum()) for ids in self._first_ids(question.labels)])
        if grade is None:
            self.errors.add(f"grader {self.name} answers none of {', '.join(question.labels)}", question.where)
        return grade

    def _first_ids(self, labels: tuple[str, ...]) -> list[list[int]]:
        """The tokens that begin each label. Other spellings of it count where they are one token.

        Raises ConfigError for a tokenizer that begins two labels alike."""
        if labels not in self._ids:
            encode = self._assistant.processor.tokenizer.encode
            found = []
            for label in labels:
                spellings = {label, label.lower(), label.capitalize(), label.upper()}
                encoded = [encode(f"{space}{spelling}") for spelling in spellings for space in ("", " ")]
                found.append({encode(label)[0]}.union(ids[0] for ids in encoded if len(ids) == 1))
            several = {id for ids in found for id in ids if sum(id in other for other in found) > 1}
            if any(not ids - several for ids in found):
                raise ConfigError(f"grader {self.name}: its tokenizer begins two of {', '.join(labels)} alike")
            self._ids[labels] = [sorted(ids - several) for ids in found]
        return self._ids[labels]


def _next_token(engine: "Engine", document: Document) -> Tensor:
    """Natural log-probabilities (V,) of the token after a prompt; what was read is kept for the next prompt."""
    from mm_gpt.inference.generation import GenerationConfig

    job = engine.job(document, GenerationConfig(max_new_tokens=1))
    with engine.lock, torch.inference_mode():
        try:
            logits = job.start()
        finally:
            for row in job.rows:
                job.finish(row)
        return logits[0].float().log_softmax(dim=-1).cpu()


# ---- A server ----


class ServerGrader:
    """Any server of OpenAI's protocol. With `logprobs` where it has them; else what it says is certain.

    Raises MMGPTError when there is no such server. Later, what it does not answer is counted.
    """

    def __init__(self, config: GraderConfig):
        from mm_gpt.serving.remote import RemoteAssistant

        self.name, self.errors, self.config = short_name(config.source), ErrorCounter(), config
        key = os.environ.get("MM_GPT_API_KEY", "")
        self._server = RemoteAssistant(
            config.source, api_key=key, model=config.model or None, silence_s=config.timeout_s
        )
        self._has_logprobs = True
        self._lock, self._unanswered = threading.Lock(), 0

    def grade(self, questions: Sequence[Question]) -> list[Grade]:
        self._unanswered = 0
        with ThreadPoolExecutor(min(self.config.parallel, max(1, len(questions)))) as pool:
            return list(pool.map(self._grade, questions))

    def _grade(self, question: Question) -> Grade:
        if self._unanswered >= SILENT_AFTER:
            return self._none(f"grader {self.name} does not answer any more", question)
        from mm_gpt.serving.remote import ServerError

        try:
            choice = self._ask(question)
        except ServerError as error:
            with self._lock:
                self._unanswered += 1
            return self._none(f"no answer of grader {self.name}", question, str(error))
        except MMGPTError as error:  # too long, an image that does not load, half a character
            return self._none(f"not readable for grader {self.name}", question, str(error))
        with self._lock:
            self._unanswered = 0
        grade = _server_grade(choice, question.labels)
        return grade or self._none(f"grader {self.name} answers none of {', '.join(question.labels)}", question)

    def _none(self, reason: str, question: Question, how: str = "") -> Grade:
        with self._lock:
            self.errors.add(reason, f"{question.where}: {how}" if how else question.where)
        return None

    def _ask(self, question: Question) -> Mapping[str, Any]:
        from mm_gpt.serving.remote import ServerError

        messages = [{**message, "content": _broken_up(message["content"])} for message in grading_prompt(question)]
        for part in (part for message in messages for part in message["content"]):
            if isinstance(part, Image):
                part.size()  # raises ImageError for what is none
            else:
                check_text(part["text"], "the text")
        for attempt in range(1, self.config.attempts + 1):
            shown = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self._has_logprobs else {}
            try:
                return self._server.whole(messages, max_new_tokens=SERVER_TOKENS, temperature=0.0, **shown)
            except ServerError as error:
                if shown and error.status in (400, 422):  # not every server has them
                    self._has_logprobs = False
                    return self._ask(question)
                if not error.may_pass or attempt == self.config.attempts:
                    raise
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _server_grade(choice: Mapping[str, Any], labels: Sequence[str]) -> Grade:
    """From a choice of the server's answer, of which nothing is taken for granted."""
    try:
        said = parse(choice["message"]["content"], labels)
        if said is None:
            return None
        shown = (choice.get("logprobs") or {}).get("content") or [{}]
        masses = [0.0] * len(labels)
        for top in shown[0].get("top_logprobs") or []:
            if (place := parse(top["token"], labels)) is not None:
                masses[place] += math.exp(min(0.0, float(top["logprob"])))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if not any(masses):
        return tuple(float(place == said) for place in range(len(labels)))
    return shares(masses)


_SPECIAL = re.compile(r"<(?=[|｜/!A-Za-z_])|\[(?=/?[A-Z_]+\])")


def _broken_up(content: Sequence[Any]) -> list[Any]:
    """As parts of OpenAI's protocol. A space goes into whatever has the form of a special token: some servers read
    those in a user's text as well."""
    return [
        {"type": "text", "text": _SPECIAL.sub(lambda found: f"{found[0]} ", part)} if isinstance(part, str) else part
        for part in content
    ]


# ---- A classifier, a function ----


class ClassifierGrader:
    """A classifier that `mm-gpt train classify` wrote. It reads text alone.

    Of kind `entailment`: the premise is the conversation with its answer, the hypothesis the question. Of kind
    `classification`: the text is all three. Its labels are the options of the questions that it is asked: yes and no,
    or the classes of the rubric, and then no question needs to be read.
    """

    def __init__(self, classifier: "Classifier", processor: "Processor", *, name: str = "classifier"):
        if classifier.config.kind not in ("entailment", "classification"):
            raise MMGPTError(f"grader {name}: a classifier of {classifier.config.kind} answers no questions")
        self.name, self.errors = name, ErrorCounter()
        self._classifier, self._processor = classifier, processor

    def grade(self, questions: Sequence[Question]) -> list[Grade]:
        grades: list[Grade] = [None] * len(questions)
        rows = {number: row for number, each in enumerate(questions) if (row := self._row(each)) is not None}
        order = sorted(rows, key=lambda number: sum(map(len, rows[number].values())))  # little padding
        for first in range(0, len(order), ROWS_TOGETHER):
            few = order[first : first + ROWS_TOGETHER]
            found = self._classifier.probabilities([rows[number] for number in few], self._processor.tokenizer)
            for number, own in zip(few, found, strict=True):
                grades[number] = tuple(own[option] for option in questions[number].options)
        return grades

    def _row(self, question: Question) -> dict[str, str] | None:
        """What is read of a question; None, counted, for what cannot be read."""
        labels, decoder = self._classifier.config.labels, self._classifier.decoder.config
        if sorted(labels) != sorted(question.options):
            have, need = ", ".join(labels), ", ".join(question.options)
            raise MMGPTError(f"grader {self.name} tells {have}; {question.name} asks for {need}")
        row = classifier_row(question, self._classifier.config.kind)
        try:
            for text in row.values():
                check_text(text, "the text")
            (ids,) = sequences(row, self._processor.tokenizer, decoder.vocab_size)
            if len(ids) > decoder.max_length:
                raise ContextOverflowError(f"{len(ids)} tokens do not fit into a context of {decoder.max_length}")
        except MMGPTError as error:
            self.errors.add(f"not readable for grader {self.name}", f"{question.where}: {error}")
            return None
        return row


def classifier_row(question: Question, kind: str) -> dict[str, str]:
    """What a classifier reads of a question; its training rows are made with it, and have a `label` besides."""
    turns = [f"{message['role']}: {_text_of(message)}" for message in question.comparison.prompt]
    told = "\n".join([*turns, f"answer: {question.answer}"])
    if kind == "entailment":
        return {"premise": told, "hypothesis": question.text}
    return {"text": f"{question.text}\n{told}" if question.options == YES_NO else told}


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


class FunctionGrader:
    """A function of a `Question`: it returns whether, or how probably, the answer is yes; the name of an option; a
    probability for each option by its name; or None.

    Raises MMGPTError naming the function when it fails."""

    def __init__(self, function: Callable[[Question], Any], *, name: str = "function"):
        self.name, self.errors, self._function = name, ErrorCounter(), function

    def grade(self, questions: Sequence[Question]) -> list[Grade]:
        grades = []
        for question in questions:
            try:
                given = self._function(question)
            except (Exception, SystemExit) as error:
                raise MMGPTError(f"grader {self.name}: {type(error).__name__}: {error} ({question.where})") from error
            grade = _given(given, question.options)
            if grade is None:
                if given is None:
                    self.errors.add(f"grader {self.name} gives None", question.where)
                else:
                    self.errors.add(f"grader {self.name} gives no grade", f"{question.where}: {given!r:.60}")
            grades.append(grade)
        return grades


def _given(value: Any, options: tuple[str, ...]) -> Grade:
    """What a function gave, as a grade; None for what is none."""
    if isinstance(value, str):
        place = parse(value, options) if options == YES_NO else options.index(value) if value in options else None
        return None if place is None else tuple(float(n == place) for n in range(len(options)))
    if isinstance(value, Mapping):
        if set(value) != set(options) or not all(_is_share(value[option]) for option in options):
            return None
        return shares([float(value[option]) for option in options])
    if options == YES_NO and _is_share(value):
        return float(value), 1.0 - float(value)
    return None


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1
