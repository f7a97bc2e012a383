"""What the commands share: how one is described, the options of models and answers, exit codes, cheap checks.

Nothing heavy is imported before a command runs. A command is one line about it, examples, a function that adds its
arguments to a parser, and a function that runs it.
"""

import argparse
import gc
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_gpt.errors import MMGPTError

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant, GenerationOptions
    from mm_gpt.inference.constraints import Constraint

EXIT_ERROR, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 3, 130, 141


class UsageError(Exception):
    """The command line itself is wrong, in a way that argparse cannot see."""


@dataclass(frozen=True)
class Command:
    about: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    usage: str | None = None


def complain(error: Exception) -> None:
    print(f"mm-gpt: error: {' '.join(str(error).split())}", file=sys.stderr)


def tell(line: str | None) -> None:
    if line is not None:
        print(line, file=sys.stderr)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        help="a model's name or folder (default: MM_GPT_MODEL, your setting, `default`)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, int8 or int4 (default: %(default)s)")


def add_generation(parser: argparse.ArgumentParser, *, beams: int | None, tokens: int) -> None:
    """`beams` is the default to tell; None where answers are always streamed, which beam search cannot."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", "--max-tokens", type=int, metavar="N", help=f"longest answer (default: {tokens})"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="above 0 samples (default: 0)")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this total")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    if beams is not None:
        group.add_argument("--num-beams", type=int, metavar="N", help=f"beam search (default: {beams})")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens with P of the likeliest one's share"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens that were there less likely"
    )
    group.add_argument("--presence-penalty", type=float, metavar="P", help="taken from tokens that the answer has")
    group.add_argument("--frequency-penalty", type=float, metavar="P", help="taken as often as the answer has them")
    group.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row come twice; 0 lets them"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON of this schema")
    form.add_argument("--json-object", action="store_true", help="the answer is a JSON object")
    form.add_argument("--regex", metavar="PATTERN", help="the answer matches this as a whole")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; repeatable")


_OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "num_beams",
    "no_repeat_ngram_size",
    "seed",
    "stop",
)


def generation_options(args: argparse.Namespace) -> "GenerationOptions":
    """The options that were given, checked before a model is loaded."""
    with nothing_collected():
        from mm_gpt.inference.assistant import generation_config

    options: Any = {name: value for name in _OPTIONS if (value := getattr(args, name, None)) is not None}
    if (constraint := _constraint(args)) is not None:
        options["constraint"] = constraint
    generation_config(options)
    return options


def _constraint(args: argparse.Namespace) -> "Constraint | None":
    """The form that is asked for. Raises MMGPTError naming a schema file that cannot be read."""
    from mm_gpt.inference.constraints import Constraint

    if (path := args.json_schema) is not None:
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise MMGPTError(f"{path}: not readable as JSON ({reason})") from None
        return Constraint(json_schema=schema)
    if args.regex is not None:
        return Constraint(regex=args.regex)
    if args.choice:
        return Constraint(choices=tuple(args.choice))
    return Constraint(json_object=True) if args.json_object else None


@contextmanager
def nothing_collected() -> Iterator[None]:
    """While modules are imported and a model is loaded: none of that is garbage, and to search there for some takes a
    fifth of the time. What was imported is not searched later either."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def load_assistant(args: argparse.Namespace, *, many: bool = False) -> "Assistant":
    """The model that the options of `add_model` name. `many`: for rows side by side, for which `auto` is bf16 with the
    packaged model: it takes two thirds of the time of int8 there, and twice the memory."""
    with nothing_collected():
        import mm_gpt
        from mm_gpt.model.packed import multiplies_bf16

        is_packaged = args.model == "default" and args.dtype == "auto"
        dtype = "bf16" if many and is_packaged and multiplies_bf16() else args.dtype
        return mm_gpt.load(args.model, device=args.device, dtype=dtype)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def check_inputs(locations: Sequence[str]) -> None:
    """Raises MMGPTError for a path that leads nowhere; URLs and globs are left to who reads them."""
    for location in locations:
        if "://" not in location and not glob.has_magic(location) and not os.path.lexists(location):
            raise MMGPTError(f"{location}: no such file or folder")


def check_folder(folder: Path) -> None:
    """Raises MMGPTError where `folder` cannot be made or written into: before hours of work, not after them."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise MMGPTError(f"{folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise MMGPTError(f"{folder}: no permission to write into {place}")
