"""`mm-gpt ask` and `mm-gpt chat`: one question about images, or a talk about them."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mm_gpt.commands.command import (
    EXIT_ERROR,
    Command,
    UsageError,
    add_generation,
    add_model,
    complain,
    generation_options,
    load_assistant,
    tell,
)
from mm_gpt.errors import MMGPTError, unknown_name

if TYPE_CHECKING:
    from mm_gpt.document import Message

STDIN = "-"


def add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="IMAGE ... QUESTION",
        help="files or URLs, then the question; - is standard input: the bytes of an image, or the question's text",
    )
    add_model(parser)
    add_generation(parser, beams=1, tokens=128)
    parser.add_argument("--json", action="store_true", help="print an object: answer, tokens, concepts, options")


def run_ask(args: argparse.Namespace) -> int:
    from mm_gpt.document import check_text
    from mm_gpt.images import load_image

    *sources, question = args.words
    _check_words(sources, question)
    if question == STDIN:
        question = _stdin_text()
    if not question.strip():
        raise UsageError("the question is empty")
    check_text(question, "the question")
    # Before the model, so that a wrong path is known at once
    images = [stdin_image() if source == STDIN else load_image(source) for source in sources]
    options = generation_options(args)
    from mm_gpt.inference.hints import Hints

    assistant = load_assistant(args)
    turn = _user(images, question)
    tell(Hints(args.model).about(question, len(images)))
    if args.json:
        answer = assistant.chat([turn], **options)
        fields = ("prompt_tokens", "image_tokens", "completion_tokens", "finish_reason")
        values = {"answer": answer.text} | {name: getattr(answer, name) for name in fields}
        if assistant.model.concepts is not None:
            values["concepts"] = [dict(assistant.concepts(image)) for image in images]
        values["generation"] = dataclasses.asdict(answer.generation)
        print(json.dumps(values, ensure_ascii=False))
    elif sys.stdout.isatty() and options.get("num_beams", 1) == 1:
        print_stream(assistant.chat([turn], stream=True, **options))
    else:
        print(assistant.chat([turn], **options))
    return 0


def _check_words(sources: Sequence[str], question: str) -> None:
    """Raises UsageError for a question that stands first or is missing, MMGPTError for a folder."""
    if [*sources, question].count(STDIN) > 1:
        raise UsageError("standard input can be read once: give one -")
    if question != STDIN and is_image(question):
        asked = next((source for source in sources if not is_image(source)), None)
        if asked is not None:
            raise UsageError(f"the question comes last, after the images: mm-gpt ask {question} {asked!r}")
        raise UsageError(f"the question is missing after {question}")
    for source in sources:
        if os.path.isdir(source):
            raise MMGPTError(f"{source}: is a folder; ask takes image files, and mm-gpt caption whole folders")


def is_image(word: str) -> bool:
    """Whether a word can only be meant as an image: a file, a folder, a URL, `-`, or a file's name."""
    from mm_gpt.images import is_url

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
    is_name = word.lower().endswith(suffixes) and not any(c.isspace() for c in word)
    return word == STDIN or is_url(word) or is_name or _exists(word)


def _exists(word: str) -> bool:
    try:
        return os.path.exists(word)
    except ValueError:  # a NUL
        return False


def stdin_image() -> Any:
    from mm_gpt.errors import ImageError
    from mm_gpt.images import DEFAULT_LIMITS, load_image

    if sys.stdin.isatty():
        raise UsageError("- reads an image from standard input, which is a terminal: mm-gpt ask - QUESTION < photo.jpg")
    data = sys.stdin.buffer.read(DEFAULT_LIMITS.max_bytes + 1)
    try:
        return load_image(data)
    except ImageError as error:
        raise ImageError(f"standard input: {error}") from error


def _stdin_text() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise MMGPTError(f"standard input: the question is no {error.encoding} text ({error.reason})") from None


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="shown with the first question")
    add_model(parser)
    add_generation(parser, beams=None, tokens=128)


CHAT_COMMANDS = ("/image", "/reset", "/quit")


def run_chat(args: argparse.Namespace) -> int:
    from mm_gpt.document import check_text
    from mm_gpt.images import load_image

    if STDIN in args.images:
        raise UsageError("chat reads its questions from standard input, so - cannot be an image")
    images: list[Any] = [load_image(source) for source in args.images]
    options = generation_options(args)
    from mm_gpt.inference.hints import Hints

    assistant = load_assistant(args)
    talk, hints, shown = assistant.conversation(**options), Hints(args.model), 0
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401 (gives input() its history and editing)

        print("/image PATH shows an image, /reset forgets everything, /quit ends", file=sys.stderr)
    failed = False
    while (line := _read_line(is_terminal)) is not None:
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command == "/quit":
                break
            if command == "/reset":
                talk, images, shown = assistant.conversation(**options), [], 0
            elif command == "/image":
                images.append(load_image(rest.strip()))
            elif command.startswith("/"):
                raise MMGPTError(unknown_name("chat command", command, CHAT_COMMANDS))
            else:
                check_text(line, "the question")
                shown += len(images)
                tell(hints.about(line, shown))
                try:
                    with closing(talk.stream(_user(images, line)["content"])) as stream:
                        print_stream(stream)
                except KeyboardInterrupt:  # ends this answer, not the chat; what there is of it stays
                    print("\n(stopped)", file=sys.stderr)
                images = []
        except MMGPTError as error:
            complain(error)
            failed = True
    return EXIT_ERROR if failed and not is_terminal else 0


def _read_line(is_terminal: bool) -> str | None:
    """The next line without surrounding blanks; None at the end of input."""
    if is_terminal:
        try:
            return input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return None
    return line.strip() if (line := sys.stdin.readline()) else None


def _user(images: Sequence[Any], text: str) -> "Message":
    from mm_gpt.document import Image

    return {"role": "user", "content": [*map(Image, images), text]}


def print_stream(stream: Iterator[str]) -> None:
    """Print an answer as it is generated."""
    started = False
    for piece in stream:
        text = piece if started else piece.lstrip()
        started = started or bool(text)
        print(text, end="", flush=True)
    print(flush=True)


COMMANDS = {
    "ask": Command(
        "Ask a question about images, or about none.",
        (
            'mm-gpt ask photo.jpg "What is the dog doing?"',
            'mm-gpt ask before.jpg after.jpg "What has changed?" --json',
            'mm-gpt ask https://example.org/cat.jpg "Describe it." --temperature 0.7 --seed 1',
            'mm-gpt ask photo.jpg -- "-5 degrees, really?"',
            'mm-gpt ask - "What is it?" < photo.jpg',
        ),
        add_ask,
        run_ask,
        usage="mm-gpt ask [options] [IMAGE ...] QUESTION",
    ),
    "chat": Command(
        "Talk about images, turn by turn.",
        ("mm-gpt chat photo.jpg", "printf '/image photo.jpg\\nWho is this?\\nWhere?\\n' | mm-gpt chat"),
        add_chat,
        run_chat,
    ),
}
