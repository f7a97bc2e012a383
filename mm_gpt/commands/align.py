"""The commands of alignment, but for training itself: answers judged, and the best of several kept."""

import argparse
import math
import sys
from pathlib import Path

from mm_gpt.commands.command import (
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    Command,
    UsageError,
    add_model,
    check_folder,
    check_inputs,
    load_assistant,
    positive,
)
from mm_gpt.errors import MMGPTError


def add_best_of(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sample several answers to each prompt, judge them, keep the best.\n"
        "FILE gets the prompts with their best answers, as data for `mm-gpt train finetune`, or with\n"
        "--pairs the best and the worst, for `mm-gpt train reward` and `dpo`. All samples and their\n"
        "rewards are in FILE.samples.jsonl: a run that was stopped or killed continues with the same\n"
        "command. Answers that were cut off at --max-new-tokens are never kept.\n\n"
        "Exit codes: 0 done, 1 the run failed, 2 wrong usage, 3 done, but some prompts were skipped,\n"
        "130 stopped by Ctrl-C or SIGTERM."
    )
    parser.add_argument("prompts", metavar="PROMPTS", help="a file or folder of prompts, with or without answers")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="SOURCE[=WEIGHT]",
        help="file.py:function, the folder of a reward model, or exact_match, boxed_match, think_format; repeatable",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON lines in TRL's layout")
    parser.add_argument("-n", "--n", type=positive, default=8, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--keep-above", type=float, metavar="X", help="only prompts whose best reward is above X")
    parser.add_argument("--pairs", action="store_true", help="write the best and the worst answer of each prompt")
    parser.add_argument("--overwrite", action="store_true", help="sample anew instead of continuing")
    add_model(parser)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest of this total")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end answers before TEXT; repeatable"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run_best_of(args: argparse.Namespace) -> int:
    if args.out.suffix != ".jsonl":
        raise UsageError(f"--out {args.out}: what is written is .jsonl")
    if args.keep_above is not None and not math.isfinite(args.keep_above):
        raise UsageError(f"--keep-above {args.keep_above} is no number")
    check_inputs([args.prompts])
    check_folder(args.out.parent)
    sources = [_weighted(text) for text in args.reward]
    from mm_gpt.alignment.best_of import best_of_n
    from mm_gpt.alignment.rewards import RewardConfig, Rewards
    from mm_gpt.datasets.comparisons import Comparisons
    from mm_gpt.datasets.loading.sources import SourceConfig
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.inference.generation import GenerationConfig
    from mm_gpt.model.mmgpt import pick_device

    names = ("n", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
    generation = GenerationConfig(**{name: getattr(args, name) for name in names}, stop=tuple(args.stop))
    errors = ErrorCounter()
    comparisons = Comparisons.open([SourceConfig(path=args.prompts)], Path(), errors)
    configs = [RewardConfig(source=source, weight=weight) for source, weight in sources]
    rewards = Rewards(configs, device=pick_device(args.device))
    assistant = load_assistant(args, many=True)
    summary = best_of_n(
        assistant.engine,
        comparisons,
        rewards,
        generation,
        args.out,
        about={"model": str(args.model), "dtype": args.dtype, "rewards": [list(each) for each in sources]},
        keep_above=args.keep_above,
        pairs=args.pairs,
        overwrite=args.overwrite,
    )
    for line in summary.lines():
        print(line)
    for told in (errors.summary() if errors.total else "", summary.errors if summary.skipped else ""):
        if told:
            print(f"mm-gpt: {told}", file=sys.stderr)
    if summary.stopped:
        again = " without --overwrite" if args.overwrite else ""
        print(f"mm-gpt: stopped; the same command{again} continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if summary.skipped or errors.total else 0


def _weighted(text: str) -> tuple[str, float]:
    """`SOURCE` or `SOURCE=WEIGHT`."""
    source, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        raise MMGPTError(f"--reward {text}: {weight!r} is no number") from None


COMMANDS = {
    "best-of": Command(
        "Keep the best of several answers to each prompt.",
        (
            "mm-gpt best-of prompts.jsonl --reward judge.py:score -o best.jsonl -n 8",
            "mm-gpt best-of prompts.jsonl --reward runs/reward/best --keep-above 0.5 -o best.jsonl",
            "mm-gpt best-of prompts.jsonl --reward runs/reward/best --reward exact_match=0.5 --pairs -o pairs.jsonl",
        ),
        add_best_of,
        run_best_of,
        usage="mm-gpt best-of [options] PROMPTS --reward SOURCE -o FILE",
    ),
}
