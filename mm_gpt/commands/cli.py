"""The command line. Data goes to stdout, everything else to stderr; a user's mistake is one line.

Each file of this folder holds some commands; this one runs the right one and turns what it raises into exit codes.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Never

from mm_gpt import __version__
from mm_gpt.commands import align, ask, caption, corpus, models, pairs, rules, scaling, serve, train
from mm_gpt.commands.command import (
    EXIT_BROKEN_PIPE,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Command,
    UsageError,
    complain,
)
from mm_gpt.errors import MMGPTError, closest, unknown_name
from mm_gpt.hub.choice import chosen_model
from mm_gpt.system.processes import EXIT_TERMINATED, Terminated, sigterm_raises

COMMANDS: dict[str, Command] = {
    **ask.COMMANDS,
    **caption.COMMANDS,
    **train.COMMANDS,
    **align.COMMANDS,
    **rules.COMMANDS,
    **pairs.COMMANDS,
    **corpus.COMMANDS,
    **scaling.COMMANDS,
    **serve.COMMANDS,
    **models.COMMANDS,
}
GROUPS = {name.partition(" ")[0] for name in COMMANDS if " " in name}
"""First words of commands of two."""


@sigterm_raises()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Raises SystemExit for --help, --version and wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:  # `mm-gpt help ask`
        argv = [*argv[1:], "--help"]
    top = _top_parser()
    name = top.parse_args(argv[:1]).command
    rest = argv[1:]
    if name in GROUPS and rest and not rest[0].startswith("-"):
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in GROUPS:
        print("\n".join(f"mm-gpt {each}: {COMMANDS[each].about}" for each in COMMANDS if each.startswith(f"{name} ")))
        return 0 if rest else EXIT_USAGE
    if name not in COMMANDS:
        if os.path.exists(name):
            top.error(f"{name!r} is a file, not a command; like: mm-gpt ask {name} QUESTION")
        top.error(unknown_name("command", name, COMMANDS))
    command = COMMANDS[name]
    try:
        parser = _Parser(
            prog=f"mm-gpt {name}",
            usage=command.usage,
            description=command.about,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        # Intermixed, so that an option may stand between an image and its question.
        args, unknown = parser.parse_known_intermixed_args(rest)
        if unknown:
            parser.error(_unknown_arguments(parser, unknown))
        if getattr(args, "model", "") is None:
            args.model = chosen_model()
        logging.basicConfig(format="mm-gpt: %(message)s", stream=sys.stderr)
        try:
            code = command.run(args)
        except UsageError as error:
            parser.error(str(error))
        sys.stdout.flush()  # or a closed pipe would be noticed only after the last chance to catch it
        return code
    except MMGPTError as error:
        complain(error)
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        print(f"mm-gpt: {str(error) or 'stopped'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Terminated:
        print("mm-gpt: stopped", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"mm-gpt: error: {' '.join(message.split())}\n")


def _unknown_arguments(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    first = next((word for word in unknown if word.startswith("-")), unknown[0])
    name = first.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    close = closest(name, options) if name.startswith("-") else None
    return f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {close}?' if close else ''}"


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()]
    examples = [f"  {command.examples[0]}" for command in COMMANDS.values()]
    parser = _Parser(
        prog="mm-gpt",
        usage="mm-gpt COMMAND ...",
        description="A multimodal language model: images and text in, text out.",
        epilog="\n".join(
            ["commands:", *lines, "", "examples:", *examples, "", "`mm-gpt COMMAND --help` says more about one."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"mm-gpt {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    return parser
