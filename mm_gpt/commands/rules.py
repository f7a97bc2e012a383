"""`mm-gpt rules`: rule-based rewards, fitted to answers of known classes, and answers graded by them."""

import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_gpt.commands.command import EXIT_SOME_FAILED, Command, UsageError, check_folder, check_inputs, tell
from mm_gpt.errors import MMGPTError

if TYPE_CHECKING:
    from mm_gpt.alignment.graders import GraderConfig
    from mm_gpt.datasets.comparisons import Comparison
    from mm_gpt.datasets.samples import ErrorCounter

FIT_OPTIONS: dict[str, tuple[type, str]] = {
    "margin": (float, "by how much the better answer is to be ahead (default: 1)"),
    "lr": (float, "of AdamW (default: 0.01)"),
    "iterations": (int, "steps of AdamW (default: 1000)"),
    "weight_decay": (float, "of AdamW (default: 0)"),
    "holdout": (float, "share of the prompts to judge the fit by (default: 0.05)"),
    "seed": (int, "of what is held out (default: 0)"),
}
"""Fields of FitConfig."""


def _add_grader(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--grader",
        required=required,
        metavar="SOURCE",
        help="who grades: a model's name or folder, the folder of a classifier, the URL of a server of OpenAI's "
        "protocol (its key is what MM_GPT_API_KEY says), or file.py:function",
    )
    parser.add_argument("--grader-model", default="", metavar="NAME", help="of a server (default: its first)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds a server may be silent (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _grader(args: argparse.Namespace) -> "GraderConfig":
    from mm_gpt.alignment.graders import GraderConfig

    return GraderConfig(source=_absolute(args.grader), model=args.grader_model, timeout_s=args.timeout)


def _absolute(source: str) -> str:
    """Files and folders by their whole path: what is written is used from other folders as well."""
    place, colon, name = source.rpartition(":")
    if colon and place.endswith(".py"):
        return f"{os.path.abspath(place)}:{name}"
    return os.path.abspath(source) if os.path.exists(source) else source


def add_fit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fit a rule-based reward to answers of which it is known what they are.\n"
        "GOLD has rows of a prompt and a completion, with the columns response_type (hard_refuse,\n"
        "safe_refuse, comply or your own) and propositions ({name: true or false}) or class. The grader\n"
        "judges each answer; the weights of what it says put better classes above worse ones, on top of\n"
        "the reward model. FOLDER is then a --reward of its own. What the fit and the grader are worth\n"
        "is printed, and kept in FOLDER/weights.json."
    )
    parser.add_argument("gold", metavar="GOLD", help="a file or folder of graded answers")
    _add_grader(parser, required=True)
    parser.add_argument("--rules", type=Path, metavar="FILE", help="default: what `mm-gpt rules show` prints")
    parser.add_argument(
        "--form", choices=("propositions", "rubric"), help="of the rules (default: the first they have)"
    )
    parser.add_argument("--reward-model", metavar="SOURCE", help="that it is added to (default: none)")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    group = parser.add_argument_group("fit")
    for name, (kind, about) in FIT_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=about)


def run_fit(args: argparse.Namespace) -> int:
    check_inputs([args.gold])
    check_folder(args.out)
    from mm_gpt.alignment.graders import load_grader
    from mm_gpt.alignment.rewards import RewardConfig, Rewards
    from mm_gpt.alignment.rule_fitting import FitConfig, fit_rules, read_gold
    from mm_gpt.alignment.rule_reward import FittedRules, checksum, save_rule_reward
    from mm_gpt.alignment.rules import DEFAULT_RULES, load_rules
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.model.mmgpt import pick_device

    given = {name: getattr(args, name) for name in FIT_OPTIONS}
    config = FitConfig(**{name: value for name, value in given.items() if value is not None})
    rules = load_rules(args.rules or DEFAULT_RULES)
    form = args.form or rules.forms[0]
    if form not in rules.forms:
        raise MMGPTError(f"{args.rules or DEFAULT_RULES}: has no {form}, only {' and '.join(rules.forms)}")
    beside = _absolute(args.reward_model) if args.reward_model else ""
    digest = checksum(beside) if beside else ""
    grader_config, errors = _grader(args), ErrorCounter()
    gold = read_gold(_opened(args.gold, errors), rules, form, errors)
    if not gold:
        raise MMGPTError(f"{args.gold}: no usable rows ({errors.summary()})")
    base: list[float | None] = [0.0] * len(gold)
    if beside:
        model = Rewards([RewardConfig(source=beside)], device=pick_device(args.device))
        scored = model([each.comparison for each in gold], [each.answer for each in gold]).total.tolist()
        base = [None if math.isnan(value) else value for value in scored]
    grader = load_grader(grader_config, device=args.device)
    weights, report = fit_rules(gold, rules, form, grader, base, errors, config)
    fitted = FittedRules(
        form=form, grader=grader_config, weights=weights, beside=beside, checksum=digest, report=report
    )
    save_rule_reward(rules, fitted, args.out)
    for response_type, own in report["response types"].items():
        print(f"{response_type}: " + ", ".join(f"{name} {_written(value)}" for name, value in own.items()))
    _print_grader(report["grader"])
    return _skipped(errors, grader.errors)


def add_grade(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Grade answers by rules, as JSON lines: their class, the probability of each class and of each\n"
        "proposition, and with a fitted reward the reward. ROWS are prompts with completions and the\n"
        "column response_type. Where they say what their answers are, as gold rows do, the grader is held\n"
        "against it at the end."
    )
    parser.add_argument("rows", metavar="ROWS", help="a file or folder of answers")
    _add_grader(parser, required=False)
    parser.add_argument("--rules", type=Path, metavar="FILE", help="a rule set, or the folder of a fitted reward")
    parser.add_argument(
        "--form", choices=("propositions", "rubric"), help="of the rules (default: the first they have)"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: standard output")


def run_grade(args: argparse.Namespace) -> int:
    is_fitted = args.rules is not None and args.rules.is_dir()
    if args.grader is None and not is_fitted:
        raise UsageError("name a --grader, or a fitted reward by --rules")
    check_inputs([args.rows])
    if args.out is not None:
        check_folder(args.out.absolute().parent)
    from mm_gpt.alignment.graders import load_grader
    from mm_gpt.alignment.rule_fitting import grader_report, read_gold
    from mm_gpt.alignment.rule_reward import load_rule_reward
    from mm_gpt.alignment.rules import DEFAULT_RULES, RESPONSE_TYPE, grade_answers, load_rules
    from mm_gpt.datasets.samples import ErrorCounter

    grader = load_grader(_grader(args), device=args.device) if args.grader else None
    reward = load_rule_reward(args.rules, device=args.device, grader=grader) if is_fitted else None
    rules = load_rules(args.rules or DEFAULT_RULES) if reward is None else reward.rules
    form = args.form or (rules.forms[0] if reward is None else reward.fitted.form)
    if form not in rules.forms or (reward is not None and form != reward.fitted.form):
        raise MMGPTError(f"{args.rules or DEFAULT_RULES}: has no {form}")
    grader = grader or (reward.grader if reward is not None else None)
    assert grader is not None
    errors = ErrorCounter()
    rows = _opened(args.rows, errors)
    asked, untyped = [], Counter[str]()
    for row in rows:
        response_type = rules.response_type(form, row.columns.get(RESPONSE_TYPE))
        if response_type is None:
            errors.add(f"unknown {RESPONSE_TYPE} {row.columns.get(RESPONSE_TYPE)!r:.60}", row.key)
            continue
        asked += [(row, completion.text, response_type) for completion in row.completions]
    grades = grade_answers(rules, form, grader, asked)
    lines = []
    for (row, answer, response_type), own in zip(asked, grades, strict=True):
        line: dict[str, Any] = {"id": row.key, "answer": answer, RESPONSE_TYPE: response_type, "class": None}
        features = rules.features(form, response_type, own)
        if features is not None:
            classes = {name: features[f"class:{name}"] for name in rules.classes(form, response_type)}
            line |= {"class": max(classes, key=lambda name: classes[name]), "classes": classes}
            line["propositions"] = {name: value for name, value in features.items() if ":" not in name}
            if reward is not None and response_type in reward.fitted.weights:
                line["reward"] = reward.weighted(response_type, features)
        untyped[f"{response_type}: {line['class'] or 'not graded'}"] += 1
        lines.append(json.dumps(line, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    if args.out is None:
        print(text, end="")
    else:
        from mm_gpt.system.writing import write_text

        write_text(args.out, text)
    for name, count in sorted(untyped.items()):
        tell(f"{name}: {count}")
    gold = read_gold(rows, rules, form, ErrorCounter(max_examples=0))
    if gold:
        places = {id(row): number for number, (row, *_) in enumerate(asked)}
        _print_grader(
            grader_report(gold, rules, form, [grades[places[id(each.comparison)]] for each in gold]), sys.stderr
        )
    return _skipped(errors, grader.errors)


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", type=Path, metavar="FILE", help="read FILE instead, and print it if it is right")


def run_show(args: argparse.Namespace) -> int:
    from mm_gpt.alignment.rules import DEFAULT_RULES, load_rules

    path = args.check or DEFAULT_RULES
    load_rules(path)
    print(path.read_text(encoding="utf-8"), end="")
    return 0


def _opened(location: str, errors: "ErrorCounter") -> "list[Comparison]":
    """The rows that can be read."""
    from mm_gpt.datasets.comparisons import Comparisons
    from mm_gpt.datasets.loading.sources import SourceConfig
    from mm_gpt.datasets.samples import BadRecordError

    rows = Comparisons.open([SourceConfig(path=location)], Path(), errors)
    found = []
    for number in range(len(rows)):
        try:
            found.append(rows[number])
        except (BadRecordError, MMGPTError) as error:
            errors.add(str(error), f"{location}: {number}")
    return found


def _print_grader(report: dict[str, Any], file: Any = None) -> None:
    for name, own in report.items():
        told = ", ".join(f"{key} {_written(value)}" for key, value in own.items() if value != 0 or key == "accuracy")
        print(f"grader, {name}: {told}", file=file)


def _written(value: Any) -> str:
    return "unknown" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _skipped(*counters: "ErrorCounter") -> int:
    for counter in counters:
        if counter.total:
            tell(counter.summary())
    return EXIT_SOME_FAILED if any(counter.total for counter in counters) else 0


COMMANDS = {
    "rules fit": Command(
        "Fit a rule-based reward to answers of known classes.",
        (
            "mm-gpt rules fit gold.jsonl --grader smolvlm --reward-model runs/reward/best --out runs/rules",
            "mm-gpt rules fit gold.jsonl --grader http://localhost:8000 --rules mine.json --out runs/rules",
            "mm-gpt rules fit gold.jsonl --grader judge.py:grade --form rubric --holdout 0.2 --out runs/rules",
        ),
        add_fit,
        run_fit,
        usage="mm-gpt rules fit [options] GOLD --grader SOURCE --out FOLDER",
    ),
    "rules grade": Command(
        "Grade answers by rules.",
        (
            "mm-gpt rules grade answers.jsonl --rules runs/rules -o grades.jsonl",
            "mm-gpt rules grade gold.jsonl --grader http://localhost:8000 --form rubric",
        ),
        add_grade,
        run_grade,
        usage="mm-gpt rules grade [options] ROWS",
    ),
    "rules show": Command(
        "Print the rules of refusals, to be changed.",
        ("mm-gpt rules show", "mm-gpt rules show --check mine.json"),
        add_show,
        run_show,
    ),
}
