"""`mm-gpt serve`: a model behind OpenAI's protocol."""

import argparse
import ipaddress
import os
import sys
from pathlib import Path

from mm_gpt.commands.command import Command, add_model, load_assistant, nothing_collected, positive

KEY = "MM_GPT_API_KEY"


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a model over HTTP to every client that speaks OpenAI's protocol: chats with\n"
        "images, completions, streaming, structured output; /health, and /metrics for Prometheus.\n"
        "The first Ctrl-C or SIGTERM lets what runs end, the second stops at once."
    )
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (default: %(default)s)")
    parser.add_argument("-p", "--port", type=_port, default=8000, metavar="N", help="0: any (default: %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="of the model, for clients (default: as --model, or its folder)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send; better in {KEY}, which no list of processes shows"
    )
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="a web page that may use it")
    limits = parser.add_argument_group("limits")
    for option, kind, default, metavar, about in (
        ("--max-rows", positive, 8, "N", "answers that are generated at once"),
        ("--max-waiting", positive, 64, "N", "prompts that wait; whoever comes then is told to come back"),
        ("--max-images", int, 16, "N", "images in a request"),
        ("--max-body", positive, 32, "MIB", "size of a request"),
        ("--timeout", float, 600, "S", "seconds for a request"),
        ("--grace", float, 30, "S", "seconds for what runs at the end"),
    ):
        limits.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{about} (default: {default})")
    limits.add_argument("--max-tokens", type=positive, metavar="N", help="longest answer (default: as the context)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: they go from 0 to 65535")
    return int(text)


def run_serve(args: argparse.Namespace) -> int:
    with nothing_collected():
        from mm_gpt.serving.server.config import ServerConfig
        from mm_gpt.serving.server.run import listen, serve

    key = args.api_key if args.api_key is not None else os.environ.get(KEY, "")
    config = ServerConfig(
        api_key=key,
        max_rows=args.max_rows,
        max_waiting=args.max_waiting,
        max_images=args.max_images,
        max_body_bytes=args.max_body * 2**20,
        max_tokens=args.max_tokens,
        timeout_s=args.timeout,
        grace_s=args.grace,
        allow_origins=tuple(args.allow_origin),
    )
    if not key and not _is_loopback(args.host):
        print(f"mm-gpt: anyone who reaches {args.host} can use this server: set {KEY}", file=sys.stderr)

    with listen(args.host, args.port) as sock:
        serve(lambda: load_assistant(args, many=True), args.name or _name(args.model), config, sock)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(model: str) -> str:
    """A folder is served under its own name alone: where it lies is nobody's business."""
    return Path(model).resolve().name if os.path.isdir(model) else model


COMMANDS = {
    "serve": Command(
        "Serve a model to clients of OpenAI's protocol.",
        ("mm-gpt serve", "mm-gpt serve --model runs/tiny/best --port 8080 --max-rows 16"),
        add_serve,
        run_serve,
    ),
}
