"""The contamination report: which items of which evaluation set a corpus holds, as JSON and as a table."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.contamination.check import COMMON_DOCUMENTS, METHODS, Scan, save_scan, scan_parallel
from mm_gpt.datasets.contamination.evaluation_index import (
    EvaluationIndex,
    EvaluationItem,
    EvaluationSet,
    IndexConfig,
)
from mm_gpt.datasets.samples import Sample
from mm_gpt.errors import MMGPTError

REPORT_FILES = ("contamination.json", "contamination.md")
MANY_LOOK_ALIKES = 0.01
"""Above this fraction of a set's images that look like another of its own, its image hits prove little."""
_VERSION = 1


def search_contamination(
    samples: Iterable[Sample],
    evaluations: Mapping[str, Iterable[EvaluationItem]],
    out: Path,
    *,
    config: IndexConfig | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Search `samples` for the items of all sets; write `contamination.json` and `contamination.md` into folder `out`.

    The index and the counts that `decontaminate.RemoveContamination` needs go to `out/index`. Returns what the JSON
    file holds. Raises MMGPTError for a set without items and a folder that cannot be written.
    """
    index = EvaluationIndex.build(evaluations, config)
    found = scan_parallel(samples, index, workers=workers)
    save_scan(out / "index", index, found)
    values = report(index, found)
    write_report(out, values)
    return values


def report(index: EvaluationIndex, found: Scan) -> dict[str, Any]:
    """For each set: items, dirty ones by method, examples. JSON values; see docs/evaluation.md."""
    dirty = _dirty(index, found)
    in_corpus = _overlap(index, found)
    return {
        "version": _VERSION,
        "corpus": {name: found.counts[name] for name in ("samples", "images", "image not fetched", "broken image")},
        "config": asdict(index.config),
        "sets": {s.name: _report_set(s, index, dirty, in_corpus, found) for s in index.sets},
    }


def _dirty(index: EvaluationIndex, found: Scan) -> dict[str, np.ndarray]:
    """Method -> whether each item of all sets is dirty, bool (I,)."""
    dirty = {method: np.zeros(index.num_items, bool) for method in METHODS}
    for method in ("n-gram", "13-gram"):
        for words, counts in found.grams.items():
            rows = index.grams[method][index.grams[method][:, 1] == words]
            seen = counts > 0 if method == "n-gram" else (counts > 0) & (counts <= COMMON_DOCUMENTS)
            dirty[method][rows[seen[rows[:, 2]], 0]] = True
    dirty["substring"][index.string_items[found.strings[index.string_items[:, 1]] > 0, 0]] = True
    dirty["image"][index.image_items[found.images > 0]] = True
    dirty["same file"][index.image_items[found.files > 0]] = True
    dirty["any"] = np.logical_or.reduce([dirty[method] for method in METHODS if method != "13-gram"])
    return dirty


def _overlap(index: EvaluationIndex, found: Scan) -> np.ndarray:
    """(2, I): of each item, its 8-grams and those that are in the corpus."""
    rows = index.grams["overlap"]
    seen = np.zeros(len(rows), bool)
    for words, counts in found.grams.items():
        of_length = rows[:, 1] == words
        seen[of_length] = counts[rows[of_length, 2]] > 0
    count = index.num_items
    return np.stack([np.bincount(rows[:, 0], minlength=count), np.bincount(rows[seen, 0], minlength=count)])


def _report_set(
    s: EvaluationSet, index: EvaluationIndex, dirty: Mapping[str, np.ndarray], in_corpus: np.ndarray, found: Scan
) -> dict[str, Any]:
    mine = slice(s.first, s.first + len(s))
    ids = list(s.fingerprints)
    grams, seen = in_corpus[:, mine].sum(axis=1).tolist()
    return {
        "items": len(s),
        "ngram_words": s.ngram_words,
        "too_short": s.too_short,
        "broken_images": s.broken_images,
        "look_alikes": _look_alikes(index, s),
        "overlap_8grams": seen / grams if grams else 0.0,
        "methods": {
            method: {
                "dirty": int(flags[mine].sum()),
                "fraction": float(flags[mine].mean()),
                "ids": [ids[i] for i in np.flatnonzero(flags[mine])],
            }
            for method, flags in dirty.items()
        },
        "examples": {m: found.examples[s.name, m] for m in METHODS if (s.name, m) in found.examples},
        "fingerprints": dict(s.fingerprints),
    }


def _look_alikes(index: EvaluationIndex, s: EvaluationSet, max_images: int = 500) -> float:
    """The fraction of images that look like a different file of their own set: there the image method proves little."""
    mine = (index.image_items >= s.first) & (index.image_items < s.first + len(s))
    looks: dict[str, int] = {}
    for number in np.flatnonzero(mine).tolist():
        looks.setdefault(index.image_files[number], int(index.image_hashes[number]))
    some = list(looks)[:: max(1, len(looks) // max_images)]
    alike = 0
    for file in some:
        near = {index.image_files[n] for n in index.near_images(looks[file]).tolist() if mine[n]}
        alike += len(near - {file}) > 0
    return alike / len(some) if some else 0.0


def markdown(values: Mapping[str, Any]) -> str:
    """A report as a table: dirty items by method, in per cent, and then what was found first."""
    corpus = values["corpus"]
    lines = [
        f"{corpus['samples']:,} samples and {corpus['images']:,} images were searched; of the images "
        f"{corpus['image not fetched']:,} were not fetched and {corpus['broken image']:,} broken.",
        "",
        "| evaluation set | items | N | 8-grams in corpus | " + " | ".join((*METHODS, "any")) + " | too short |",
        "|---|" + "---|" * (len(METHODS) + 5),
    ]
    for name, s in values["sets"].items():
        cells = [f"{s['methods'][m]['dirty']:,} ({100 * s['methods'][m]['fraction']:.1f} %)" for m in (*METHODS, "any")]
        numbers = [f"{s['items']:,}", str(s["ngram_words"]), f"{100 * s['overlap_8grams']:.2f} %"]
        lines.append(f"| {' | '.join([_cell(name), *numbers, *cells, format(s['too_short'], ',')])} |")
    for name, s in values["sets"].items():
        if s["look_alikes"] > MANY_LOOK_ALIKES:
            share = f"{100 * s['look_alikes']:.0f} %"
            lines += ["", f"{_cell(name)}: {share} of its images look like another of the set; `image` finds too many."]
    rows = [(n, m, e) for n, s in values["sets"].items() for m, found in s["examples"].items() for e in found]
    if rows:
        lines += ["", "| evaluation set | item | method | sample | shared |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, (n, e['item'], m, e['sample'], e['shared'])))} |" for n, m, e in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """One line that cannot end its cell: pages hold anything."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def write_report(out: Path, values: Mapping[str, Any]) -> None:
    """`contamination.json` and `contamination.md` in folder `out`. Raises MMGPTError when they cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in zip(REPORT_FILES, (json.dumps(values, indent=1) + "\n", markdown(values)), strict=True):
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MMGPTError(f"{error.filename or out}: {error.strerror or error}") from None


def read_report(path: Path) -> dict[str, Any]:
    """A `contamination.json`. Raises MMGPTError for anything else."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sound = values["version"] == _VERSION and all(
            isinstance(s["fingerprints"], dict) and all(isinstance(m["ids"], list) for m in s["methods"].values())
            for s in values["sets"].values()
        )
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise MMGPTError(f"{path}: not a contamination report of this version")
    return values
