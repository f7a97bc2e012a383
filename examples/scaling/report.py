"""What a ladder came to, in one file: its runs, predictions and verdicts, answers, and what an image token is worth.

    python examples/scaling/report.py PLAN FILED -o docs/results/scaling_ladder.json --answers FILED_ANSWERS \\
        --mixture 0.25=PLAN --mixture 0.75=PLAN

A mixture is a plan of the same rules whose recipe has that share of picture pages (`experiment.py --pages-share`). With
two of them the losses of text and of pages are fitted apart, each to its own tokens and to those of the other kind.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from capability import judge, ladder_of_answers

from mm_gpt.config import to_dict
from mm_gpt.eval.harness import git_commit
from mm_gpt.scaling.ladder import LadderPlan
from mm_gpt.scaling.modalities import MixedPoint, fit_modalities
from mm_gpt.scaling.points import CannotTell
from mm_gpt.scaling.registration import verdicts
from mm_gpt.scaling.runs import Finished, read_run

TEXT, PAGES = "loss manuals/held_out.jsonl", "loss pages/held_out"


def finished(plan_path: Path) -> list[Finished]:
    """The runs of a plan that are done."""
    plan, found = LadderPlan.load(plan_path), []
    for run in plan.runs:
        try:
            found.append(read_run(plan_path.parent / run.name, run))
        except CannotTell as error:
            print(error)
    return found


def mixed(plan_path: Path, pages_share: float, *, most: float = float("inf")) -> list[MixedPoint]:
    """The runs of a plan with so many FLOPs at most, by what they read of each kind."""
    return [
        MixedPoint(
            each.run.parameters,
            {"text": each.tokens * (1 - pages_share), "pages": each.tokens * pages_share},
            {"text": each.losses[TEXT], "pages": each.losses[PAGES]},
            each.flops,
            f"{each.run.name} {pages_share:g}",
        )
        for each in finished(plan_path)
        if each.flops <= most
    ]


def worth(plan_path: Path, mixtures: list[tuple[float, Path]]) -> dict[str, Any]:
    """What a token of the other kind is worth to each kind, or why that cannot be told."""
    others = [point for share, path in mixtures for point in mixed(path, share)]
    top = max(point.flops for point in others) * 1.01
    points = [*mixed(plan_path, 0.5, most=top), *others]
    values: dict[str, Any] = {
        "runs": [
            {"name": p.name, "N": p.parameters, "tokens": dict(p.tokens), "losses": dict(p.losses)} for p in points
        ]
    }
    for kind in ("text", "pages"):
        alone = [MixedPoint(p.parameters, p.tokens, {kind: p.losses[kind]}, p.flops, p.name) for p in points]
        try:
            fit = fit_modalities(alone)[kind]
        except CannotTell as error:
            values[kind] = {"cannot tell": str(error)}
        else:
            values[kind] = {
                "worth": fit.worth,
                "90 %": [fit.worth_low, fit.worth_high],
                "coefficients": fit.fit.coefficients,
                "largest residual": max(map(abs, fit.fit.residuals)),
            }
        print(kind, {key: value for key, value in values[kind].items() if key != "coefficients"})
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("filed", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--answers", type=Path, help="the prediction that capability.py filed")
    parser.add_argument("--mixture", action="append", default=[], metavar="SHARE=PLAN")
    args = parser.parse_args()
    plan, folder = LadderPlan.load(args.plan), args.plan.parent
    values: dict[str, Any] = {
        "command": f"python examples/scaling/report.py {' '.join(sys.argv[1:])}",
        "commit": git_commit(),
        "machine": f"{platform.processor() or platform.machine()}, one thread, float32",
        "rules": to_dict(plan.ladder),
        "data": to_dict(plan.data),
        "runs": [
            {
                "name": each.run.name,
                "role": each.run.role,
                "N": each.run.parameters,
                "blocks": each.run.blocks,
                "vision": each.run.vision,
                "D": each.tokens,
                "flops": each.flops,
                "seconds": round(each.seconds),
                "losses": each.losses,
            }
            for each in finished(args.plan)
        ],
        "verdicts": [
            {
                "metric": each.metric,
                "predicted": each.predicted,
                "low": each.low,
                "high": each.high,
                "measured": each.measured,
                "error": each.error,
                "inside": each.is_inside,
            }
            for each in verdicts(args.filed, args.plan)
        ],
    }
    for each in values["verdicts"]:
        print(each)
    if args.answers is not None:
        values["answers"] = judge(plan, folder, args.answers)
        rows, found = ladder_of_answers(plan, folder)
        values["answers"] |= {"ladder": rows, "emergence": to_dict(found)}
    if args.mixture:
        pairs = [item.partition("=") for item in args.mixture]
        values["mixtures"] = worth(args.plan, [(float(share), Path(path)) for share, _, path in pairs])
    args.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
