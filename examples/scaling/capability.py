"""What the target will be able to do, filed before it runs; and afterwards whether it can, and whether that emerged.

    python examples/scaling/questions.py PLAN WORK/pages
    python examples/scaling/capability.py PLAN -o FILED
    python examples/scaling/capability.py PLAN --verdict FILED

GPT-4's way: the mean over questions of -log(pass rate) falls as a power law of compute, over questions that every small
model answers at least once in `SAMPLES` samples. `questions.py` has written the probabilities of the answers, so a pass
rate is not estimated from samples, but known.
"""

import argparse
import datetime
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from questions import ANSWERS

from mm_gpt.errors import MMGPTError
from mm_gpt.eval.harness import git_commit
from mm_gpt.scaling.capability import Attempts, Emergence, emergence, mean_log_loss, predict_capability
from mm_gpt.scaling.ladder import LadderPlan, PlannedRun
from mm_gpt.scaling.points import CannotTell
from mm_gpt.scaling.runs import has_begun, read_run

SAMPLES = 1000
RESOLUTION = 10**9
"""A probability as so many attempts."""


def read_answers(folder: Path) -> list[dict[str, Any]]:
    path = folder / ANSWERS
    if not path.is_file():
        raise MMGPTError(f"{path}: not there; questions.py writes it")
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def attempts(folder: Path, run: PlannedRun, flops: float) -> Attempts:
    """Probabilities as attempts; less than one in `SAMPLES` is none."""
    passed = {}
    for number, row in enumerate(read_answers(folder)):
        share = math.exp(row["log_probability"])
        passed[f"{number:04d}"] = round(share * RESOLUTION) if share >= 1 / SAMPLES else 0
    return Attempts(flops, RESOLUTION, passed, run.name)


def file_prediction(plan: LadderPlan, folder: Path, target: PlannedRun, out: Path) -> dict[str, Any]:
    if has_begun(folder / target.name):
        raise MMGPTError(f"{folder / target.name} has begun: a prediction is made before")
    if out.exists():
        raise MMGPTError(f"{out} is there already: a prediction is filed once")
    runs = [run for run in plan.of_role("rung") if run.seed == 0 and run.budget == plan.ladder.budgets[0]]
    small = [attempts(folder / run.name, run, read_run(folder / run.name, run).flops) for run in runs]
    found = predict_capability(small, target.flops, most=1.0)
    values: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "target": target.name,
        "flops": target.flops,
        "problems": found.problems,
        "log_loss": found.log_loss,
        "low": found.low,
        "high": found.high,
        "held out error": found.held_out.error,
        "fit": found.fit.to_dict(),
        "inputs": {run.name: hashlib.sha256((folder / run.name / ANSWERS).read_bytes()).hexdigest() for run in runs},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(values, indent=1) + "\n")
    print(found)
    return values


def judge(plan: LadderPlan, folder: Path, filed: Path) -> dict[str, Any]:
    """What came of it, over the same questions."""
    values = json.loads(filed.read_text())
    for name, before in values["inputs"].items():
        if hashlib.sha256((folder / name / ANSWERS).read_bytes()).hexdigest() != before:
            raise MMGPTError(f"not registered: {folder / name / ANSWERS} has changed since {filed}")
    run = plan.run(values["target"])
    done = attempts(folder / run.name, run, read_run(folder / run.name, run).flops)
    measured = mean_log_loss(done, values["problems"], floor=True)
    inside = values["low"] <= measured <= values["high"]
    print(
        f"mean -log(pass rate): predicted {values['log_loss']:.3f} ({values['low']:.3f} to {values['high']:.3f}), "
        f"measured {measured:.3f}, {'inside' if inside else 'outside'} the interval"
    )
    return {"predicted": values["log_loss"], "low": values["low"], "high": values["high"], "measured": measured}


def ladder_of_answers(plan: LadderPlan, folder: Path) -> tuple[list[dict[str, Any]], Emergence]:
    """Exact match and likelihood, rung by rung, the target included; and whether anything emerged."""
    rows = []
    for run in plan.runs:
        if run.seed or run.budget != plan.ladder.budgets[0]:
            continue
        try:
            flops = read_run(folder / run.name, run).flops
            answers = read_answers(folder / run.name)
        except (CannotTell, MMGPTError):
            continue
        exact = sum(row["exact"] for row in answers) / len(answers)
        likelihood = sum(row["log_probability"] for row in answers) / sum(row["tokens"] for row in answers)
        rows.append({"run": run.name, "flops": flops, "exact match": exact, "log likelihood a token": likelihood})
        print(f"{run.name}: C {flops:.2e}, {exact:.1%} to the letter, {likelihood:.3f} nats a token")
    found = emergence(
        [row["flops"] for row in rows],
        [row["exact match"] for row in rows],
        [row["log likelihood a token"] for row in rows],
        problems=len(answers),
    )
    print(f"emergence: {found.verdict}")
    return rows, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="file a prediction of the plan's target")
    parser.add_argument("--verdict", type=Path, metavar="FILED", help="judge it")
    args = parser.parse_args()
    plan, folder = LadderPlan.load(args.plan), args.plan.parent
    if args.out is not None:
        file_prediction(plan, folder, plan.of_role("target")[0], args.out)
    if args.verdict is not None:
        judge(plan, folder, args.verdict)
    ladder_of_answers(plan, folder)


if __name__ == "__main__":
    main()
