"""`mm-gpt models`, `export` and `demo`: what models there are, for other programs, in a browser."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_gpt.commands.command import Command, add_model, check_folder, nothing_collected, positive


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name or folder")
    parser.add_argument(
        "--format", default="hf", metavar="NAME", help="hf: Hugging Face's; gguf: llama.cpp's (default: %(default)s)"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the files")
    parser.add_argument(
        "--dtype",
        default="float16",
        metavar="NAME",
        help="of matrices: float32, bfloat16, float16 or, in GGUF, q8_0 (default: %(default)s)",
    )
    parser.add_argument("--decoder-only", action="store_true", help="the language model without its eyes")
    parser.add_argument("--overwrite", action="store_true", help="replace the exported model in FOLDER")


def run_export(args: argparse.Namespace) -> int:
    from mm_gpt.hub.export.export_model import export_model

    check_folder(args.out.absolute().parent)
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


def add_demo(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (default: %(default)s)")
    parser.add_argument("-p", "--port", type=positive, default=7860, metavar="N", help="default: %(default)s")
    parser.add_argument("--server", metavar="URL", help="of a server, whose first model answers: none is loaded here")
    parser.add_argument("--api-key", metavar="KEY", help="of that server (default: what MM_GPT_API_KEY says)")


def run_demo(args: argparse.Namespace) -> int:
    with nothing_collected():
        from mm_gpt.serving.gradio_demo import launch

    if args.server is not None:
        key = args.api_key if args.api_key is not None else os.environ.get("MM_GPT_API_KEY", "")
        launch(host=args.host, port=args.port, server=args.server, api_key=key)
    else:
        launch(args.model, args.host, args.port, args.device, args.dtype)
    return 0


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the models in the package, the weights that are fetched when something needs them,\n"
        "and the public models that --model takes by name. `mm-gpt train --list` has the presets."
    )
    parser.add_argument(
        "--set-default", metavar="NAME", help="from now on take this model where none is named; `default`: the packaged"
    )


def run_models(args: argparse.Namespace) -> int:
    from mm_gpt.hub.choice import VARIABLE, describe_choice, set_default

    if args.set_default is not None:
        print(f"{set_default(args.set_default)}: {args.set_default}")
        if os.environ.get(VARIABLE):
            print(f"mm-gpt: {VARIABLE} is set and comes first: {describe_choice()}", file=sys.stderr)
        return 0
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
    print(f"\nTaken where none is named: {describe_choice()}")
    for title, table in tables().items():
        print(f"\n{title}\n")
        _print_table(table)
    return 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))


COMMANDS = {
    "export": Command(
        "Write a model for other programs: Hugging Face's classes, vLLM, llama.cpp.",
        (
            "mm-gpt export runs/finetune/best --out exported",
            "mm-gpt export default --decoder-only --format gguf --dtype q8_0 --out exported-gguf",
        ),
        add_export,
        run_export,
    ),
    "demo": Command(
        "Open a web page to try a model.",
        ("mm-gpt demo", "mm-gpt demo --model runs/tiny/best --port 8000", "mm-gpt demo --server http://127.0.0.1:8000"),
        add_demo,
        run_demo,
    ),
    "models": Command(
        "List the models that there are.",
        ("mm-gpt models", "mm-gpt models --set-default smolvlm"),
        add_models,
        run_models,
    ),
}
