"""The runs of a plan: trained one after the other, and read as points of a law when they are finished.

A run lies in a folder of its name beside the plan and is an ordinary one: `mm-gpt train` could have made it. Only what
has come to the end of its schedule is a point; a run whose rate has not fallen yet would stand above the law.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_gpt.config import first_difference, from_dict, to_dict
from mm_gpt.errors import MMGPTError
from mm_gpt.hub.weights import read_json
from mm_gpt.scaling.ladder import LadderPlan, PlannedRun
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.training.language import LanguageRecipe
from mm_gpt.training.recipes import run_recipe
from mm_gpt.training.run_log import read_log

logger = logging.getLogger(__name__)

LOG, RECIPE = "log.jsonl", "recipe.json"
DIVERGED = 1.1
"""A run whose training loss ends at so many times the lowest it has been has diverged: both are means over a fifth of
the log, since steps are noisy and differ in what they read."""


@dataclass(frozen=True)
class Finished:
    """What a run came to."""

    run: PlannedRun
    losses: dict[str, float]
    """Validation losses at the end: `loss`, and `loss SOURCE` of each held-out source."""
    tokens: float
    flops: float
    seconds: float

    def point(self, metric: str = "loss") -> Point:
        """Raises MMGPTError for a metric that the run does not have."""
        if metric not in self.losses:
            raise MMGPTError(f"{self.run.name} has no validation {metric!r} (it has: {', '.join(self.losses)})")
        return Point(self.run.parameters, self.tokens, self.flops, self.losses[metric], self.run.name)


def target_point(run: PlannedRun) -> Point:
    """A run that is still to come."""
    return Point(run.parameters, run.tokens, run.flops, name=run.name)


def has_begun(folder: Path) -> bool:
    """Whether anything of a run is there: its loss might be known."""
    return (folder / LOG).exists() or (folder / RECIPE).exists()


def train_runs(plan: LadderPlan, folder: Path, runs: Sequence[PlannedRun], *, progress: bool = True) -> list[str]:
    """Train what is not finished yet, in the folders `folder`/NAME; what was stopped goes on. A run that fails is
    reported, and the others go on. Returns the names of those that failed."""
    failed = []
    for run in runs:
        out = folder / run.name
        recipe = plan.recipe_of(run)
        check_recipe(out, run, to_dict(recipe))
        try:
            read_run(out, run)
        except CannotTell:
            logger.info("%s: N %s, D %s", run.name, f"{run.parameters:,}", f"{run.tokens:,.0f}")
        else:
            logger.info("%s is finished", run.name)
            continue
        try:
            run_recipe(recipe, out, resume=has_begun(out), progress=progress)
        except MMGPTError as error:
            logger.error("%s failed: %s", run.name, error)
            failed.append(run.name)
    return failed


def check_recipe(out: Path, run: PlannedRun, recipe: dict[str, Any]) -> None:
    """Raises MMGPTError where a folder holds another run than the plan's."""
    if (out / RECIPE).exists():
        # A setting that came after the run had its default then
        before = to_dict(from_dict(LanguageRecipe, read_json(out / RECIPE), where=str(out / RECIPE)))
        key = first_difference(*(json.loads(json.dumps(each)) for each in (recipe, before)))
        if key is not None:
            raise MMGPTError(f"{out} is not the plan's {run.name}: another {key}; choose another folder")


def read_run(out: Path, run: PlannedRun) -> Finished:
    """A finished run. Raises CannotTell for one that is missing, unfinished or diverged, naming the folder."""
    rows = _rows(out / LOG)
    steps = [row for row in rows if "validation" not in row and "loss" in row]
    if broken := [row["step"] for row in steps if not math.isfinite(row["loss"])]:
        raise CannotTell(f"{out}: diverged (no finite loss at step {broken[0]}): lower the ladder's lr")
    last = next((row for row in rows if "validation" in row and row["step"] == run.steps), None)
    if not steps or last is None:
        at = max((row["step"] for row in rows), default=0)
        raise CannotTell(f"{out}: not finished (step {at} of {run.steps}); `mm-gpt scaling run` goes on with it")
    losses = {key: float(value) for key, value in last["validation"].items() if key.startswith("loss")}
    train = [row["loss"] for row in steps]
    size = max(1, len(train) // 5)
    means = [sum(train[end - size : end]) / size for end in range(size, len(train) + 1)]
    if not all(map(math.isfinite, losses.values())) or means[-1] > DIVERGED * min(means):
        raise CannotTell(
            f"{out}: diverged (the training loss ends at {means[-1]:.3g}, after {min(means):.3g}): "
            "lower the ladder's lr"
        )
    tokens, flops = steps[-1].get("tokens", run.tokens), steps[-1].get("flops", run.flops)
    seconds = sum(row.get("seconds", 0.0) for row in steps) * run.steps / len(steps)
    return Finished(run, losses, float(tokens), float(flops), seconds)


def read_runs(plan: LadderPlan, folder: Path, runs: Sequence[PlannedRun]) -> list[Finished]:
    """Raises CannotTell as `read_run` does, and MMGPTError for what is not the plan's run, but has its name."""
    found = []
    for run in runs:
        out = folder / run.name
        check_recipe(out, run, to_dict(plan.recipe_of(run)))
        found.append(read_run(out, run))
        if not (out / RECIPE).is_file():
            raise MMGPTError(f"{out}: no {RECIPE}, which would tell that it is the plan's {run.name}")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """What a run has logged. Raises MMGPTError for a row that a ladder cannot count with."""
    rows = read_log(path) if path.exists() else []
    for number, row in enumerate(rows, 1):
        if not _has_numbers(row):
            raise MMGPTError(f"{path}: line {number} is no row of a log")
    return rows


def _has_numbers(row: dict[str, Any]) -> bool:
    """Whether what a ladder reads of a row of a log are numbers that it can count with."""
    validation = row.get("validation", {})
    if not isinstance(validation, dict):
        return False
    read = [row[key] for key in ("loss", "tokens", "flops", "seconds") if key in row]
    read += [value for key, value in validation.items() if key.startswith("loss")]
    return all(isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000) for value in read)
