"""Masked tokens (BERT) and halves of a document (InfoNCE) against the next token, at the same number of FLOPs.

Each objective trains the same small transformer from the same random weights until the same FLOPs are spent, those of
forward and backward as torch counts them. Then every model is asked what it has learned:

  generation     the loss of the next token on held-out pages, after a short causal training that is the same for all
  topics         which chapter a paragraph of a held-out page is from, read off the frozen states by a linear model
  cloze          which of four words stood in a gap, for models that can say so without more training

python examples/literature/objectives.py debian --page docs/literature.md
python examples/literature/objectives.py --quick --seeds 1 -o /tmp/try.json --plot /tmp/try.png
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gimp_manual import Page, split, texts, token_rows
from small_runs import (
    Finished,
    batches,
    best_rate,
    cell,
    chosen,
    interval,
    linear_accuracy,
    options,
    pages_of,
    paired,
    said,
    save_figure,
    small_config,
    table,
    write,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mm_gpt.errors import MMGPTError
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.objectives import contrastive_segment_loss, mask_tokens, mean_state
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.schedules import learning_rate
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.train_config import TrainConfig

NEXT, MASKED, SEGMENTS, NONE = "next token", "masked tokens", "segments", "random weights"
OBJECTIVES = (NEXT, MASKED, SEGMENTS)
CHOICES = 4
TUNED_SHARE = 0.25
"""Of the FLOPs, for each learning rate that is tried."""


@dataclass(frozen=True)
class Sizes:
    steps: int = 300
    """Of the next token, whose FLOPs all objectives may spend."""
    adapt_steps: int = 50
    rows: int = 8
    documents: int = 16
    """Rows of a step of `segments`: each is told from the others of its step."""
    length: int = 64
    width: int = 48
    layers: int = 2
    vocab_size: int = 512
    paragraphs: int = 400
    held_out: int = 96
    items: int = 200
    walks: int = 3


FULL = Sizes()
QUICK = Sizes(
    steps=6,
    adapt_steps=2,
    rows=4,
    documents=6,
    length=32,
    width=32,
    layers=1,
    vocab_size=600,
    paragraphs=60,
    held_out=4,
    items=12,
    walks=1,
)


def objective_loss(name: str, model: Decoder, rows: Tensor, mask_id: int, draw: torch.Generator) -> tuple[Tensor, int]:
    """The loss of an objective on rows (B, T + 1), summed, and the number of things that it is a sum over."""
    positions = torch.arange(rows.shape[1] - 1).expand(len(rows), -1)
    if name == NEXT:
        labels = rows[:, 1:].contiguous()
        total, count = model.loss(model(model.embed(rows[:, :-1]), positions), labels)
        return total, int(count)
    if name == MASKED:
        shown, labels = mask_tokens(rows[:, :-1], mask_id=mask_id, vocab_size=mask_id, generator=draw)
        total, count = model.loss(model(model.embed(shown), positions), labels)
        return total, int(count)
    half = positions.shape[1] // 2
    sides, places = (torch.cat([x[:, :half], x[:, half : 2 * half]]) for x in (rows, positions))  # (2B, T / 2)
    states = mean_state(model(model.embed(sides), places))
    return contrastive_segment_loss(*states.chunk(2)), len(rows)


def step_flops(name: str, model: Decoder, rows: Tensor, mask_id: int) -> int:
    """Of a training step on rows (B, T + 1): matrix products forward and backward, each multiplication and addition."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        loss, _ = objective_loss(name, model, rows, mask_id, torch.Generator().manual_seed(0))
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


class World:
    """Text, tasks on it, and runs of a model."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes):
        self.sizes = sizes
        self.parts = split(pages_of(args, ("en",)))
        self.tokenizer = Tokenizer.train(texts(self.parts["train"], "en"), sizes.vocab_size)
        self.rows = {
            part: token_rows(pages, "en", self.tokenizer, sizes.length + 1) for part, pages in self.parts.items()
        }
        self.mask_id = self.tokenizer.vocab_size
        self.config = small_config(
            self.mask_id + 1, width=sizes.width, layers=sizes.layers, max_length=sizes.length, causal=False
        )
        self.topics = {part: self.labelled(pages) for part, pages in self.parts.items()}
        self.items = self.gaps(self.rows["test"])
        self.flops = {
            name: step_flops(name, self.fresh(name, 0), self.rows["train"][: self.size(name)], self.mask_id)
            for name in OBJECTIVES
        }

    def fresh(self, name: str, seed: int) -> Decoder:
        model = Decoder(replace(self.config, causal=name == NEXT))
        init_weights(model, torch.Generator().manual_seed(seed))
        return model

    def size(self, name: str) -> int:
        return self.sizes.documents if name == SEGMENTS else self.sizes.rows

    def steps(self, name: str, share: float = 1.0) -> int:
        """As many as the FLOPs of all steps of the next token pay for."""
        return max(1, round(share * self.sizes.steps * self.flops[NEXT] / self.flops[name]))

    def train(
        self, name: str, model: Decoder, lr: float, seed: int, steps: int, watch: Callable[[int], None] | None = None
    ) -> Decoder:
        config = TrainConfig(
            steps=steps, lr=lr, warmup_steps=max(1, steps // 10), final_lr=0.1, weight_decay=0.01, beta2=0.95
        )
        optimizer = make_optimizer([ParameterGroup("all", list(model.parameters()))], config)
        draw = torch.Generator().manual_seed(seed)
        for step, rows in enumerate(islice(batches(self.rows["train"], self.size(name), seed), steps)):
            if watch is not None:
                watch(step)
            loss, count = objective_loss(name, model, rows, self.mask_id, draw)
            optimizer.zero_grad()
            (loss / max(1, count)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
        return model

    @torch.no_grad()
    def held_out(self, name: str, model: Decoder, part: str) -> float:
        """An objective's loss on pages that were not trained on, always with the same masks."""
        draw = torch.Generator().manual_seed(12)
        total, count = 0.0, 0
        for rows in self.rows[part][: self.sizes.held_out].split(self.size(name)):
            loss, number = objective_loss(name, model, rows, self.mask_id, draw)
            total, count = total + float(loss), count + number
        return total / count

    # ---- What a model has learned ----

    def adapt(
        self, model: Decoder, lr: float, seed: int, watch: Callable[[Decoder, int], None] | None = None
    ) -> Decoder:
        """A copy that sees only what comes before, after `adapt_steps` of the next token."""
        twin = Decoder(replace(self.config, causal=True))
        twin.load_state_dict(model.state_dict())
        seen = None if watch is None else lambda step: watch(twin, step)
        return self.train(NEXT, twin, lr, seed, self.sizes.adapt_steps, seen)

    def labelled(self, pages: list[Page]) -> tuple[Tensor, Tensor, list[str]]:
        """Paragraphs with a topic: ids (N, T), padded by -1, topics (N,), and texts, evenly spread over the pages."""
        names = sorted({page.topic for page in pages if page.topic})
        seen: dict[str, int] = {}
        for page in pages:
            for text in page.paragraphs["en"] if page.topic else ():
                if len(text) >= 80:
                    seen.setdefault(text, names.index(str(page.topic)))
        chosen = list(seen.items())[:: max(1, -(-len(seen) // self.sizes.paragraphs))]
        ids = [torch.tensor(self.tokenizer.encode(text)[: self.sizes.length]) for text, _ in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        return padded, torch.tensor([topic for _, topic in chosen]), [text for text, _ in chosen]

    @torch.no_grad()
    def states(self, model: Decoder, ids: Tensor) -> Tensor:
        """The mean state of each paragraph (N, D)."""
        found = []
        for own in ids.split(64):
            present = own >= 0
            positions = torch.arange(own.shape[1]).expand(len(own), -1)
            mask = present[:, None, None].expand(-1, 1, own.shape[1], -1)
            if model.config.causal:
                mask = mask & torch.ones(own.shape[1], own.shape[1], dtype=torch.bool).tril()
            found.append(mean_state(model(model.embed(own.clamp(min=0)), positions, mask=mask), present))
        return torch.cat(found)

    def topic_accuracy(self, model: Decoder) -> float:
        states = {part: (self.states(model, ids), labels) for part, (ids, labels, _) in self.topics.items()}
        return linear_accuracy(states["train"], states["validation"], states["test"])

    def word_accuracy(self) -> float:
        """The same from nothing but which tokens a paragraph has: what a probe can do without any model."""
        counts = {}
        for part, (ids, labels, _) in self.topics.items():
            bag = torch.zeros(len(ids), self.mask_id + 1).scatter_(1, ids.clamp(min=0), (ids >= 0).float())
            counts[part] = (bag, labels)
        return linear_accuracy(counts["train"], counts["validation"], counts["test"])

    def gaps(self, rows: Tensor) -> list[tuple[Tensor, int, list[int]]]:
        """Rows (T,), the place of a word of one token in the middle of each, and four words, the right one first."""
        vocabulary = {id: self.tokenizer.decode([id]) for id in range(self.tokenizer.vocab_size)}
        words = {id for id, text in vocabulary.items() if text[:1] == " " and text[1:].isalpha() and len(text) > 3}
        known = Counter(self.rows["train"].flatten().tolist())
        frequent = torch.tensor([known[id] if id in words else 0 for id in vocabulary], dtype=torch.float)
        draw = torch.Generator().manual_seed(5)
        items = []
        for row in rows[torch.randperm(len(rows), generator=draw)]:
            middle = row.shape[0] // 2
            place = next((at for at in range(middle, middle + 16) if int(row[at]) in words), None)
            if place is None or place >= self.sizes.length - 1:
                continue
            others = frequent.clone()
            others[row[place]] = 0
            wrong = torch.multinomial(others, CHOICES - 1, generator=draw).tolist()
            items.append((row[:-1], place, [int(row[place]), *wrong]))
            if len(items) == self.sizes.items:
                break
        if not items:
            raise MMGPTError("no held-out row has a word of one token in its middle: a larger vocabulary is needed")
        return items

    def measure(self, name: str, model: Decoder, adapt_lr: float, seed: int) -> dict[str, Any]:
        """All that is asked of a model, and `curves`: its loss in the course of the adaptation."""
        curve: list[tuple[int, float]] = []

        def watched(twin: Decoder, step: int) -> None:
            if step % max(1, self.sizes.adapt_steps // 5) == 0:
                curve.append((step, self.held_out(NEXT, twin, "test")))

        twin = self.adapt(model, adapt_lr, seed, watched)
        curve.append((self.sizes.adapt_steps, self.held_out(NEXT, twin, "test")))
        values: dict[str, Any] = {"curves": curve, "generation": curve[-1][1], "topics": self.topic_accuracy(model)}
        if name in OBJECTIVES:
            values["own loss"] = self.held_out(name, model, "test")
        if name != SEGMENTS:  # which has no words to say
            values["cloze"] = self.cloze_accuracy(MASKED if name == NONE else name, model)
        return values

    @torch.no_grad()
    def cloze_accuracy(self, name: str, model: Decoder) -> float:
        """A masked model names the likeliest of the four words in the gap; a causal one takes the likeliest text."""
        right = 0
        positions = torch.arange(self.sizes.length).unsqueeze(0)
        for row, place, choices in self.items:
            if name == NEXT:
                filled = row.repeat(CHOICES, 1)
                filled[:, place] = torch.tensor(choices)
                hidden = model(model.embed(filled), positions.expand(CHOICES, -1))
                logprobs = model.logits(hidden[:, place - 1 : -1]).log_softmax(dim=-1)
                scores = logprobs.gather(2, filled[:, place:].unsqueeze(2)).sum(dim=(1, 2))
            else:
                shown = row.clone()
                shown[place] = self.mask_id
                scores = model.logits(model(model.embed(shown[None]), positions)[0, place])[choices]
            right += int(scores.argmax()) == 0
        return right / len(self.items)


def measure(world: World, seeds: int, finished: Finished, progress: tqdm) -> dict[str, dict[str, Any]]:
    """Of each objective, and of no training at all, its learning rates and what was measured, by seed."""
    found = {}
    for name in (*OBJECTIVES, NONE):
        progress.set_description(name)

        def pretrained(lr: float, seed: int, share: float = 1.0, name: str = name) -> Decoder:
            if name == NONE:
                return world.fresh(name, seed)
            return world.train(name, world.fresh(name, seed), lr, seed, world.steps(name, share))

        def own_loss(lr: float, name: str = name, made: Any = pretrained) -> float:
            progress.update()
            key = f"{name} {lr} short"
            return finished.get(key, lambda: world.held_out(name, made(lr, 1000, TUNED_SHARE), "validation"))

        best = 0.0 if name == NONE else best_rate(own_loss, 16e-3, walks=world.sizes.walks)
        models: dict[int, Decoder] = {}  # the first one is there already when it is measured

        def model_of(
            seed: int, models: dict[int, Decoder] = models, best: float = best, made: Any = pretrained
        ) -> Decoder:
            if seed not in models:
                models[seed] = made(best, seed)
            return models[seed]

        def adapted_loss(lr: float, name: str = name, best: float = best, model_of: Any = model_of) -> float:
            progress.update()
            key = f"{name} {best} adapted {lr}"
            return finished.get(key, lambda: world.held_out(NEXT, world.adapt(model_of(0), lr, 0), "validation"))

        adapt_lr = best_rate(adapted_loss, 8e-3, walks=world.sizes.walks)
        own: dict[str, Any] = {"lr": best, "adaptation lr": adapt_lr}
        for seed in range(seeds):
            progress.update()
            key = f"{name} {best} {adapt_lr} {seed}"
            values = finished.get(key, lambda n=name, s=seed, m=model_of, lr=adapt_lr: world.measure(n, m(s), lr, s))
            models.pop(seed, None)
            for measured, value in values.items():
                own.setdefault(measured, []).append(value)
        found[name] = own
    return found


MEASURES = ("generation", "topics", "cloze")


def summary(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    ways: dict[str, Any] = {}
    sentences = []
    for name, own in found.items():
        ways[name] = {"lr": own["lr"], "adaptation lr": own["adaptation lr"], "curves": own["curves"]}
        for key in ("own loss", *MEASURES):
            if key in own:
                ways[name][key] = interval(own[key])
        if name == NEXT:
            continue
        ways[name]["beside next token"] = {}
        for key in MEASURES:
            if key in own:
                effect = ways[name]["beside next token"][key] = paired(own[key], found[NEXT][key])
                sentences.append(said(effect, f"{name}: {key} beside next token"))
        if name != NONE:
            effect = ways[name]["generation beside random weights"] = paired(
                own["generation"], found[NONE]["generation"]
            )
            sentences.append(said(effect, f"{name}: generation beside random weights"))
    return ways, sentences


def tables(ways: dict[str, Any], spent: dict[str, Any]) -> str:
    rows = []
    for name, own in ways.items():
        steps = spent.get(name, {})
        work = [f"{steps['steps']:,}", f"{steps['tokens']:,}", f"{steps['TFLOPs']:.2f}"] if steps else ["0", "0", "0"]
        values = [cell(own[key]) if key in own else "" for key in MEASURES]
        rows.append([name, *work, *values])
    header = ["trained on", "steps", "tokens", "TFLOPs", "next-token loss after adaptation", "topics", "cloze"]
    return table(header, rows)


def draw(ways: dict[str, Any], words: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, own) in enumerate(ways.items()):
        steps = [step for step, _ in own["curves"][0]]
        means = [sum(curve[at][1] for curve in own["curves"]) / len(own["curves"]) for at in range(len(steps))]
        left.plot(steps, means, "o-", ms=3, color=f"C{number}", label=name)
        for place, key in enumerate(("topics", "cloze")):
            if key in own:
                ci95 = own[key]["ci95"] or [own[key]["mean"]] * 2
                half = (ci95[1] - ci95[0]) / 2
                label = name if place == 0 else None
                at = place + 0.15 * number
                right.errorbar(at, own[key]["mean"], yerr=half, fmt="o", color=f"C{number}", capsize=3, label=label)
    left.set(xlabel="steps of causal adaptation", ylabel="nats a token, held-out text")
    left.set_ylim(top=min(left.get_ylim()[1], 10))
    right.axhline(words, xmax=0.45, ls=":", color="k", lw=1, label="topics from words alone")
    right.axhline(1 / CHOICES, xmin=0.55, ls="--", color="k", lw=1, label="cloze by chance")
    right.set_xticks([0.22, 1.22], ["topics", "cloze"])
    right.set_ylabel("accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = options(__doc__, "objectives", 3).parse_args()
    torch.set_num_threads(1)
    sizes, start = chosen(args, FULL, QUICK), time.process_time()
    world = World(args, sizes)
    spent = {
        name: {
            "steps": world.steps(name),
            "tokens": world.steps(name) * world.size(name) * sizes.length,
            "TFLOPs": round(world.steps(name) * world.flops[name] / 1e12, 4),
        }
        for name in OBJECTIVES
    }
    finished = Finished(args.output, {"manual": args.manual is not None, **vars(sizes)})
    with tqdm(unit="run", disable=None) as progress:
        ways, sentences = summary(measure(world, args.seeds, finished, progress))
    topics = world.topics["test"][1]
    words = world.word_accuracy()
    result = {
        "what": "on held-out pages; 95 % intervals of Student's t over seeds; differences are paired",
        "text": "GIMP's manual in English" if args.manual else "made up",
        "seeds": list(range(args.seeds)),
        "sizes": vars(sizes),
        "spent": spent,
        "paragraphs of topics": {part: len(labels) for part, (_, labels, _) in world.topics.items()},
        "most frequent topic": round(float(topics.bincount().max() / len(topics)), 4),
        "topics from words alone": round(words, 4),
        "gaps": len(world.items),
        "processor seconds": round(time.process_time() - start),
        "ways": ways,
        "found": sentences,
    }
    write(result, tables(ways, spent), args, finished)
    draw(ways, words, args.plot)


if __name__ == "__main__":
    main()
