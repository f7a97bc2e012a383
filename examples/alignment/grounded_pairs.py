"""How right are hallucination pairs about texts? Answers with planted faults, the loop, and the truth.

Every passage tells facts about two people, and an answer repeats those about one of them: some as they are, and some
with a planted fault. The loop knows nothing of the plan; its pairs are held against it. A pair is right when the first
answer has a fault and the preferred one has none; it is better when the preferred one has fewer.

    python examples/alignment/grounded_pairs.py --out grounded_pairs.json [--model NAME --limit 50]

Listers: the check for names and numbers that the text lacks; one that sees a share of all faults and takes some true
sentences for faults, as models do; one that always says "none"; with --model a language model. Rewriters drop the
sentences with what was listed, or say something else wrong instead once in three times.
"""

import argparse
import json
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_gpt.alignment.hallucination import (
    Lister,
    ModelLister,
    ModelRewriter,
    Rewriter,
    list_names_and_numbers,
    rewrite_until_supported,
)
from mm_gpt.alignment.hallucination_pairs import report
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.eval.metrics.statistics import wilson_interval

NAMES = ["Anna", "Bruno", "Clara", "David", "Elsa", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Leo"]
TOWNS = ["Oslo", "Lyon", "Porto", "Ghent", "Turin", "Graz", "Bergen", "Cork"]
TRADES = ["baker", "nurse", "pilot", "tailor", "painter", "farmer"]
PETS = ["cats", "dogs", "goats", "parrots"]
FAULTS = ("number", "foreign name", "swapped name", "trade", "addition")
ADDITIONS = ["{} also likes to swim.", "{} once won a prize in Madrid.", "{} has a sister."]


@dataclass(frozen=True)
class Case:
    prompt: Comparison
    answer: str
    faults: tuple[str, ...]
    """The kinds of the planted ones."""
    true: frozenset[str]
    """Every sentence that the passage supports."""


def make_case(number: int, seed: int) -> Case:
    """One passage, a question and an answer with no, one or two faults."""
    rng = random.Random(f"{seed}/{number}")
    names, towns, trades = rng.sample(NAMES, 2), rng.sample(TOWNS, 3), rng.sample(TRADES, 3)
    ages, years, pets = rng.sample(range(20, 70), 3), rng.sample(range(1990, 2020), 3), rng.sample(PETS, 2)

    def facts(name: str, age: int, town: str, year: int, trade: str, animal: str) -> list[str]:
        return [
            f"{name} is {age} years old.",
            f"{name} moved to {town} in {year}.",
            f"{name} works as a {trade}.",
            f"{name} has two {animal}.",
        ]

    both = [facts(names[i], ages[i], towns[i], years[i], trades[i], pets[i]) for i in (0, 1)]
    own, name = list(both[0]), names[0]
    chosen = rng.sample(FAULTS, rng.choice([0, 1, 1, 2]))
    for kind in chosen:
        if kind == "number":
            own[0] = f"{name} is {ages[2]} years old."
        elif kind == "foreign name":
            own[1] = f"{name} moved to {towns[2]} in {years[0]}."
        elif kind == "swapped name":
            own[1] = f"{name} moved to {towns[1]} in {years[0]}."
        elif kind == "trade":
            own[2] = f"{name} works as a {trades[2]}."
        else:
            own.append(rng.choice(ADDITIONS).format(name))
    passage = [sentence for of_one in both for sentence in of_one]
    rng.shuffle(passage)
    question = f"{' '.join(passage)}\n\nWhat is said about {name}?"
    prompt = Comparison(f"case{number}", ({"role": "user", "content": [question]},))
    return Case(prompt, " ".join(own), tuple(sorted(chosen)), frozenset(passage))


def sentences(text: str) -> list[str]:
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def num_faults(case: Case, text: str) -> int:
    return sum(sentence not in case.true for sentence in sentences(text))


def noisy_lister(cases: dict[str, Case], *, recall: float, false_alarms: float) -> Lister:
    """Sees each fault with one probability, and takes each true sentence for one with another."""

    def lister(prompt: Comparison, answer: str) -> list[str]:
        rng = random.Random(zlib.crc32(f"{prompt.key}/{answer}".encode()))
        true = cases[prompt.key].true
        return [s for s in sentences(answer) if rng.random() < (false_alarms if s in true else recall)]

    return lister


def dropping_rewriter(*, wrong: float) -> Rewriter:
    """Leaves out the sentences with what was listed; with probability `wrong` it makes up another one instead."""

    def rewriter(prompt: Comparison, answer: str, unsupported: Sequence[str], round: int) -> str:
        rng = random.Random(zlib.crc32(f"{prompt.key}/{answer}/{round}".encode()))
        kept = [s for s in sentences(answer) if not any(listed in s for listed in unsupported)]
        if rng.random() < wrong:
            name = answer.split()[0]
            kept.append(rng.choice([f"{name} is {rng.randrange(70, 99)} years old.", f"{name} has a garden."]))
        return " ".join(kept)

    return rewriter


def measure(cases: Sequence[Case], lister: Lister, rewriter: Rewriter) -> dict[str, Any]:
    """Precision of the kept pairs, and what share of the faulty answers came to a right one."""
    outcomes = [rewrite_until_supported(case.prompt, case.answer, lister, rewriter) for case in cases]
    kept = [(case, o) for case, o in zip(cases, outcomes, strict=True) if o.end == "kept"]
    faults = [(num_faults(case, o.rewritten or ""), num_faults(case, o.answer)) for case, o in kept]
    right = [case for (case, _), (after, before) in zip(kept, faults, strict=True) if after == 0 < before]
    faulty = sum(bool(case.faults) for case in cases)
    found = {case.prompt.key for case in right}
    kinds = Counter(kind for case in cases for kind in case.faults)
    solved = Counter(kind for case in cases if case.prompt.key in found for kind in case.faults)
    return {
        "kept": len(kept),
        "right": len(right),
        "better": sum(after < before for after, before in faults),
        "worse": sum(after > before for after, before in faults),
        "precision": len(right) / len(kept) if kept else None,
        "precision_interval": wilson_interval(len(right), len(kept)) if kept else None,
        "recall": len(right) / faulty,
        "recall_interval": wilson_interval(len(right), faulty),
        "recall_by_fault": {kind: solved[kind] / kinds[kind] for kind in FAULTS if kinds[kind]},
        **{name: value for name, value in report(outcomes).items() if name in ("ends", "rounds")},
    }


def run(count: int, seed: int) -> dict[str, Any]:
    """Every lister with every rewriter, without a language model."""
    cases = [make_case(number, seed) for number in range(count)]
    by_key = {case.prompt.key: case for case in cases}
    listers: dict[str, Lister] = {
        "names and numbers": list_names_and_numbers,
        "the truth": noisy_lister(by_key, recall=1.0, false_alarms=0.0),
        "sees 80 %, 5 % false": noisy_lister(by_key, recall=0.8, false_alarms=0.05),
        "sees 50 %, 20 % false": noisy_lister(by_key, recall=0.5, false_alarms=0.2),
        "always none": lambda prompt, answer: [],
    }
    rewriters = {"drops": dropping_rewriter(wrong=0.0), "drops, 1 in 3 wrong": dropping_rewriter(wrong=1 / 3)}
    return {
        f"{lister_name}; {rewriter_name}": measure(cases, lister, rewriter)
        for lister_name, lister in listers.items()
        for rewriter_name, rewriter in rewriters.items()
    }


def run_model(name: str, count: int, seed: int) -> dict[str, Any]:
    """A language model as lister and rewriter."""
    import mm_gpt

    assistant = mm_gpt.load(name)

    def ask(messages: Any, seed: int) -> str:
        return assistant.chat(messages, max_new_tokens=120, temperature=0.7 if seed else 0.0, seed=seed).text

    cases = [make_case(number, seed) for number in range(count)]
    return {f"{name}; {name}": measure(cases, ModelLister(ask), ModelRewriter(ask))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", metavar="NAME", help="also measure a model as lister and rewriter")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="cases for it (default: 50)")
    args = parser.parse_args()
    results = run(args.count, args.seed)
    if args.model:
        results |= run_model(args.model, args.limit, args.seed)
    args.out.write_text(json.dumps({"cases": args.count, "seed": args.seed, "results": results}, indent=2) + "\n")
    for name, each in results.items():
        precision = "no pair" if each["precision"] is None else f"precision {each['precision']:.3f}"
        print(f"{name:45} {precision}, recall {each['recall']:.3f}, ", end="")
        print(f"{each['better']} of {each['kept']} better, {each['worse']} worse")


if __name__ == "__main__":
    main()
