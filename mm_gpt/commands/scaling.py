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
    from mm_gpt.scaling.ladder import LadderConfig, make_plan, table

    names = {field.name for field in dataclasses.fields(LadderConfig)}
    rules = {name: value for name, value in vars(args).items() if name in names and value is not None}
    config = LadderConfig(**rules, targets=args.target)
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
        runs = tuple(plan.run(name) for name in args.only.split(",") if name)
    else:
        runs = plan.of_role("target" if args.target else "rung")
    if not runs:
        raise UsageError("the plan has no target")
    logging.getLogger("mm_gpt").setLevel(logging.INFO)
    failed = train_runs(plan, args.plan.parent, runs, progress=sys.stderr.isatty())
    if failed:
        tell(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return EXIT_SOME_FAILED if failed else 0
