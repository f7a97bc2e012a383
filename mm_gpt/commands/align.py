"""The commands of alignment, but for training itself: answers judged, and the best of several kept."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_gpt.commands.ask import STDIN, is_image, stdin_image
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


def add_reward(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score answers with a reward model, best first; or, with --comparisons, measure the model on\n"
        "prompts with preferred answers: accuracy, what length alone explains, and how often it is still\n"
        "right when each prompt has the images of another.\n\n"
        "Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 done, but some comparisons were skipped."
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="IMAGE ... PROMPT ANSWER ...",
        help="files or URLs, then the prompt, then the answers to it; - is standard input: the bytes of an image",
    )
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="of a reward model, or of its run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--comparisons", metavar="PATH", help="a file or folder of comparisons to be measured on")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FOLDER", help="with --comparisons: for the report and its plot"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of text")


def run_reward(args: argparse.Namespace) -> int:
    if args.comparisons is not None:
        return _reward_report(args)
    if args.out is not None:
        raise UsageError("--out is for the report about --comparisons")
    images, prompt, answers = _reward_words(args.words)
    from mm_gpt.alignment.reward_model import ModelReward
    from mm_gpt.datasets.comparisons import Comparison
    from mm_gpt.document import Image, check_text
    from mm_gpt.images import load_image
    from mm_gpt.model.mmgpt import pick_device

    for text in (prompt, *answers):
        check_text(text, "the prompt" if text is prompt else "an answer")
    content = [*(Image(stdin_image() if image == STDIN else load_image(image)) for image in images), prompt]
    reward = ModelReward(args.model, device=pick_device(args.device))
    comparison = Comparison("the answer", ({"role": "user", "content": content},))
    scores = reward([comparison] * len(answers), answers)
    if None in scores:
        raise MMGPTError(reward.errors.summary())
    found = sorted(zip(answers, scores, strict=True), key=lambda pair: -(pair[1] or 0.0))
    if args.json:
        rows = [{"answer": answer, "score": score} for answer, score in found]
        print(json.dumps({"model": reward.name, "prompt": prompt, "answers": rows}, ensure_ascii=False))
    elif len(found) == 1:
        print(f"{found[0][1]:.4f}")
    else:
        for answer, score in found:
            print(f"{score:9.4f}  {' '.join(answer.split())}")
    return 0


def _reward_words(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Images, the prompt and the answers. Raises UsageError where one of them is missing."""
    first = next((at for at, word in enumerate(words) if not is_image(word)), len(words))
    images, texts = list(words[:first]), list(words[first:])
    if len(texts) < 2:
        what = "the prompt and its answers are" if not texts else f"an answer is missing after {texts[0]!r}: they are"
        raise UsageError(f"{what} to follow the images: mm-gpt reward photo.jpg PROMPT ANSWER")
    if late := [text for text in texts if Path(text).suffix and is_image(text) and "://" not in text]:
        raise UsageError(f"{late[0]} comes after {texts[0]!r}: images are to stand before the prompt")
    if images.count(STDIN) > 1:
        raise UsageError("standard input can be read once: give one -")
    if not texts[0].strip():
        raise UsageError("the prompt is empty")
    return images, texts[0], texts[1:]


def _reward_report(args: argparse.Namespace) -> int:
    if args.words:
        raise UsageError("give either a prompt with answers or --comparisons")
    check_inputs([args.comparisons])
    if args.out is not None:
        check_folder(args.out)
    from mm_gpt.alignment.reward_model import load_reward_model
    from mm_gpt.alignment.reward_report import describe, judge, write_report
    from mm_gpt.datasets.comparisons import Comparisons
    from mm_gpt.datasets.loading.sources import SourceConfig
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.model.mmgpt import pick_device
    from mm_gpt.system.writing import naming

    errors = ErrorCounter()
    model, processor = load_reward_model(args.model)
    comparisons = Comparisons.open([SourceConfig(path=args.comparisons)], Path(), errors)
    report, judged = judge(model.to(pick_device(args.device)), processor, comparisons, errors)
    if args.out is not None:
        with naming(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        write_report(report, judged, args.out)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print("\n".join(describe(report)))
    if errors.total:
        print(f"mm-gpt: {errors.summary()}", file=sys.stderr)
    return EXIT_SOME_FAILED if errors.total else 0


def add_best_of(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sample several answers to each prompt, judge them, keep the best.\n"
        "FILE gets the prompts with their best answers, as data for `mm-gpt train sft`, or with\n"
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
    "reward": Command(
        "Score answers with a reward model, or measure it.",
        (
            'mm-gpt reward photo.jpg "What is the dog doing?" "It sleeps." -m runs/reward/best',
            'mm-gpt reward photo.jpg "Describe it." "A dog." "A brown dog on a sofa." -m runs/reward --json',
            "mm-gpt reward --comparisons held_out.jsonl -m runs/reward/best -o report",
        ),
        add_reward,
        run_reward,
        usage="mm-gpt reward [options] [IMAGE ...] PROMPT ANSWER ... -m FOLDER",
    ),
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
