"""The command line. Data goes to stdout, everything else to stderr; a user's mistake is one line.

Nothing heavy is imported before a command runs. A command is its name, one line about it, a function that adds its
arguments to a parser, and a function that runs it.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from mm_gpt import __version__
from mm_gpt.commands import corpus as corpus_commands
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.templates.prompts import CAPTION_PROMPT

if TYPE_CHECKING:
    from mm_gpt.document import Message
    from mm_gpt.inference.assistant import Assistant, GenerationOptions

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Raises SystemExit for --help, --version and wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    top = _top_parser()
    name = top.parse_args(argv[:1]).command
    rest = argv[1:]
    if name == "corpus" and rest and not rest[0].startswith("-"):  # a group of commands
        name, rest = f"corpus {rest[0]}", rest[1:]
    if name == "corpus":
        print("\n".join(f"mm-gpt {each}: {COMMANDS[each].about}" for each in COMMANDS if each.startswith("corpus ")))
        return 0 if rest else EXIT_USAGE
    if name not in COMMANDS:
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
        args = parser.parse_intermixed_args(rest)
        logging.basicConfig(format="mm-gpt: %(message)s", stream=sys.stderr)
        try:
            code = command.run(args)
        except UsageError as error:
            parser.error(str(error))
        sys.stdout.flush()  # or a closed pipe would be noticed only after the last chance to catch it
        return code
    except MMGPTError as error:
        _complain(error)
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        print(f"mm-gpt: {str(error) or 'stopped'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"mm-gpt: error: {message}\n")


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
    parser.add_argument("--version", action="version", version=f"mm-gpt {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    return parser


def _complain(error: Exception) -> None:
    print(f"mm-gpt: error: {' '.join(str(error).split())}", file=sys.stderr)


# ---- Options that commands share ----


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="a model's name or folder (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _add_generation(parser: argparse.ArgumentParser, *, beams: int | None, tokens: int) -> None:
    """`beams` is the default to tell; None where answers are always streamed, which beam search cannot."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=f"longest answer (default: {tokens})")
    group.add_argument("--temperature", type=float, metavar="T", help="above 0 samples (default: 0)")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this total")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    if beams is not None:
        group.add_argument("--num-beams", type=int, metavar="N", help=f"beam search (default: {beams})")
    group.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row come twice; 0 lets them"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable")


def _generation_options(args: argparse.Namespace) -> "GenerationOptions":
    """The options that were given, checked before a model is loaded."""
    from mm_gpt.inference.assistant import generation_config

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "no_repeat_ngram_size", "seed", "stop")
    options: Any = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    generation_config(options)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


# ---- ask and chat ----


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="IMAGE ... QUESTION", help="files or URLs, then the question")
    _add_model(parser)
    _add_generation(parser, beams=1, tokens=128)
    parser.add_argument("--json", action="store_true", help="print an object with the answer and its token counts")


def _run_ask(args: argparse.Namespace) -> int:
    from mm_gpt.images import load_image

    *sources, question = args.words
    if not question.strip():
        raise UsageError("the question is empty")
    if not sources and os.path.isfile(question):
        raise UsageError(f"the question is missing after {question}")
    images = [load_image(source) for source in sources]  # before the model, so that a wrong path is known at once
    options = _generation_options(args)

    import mm_gpt

    assistant = mm_gpt.load(args.model, device=args.device)
    turn = _user(images, question)
    if args.json:
        answer = assistant.chat([turn], **options)
        fields = ("prompt_tokens", "image_tokens", "completion_tokens", "finish_reason")
        values = {"answer": answer.text} | {name: getattr(answer, name) for name in fields}
        print(json.dumps(values, ensure_ascii=False))
    elif sys.stdout.isatty() and options.get("num_beams", 1) == 1:
        _print_stream(assistant.chat([turn], stream=True, **options))
    else:
        print(assistant.chat([turn], **options))
    return 0


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="shown with the first question")
    _add_model(parser)
    _add_generation(parser, beams=None, tokens=128)


CHAT_COMMANDS = ("/image", "/reset", "/quit")


def _run_chat(args: argparse.Namespace) -> int:
    from mm_gpt.images import load_image

    images: list[Any] = [load_image(source) for source in args.images]
    options = _generation_options(args)

    import mm_gpt

    assistant = mm_gpt.load(args.model, device=args.device)
    talk = assistant.conversation(**options)
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
                talk, images = assistant.conversation(**options), []
            elif command == "/image":
                images.append(load_image(rest.strip()))
            elif command.startswith("/"):
                raise MMGPTError(unknown_name("chat command", command, CHAT_COMMANDS))
            else:
                try:
                    with closing(talk.stream(_user(images, line)["content"])) as stream:
                        _print_stream(stream)
                except KeyboardInterrupt:  # ends this answer, not the chat; what there is of it stays
                    print("\n(stopped)", file=sys.stderr)
                images = []
        except MMGPTError as error:
            _complain(error)
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


def _print_stream(stream: Iterator[str]) -> None:
    """Print an answer as it is generated."""
    started = False
    for piece in stream:
        text = piece if started else piece.lstrip()
        started = started or bool(text)
        print(text, end="", flush=True)
    print(flush=True)


# ---- caption ----


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Caption many images. Each becomes a line with `image` and `caption` or `error`.\n"
        "Lines are on the disk after each batch: a run that was stopped or killed continues\n"
        "with the same command, and no image is done twice. Files that are no images are\n"
        "left out and counted at the end.\n\n"
        "Exit codes: 0 all images have captions, 1 the run failed, 2 wrong usage,\n"
        "3 complete, but some lines hold an error, 130 stopped by Ctrl-C or SIGTERM."
    )
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="files, folders (to the bottom, without hidden names), quoted globs, WebDataset .tar files, http(s) URLs",
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=".jsonl or .csv (default: JSONL on stdout)")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--prompt", metavar="TEXT", default=CAPTION_PROMPT, help='what to ask about each image (default: "%(default)s")'
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--retry-errors", action="store_true", help="try the images again whose line is an error")
    again.add_argument("--overwrite", action="store_true", help="start anew instead of continuing FILE")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of the model on CPUs (default: one per core)")
    _add_model(parser)
    _add_generation(parser, beams=3, tokens=40)


def _run_caption(args: argparse.Namespace) -> int:
    from mm_gpt.captioning import caption_images, share_cores

    share_cores()
    if args.out is None and (args.overwrite or args.retry_errors):
        raise UsageError("--overwrite and --retry-errors need -o FILE")

    def load() -> "Assistant":
        import torch

        import mm_gpt

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return mm_gpt.load(args.model, device=args.device)

    summary = caption_images(
        load,
        args.input,
        sys.stdout.buffer if args.out is None else args.out,
        batch_size=args.batch_size,
        prompt=args.prompt,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
        options=_generation_options(args),
    )
    print(f"mm-gpt: {summary}", file=sys.stderr)
    if summary.stopped:
        if args.out is not None:
            again = " without --overwrite" if args.overwrite else ""
            print(f"mm-gpt: stopped; the same command{again} continues {args.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if summary.errors else 0


# ---- train, eval, export, demo, models ----


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="its name, or a preset's; --list shows all")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, like train.lr=1e-4")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    parser.add_argument("--data", type=Path, default=Path("."), metavar="FOLDER", help="of the sources (default: .)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")


def _run_train(args: argparse.Namespace) -> int:
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
    logging.getLogger("mm_gpt").setLevel(logging.INFO)
    run_recipe(chosen, args.out or Path("runs") / args.recipe, resume=args.resume, progress=sys.stderr.isatty())
    return 0


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from mm_gpt.eval.harness import add_arguments

    add_arguments(parser)


def _run_eval(args: argparse.Namespace) -> int:
    from mm_gpt.eval.harness import run

    return run(args)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name or folder")
    parser.add_argument(
        "--format", default="hf", metavar="NAME", help="hf: Hugging Face's; gguf: llama.cpp's (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the files")
    parser.add_argument(
        "--dtype",
        default="float16",
        metavar="NAME",
        help="of matrices: float32, bfloat16, float16 or, in GGUF, q8_0 (default: %(default)s)",
    )
    parser.add_argument("--decoder-only", action="store_true", help="the language model without its eyes")
    parser.add_argument("--overwrite", action="store_true", help="replace the exported model in FOLDER")


def _run_export(args: argparse.Namespace) -> int:
    from mm_gpt.hub.export.export import export_model

    files = export_model(
        args.model,
        args.out,
        format=args.format,
        dtype=args.dtype,
        decoder_only=args.decoder_only,
        overwrite=args.overwrite,
    )
    for path in files:
        print(f"{path}  {_size(path.stat().st_size)}")
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (default: %(default)s)")
    parser.add_argument("--port", type=_positive, default=7860, metavar="N", help="default: %(default)s")


def _run_demo(args: argparse.Namespace) -> int:
    from mm_gpt.serving.gradio_demo import launch

    launch(args.model, args.host, args.port, args.device)
    return 0


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the models in the package, the weights that are fetched when something needs them,\n"
        "and the public checkpoints that --model takes by name. `mm-gpt train --list` has the presets."
    )


def _run_models(args: argparse.Namespace) -> int:
    from mm_gpt.hub.checkpoint import decoder_names, model_folder, shipped_models
    from mm_gpt.hub.fetching.download import cache_folder
    from mm_gpt.hub.fetching.registry import REGISTRY
    from mm_gpt.hub.public import tables

    rows: list[tuple[str, ...]] = [("NAME", "SIZE", "WHERE", "LICENCE", "WHAT")]
    for name in shipped_models():
        num_bytes = sum(file.stat().st_size for file in model_folder(name).iterdir() if file.is_file())
        rows.append((name, _size(num_bytes), "in the package", "see its README.md", "A model for --model."))
    for entry in REGISTRY.values():
        paths = {cache_folder() / file.name: file.size_bytes for file in entry.files}
        is_cached = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
        where = "in the cache" if is_cached else "to be fetched"
        about = f"{entry.description} A model for --model." if entry.name in decoder_names() else entry.description
        rows.append((entry.name, _size(sum(paths.values())), where, entry.licence, about))
    _print_table(rows)
    for title, table in tables().items():
        print(f"\n{title}\n")
        _print_table(table)
    return 0


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))


COMMANDS = {
    "ask": Command(
        "Ask a question about images, or about none.",
        (
            'mm-gpt ask photo.jpg "What is the dog doing?"',
            'mm-gpt ask before.jpg after.jpg "What has changed?" --json',
            'mm-gpt ask https://example.org/cat.jpg "Describe it." --temperature 0.7 --seed 1',
            'mm-gpt ask photo.jpg -- "-5 degrees, really?"',
        ),
        _add_ask,
        _run_ask,
        usage="mm-gpt ask [options] [IMAGE ...] QUESTION",
    ),
    "chat": Command(
        "Talk about images, turn by turn.",
        ("mm-gpt chat photo.jpg", "printf '/image photo.jpg\\nWho is this?\\nWhere?\\n' | mm-gpt chat"),
        _add_chat,
        _run_chat,
    ),
    "caption": Command(
        "Caption many images into a file that survives interruptions.",
        (
            "mm-gpt caption photos/ -o captions.jsonl",
            "mm-gpt caption 'shards/*.tar' https://example.org/cat.jpg -o captions.csv --batch-size 16",
            "mm-gpt caption photos/ -o captions.jsonl --retry-errors",
            "mm-gpt caption photos/ | head",
        ),
        _add_caption,
        _run_caption,
        usage="mm-gpt caption [options] INPUT [INPUT ...]",
    ),
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
        _add_train,
        _run_train,
        usage="mm-gpt train [options] RECIPE [KEY=VALUE ...]",
    ),
    "corpus build": Command(
        "Make a corpus of web pages, WARC files, public datasets, captioned images or text.",
        (
            "mm-gpt corpus build pages/ --out corpus",
            "mm-gpt corpus build 'crawl/*.warc.gz' --out corpus filters=obelics languages=en",
            "mm-gpt corpus build llava_v1_5_mix665k.json --images images/ --out corpus",
            "mm-gpt corpus build s3://bucket/pages/ --out /shared/corpus --ray",
        ),
        corpus_commands.add_build,
        corpus_commands.run_build,
        usage="mm-gpt corpus build [options] SOURCE [SOURCE ...] [KEY=VALUE ...] --out FOLDER",
    ),
    "corpus show": Command(
        "Show what is in a corpus or source.",
        ("mm-gpt corpus show corpus", "mm-gpt corpus show obelics.parquet -n 1"),
        corpus_commands.add_show,
        corpus_commands.run_show,
    ),
    "corpus formats": Command(
        "List the formats of sources.",
        ("mm-gpt corpus formats",),
        corpus_commands.add_formats,
        corpus_commands.run_formats,
    ),
    "corpus contamination": Command(
        "Look for evaluation sets in a corpus.",
        ("mm-gpt corpus contamination corpus --eval vqa=daquar/val-000000.tar --out contamination",),
        corpus_commands.add_contamination,
        corpus_commands.run_contamination,
    ),
    "corpus quality": Command(
        "Train a classifier that tells good documents from raw ones.",
        ("mm-gpt corpus quality books/ encyclopedia/ --raw crawl.warc.gz --out quality",),
        corpus_commands.add_quality,
        corpus_commands.run_quality,
    ),
    "corpus tokenizer": Command(
        "Learn a tokenizer from corpora.",
        ("mm-gpt corpus tokenizer corpus --out tokenizer --vocab-size 8000",),
        corpus_commands.add_tokenizer,
        corpus_commands.run_tokenizer,
    ),
    "eval": Command(
        "Measure a model on captions, questions or text.",
        ("mm-gpt eval --task captioning --data flickr8k/test.tar", "mm-gpt eval --task vqa --data vqa/ --limit 500"),
        _add_eval,
        _run_eval,
    ),
    "export": Command(
        "Write a model for other programs: Hugging Face's classes, vLLM, llama.cpp.",
        (
            "mm-gpt export runs/finetune/best --out exported",
            "mm-gpt export default --decoder-only --format gguf --dtype q8_0 --out exported-gguf",
        ),
        _add_export,
        _run_export,
    ),
    "demo": Command(
        "Open a web page to try a model.",
        ("mm-gpt demo", "mm-gpt demo --model runs/tiny/best --port 8000"),
        _add_demo,
        _run_demo,
    ),
    "models": Command(
        "List the models that there are.",
        ("mm-gpt models",),
        _add_models,
        _run_models,
    ),
}
