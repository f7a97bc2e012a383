"""How well the runs of a ladder answer questions about pictures: exact match beside the likelihood of the answer.

    python examples/scaling/questions.py PLAN WORK/pages

writes `questions.json` into the folder of each finished run: for every question of `WORK/pages/questions.jsonl` the
log-probability of the answer, and whether greedy decoding gives it to the letter. Both come from one forward pass:
greedy decoding writes the answer if each of its tokens is the likeliest one. Samples are not needed for a pass rate
either: the probability of the answer is what the share of right ones among infinitely many samples at temperature 1 is.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from picture_pages import OPENINGS

from mm_gpt.document import Document, Image, Text
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Processor, collate
from mm_gpt.scaling.ladder import LadderPlan
from mm_gpt.scaling.points import CannotTell
from mm_gpt.scaling.runs import read_run

ANSWERS = "questions.json"
BATCH = 50


@dataclass(frozen=True)
class Question:
    image: Path
    question: str
    answer: str

    def document(self) -> Document:
        """As a page has it; the answer alone is scored."""
        asked = Text(self.question, is_target=False)
        return Document((Text(OPENINGS[0], is_target=False), Image(self.image), asked, Text(f" {self.answer}")))


def read_questions(folder: Path) -> list[Question]:
    lines = (folder / "questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [Question(folder / row["image"], row["question"], row["answer"]) for row in rows]


@torch.inference_mode()
def answer(model: MMGPT, processor: Processor, questions: list[Question]) -> list[tuple[float, int, bool]]:
    """For each question the log-probability of its answer in nats, its tokens, and whether greedy decoding gives it."""
    found = []
    model.eval()
    for start in range(0, len(questions), BATCH):
        examples = [processor(question.document()) for question in questions[start : start + BATCH]]
        batch = collate([[example] for example in examples], processor.pixels(examples))
        logits = model.decoder.logits(model(batch)).float().log_softmax(dim=-1)  # (B, T, V)
        for row, labels in zip(logits, batch.labels, strict=True):
            (places,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
            places = places[:-1]  # the last target is the end of the document, where a page goes on
            wanted = labels[places]
            scores = row[places].gather(1, wanted[:, None]).sum().item()
            found.append((scores, len(places), bool((row[places].argmax(dim=1) == wanted).all())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("pages", type=Path)
    args = parser.parse_args()
    plan, questions = LadderPlan.load(args.plan), read_questions(args.pages)
    for run in plan.runs:
        folder = args.plan.parent / run.name
        try:
            read_run(folder, run)
        except CannotTell:
            continue
        if not (folder / ANSWERS).exists():
            model, processor = load_model(folder / "best")
            rows = [
                {"question": q.question, "answer": q.answer, "log_probability": score, "tokens": n, "exact": exact}
                for q, (score, n, exact) in zip(questions, answer(model, processor, questions), strict=True)
            ]
            (folder / ANSWERS).write_text(json.dumps(rows) + "\n")
        rows = json.loads((folder / ANSWERS).read_text())
        exact = sum(row["exact"] for row in rows) / len(rows)
        nats = -sum(row["log_probability"] for row in rows) / sum(row["tokens"] for row in rows)
        print(f"{run.name}: {exact:.1%} to the letter, {nats:.3f} nats a token of the answers")


if __name__ == "__main__":
    main()
