"""`mm-gpt train` and `mm-gpt eval`: make a model, and measure one."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from mm_gpt.commands.command import Command, UsageError, check_folder, check_inputs
from mm_gpt.errors import MMGPTError


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="its name, or a preset's; --list shows all")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, like train.lr=1e-4")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    parser.add_argument("--data", type=Path, default=Path("."), metavar="FOLDER", help="of the sources (default: .)")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")


def run_train(args: argparse.Namespace) -> int:
    if args.recipe is None and not args.list:
        raise UsageError("name a recipe, or --list them")
    from mm_gpt.config import override
    from mm_gpt.model.presets import PRESETS
    from mm_gpt.training.recipes import RECIPES, recipe, run_recipe

    if args.list:
        width = max(map(len, [*RECIPES, *PRESETS]))
        for name, recipe_of in RECIPES.items():
            print(f"{name:{width}}  {(recipe_of.__doc__ or '').partition(chr(10))[0]}")
        for name, preset in PRESETS.items():
            print(f"{name:{width}}  {preset.about}")
        return 0
    if not args.data.is_dir():
        raise MMGPTError(f"{args.data}: no such folder")
    chosen: Any = override(recipe(args.recipe, str(args.data)), args.overrides)
    out = args.out or Path("runs") / args.recipe
    check_folder(out)
    logging.getLogger("mm_gpt").setLevel(logging.INFO)
    run_recipe(chosen, out, resume=args.resume, progress=sys.stderr.isatty())
    return 0


def add_eval(parser: argparse.ArgumentParser) -> None:
    from mm_gpt.eval.harness import add_arguments

    add_arguments(parser)


def run_eval(args: argparse.Namespace) -> int:
    from mm_gpt.eval.harness import run

    check_inputs([*args.data, *([args.contamination] if args.contamination else [])])
    check_folder(args.output.parent)
    return run(args)


COMMANDS = {
    "train": Command(
        "Train a model by a recipe.",
        (
            "mm-gpt train tiny --data pictures/ --out runs/tiny",
            "mm-gpt train --list",
            "mm-gpt train tiny --data pictures/ --out runs/tiny --resume",
            "mm-gpt train finetune --data my-photos/ train.steps=500 train.lr=1e-4",
            "mm-gpt train finetune --data my-photos/ start=HuggingFaceTB/SmolVLM-256M-Instruct",
            "mm-gpt train gpt2-small --data texts/ row_length=256 rows=8",
        ),
        add_train,
        run_train,
        usage="mm-gpt train [options] RECIPE [KEY=VALUE ...]",
    ),
    "eval": Command(
        "Measure a model on captions, questions or text.",
        ("mm-gpt eval --task captioning --data flickr8k/test.tar", "mm-gpt eval --task vqa --data vqa/ --limit 500"),
        add_eval,
        run_eval,
    ),
}
