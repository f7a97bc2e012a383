"""XLM's three ideas on two languages, one of them rare: language embeddings, sampling, and the translation objective.

A small encoder learns masked tokens of GIMP's manual in English and of one page in five in German (Lample and Conneau,
1901.07291). Batches are of one language, drawn with q in proportion to p^alpha. With translations, every second step
masks tokens of paragraphs beside their translations, from the same German pages: no way sees German that another does
not. Measured on pages that nobody has seen, in the rare language above all:

  loss           masked tokens, in nats
  retrieval      how often the nearest German paragraph is the translation, and back, by the mean state
  topics         a linear model that has seen English paragraphs alone names the chapters of German ones (zero-shot)

Control: `wrong translations` pairs each paragraph with another one's, so that the tokens are the same.

python examples/literature/translation.py debian --page docs/literature.md
python examples/literature/translation.py --quick --seeds 1 -o /tmp/try.json --plot /tmp/try.png
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gimp_manual import TOPICS, Page, split, texts, token_rows
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
from torch import Tensor, nn
from tqdm import tqdm

from mm_gpt.datasets.loading.multilingual import language_weights, train_tokenizer
from mm_gpt.errors import MMGPTError
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.training.objectives import LanguageEmbedding, mask_tokens, mean_state, translation_pairs
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.schedules import learning_rate
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.train_config import TrainConfig

COMMON, RARE = "en", "de"
LANGUAGES = (COMMON, RARE)


@dataclass(frozen=True)
class Way:
    alpha: float = 0.7
    language_embedding: bool = False
    translations: bool = False
    right: bool = True
    """Off: a paragraph stands beside the translation of another."""


WAYS = {
    "plain": Way(),
    "language embeddings": Way(language_embedding=True),
    "translations": Way(translations=True),
    "both": Way(language_embedding=True, translations=True),
    "both, wrong translations": Way(language_embedding=True, translations=True, right=False),
    "language embeddings, alpha 1": Way(alpha=1.0, language_embedding=True),
    "language embeddings, alpha 0.5": Way(alpha=0.5, language_embedding=True),
}


@dataclass(frozen=True)
class Sizes:
    steps: int = 300
    rows: int = 6
    length: int = 96
    width: int = 48
    layers: int = 2
    vocab_size: int = 768
    characters: int = 1_000_000
    """That the shared vocabulary is learned from."""
    every: int = 5
    """One page in so many is there in the rare language."""
    held_out: int = 64
    pairs: int = 150
    paragraphs: int = 300
    walks: int = 1


FULL = Sizes()
QUICK = Sizes(
    steps=2,
    rows=4,
    length=64,
    width=32,
    layers=1,
    vocab_size=600,
    characters=60_000,
    every=2,
    held_out=8,
    pairs=12,
    paragraphs=40,
    walks=1,
)


class Encoder(nn.Module):
    """A decoder that sees the whole text, with or without a vector for each language."""

    def __init__(self, decoder: Decoder, languages: LanguageEmbedding | None):
        super().__init__()
        self.decoder, self.languages = decoder, languages

    def forward(self, ids: Tensor, positions: Tensor, languages: Tensor, present: Tensor) -> Tensor:
        """All (B, T) -> hidden states (B, T, D)."""
        x = self.decoder.embed(ids)
        if self.languages is not None:
            x = self.languages(x, languages)
        return self.decoder(x, positions, mask=present[:, None, None].expand(-1, 1, ids.shape[1], -1))


class World:
    def __init__(self, args: argparse.Namespace, sizes: Sizes):
        self.sizes = sizes
        parts = split(pages_of(args, LANGUAGES))
        known = [page for page in parts["train"] if page.pairs(*LANGUAGES)][:: sizes.every]
        own = {COMMON: parts["train"], RARE: known}
        self.counts = {language: float(sum(map(len, texts(pages, language)))) for language, pages in own.items()}
        self.tokenizer = train_tokenizer(
            {language: texts(pages, language) for language, pages in own.items()},
            sizes.vocab_size,
            alpha=0.5,
            max_characters=sizes.characters,
        )
        self.separator = self.tokenizer.special[self.tokenizer.end_of_text]
        self.mask_id = self.tokenizer.vocab_size
        self.train_rows = {
            language: token_rows(pages, language, self.tokenizer, sizes.length) for language, pages in own.items()
        }
        self.rows = {
            (part, language): token_rows(parts[part], language, self.tokenizer, sizes.length)
            for part in ("validation", "test")
            for language in LANGUAGES
        }
        self.pairs = self.encoded(known, sizes.length)
        self.test_pairs = self.encoded(parts["test"], sizes.length, shortest=60)[: sizes.pairs]
        if not self.pairs or len(self.test_pairs) < 2:
            raise MMGPTError("too few paragraphs have translations")
        self.topics = {
            (part, language): self.labelled(parts[part], language) for part in parts for language in LANGUAGES
        }
        self.config = small_config(
            self.mask_id + 1, width=sizes.width, layers=sizes.layers, max_length=sizes.length, causal=False
        )

    def encoded(self, pages: list[Page], length: int, *, shortest: int = 1) -> list[tuple[list[int], list[int]]]:
        """Paragraphs and translations that fit into a row together, each once on either side, in a random order."""
        pairs = dict(pair for page in pages for pair in page.pairs(*LANGUAGES) if min(map(len, pair)) >= shortest)
        pairs = {one: other for other, one in {other: one for one, other in pairs.items()}.items()}
        found = [(self.tokenizer.encode(a), self.tokenizer.encode(b)) for a, b in pairs.items()]
        fitting = [(a, b) for a, b in found if len(a) + len(b) + 2 <= length]
        random.Random(0).shuffle(fitting)
        return fitting

    def labelled(self, pages: list[Page], language: str) -> tuple[list[list[int]], Tensor]:
        """Paragraphs, evenly spread over the pages, and the topics of their pages."""
        seen: dict[str, int] = {}
        for page in pages:
            for text in page.paragraphs[language] if page.topic else ():
                if len(text) >= 80:
                    seen.setdefault(text, list(TOPICS).index(str(page.topic)))
        chosen = list(seen.items())[:: max(1, -(-len(seen) // self.sizes.paragraphs))]
        ids = [self.tokenizer.encode(text)[: self.sizes.length // 2] for text, _ in chosen]
        return ids, torch.tensor([topic for _, topic in chosen])

    def fresh(self, way: Way, seed: int) -> Encoder:
        decoder = Decoder(self.config)
        init_weights(decoder, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        return Encoder(decoder, LanguageEmbedding(len(LANGUAGES), self.sizes.width) if way.language_embedding else None)

    def loss(
        self, model: Encoder, batch: tuple[Tensor, Tensor, Tensor, Tensor], draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        ids, positions, languages, present = batch
        maskable = present & (ids != self.separator)
        shown, labels = mask_tokens(
            ids, mask_id=self.mask_id, vocab_size=self.mask_id, maskable=maskable, generator=draw
        )
        return model.decoder.loss(model(shown, positions, languages, present), labels)

    def monolingual(self, rows: Tensor, language: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = torch.arange(rows.shape[1]).expand(len(rows), -1)
        return (
            rows,
            positions,
            torch.full_like(rows, LANGUAGES.index(language)),
            torch.ones_like(rows, dtype=torch.bool),
        )

    def translated(self, draw: random.Random, right: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs drawn evenly; either language comes first."""
        chosen = draw.sample(self.pairs, min(self.sizes.rows, len(self.pairs)))
        first, second = ([pair[side] for pair in chosen] for side in (0, 1))
        if not right:  # by one place, among those of the batch that are as long: the rows must still fit
            second = second[1:] + second[:1]
            room = [self.sizes.length - 2 - len(one) for one in first]
            second = [other[:space] for other, space in zip(second, room, strict=True)]
        sides, languages = (first, second), (0, 1)
        if draw.random() < 0.5:
            sides, languages = (second, first), (1, 0)
        return translation_pairs(*sides, languages=languages, separator=self.separator, max_length=self.sizes.length)

    def train(self, way: Way, lr: float, seed: int) -> tuple[Encoder, dict[str, int]]:
        """A model, and the tokens that it has seen of each language."""
        sizes = self.sizes
        config = TrainConfig(
            steps=sizes.steps,
            lr=lr,
            warmup_steps=max(1, sizes.steps // 10),
            final_lr=0.1,
            weight_decay=0.01,
            beta2=0.95,
        )
        model = self.fresh(way, seed)
        optimizer = make_optimizer([ParameterGroup("all", list(model.parameters()))], config)
        masks, draw = torch.Generator().manual_seed(seed), random.Random(seed)
        streams = {language: batches(rows, sizes.rows, seed) for language, rows in self.train_rows.items()}
        shares = language_weights(self.counts, way.alpha)
        seen = dict.fromkeys(LANGUAGES, 0)
        for step in range(sizes.steps):
            if way.translations and step % 2:
                batch = self.translated(draw, way.right)
            else:
                (language,) = draw.choices(LANGUAGES, [shares[name] for name in LANGUAGES])
                batch = self.monolingual(next(streams[language]), language)
            for number, language in enumerate(LANGUAGES):
                seen[language] += int((batch[3] & (batch[2] == number)).sum())
            loss, count = self.loss(model, batch, masks)
            optimizer.zero_grad()
            (loss / count.clamp(min=1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
        return model, seen

    # ---- What a model has learned ----

    @torch.no_grad()
    def held_out(self, model: Encoder, language: str, part: str = "test") -> float:
        """Nats a masked token, always with the same masks."""
        draw = torch.Generator().manual_seed(12)
        total, count = 0.0, 0
        for rows in self.rows[part, language][: self.sizes.held_out].split(self.sizes.rows):
            loss, number = self.loss(model, self.monolingual(rows, language), draw)
            total, count = total + float(loss), count + int(number)
        return total / count

    @torch.no_grad()
    def states(self, model: Encoder, paragraphs: Sequence[list[int]], language: str) -> Tensor:
        """The mean state of each paragraph (N, D), without what all of its language have in common."""
        found = []
        for start in range(0, len(paragraphs), 32):
            ids = [torch.tensor(own) for own in paragraphs[start : start + 32]]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
            present = padded >= 0
            rows, positions, languages, _ = self.monolingual(padded.clamp(min=0), language)
            found.append(mean_state(model(rows, positions, languages, present), present))
        states = torch.cat(found)
        return states - states.mean(dim=0)

    def validation_loss(self, way: Way, lr: float) -> float:
        model, _ = self.train(way, lr, 1000)
        return sum(self.held_out(model, language, "validation") for language in LANGUAGES)

    def run(self, way: Way, lr: float, seed: int) -> dict[str, Any]:
        model, seen = self.train(way, lr, seed)
        return {"tokens seen": seen, **self.measure(model)}

    def measure(self, model: Encoder) -> dict[str, float]:
        sides = [self.states(model, [pair[at] for pair in self.test_pairs], LANGUAGES[at]) for at in (0, 1)]
        topics = {key: (self.states(model, ids, key[1]), labels) for key, (ids, labels) in self.topics.items()}
        train, validation = topics["train", COMMON], topics["validation", COMMON]
        return {
            "loss de": self.held_out(model, RARE),
            "loss en": self.held_out(model, COMMON),
            "retrieval": retrieval(*sides),
            "topics de": linear_accuracy(train, validation, topics["test", RARE]),
            "topics en": linear_accuracy(train, validation, topics["test", COMMON]),
        }

    def without_model(self) -> dict[str, float]:
        """Retrieval by tokens that both languages share, such as names and numbers, and the most frequent topic."""
        bags = []
        for side in (0, 1):
            bag = torch.zeros(len(self.test_pairs), self.mask_id)
            for row, pair in zip(bag, self.test_pairs, strict=True):
                row.index_add_(0, torch.tensor(pair[side]), torch.ones(len(pair[side])))
            bags.append(bag.log1p() - bag.log1p().mean(dim=0))
        labels = self.topics["test", RARE][1]
        return {
            "retrieval by shared tokens": round(retrieval(*bags), 4),
            "retrieval by chance": round(1 / len(self.test_pairs), 4),
            "most frequent topic": round(float(labels.bincount().max()) / len(labels), 4),
        }


def retrieval(first: Tensor, second: Tensor) -> float:
    """How often the nearest state (N, D) of the other side, by cosine, is that of the same pair; both ways averaged."""
    similarity = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    own = torch.arange(len(first))
    return float(
        ((similarity.argmax(dim=1) == own).float().mean() + (similarity.argmax(dim=0) == own).float().mean()) / 2
    )


MEASURES = ("loss de", "loss en", "retrieval", "topics de", "topics en")
EFFECTS = (
    ("language embeddings", "plain"),
    ("translations", "plain"),
    ("both", "language embeddings"),
    ("both", "translations"),
    ("both", "both, wrong translations"),
    ("language embeddings", "language embeddings, alpha 1"),
    ("language embeddings, alpha 0.5", "language embeddings, alpha 1"),
)


def measure(
    world: World, seeds: int, finished: Finished, progress: tqdm
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Of each way its measures by seed; and the learning rates and tokens seen."""
    found: dict[str, dict[str, list[float]]] = {}
    about: dict[str, Any] = {"lr": {}, "tokens seen": {}}
    for name, way in WAYS.items():
        progress.set_description(name)
        # One rate with translations and one without: the other differences are too small to move it.
        key = "with translations" if way.translations else "without translations"
        if key not in about["lr"]:

            def tried(lr: float, way: Way = way) -> float:
                progress.update()
                return finished.get(f"{way} {lr}", lambda: world.validation_loss(way, lr))

            about["lr"][key] = best_rate(tried, 16e-3, walks=world.sizes.walks)
        for seed in range(seeds):
            progress.update()
            rate = about["lr"][key]
            values = finished.get(f"{way} {rate} {seed}", lambda w=way, lr=rate, s=seed: world.run(w, lr, s))
            about["tokens seen"].setdefault(name, values["tokens seen"])
            for measured in MEASURES:
                found.setdefault(name, {}).setdefault(measured, []).append(values[measured])
    for seed in range(seeds):
        for measured, value in world.measure(world.fresh(WAYS["plain"], seed)).items():
            found.setdefault("random weights", {}).setdefault(measured, []).append(value)
    return found, about


def summary(found: dict[str, dict[str, list[float]]]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    ways = {name: {key: interval(own[key]) for key in MEASURES} for name, own in found.items()}
    effects: dict[str, Any] = {}
    sentences = []
    for one, other in EFFECTS:
        own = effects[f"{one} beside {other}"] = {key: paired(found[one][key], found[other][key]) for key in MEASURES}
        sentences += [said(effect, f"{one} beside {other}: {key}") for key, effect in own.items()]
    return ways, effects, sentences


def tables(ways: dict[str, Any]) -> str:
    return table(
        ["trained with", *MEASURES], [[name, *(cell(own[key]) for key in MEASURES)] for name, own in ways.items()]
    )


def draw(ways: dict[str, Any], without: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = [name for name in ways if name != "random weights"]
    for axes, key in zip(figure.subplots(1, 3, sharey=True), ("loss de", "retrieval", "topics de"), strict=True):
        for place, name in enumerate(reversed(names)):
            own = ways[name][key]
            ci95 = own["ci95"] or [own["mean"]] * 2
            axes.errorbar(own["mean"], place, xerr=(ci95[1] - ci95[0]) / 2, fmt="o", color="C0", capsize=3)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_xlabel({"loss de": "nats a masked German token"}.get(key, f"{key}, accuracy"))
        axes.grid(alpha=0.3)
        if key == "retrieval":
            axes.axvline(without["retrieval by shared tokens"], ls=":", color="k", lw=1)
        if key == "topics de":
            axes.axvline(without["most frequent topic"], ls=":", color="k", lw=1)
    save_figure(figure, path)


def main() -> None:
    args = options(__doc__, "translation", 3).parse_args()
    torch.set_num_threads(1)
    sizes, start = chosen(args, FULL, QUICK), time.process_time()
    world = World(args, sizes)
    finished = Finished(args.output, {"manual": args.manual is not None, **vars(sizes)})
    with tqdm(unit="run", disable=None) as progress:
        found, about = measure(world, args.seeds, finished, progress)
    ways, effects, sentences = summary(found)
    without = world.without_model()
    result = {
        "what": "on held-out pages; 95 % intervals of Student's t over seeds; differences are paired",
        "text": "GIMP's manual" if args.manual else "made up",
        "seeds": list(range(args.seeds)),
        "sizes": vars(sizes),
        "characters": {language: int(count) for language, count in world.counts.items()},
        "shares": {str(alpha): language_weights(world.counts, alpha) for alpha in (1.0, 0.7, 0.5)},
        "pairs": {"train": len(world.pairs), "test": len(world.test_pairs)},
        **about,
        **without,
        "processor seconds": round(time.process_time() - start),
        "ways": ways,
        "effects": effects,
        "found": sentences,
    }
    write(result, tables(ways), args, finished)
    draw(ways, without, args.plot)


if __name__ == "__main__":
    main()
