"""`mm-gpt scaling`: a ladder of small runs, the law of their losses, and what it says about a larger run before it."""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_gpt.commands.command import EXIT_SOME_FAILED, Command, UsageError, check_folder, tell
from mm_gpt.errors import MMGPTError

if TYPE_CHECKING:
    from mm_gpt.scaling.ladder import LadderPlan
    from mm_gpt.training.language import LanguageRecipe


def _numbers(of: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(of(part) for part in text.split(",") if part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, like 16,32,48") from None

    return parse


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a language recipe's name, or a recipe.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it, like train.weight_decay=0.1")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the sources (default: the recipe's, or .)")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the plan; runs lie beside it")
    parser.add_argument("--widths", type=_numbers(int), required=True, metavar="N,N,...", help="of the rungs")
    parser.add_argument("--target", type=_numbers(int), default=(), metavar="N,...", help="widths to be predicted")
    group = parser.add_argument_group("rules")
    group.add_argument("--tokens-per-parameter", type=float, metavar="X", help="D / N (default: 20)")
    group.add_argument("--budgets", type=_numbers(float), metavar="X,...", help="multiples of it, of each rung")
    group.add_argument("--seeds", type=int, metavar="N", help="runs of the small rungs (default: 1)")
    group.add_argument("--seeds-width", type=int, metavar="N", help="how wide a small rung is at most")
    group.add_argument("--layers", type=int, metavar="N", help="of all sizes (default: by --width-per-layer)")
    group.add_argument("--width-per-layer", type=int, metavar="N", help="a layer for each N (default: 16)")
    group.add_argument("--head-size", type=int, metavar="N", help="(default: 16)")
    group.add_argument("--lr", type=float, metavar="X", help="peak at N = 100,000 (default: 5e-3)")
    group.add_argument("--lr-exponent", type=float, metavar="X", help="of N (default: -1/3)")
    group.add_argument("--batch-tokens", type=float, metavar="X", help="in a step at N = 100,000 (default: 2048)")
    group.add_argument("--batch-exponent", type=float, metavar="X", help="of N (default: 2/3)")
    group.add_argument("--warmup-tokens-per-parameter", type=float, metavar="X", help="(default: 1)")
    parser.add_argument("--untimed", action="store_true", help="do not try how long a step takes")


def run_plan(args: argparse.Namespace) -> int:
    check_folder(args.out.absolute().parent)
    from mm_gpt.config import override
    from mm_gpt.scaling.ladder import LadderConfig, LadderPlan, make_plan, table
    from mm_gpt.scaling.runs import has_begun

    names = {field.name for field in dataclasses.fields(LadderConfig)}
    rules = {name: value for name, value in vars(args).items() if name in names and value is not None}
    config = LadderConfig(**rules, targets=args.target)
    if args.out.exists() and (
        begun := [r.name for r in LadderPlan.load(args.out).runs if has_begun(args.out.parent / r.name)]
    ):
        raise MMGPTError(f"{args.out} is there already, and {begun[0]} has begun by it: choose another folder")
    plan = make_plan(override(_recipe(args.recipe, args.data), args.overrides), config, timed=not args.untimed)
    plan.save(args.out)
    print(table(plan))
    return 0


def _recipe(name: str, data: Path | None) -> "LanguageRecipe":
    from mm_gpt.config import from_dict
    from mm_gpt.hub.weights import read_json
    from mm_gpt.training.language import LanguageRecipe
    from mm_gpt.training.recipes import recipe

    if data is not None and not data.is_dir():
        raise MMGPTError(f"{data}: no such folder")
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise MMGPTError(f"{name}: no such file")
        chosen: Any = from_dict(LanguageRecipe, read_json(Path(name)), where=name)
        return chosen if data is None else dataclasses.replace(chosen, data=str(data))
    chosen = recipe(name, str(data or Path()))
    if type(chosen) is not LanguageRecipe:
        raise MMGPTError(f"{name}: a ladder needs a recipe of the language stage")
    return chosen


def _add_plan_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what `mm-gpt scaling plan` wrote")


def add_run(parser: argparse.ArgumentParser) -> None:
    _add_plan_file(parser)
    parser.add_argument("--only", metavar="NAME,...", help="these runs (default: all rungs)")
    parser.add_argument("--target", action="store_true", help="the targets, once their losses are predicted")


def run_run(args: argparse.Namespace) -> int:
    from mm_gpt.scaling.ladder import LadderPlan
    from mm_gpt.scaling.runs import train_runs

    plan = LadderPlan.load(args.plan)
    if args.only is not None:
        runs = tuple(plan.run(name) for name in args.only.split(","))
    else:
        runs = plan.of_role("target" if args.target else "rung")
    if not runs:
        raise UsageError("the plan has no target")
    logging.getLogger("mm_gpt").setLevel(logging.INFO)
    failed = train_runs(plan, args.plan.parent, runs, progress=sys.stderr.isatty())
    if failed:
        tell(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return EXIT_SOME_FAILED if failed else 0


def add_fit(parser: argparse.ArgumentParser) -> None:
    _add_plan_file(parser)
    parser.add_argument("--form", choices=("power", "parametric"), default="power", help="(default: %(default)s)")
    parser.add_argument("--metric", metavar="NAME", help="one validation loss (default: each)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of loss against compute")


def run_fit(args: argparse.Namespace) -> int:
    from mm_gpt.scaling.ladder import LadderPlan
    from mm_gpt.scaling.laws import fit_parametric, fit_power, held_out_error
    from mm_gpt.scaling.points import CannotTell
    from mm_gpt.scaling.registration import points_of
    from mm_gpt.scaling.runs import read_runs

    plan = LadderPlan.load(args.plan)
    finished = points_of(plan, read_runs(plan, args.plan.parent, plan.of_role("rung")), args.form)
    metrics = list(finished[0].losses) if args.metric is None else [args.metric]
    fits = {}
    for metric in metrics:
        points = [each.point(metric) for each in finished]
        try:
            fit = (fit_power if args.form == "power" else fit_parametric)(points)
            held_out = held_out_error(points, args.form)
        except CannotTell as error:
            if metric == metrics[0]:
                raise
            tell(f"{metric}: {error}")
            continue
        fits[metric] = fit
        ranges = fit.quantiles if len(points) > len(fit.coefficients) else {}
        print(f"{metric}: {_law(args.form)} of {len(points)} runs")
        for name, value in fit.coefficients.items():
            low_high = f"   90 %: {ranges[name][0]:.4g} to {ranges[name][2]:.4g}" if name in ranges else ""
            print(f"  {name:6} {value:.4g}{low_high}")
        for point, residual in zip(fit.points, fit.residuals, strict=True):
            print(f"  {point.name:16} C {point.flops:.2e}  loss {point.loss:.4f}  law {residual:+.2%}")
        print(f"  largest rung held out: {held_out.error:+.2%}")
    if args.plot is not None:
        from mm_gpt.scaling.plots import plot_losses

        plot_losses(args.plot, fits)
    return 0


def _law(form: str) -> str:
    return "L(C) = a C^b + c" if form == "power" else "L(N, D) = A / N^alpha + B / D^beta + E"


def add_predict(parser: argparse.ArgumentParser) -> None:
    _add_plan_file(parser)
    parser.add_argument("--target", metavar="NAME", help="a target of the plan (default: its only one)")
    parser.add_argument("--form", choices=("power", "parametric"), default="power", help="(default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="the registration (default: PLAN's folder)")


def run_predict(args: argparse.Namespace) -> int:
    from mm_gpt.scaling.ladder import LadderPlan
    from mm_gpt.scaling.registration import register

    plan = LadderPlan.load(args.plan)
    target = args.target or _only_target(plan)
    out = args.out or args.plan.parent / f"prediction-{target}.json"
    values = register(args.plan, target, out, form=args.form)
    for metric, each in values["predictions"].items():
        if "loss" not in each:
            tell(f"{metric}: {each['cannot tell']}")
            continue
        print(
            f"{metric}: {each['loss']:.4f} (90 %: {each['low']:.4f} to {each['high']:.4f}) for {target}; "
            f"largest rung held out: {each['held out']['error']:+.2%}"
        )
    print(f"filed as {out} ({values['digest'][:16]}); commit it before the target runs")
    return 0


def _only_target(plan: "LadderPlan") -> str:
    targets = plan.of_role("target")
    if len(targets) != 1:
        raise UsageError(f"name a --target: {', '.join(run.name for run in targets) or 'the plan has none'}")
    return targets[0].name


def add_verdict(parser: argparse.ArgumentParser) -> None:
    _add_plan_file(parser)
    parser.add_argument("registration", type=Path, metavar="REGISTRATION", help="what `mm-gpt scaling predict` filed")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the law, its interval and what came")


def run_verdict(args: argparse.Namespace) -> int:
    from mm_gpt.scaling.registration import read_fits, verdicts

    found = verdicts(args.registration, args.plan)
    for each in found:
        print(each)
    if args.plot is not None:
        from mm_gpt.scaling.plots import plot_losses

        fits, target = read_fits(args.registration)
        plot_losses(args.plot, fits, target=target, measured={each.metric: each.measured for each in found})
    return 0


COMMANDS = {
    "scaling plan": Command(
        "Plan a ladder: sizes, and settings that follow from them.",
        (
            "mm-gpt scaling plan tiny --data pictures/ --widths 16,32,48,64 --target 96 -o runs/ladder/plan.json",
            "mm-gpt scaling plan recipe.json --widths 16,24,32,48 --target 80 --tokens-per-parameter 10 -o plan.json",
        ),
        add_plan,
        run_plan,
        usage="mm-gpt scaling plan [options] RECIPE [KEY=VALUE ...] --widths N,N,... --out FILE",
    ),
    "scaling run": Command(
        "Train the rungs of a plan, or its targets.",
        ("mm-gpt scaling run runs/ladder/plan.json", "mm-gpt scaling run runs/ladder/plan.json --target"),
        add_run,
        run_run,
    ),
    "scaling fit": Command(
        "Fit the law of the finished rungs.",
        ("mm-gpt scaling fit runs/ladder/plan.json", "mm-gpt scaling fit plan.json --form parametric --plot law.png"),
        add_fit,
        run_fit,
    ),
    "scaling predict": Command(
        "Predict the loss of a target, and file the prediction.",
        ("mm-gpt scaling predict runs/ladder/plan.json -o predictions/w96.json",),
        add_predict,
        run_predict,
    ),
    "scaling verdict": Command(
        "Hold a filed prediction against what came.",
        ("mm-gpt scaling verdict runs/ladder/plan.json predictions/w96.json --plot verdict.png",),
        add_verdict,
        run_verdict,
    ),
}
