"""The models that the experiments begin with, and how every model of theirs is measured.

A world is a folder: scenes (`scenes.write_world`), a base model that has learned from captions of the wild, `sft`,
which has seen demonstrations as well, answers that wavering raters have ranked, and a reward model that was learned
from these. What is finished is not made again.

python examples/alignment/world.py WORLD

Shapes: S seeds, P prompts, k answers to each.
"""

import argparse
import dataclasses
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import (
    KINDS,
    Scene,
    demonstration,
    place_questions,
    ranking,
    read_answer,
    read_rows,
    scene_of,
    sentence,
    web_caption,
    worth,
    write_rows,
    write_world,
)

from mm_gpt.alignment.completions import (
    completion_batch,
    completion_sums,
    completions_document,
    prompt_document,
    sampled_document,
    token_logprobs,
)
from mm_gpt.alignment.policy import PolicyRecipe
from mm_gpt.alignment.preference import PreferenceRecipe
from mm_gpt.alignment.reward_model import ModelReward
from mm_gpt.alignment.reward_training import RewardRecipe
from mm_gpt.alignment.rewards import RewardConfig
from mm_gpt.datasets.comparisons import Comparison, Completion
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.document import Document, Image, Text
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, collate
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.training.language import LanguageRecipe
from mm_gpt.training.recipes import run_recipe
from mm_gpt.training.rollouts import Sampler
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig

TRUTH = f"{Path(__file__).with_name('scenes.py')}:true_reward"
SHUFFLED = f"{Path(__file__).with_name('scenes.py')}:shuffled_reward"
LONGEST = 28
"""Tokens of an answer. Three things take 17."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    scenes: int = 3000
    prompts: int = 1200
    held_out: int = 200
    base_steps: int = 1200
    sft_steps: int = 60
    reward_steps: int = 400
    ranked: int = 4
    """Answers of the model to each prompt that raters rank."""
    policy_steps: int = 120
    preference_steps: int = 120
    measured: int = 4
    """Answers to each held-out prompt by which a model is measured."""
    best_of: int = 128
    """Answers to each held-out prompt that the best are chosen from."""


FULL = Sizes()
QUICK = Sizes(
    scenes=24,
    prompts=16,
    held_out=6,
    base_steps=2,
    sft_steps=2,
    reward_steps=2,
    policy_steps=2,
    preference_steps=2,
    measured=2,
    best_of=8,
)
"""For tests: everything runs, nothing is learned."""


def config(steps: int, lr: float, seed: int = 0, *, validate_every: int | None = None, **more: Any) -> TrainConfig:
    """In float32 on the CPU, so that two machines find the same."""
    every = validate_every or steps
    own: dict[str, Any] = {"warmup_steps": max(1, steps // 10), "weight_decay": 0.01, "log_every": every} | more
    return TrainConfig(
        steps=steps, lr=lr, seed=seed, precision="fp32", device="cpu", validate_every=every, save_every=100, **own
    )


# ---- Models ----


def build_world(folder: Path, sizes: Sizes) -> None:
    """Everything that the experiments begin with, as far as it is not there."""
    once(folder / "data", lambda out: write_data(out, sizes))
    once(folder / "base", lambda out: learn(base_recipe(folder, sizes), out))
    once(folder / "sft", lambda out: learn(sft_recipe(folder, sizes), out))
    once(folder / "preferences", lambda out: write_preferences(folder, out, sizes))
    once(folder / "reward", lambda out: learn(reward_recipe(folder, sizes), out))


def write_data(out: Path, sizes: Sizes) -> None:
    write_world(out, scenes=sizes.scenes, prompts=sizes.prompts, held_out=sizes.held_out)


def once(out: Path, make: Callable[[Path], object]) -> Path:
    """What `make` writes into a folder, which it goes on with where it was stopped."""
    if not (done := out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        make(out)
        done.touch()
    return out


def learn(recipe: Any, out: Path) -> None:
    run_recipe(recipe, out, resume=True, progress=False)


def sources(*paths: str) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(path=path) for path in paths)


PRETRAINING = ("data/pretrain", "data/text/stories.txt")
HELD_OUT = ("data/held_out", "data/held_out_text/stories.txt")


def base_recipe(folder: Path, sizes: Sizes) -> LanguageRecipe:
    """A picture is four patches of a tower that stays as it was drawn: random features tell the few things apart, and a
    connector learns to read them sooner than it does from a tower that changes."""
    half = (0.5, 0.5, 0.5)
    decoder = DecoderConfig(
        vocab_size=400,
        width=96,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_size=16,
        mlp_width=256,
        max_length=512,
    )
    return LanguageRecipe(
        train=config(sizes.base_steps, 4e-3),
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model="timm/test_vit", image_size=32),
            connector=ConnectorConfig(kind="linear"),
        ),
        image=ImageTransformConfig(size=32, mean=half, std=half),
        sources=sources(*PRETRAINING),
        validation=sources(*HELD_OUT),
        decoder="full",
        vision_blocks=0,
        row_length=256,
        rows=4,
        max_captions=2,
        max_questions=4,
        augment=False,
        validation_images=20,
        data=str(folder),
    )


def sft_recipe(folder: Path, sizes: Sizes) -> LanguageRecipe:
    """Demonstrations, for a pass or two."""
    return LanguageRecipe(
        train=config(sizes.sft_steps, 5e-4),
        model=None,
        image=None,
        start=str(folder / "base/best"),
        sources=sources("data/sft.jsonl"),
        holdout=0.1,
        decoder="full",
        row_length=256,
        rows=4,
        augment=False,
        validation_images=20,
        data=str(folder),
    )


def write_preferences(folder: Path, out: Path, sizes: Sizes) -> None:
    """Of each prompt some answers of `sft`, a demonstration and a caption of the wild, ranked by a rater of its own."""
    model, processor = load_model(str(folder / "sft/best"))
    prompts = read_prompts(folder / "data/prompts.jsonl")
    answers = Answers.sample(model, processor, prompts, sizes.ranked, seed=1)
    rng, rows = random.Random("raters"), []
    for prompt, texts in zip(prompts, answers.texts, strict=True):
        scene = prompt.scene
        texts = list(dict.fromkeys([*filter(None, texts), demonstration(scene, rng), web_caption(scene, rng)]))
        if len(texts) > 1:
            said = [[{"role": "assistant", "content": text}] for text in texts]
            kept = {name: prompt.row[name] for name in ("id", "prompt", "images", "things")}
            rows.append(kept | {"completions": said, "ranks": ranking(texts, scene, rng)})
    write_rows(out / "ranked.jsonl", rows)


def comparisons(folder: Path) -> tuple[SourceConfig, ...]:
    return (SourceConfig(path="preferences/ranked.jsonl", images=str((folder / "data").resolve())),)


def reward_recipe(folder: Path, sizes: Sizes, seed: int = 0) -> RewardRecipe:
    return RewardRecipe(
        train=config(sizes.reward_steps, 2e-3, seed),
        start=str(folder / "sft/best"),
        sources=comparisons(folder),
        holdout=0.15,
        decoder="full",
        comparisons=8,
        data=str(folder),
    )


def policy_recipe(folder: Path, sizes: Sizes, method: str, seed: int, **more: Any) -> PolicyRecipe:
    """`ppo` with the learnt reward, `grpo` with the same, `grpo_truth` with the true one, `grpo_shuffled` with one
    that belongs to other pictures. `more`: other fields of the recipe."""
    learnt = str(folder / "reward/best")
    source = {"grpo_truth": TRUTH, "grpo_shuffled": SHUFFLED}.get(method, learnt)
    gauges = [RewardConfig(source=TRUTH, weight=0)] if source != TRUTH else []
    own: dict[str, Any] = {"advantage": "gae"} if method.startswith("ppo") else {"advantage": "grpo"}
    own |= {"beta": 0.2, "pretraining": (), "prompts": 12, "samples": 8, "minibatches": 2, "critic_lr": 2.0}
    every = more.pop("validate_every", None)
    return PolicyRecipe(
        # As InstructGPT does it, the rate stays where it is after warming up.
        train=config(sizes.policy_steps, 4e-4, seed, validate_every=every, final_lr=1.0),
        start=str(folder / "sft/best"),
        sources=sources("data/prompts.jsonl"),
        validation=sources("data/held_out_prompts.jsonl"),
        rewards=(RewardConfig(source=source), *gauges),
        validation_prompts=sizes.held_out,
        max_new_tokens=LONGEST,
        decoder="full",
        data=str(folder),
        **(own | more),
    )


def preference_recipe(folder: Path, sizes: Sizes, seed: int, **more: Any) -> PreferenceRecipe:
    return PreferenceRecipe(
        train=config(sizes.preference_steps, 2e-4, seed),
        start=str(folder / "sft/best"),
        sources=comparisons(folder),
        holdout=0.1,
        decoder="full",
        data=str(folder),
        **more,
    )


# ---- Measures ----


@dataclass(frozen=True)
class Prompt:
    """A prompt with what is in its picture."""

    row: dict[str, Any]
    comparison: Comparison

    @property
    def scene(self) -> Scene:
        return scene_of(self.row["things"], self.row["seed"])

    def without_image(self) -> "Prompt":
        message = {"role": "user", "content": [CAPTION_PROMPT]}
        return dataclasses.replace(self, comparison=dataclasses.replace(self.comparison, prompt=(message,)))


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    found = []
    for row in read_rows(path)[:limit]:
        content = [Image(path.parent / row["images"][0]), CAPTION_PROMPT]
        found.append(Prompt(row, Comparison(row["id"], ({"role": "user", "content": content},))))
    return found


@dataclass
class Answers:
    """Sampled answers to P prompts, k to each."""

    prompts: list[Prompt]
    ids: list[list[tuple[int, ...]]]
    texts: list[list[str]]
    logprobs: np.ndarray  # (P, k) of the policy that drew them, nats, summed

    @classmethod
    def sample(
        cls, model: MMGPT, processor: Processor, prompts: list[Prompt], k: int, *, seed: int, temperature: float = 1.0
    ) -> "Answers":
        sampler = Sampler(model, processor, max_new_tokens=LONGEST, temperature=temperature)
        documents = [prompt_document(processor, prompt.comparison) for prompt in prompts]
        drawn = sampler(documents, k, [seed * 1_000_003 + number for number in range(len(prompts))])
        ends = set(processor.tokenizer.end_ids)
        decode = processor.tokenizer.decode
        texts = [[decode([id for id in s.ids if id not in ends]).strip() for s in own] for own in drawn]
        sums = np.array([[sum(s.logprobs) for s in own] for own in drawn])
        return cls(prompts, [[s.ids for s in own] for own in drawn], texts, sums)

    def truth(self) -> np.ndarray:
        """(P, k)"""
        return np.array([[worth(t, p.scene) for t in own] for p, own in zip(self.prompts, self.texts, strict=True)])

    def rewarded(self, reward: ModelReward) -> np.ndarray:
        """(P, k): what a reward model gives them as text, the way that training asks it."""
        repeated = [prompt.comparison for prompt, own in zip(self.prompts, self.texts, strict=True) for _ in own]
        values = reward(repeated, [text for own in self.texts for text in own])
        return np.array(values, dtype=float).reshape(len(self.prompts), -1)

    @torch.no_grad()
    def scored(self, model: MMGPT, processor: Processor, together: int = 16) -> np.ndarray:
        """(P, k): their log-probabilities under a model (nats, summed), as they were sampled."""
        few = [  # so many answers as fit beside each other into the context
            sampled_document(processor, prompt.comparison, ids[first : first + together])
            for prompt, ids in zip(self.prompts, self.ids, strict=True)
            for first in range(0, len(ids), together)
        ]
        found = []
        for first in range(0, len(few), 32):
            batch = completion_batch(processor, few[first : first + 32])
            found.append(completion_sums(token_logprobs(model, batch.batch), batch))
        return torch.cat(found).double().view(len(self.prompts), -1).numpy()


class Judge:
    """Measures models on the held-out side of a world."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes
        self.start, self.processor = load_model(str(folder / "sft/best"))
        self.start.eval()
        self.reward = ModelReward(folder / "reward/best")
        self.prompts = read_prompts(folder / "data/held_out_prompts.jsonl", sizes.held_out)
        rng = random.Random("measures")
        rows = read_rows(folder / "data/held_out/captions.jsonl")
        pictures = [folder / "data/held_out" / row["image"] for row in rows]
        self.captions = [
            self._turn(picture, CAPTION_PROMPT, rng.choice(row["captions"]))
            for picture, row in zip(pictures, rows, strict=True)
        ]
        stories = (folder / "data/held_out_text/stories.txt").read_text().split("\n\n")
        self.stories = [Document((Text(story.strip()),)) for story in stories if story.strip()]

    def _turn(self, picture: Path, question: str, answer: str) -> Document:
        user = {"role": "user", "content": [Image(picture), question]}
        return self.processor.chat([user, {"role": "assistant", "content": [answer]}], answer_starts=False)

    def measure(self, model_folder: Path, seed: int = 0) -> dict[str, Any]:
        """Every number of one model. Lists are of the held-out prompts, in their order, means over k answers."""
        model, _ = load_model(str(model_folder))
        model.eval()
        answers = Answers.sample(model, self.processor, self.prompts, self.sizes.measured, seed=seed)
        readings = [[read_answer(t, p.scene) for t in own] for p, own in zip(self.prompts, answers.texts, strict=True)]
        blind = [prompt.without_image() for prompt in self.prompts]
        unseen = Answers.sample(model, self.processor, blind, self.sizes.measured, seed=seed)
        found = {
            "truth": answers.truth(),
            "proxy": answers.rewarded(self.reward),
            "kl": answers.logprobs - answers.scored(self.start, self.processor),
            "truth without the image": unseen.truth(),
            "unsupported": _of(readings, lambda r: r.unsupported > 0),
            "flattery": _of(readings, lambda r: r.flattery),
            "words": _of(readings, lambda r: r.words),
            "no sentence": _of(readings, lambda r: not r.is_sentence),
        }
        values: dict[str, Any] = {name: [round(v, 5) for v in f.mean(axis=1).tolist()] for name, f in found.items()}
        values["caption loss"] = nats(model, self.processor, self.captions)
        values["language loss"] = nats(model, self.processor, self.stories)
        values["samples"] = [own[0] for own in answers.texts[:6]]
        return values


def _of(readings: list[list[Any]], what: Callable[[Any], float]) -> np.ndarray:
    return np.array([[float(what(reading)) for reading in own] for own in readings])


@torch.no_grad()
def nats(model: MMGPT, processor: Processor, documents: Sequence[Document]) -> list[float]:
    """Of each document, the mean loss of its learned tokens in nats."""
    found = []
    for first in range(0, len(documents), 64):
        examples = [processor(document) for document in documents[first : first + 64]]
        batch = collate([[example] for example in examples], processor.pixels(examples))
        values = -token_logprobs(model, batch)
        counts = (batch.labels >= 0).sum(dim=1)
        found += (values.sum(dim=1) / counts).tolist()
    return [round(value, 5) for value in found]


CHOICES = ("Nothing.", *(sentence([" ".join(kind)]) for kind in KINDS))
"""Every answer to a question about a place."""


@torch.no_grad()
def confidence(model: MMGPT, processor: Processor, questions: Sequence[tuple[Path, str, str]]) -> np.ndarray:
    """(N, 2): the probability of the likeliest of `CHOICES` among them, and whether that is the right answer."""
    answers = tuple(Completion(({"role": "assistant", "content": [choice]},)) for choice in CHOICES)
    found = []
    for first in range(0, len(questions), 32):
        few = questions[first : first + 32]
        asked = [
            Comparison(question, ({"role": "user", "content": [Image(picture), question]},), answers)
            for picture, question, _ in few
        ]
        batch = completion_batch(processor, [completions_document(processor, each) for each in asked])
        sums = completion_sums(token_logprobs(model, batch.batch), batch).double().view(len(few), -1)
        sure, chosen = sums.softmax(dim=1).max(dim=1)
        for p, at, (_, _, answer) in zip(sure.tolist(), chosen.tolist(), few, strict=True):
            found.append((p, float(CHOICES[at] == answer)))
    return np.array(found)


def asked(folder: Path, prompts: int) -> list[tuple[Path, str, str]]:
    """Questions about two places of each held-out picture: one where something is, and any."""
    found, rng = [], random.Random("questions")
    for row in read_rows(folder / "data/held_out_prompts.jsonl")[:prompts]:
        scene = scene_of(row["things"], row["seed"])
        pairs = place_questions(scene)
        something = rng.choice([pair for pair in pairs if pair[1] != CHOICES[0]])
        picture = folder / "data" / row["images"][0]
        found += [(picture, *something), (picture, *rng.choice([pair for pair in pairs if pair != something]))]
    return found


# ---- Statistics ----


def interval(values: Any, *, resamples: int = 2000) -> dict[str, Any]:
    """Mean of values (S, P) and its 95 % bootstrap interval, over seeds and prompts drawn anew, both with replacement.

    With three seeds the interval is rough: seeds are few, and all of them are listed.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    rng = np.random.default_rng(0)
    s, p = table.shape
    means = []
    for _ in range(resamples):
        of_seeds = table[rng.integers(s, size=s)]
        means.append(of_seeds[:, rng.integers(p, size=p)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": round(float(table.mean()), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
        "seeds": [round(float(v), 4) for v in table.mean(axis=1)],
    }


def verdict(effect: dict[str, Any], what: str) -> str:
    """An effect in words; one whose interval holds 0 is none."""
    low, high = effect["ci95"]
    said = f"{what}: {effect['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return said + ("" if low > 0 or high < 0 else "  no effect shown: the interval holds 0")


def best_of_weights(n: int, of: int) -> np.ndarray:
    """(of,): the chance that the answer of each rank (0: the best of all) is the best of `n` drawn without replacement
    from `of` (as in 2112.09332): a mean over all draws in place of one of them."""
    total = math.comb(of, n)
    return np.array([math.comb(of - rank - 1, n - 1) / total for rank in range(of)])


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """(P, N), (P, N) -> (P,): the expected value of the best of n by their scores."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    return ranked @ best_of_weights(n, values.shape[1])


def best_of_kl(n: int) -> float:
    """Of best-of-n from the policy that it draws from, in nats, where no two answers are alike; an upper bound else."""
    return math.log(n) - (n - 1) / n


# ---- Results ----


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON file, made where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()))
        partial.rename(path)
    return json.loads(path.read_text())


def trained(folder: Path, judge: Judge, name: str, recipe: Callable[[], Any], seed: int) -> dict[str, Any]:
    """The measures of the model that a recipe ends with, trained where it is not there. It is the last one, and not the
    best of the run: nothing is chosen by what is measured."""
    out = once(folder / "runs" / name, lambda out: learn(recipe(), out))
    return cached(out / "measures.json", lambda: judge.measure(last(out), seed))


def last(out: Path) -> Path:
    """The last checkpoint of a run."""
    return max(path for path in out.glob("step-*") if path.is_dir())


def log_rows(out: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def options(about: str | None, output: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder of the world: made where it is not there, and gone on with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: whether it runs")
    parser.add_argument("-o", "--output", type=Path, default=Path(output), help="JSON")
    plot = Path("docs") / Path(output).with_suffix(".png").name
    parser.add_argument("--plot", type=Path, default=plot, help="PNG")
    return parser


def begin(args: argparse.Namespace) -> tuple[Judge, Sizes]:
    """The world, as it is needed."""
    logging.getLogger("mm_gpt").setLevel(logging.ERROR)
    sizes = QUICK if args.quick else FULL
    build_world(args.world, sizes)
    return Judge(args.world, sizes), sizes


def main() -> None:
    parser = options(__doc__, "docs/results/alignment_world.json")
    args = parser.parse_args()
    judge, _ = begin(args)
    for name in ("base", "sft"):
        values = cached(
            args.world / f"measures/{name}-0.json", lambda n=name: judge.measure(args.world / n / "best", 0)
        )
        print(name, {key: round(float(np.mean(own)), 3) for key, own in values.items() if key != "samples"})
        print("\n".join(values["samples"]))


if __name__ == "__main__":
    main()
