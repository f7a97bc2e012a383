"""Evaluation tasks: what is asked of a model, and how the answers are scored. One small class each, in `TASKS`.

The controls of tasks about images are in `mm_gpt.eval.base`. For text perplexity the control is the decoder `before` it
was adapted.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.contamination.evaluation_index import EvaluationItem
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer, Record
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.base import ImageTask, Instance, RatioScore, Score, Task
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.metrics.captions import bleu, cider_d, rouge_l
from mm_gpt.eval.metrics.vqa import exact_match, vqa_accuracy
from mm_gpt.eval.naming import Naming
from mm_gpt.eval.objects import UnsupportedObjects
from mm_gpt.eval.perplexity import WINDOW, read_text, window_nats, windows
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.inference.assistant import Assistant, load
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.decoder import Decoder
from mm_gpt.templates.prompts import CAPTION_PROMPT, question_prompt

logger = logging.getLogger(__name__)

MIN_ANNOTATORS = 4
"""From so many answers on, the VQA accuracy can reach 1."""


class Captioning(ImageTask):
    """CIDEr-D, BLEU-4 and ROUGE-L of one caption for each image against all its references."""

    name = "captioning"
    num_beams = 3
    max_new_tokens = 40

    def generation(self) -> GenerationConfig:
        return self.assistant.caption_config(self._options())

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        return [("", CAPTION_PROMPT, {"references": list(record.captions)})] if record.captions else []

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [record.captions]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        predictions, references = [r["prediction"] for r in rows], [r["references"] for r in rows]
        return {
            "CIDEr-D": cider_d(predictions, references),
            "BLEU-4": bleu(predictions, references)[3],
            "ROUGE-L": rouge_l(predictions, references),
        }


class VQA(ImageTask):
    """Exact match of short answers; the VQA accuracy too where every question has the answers of 4 or more people."""

    name = "vqa"
    num_beams = 1
    max_new_tokens = 32

    def generation(self) -> GenerationConfig:
        return self.assistant.chat_config(self._options())

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        asked = []
        for number, pair in enumerate(record.questions):
            prompt = question_prompt(pair.question, pair.answer)
            row = {"question": prompt, "answer": pair.answer, "references": accepted_answers(pair)}
            asked.append((f"#{number}", prompt, row))
        return asked

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [(f"{pair.question} {pair.answer}",) for pair in record.questions]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        return self._scores([row["prediction"] for row in rows])

    def baselines(self) -> dict[str, tuple[str, dict[str, Score]]]:
        """Always the commonest answer of the evaluation set itself, which no model can know: a hard baseline."""
        answer = Counter(instance.row["answer"] for instance in self.instances).most_common(1)[0][0]
        return {"majority_answer_of_this_set": (answer, self._scores([answer] * len(self.instances)))}

    def _scores(self, predictions: list[str]) -> dict[str, Score]:
        references = [instance.row["references"] for instance in self.instances]
        pairs = list(zip(predictions, references, strict=True))
        scores: dict[str, Score] = {}
        enough = [len(answers) >= MIN_ANNOTATORS for answers in references]
        if all(enough):
            scores["VQA accuracy"] = self._ratio(vqa_accuracy(p, answers) for p, answers in pairs)
        elif any(enough):
            logger.warning(
                "no VQA accuracy: %d of %d questions have %d answers", sum(enough), len(enough), MIN_ANNOTATORS
            )
        scores["exact match"] = self._ratio(exact_match(p, answers) for p, answers in pairs)
        return scores


class Perplexity(Task):
    """Nats per token and perplexity of plain text files, for the model and for its decoder before adaptation."""

    name = "perplexity"
    controls = default_controls = ("before",)
    unit = "windows"
    scale = 1.0
    lower_is_better = True

    def _instances(self) -> list[Instance]:
        self._before: Decoder | None = None
        self._pieces: dict[str, list[int]] = {}
        instances: list[Instance] = []
        for id, piece in itertools.islice(self._windows(self.config, self.assistant, self.errors), self.config.limit):
            self._pieces[id] = piece
            instances.append(Instance(id=id, group=len(instances), length=len(piece), row={"tokens": len(piece) - 1}))
            self._digest.update(repr(piece).encode())
        if not instances:
            raise MMGPTError(f"{', '.join(self.config.data)}: no text to evaluate")
        return instances

    @classmethod
    def _windows(
        cls, config: EvalConfig, assistant: Assistant, errors: ErrorCounter
    ) -> Iterator[tuple[str, list[int]]]:
        """(id, token ids) of each window of each text."""
        length = min(WINDOW, assistant.model.decoder.config.max_length)
        count = itertools.count()
        for number, path in enumerate(map(Path, config.data)):
            ids = assistant.processor.tokenizer.encode(read_text(path))
            if len(ids) < 2:
                errors.add("text of fewer than two tokens", str(path))
            for piece in windows(ids, length):
                yield f"{number}:{path.name}#{next(count)}", piece

    @classmethod
    def sources(cls, config: EvalConfig, assistant: Assistant | None) -> Iterator[EvaluationItem]:
        assistant = assistant or load(config.model, device=config.device, dtype=config.dtype)
        for id, piece in cls._windows(config, assistant, ErrorCounter()):
            yield EvaluationItem(id, (assistant.processor.tokenizer.decode(piece),))

    def predict(self, instances: Sequence[Instance], control: str) -> list[dict[str, Any]]:
        decoder = self._untouched() if control == "before" else self.assistant.model.decoder
        return [{"nats": nats} for nats in window_nats(decoder, [self._pieces[instance.id] for instance in instances])]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        nats = np.array([row["nats"] for row in rows])
        tokens = np.array([float(row["tokens"]) for row in rows])
        groups = np.arange(len(rows))
        return {
            "perplexity": RatioScore(nats, tokens, groups, exponential=True),
            "nats per token": RatioScore(nats, tokens, groups),
        }

    def check_control(self, control: str) -> None:
        if not isinstance(self.assistant.base_decoder, str):
            raise MMGPTError("the model has a decoder of its own: there is nothing 'before' to compare it with")

    def _untouched(self) -> Decoder:
        """The decoder that the model's configuration names, as it was before training, with the same precision."""
        if self._before is None:
            name = self.assistant.base_decoder
            assert isinstance(name, str)
            ours = self.assistant.model.decoder
            self._before = load_decoder(name)[0].to(ours.device, ours.dtype).eval().requires_grad_(False)
        return self._before


TASKS: dict[str, type[Task]] = {task.name: task for task in (Captioning, VQA, Naming, UnsupportedObjects, Perplexity)}


def accepted_answers(pair: QuestionAnswer) -> list[str]:
    """Every answer that counts as right; people's answers stay as often as they were given.

    Sets such as DAQUAR list the members of one answer ("plant, books"): there only the whole is right.
    """
    is_set = len(pair.answers) > 1 and pair.answer == ", ".join(pair.answers)
    if is_set or not pair.answers:
        return [pair.answer]
    return list(pair.answers) if pair.answer in pair.answers else [pair.answer, *pair.answers]
