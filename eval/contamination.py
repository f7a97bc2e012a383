"""Scores with and without the items that a training corpus holds, from the report of `mm-gpt corpus contamination`.

As in GPT-3's analysis: the score of all items (full), of those that no method found (clean), of those that one found
(dirty), and (clean - full) / full. As in GPT-4's report, the worse of full and clean is the one to quote.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_gpt.datasets.contamination.evaluation_index import EvaluationItem
from mm_gpt.datasets.contamination.report import MANY_LOOK_ALIKES, read_report
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.eval.metrics.statistics import bootstrap_statistic

if TYPE_CHECKING:
    from mm_gpt.eval.base import Score, Task
    from mm_gpt.eval.config import EvalConfig
    from mm_gpt.inference.assistant import Assistant

logger = logging.getLogger(__name__)

CUTTING_RULE = "13-gram"
"""Says what is cut out of a corpus, not what counts as dirty."""


def evaluation_items(config: EvalConfig, assistant: Assistant | None = None) -> list[EvaluationItem]:
    """The items of a task on its data, to be looked for in a corpus: texts and images under the ids of its results.

    All of them, whatever `config.limit`. For perplexity the items are windows of tokens; `assistant` is then loaded
    from `config.model` unless given. Raises MMGPTError for an unknown task and data that cannot be read.
    """
    from mm_gpt.eval.tasks import TASKS

    if config.task not in TASKS:
        raise MMGPTError(unknown_name("task", config.task, TASKS))
    items = list(TASKS[config.task].sources(config, assistant))
    if not items:
        raise MMGPTError(f"{', '.join(config.data)}: nothing to evaluate")
    return items


@dataclasses.dataclass(frozen=True)
class DirtyItems:
    """What a report says about the items of one task."""

    report: str
    set_name: str
    look_alikes: float
    flags: Mapping[str, np.ndarray]
    """Method -> whether each item is dirty, bool (N,), in the order of the task's items."""


def read_dirty_items(path: Path, task: Task) -> DirtyItems:
    """The part of a contamination report that is about the items of `task`, recognised by their content.

    Raises MMGPTError when no set of the report, or more than one, holds all of them.
    """
    values = read_report(path)
    wanted = {instance.id for instance in task.instances}
    sources = type(task).sources(task.config, task.assistant)
    prints = {item.id: item.fingerprint() for item in sources if item.id in wanted}
    fitting = [
        name for name, s in values["sets"].items() if all(s["fingerprints"].get(id) == p for id, p in prints.items())
    ]
    if not fitting:
        raise MMGPTError(f"{path}: none of its sets ({', '.join(values['sets'])}) holds these items; make it anew")
    if len(fitting) > 1:
        raise MMGPTError(f"{path}: its sets {', '.join(fitting)} all hold these items; name each set once")
    s = values["sets"][fitting[0]]
    flags = {}
    for method, found in s["methods"].items():
        ids = set(found["ids"])
        flags[method] = np.array([instance.id in ids for instance in task.instances])
    if s["look_alikes"] > MANY_LOOK_ALIKES:
        logger.warning("%s: images of %s look alike, so its image hits prove little", path, fitting[0])
    return DirtyItems(str(path), fitting[0], s["look_alikes"], {m: f for m, f in flags.items() if m != CUTTING_RULE})


def split_scores(scores: Mapping[str, Score], dirty: DirtyItems, task: Task) -> dict[str, Any]:
    """Full, clean and dirty scores by method and metric, with n and 95 % intervals. JSON values; None where n is 0."""
    groups = np.array([instance.group for instance in task.instances])
    methods = {}
    for method, is_dirty in dirty.flags.items():
        methods[method] = {
            "n": {"full": len(is_dirty), "clean": int((~is_dirty).sum()), "dirty": int(is_dirty.sum())},
            "metrics": {name: _split(score, is_dirty, groups, task) for name, score in scores.items()},
        }
    return {
        "report": dirty.report,
        "set": dirty.set_name,
        "image_look_alikes": dirty.look_alikes,
        "methods": methods,
    }


def _split(score: Score, is_dirty: np.ndarray, groups: np.ndarray, task: Task) -> dict[str, Any]:
    seed = task.config.seed
    everything = np.ones(len(is_dirty), bool)
    parts = {
        name: _part(score, keep, groups, seed)
        for name, keep in (("full", everything), ("clean", ~is_dirty), ("dirty", is_dirty))
    }
    values = [part["value"] for part in (parts["full"], parts["clean"]) if part["value"] is not None]
    return {
        **parts,
        "relative_difference": _relative_difference(score, ~is_dirty, groups, seed),
        "worse_of_full_and_clean": max(values) if task.lower_is_better else min(values),
    }


def _part(score: Score, keep: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float | None]:
    """The score of the items in `keep`, bool (N,), and its interval where they are of two groups or more."""
    from mm_gpt.eval.base import RatioScore

    if not keep.any():
        return {"value": None, "low": None, "high": None}
    kept_groups, renumbered = np.unique(groups[keep], return_inverse=True)
    low: float | None = None
    high: float | None = None
    if isinstance(score, RatioScore):
        part = dataclasses.replace(
            score, totals=score.totals[keep], weights=score.weights[keep], groups=renumbered.astype(np.int64)
        )
        value = part.score
        if len(kept_groups) > 1:
            low, high = part.interval(seed=seed)
    else:  # one item for each group
        value = float(score.resampled(kept_groups[None, :])[0])
        if len(kept_groups) > 1:
            low, high = bootstrap_statistic(
                lambda drawn: score.resampled(kept_groups[drawn]), len(kept_groups), seed=seed
            )
    return {"value": value, "low": low, "high": high}


def _relative_difference(score: Score, is_clean: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float | None]:
    """(clean - full) / full, drawing the same groups for both. Draws without a clean item or of score 0 say nothing."""
    nothing: dict[str, float | None] = {"value": None, "low": None, "high": None}
    num_groups = int(groups.max()) + 1
    if not is_clean.any():
        return nothing
    clean_of = _clean_resampler(score, is_clean)

    def relative(indices: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            full = score.resampled(indices)
            result: np.ndarray = (clean_of(indices) - full) / full
            return result

    value = relative(np.arange(num_groups)[None, :])[0]
    if not np.isfinite(value):
        return nothing
    draws: list[np.ndarray] = []

    def collect(indices: np.ndarray) -> np.ndarray:
        draws.append(relative(indices))
        return np.zeros(len(indices))

    if num_groups < 2:
        return {**nothing, "value": float(value)}
    bootstrap_statistic(collect, num_groups, seed=seed)
    known = np.concatenate(draws)
    low, high = np.quantile(known[np.isfinite(known)], [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _clean_resampler(score: Score, is_clean: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Group indices (R, G) -> the score of the clean items among them, (R,); nan where there are none."""
    from mm_gpt.eval.base import RatioScore

    if isinstance(score, RatioScore):
        return dataclasses.replace(score, totals=score.totals * is_clean, weights=score.weights * is_clean).resampled

    def resampled(indices: np.ndarray) -> np.ndarray:  # one item for each group, so groups are clean or dirty
        rows = [row[is_clean[row]] for row in indices]
        return np.array([score.resampled(row[None, :])[0] if len(row) else np.nan for row in rows])

    return resampled


def table_rows(results: Mapping[str, Any], metrics: Sequence[str], cell: Callable[..., str]) -> list[list[str]]:
    """Rows for the table of `mm-gpt eval`: each method that found something."""
    rows = []
    for method, found in results["methods"].items():
        if not found["n"]["dirty"]:
            continue
        for part in ("clean", "dirty"):
            scores = [found["metrics"][m][part] for m in metrics]
            cells = ["-" if s["value"] is None else cell(s) for s in scores]
            rows.append([f"{part} by {method} (n = {found['n'][part]})", *cells])
        relative = [found["metrics"][m]["relative_difference"]["value"] for m in metrics]
        rows.append(["  (clean - full) / full", *("-" if r is None else f"{100 * r:+.1f} %" for r in relative)])
    return rows
