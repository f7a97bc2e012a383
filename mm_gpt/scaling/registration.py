"""Predictions that are filed before their run begins, and what became of them.

A registration is a JSON file: the law and its coefficients, the runs that it was fitted to, how it missed the largest
of them when that was held out, and the SHA-256 of everything that went in. It is of use when somebody else can see
that it was there before the run: commit it. Changed afterwards, or with a changed log, it is not a registration any
more. The verdict never fits again.
"""

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_gpt.config import from_dict, to_dict
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.harness import git_commit
from mm_gpt.hub.weights import read_json
from mm_gpt.scaling.ladder import LadderPlan, PlannedRun
from mm_gpt.scaling.laws import Fit, Prediction, predict_run
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.scaling.runs import LOG, RECIPE, Finished, has_begun, read_runs, target_point
from mm_gpt.system.writing import write_text

VERSION = 1
FORMS = ("power", "parametric")


def points_of(plan: LadderPlan, finished: Sequence[Finished], form: str) -> list[Finished]:
    """The runs that a law of this form is fitted to: one of compute alone wants a single ratio of D to N."""
    if form == "power":
        return [each for each in finished if each.run.budget == plan.ladder.budgets[0]]
    return list(finished)


def predict(
    plan: LadderPlan, folder: Path, target: PlannedRun, *, form: str = "power"
) -> dict[str, Prediction | CannotTell]:
    """By validation metric, `loss` first. Raises CannotTell where runs are missing, and MMGPTError where the target has
    begun: what is known is not predicted."""
    if has_begun(folder / target.name):
        raise MMGPTError(f"{folder / target.name} has begun: a prediction is made before")
    finished = points_of(plan, read_runs(plan, folder, plan.of_role("rung")), form)
    found: dict[str, Prediction | CannotTell] = {}
    for metric in finished[0].losses:
        try:
            found[metric] = predict_run([each.point(metric) for each in finished], target_point(target), form)  # type: ignore[arg-type]
        except CannotTell as error:
            found[metric] = error
    return found


def register(
    plan_path: Path,
    target: str,
    out: Path,
    *,
    form: str = "power",
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
) -> dict[str, Any]:
    """Predict a target of a plan and write the registration. Returns its values.

    Raises CannotTell where `loss` cannot be predicted (of other metrics the reason is filed), and MMGPTError where the
    target has begun or `out` is there already.
    """
    if out.exists():
        raise MMGPTError(f"{out} is there already: a prediction is filed once")
    plan, folder = LadderPlan.load(plan_path), plan_path.parent
    run = plan.run(target)
    if run.role != "target":
        raise MMGPTError(f"{target} is a rung of the ladder, not a target (it has: {_names(plan.of_role('target'))})")
    predictions = predict(plan, folder, run, form=form)
    headline = next(iter(predictions.values()))
    if isinstance(headline, CannotTell):
        raise headline
    values: dict[str, Any] = {
        "version": VERSION,
        "time": now().isoformat(timespec="seconds"),
        "commit": git_commit(),
        "form": form,
        "target": to_dict(run),
        "predictions": {metric: _as_json(each) for metric, each in predictions.items()},
        "inputs": _inputs(plan_path, plan),
    }
    values["digest"] = digest(values)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(values, indent=1) + "\n")
    return values


def _names(runs: Sequence[PlannedRun]) -> str:
    return ", ".join(run.name for run in runs) or "none"


def _as_json(prediction: Prediction | CannotTell) -> dict[str, Any]:
    if isinstance(prediction, CannotTell):
        return {"cannot tell": str(prediction)}
    return {
        "loss": prediction.loss,
        "low": prediction.low,
        "high": prediction.high,
        "held out": {
            "runs": prediction.held_out.names,
            "measured": prediction.held_out.measured,
            "predicted": prediction.held_out.predicted,
            "error": prediction.held_out.error,
        },
        "fit": prediction.fit.to_dict(),
    }


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of a registration without its digest."""
    own = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _inputs(plan_path: Path, plan: LadderPlan) -> dict[str, str]:
    """SHA-256 of the plan, and of each rung's log and recipe, by their path from the plan's folder."""
    folder = plan_path.parent
    paths = [plan_path, *(folder / run.name / name for run in plan.of_role("rung") for name in (RECIPE, LOG))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ---- Verdict ----


@dataclass(frozen=True)
class Verdict:
    """One prediction and what came."""

    metric: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1

    @property
    def is_inside(self) -> bool:
        return self.low <= self.measured <= self.high

    def __str__(self) -> str:
        inside = "inside" if self.is_inside else "outside"
        return (
            f"{self.metric}: predicted {self.predicted:.4f} (90 %: {self.low:.4f} to {self.high:.4f}), measured "
            f"{self.measured:.4f}, error {self.error:+.2%}, {inside} the interval"
        )


def verdicts(path: Path, plan_path: Path) -> list[Verdict]:
    """What became of a registered prediction.

    Raises MMGPTError that begins with "not registered" where the file, the plan or a rung has changed since, or the
    target had begun before; CannotTell where the target is not finished.
    """
    values = _read(path)
    plan, folder = LadderPlan.load(plan_path), plan_path.parent
    for name, before in values["inputs"].items():
        file = plan_path if name == plan_path.name else folder / name
        if not file.is_file():
            raise MMGPTError(f"not registered: {file}, which went into {path}, is gone")
        if hashlib.sha256(file.read_bytes()).hexdigest() != before:
            raise MMGPTError(f"not registered: {file} has changed since {path}")
    run = plan.run(values["target"]["name"])
    (finished,) = read_runs(plan, folder, [run])
    filed = _time(values["time"]).timestamp()
    if (folder / run.name / RECIPE).stat().st_mtime < filed:
        raise MMGPTError(f"not registered: {folder / run.name} had begun before {path}")
    return [
        Verdict(metric, each["loss"], each["low"], each["high"], finished.losses[metric])
        for metric, each in values["predictions"].items()
        if "loss" in each and metric in finished.losses
    ]


def read_fits(path: Path) -> tuple[dict[str, Fit], Point]:
    """The laws of a registration by metric, and the run that they were asked about."""
    values = _read(path)
    target = from_dict(PlannedRun, values["target"], where=f"{path}: target")
    fits = {
        metric: Fit.from_dict(each["fit"], where=f"{path}: {metric}")
        for metric, each in values["predictions"].items()
        if "fit" in each
    }
    return fits, target_point(target)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MMGPTError(f"{path}: no such registration; `mm-gpt scaling predict` writes one")
    values = read_json(path)
    wanted = {"version", "time", "target", "predictions", "inputs", "digest"}
    if not isinstance(values, dict) or not wanted <= values.keys():
        raise MMGPTError(f"{path}: no registration (a prediction that was filed)")
    if values["version"] != VERSION:
        raise MMGPTError(f"{path}: of version {values['version']}, and this program reads {VERSION}")
    if digest(values) != values["digest"]:
        raise MMGPTError(f"not registered: {path} has been edited since")
    try:
        from_dict(PlannedRun, values["target"])
        _time(values["time"])
        for each in values["predictions"].values():
            if "loss" in each:
                math.fsum((each["loss"], each["low"], each["high"]))
        b"".join(bytes.fromhex(each) for each in values["inputs"].values())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MMGPTError) as error:
        raise MMGPTError(f"{path}: no registration (a prediction that was filed): {error}") from None
    return values


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
