"""`mm-gpt caption`: many images into a file of captions."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mm_gpt.commands.command import (
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    Command,
    UsageError,
    add_generation,
    add_model,
    check_inputs,
    generation_options,
    load_assistant,
    positive,
    tell,
)
from mm_gpt.templates.prompts import CAPTION_PROMPT

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant


def add_caption(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "-o", "--out", "--output", type=Path, metavar="FILE", help=".jsonl or .csv (default: JSONL on stdout)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--prompt", metavar="TEXT", default=CAPTION_PROMPT, help='what to ask about each image (default: "%(default)s")'
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--retry-errors", action="store_true", help="try the images again whose line is an error")
    again.add_argument("--overwrite", action="store_true", help="start anew instead of continuing FILE")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the model on CPUs (default: one per core)")
    add_model(parser)
    add_generation(parser, beams=3, tokens=40)


def run_caption(args: argparse.Namespace) -> int:
    from mm_gpt.captioning import caption_images, share_cores
    from mm_gpt.document import check_text

    share_cores()
    if args.out == Path("-"):
        args.out = None
    if args.out is None and (args.overwrite or args.retry_errors):
        raise UsageError("--overwrite and --retry-errors need -o FILE")
    if "-" in args.input:
        raise UsageError('caption reads files, not standard input; one image: mm-gpt ask - "Describe it." < photo.jpg')
    check_text(args.prompt, "--prompt")
    check_inputs(args.input)
    options = generation_options(args)
    loaded: list[Assistant] = []

    def load() -> "Assistant":
        import torch

        from mm_gpt.inference.hints import Hints

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        loaded.append(load_assistant(args, many=True))
        tell(Hints(args.model).about(args.prompt, 1))
        return loaded[0]

    summary = caption_images(
        load,
        args.input,
        sys.stdout.buffer if args.out is None else args.out,
        batch_size=args.batch_size,
        prompt=args.prompt,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
        options=options,
    )
    for assistant in loaded:
        config = assistant.caption_config(options)
        names = ("num_beams", "temperature", "max_new_tokens", "no_repeat_ngram_size")
        print("mm-gpt: generated with", ", ".join(f"{n} {getattr(config, n)}" for n in names), file=sys.stderr)
    print(f"mm-gpt: {summary}", file=sys.stderr)
    if summary.stopped:
        if args.out is not None:
            again = " without --overwrite" if args.overwrite else ""
            print(f"mm-gpt: stopped; the same command{again} continues {args.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if summary.errors else 0


COMMANDS = {
    "caption": Command(
        "Caption many images into a file that survives interruptions.",
        (
            "mm-gpt caption photos/ -o captions.jsonl",
            "mm-gpt caption 'shards/*.tar' https://example.org/cat.jpg -o captions.csv --batch-size 16",
            "mm-gpt caption photos/ -o captions.jsonl --retry-errors",
            "mm-gpt caption photos/ | head",
        ),
        add_caption,
        run_caption,
        usage="mm-gpt caption [options] INPUT [INPUT ...]",
    ),
}
