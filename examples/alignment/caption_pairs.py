"""What the check of captions for unsupported objects is worth, and what pairs that were made with it are like.

    python examples/alignment/caption_pairs.py flickr8k/val-000000.tar --out caption_check.json [--pairs pairs.jsonl]

Nobody has marked what is in the photos, so the check is held against people's captions. One of a photo, held against
its other ones, is nearly always right: what is flagged there are false alarms (or what the others left out). One of
another photo is nearly always wrong: what is flagged there was found. Both are counted by object as well.

--pairs: of pairs that `mm-gpt pairs` wrote, how long both sides are, how many objects they name, and how often each
says a word: a model that learns from them should not learn to say less.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter, Record
from mm_gpt.datasets.sources import read_samples
from mm_gpt.eval.objects import Known, named_objects, object_scores


def read_captions(locations: Sequence[str]) -> list[tuple[str, ...]]:
    """Of each photo with two captions or more, these."""
    samples = (sample for location in locations for sample in read_samples(location, ErrorCounter()))
    return [sample.captions for sample in samples if isinstance(sample, Record) and len(sample.captions) > 1]


def check(photos: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Each caption against the other ones of its photo, and against as many of the next photo."""
    texts, own, other, groups = [], [], [], []
    for number, captions in enumerate(photos):
        following = photos[(number + 1) % len(photos)]
        for place, text in enumerate(captions):
            texts.append(text)
            own.append([*captions[:place], *captions[place + 1 :]])
            other.append(list(following[: len(captions) - 1]))
            groups.append(number)
    return {
        "photos": len(photos),
        "captions": len(texts),
        "own_photo": _described(texts, own, groups),
        "another_photo": _described(texts, other, groups),
        "by_object": _by_object(texts, own),
    }


def _described(texts: Sequence[str], known: Sequence[Sequence[str]], groups: Sequence[int]) -> dict[str, Any]:
    scores = object_scores(texts, known, groups)
    return {name: {"value": score.score, "interval": score.interval()} for name, score in scores.items()}


def _by_object(texts: Sequence[str], known: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """How often people name each object, and the share of this that their other captions do not support."""
    named: Counter[str] = Counter()
    unsupported: Counter[str] = Counter()
    for text, others in zip(texts, known, strict=True):
        evidence = Known(others)
        for names in {n.names for n in named_objects(text) if n.is_real}:
            word = " or ".join(names)
            named[word] += 1
            unsupported[word] += not any(map(evidence.supports, names))
    return {word: {"named": count, "unsupported": unsupported[word] / count} for word, count in named.most_common()}


def describe_pairs(path: Path) -> dict[str, Any]:
    """Means of both sides of the pairs, and the words of which one side has more."""
    pairs = Comparisons.open([SourceConfig(path=path.name)], path.parent, ErrorCounter())
    sides: list[tuple[str, str]] = []
    photos = set()
    for comparison in pairs:
        preferred, other = sorted(comparison.completions, key=lambda completion: completion.rank)
        sides.append((preferred.text, other.text))
        photos.add(comparison.key.partition("#")[0])
    words = [
        Counter(word for text in side for word in text.lower().strip(".").split()) for side in zip(*sides, strict=True)
    ]
    more = {word: words[0][word] - words[1][word] for word in words[0] | words[1]}
    ranked = sorted(more.items(), key=lambda item: item[1])
    return {
        "pairs": len(sides),
        "photos": len(photos),
        "words": [float(np.mean([len(side[n].split()) for side in sides])) for n in (0, 1)],
        "objects": [float(np.mean([len(named_objects(side[n])) for side in sides])) for n in (0, 1)],
        "preferred_is_longer": float(np.mean([len(a.split()) > len(b.split()) for a, b in sides])),
        "preferred_is_shorter": float(np.mean([len(a.split()) < len(b.split()) for a, b in sides])),
        "more_often_preferred": dict(ranked[:-26:-1]),
        "more_often_not": dict(ranked[:25]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", metavar="PHOTOS", help="with two captions or more each")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--pairs", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    results = check(read_captions(args.data))
    if args.pairs:
        results["pairs"] = describe_pairs(args.pairs)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    for name in ("own_photo", "another_photo"):
        parts = [f"{metric} {score['value']:.3f}" for metric, score in results[name].items()]
        print(f"people's captions, held against those of {name.replace('_', ' ')}: {', '.join(parts)}")
    if args.pairs:
        print(json.dumps({k: v for k, v in results["pairs"].items() if not isinstance(v, dict)}))


if __name__ == "__main__":
    main()
