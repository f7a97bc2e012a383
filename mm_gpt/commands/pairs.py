"""`mm-gpt pairs`: preference pairs whose better answer says nothing that its picture or text does not support."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from mm_gpt.alignment.hallucination import Ask
    from mm_gpt.document import Message
    from mm_gpt.inference.assistant import Assistant

LIST_TOKENS = 200
"""Of a model's list, and of what it rewrites."""


def add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make preference pairs against what pictures and texts do not support.\n\n"
        "Exit codes: 0 done, 1 the run failed, 2 wrong usage, 3 done, but some prompts were skipped,\n"
        "130 stopped by Ctrl-C."
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="captioned photos, or prompts with pictures and texts")
    add_model(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.jsonl", help="of the pairs")
    parser.add_argument(
        "--lister",
        default="known",
        metavar="WHO",
        help="who lists what is unsupported: known (objects that no caption of the photo mentions or implies), words "
        "(names and numbers that the text lacks), model (the one that answers), another's name or folder, or the URL "
        "of a server (default: %(default)s)",
    )
    parser.add_argument(
        "--rewriter",
        metavar="WHO",
        help="samples (another answer of the model), model, another's name or folder, or a URL "
        "(default: samples for known, else model)",
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="drawn for each prompt (default: 8)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of these (default: 1)")
    parser.add_argument("--max-new-tokens", type=positive, default=40, metavar="N", help="longest answer (default: 40)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="rewritings at most (default: 5)")
    parser.add_argument("--per-prompt", type=positive, default=3, metavar="N", help="pairs at most (default: 3)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn answers")
    parser.add_argument("--restart", action="store_true", help="replace the answers of an earlier run to the same file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run_pairs(args: argparse.Namespace) -> int:
    check_inputs(args.data)
    check_folder(args.out.parent)
    if args.out.suffix != ".jsonl":
        raise UsageError(f"--out {args.out}: pairs are JSON lines, in a file that ends in .jsonl")
    rewriter = args.rewriter or ("samples" if args.lister == "known" else "model")
    if rewriter == "samples" and args.lister != "known":
        raise UsageError("--rewriter samples chooses by what is known of a photo: it goes with --lister known")
    from tqdm import tqdm

    from mm_gpt.alignment.hallucination import ModelLister, ModelRewriter, list_names_and_numbers, list_objects
    from mm_gpt.alignment.hallucination_pairs import PairsConfig, make_pairs, read_prompts
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.eval.harness import model_sha256

    config = PairsConfig(
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        max_rounds=args.rounds,
        pairs_per_prompt=args.per_prompt,
        seed=args.seed,
    )
    assistant = load_assistant(args, many=True)
    checks: Any = {"known": list_objects, "words": list_names_and_numbers}
    lister = checks[args.lister] if args.lister in checks else ModelLister(_ask(args.lister, assistant, args))
    rewrite = None if rewriter == "samples" else ModelRewriter(_ask(rewriter, assistant, args))
    about = {"model": model_sha256(args.model), "dtype": args.dtype, "lister": args.lister, "rewriter": rewriter}
    errors = ErrorCounter()
    prompts = tqdm(read_prompts(args.data, errors, limit=args.limit), desc="pairs", unit=" prompts", disable=None)
    more: Any = {"errors": errors, "about": about, "restart": args.restart}
    try:
        found = make_pairs(prompts, assistant, lister, rewrite, args.out, config, **more)
    except KeyboardInterrupt:
        print("stopped; the same command continues this run", file=sys.stderr)
        return EXIT_INTERRUPTED
    found["skipped"] = dict(errors.counts)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{found['pairs']} pairs of {found['prompts']} prompts, {found['answers']} answers")
        print("\n".join(f"  {count:7,} {end}" for end, count in found["ends"].items()))
        print(f"  words: {found['words_chosen']:.1f} preferred, {found['words_rejected']:.1f} not")
    if errors.total:
        print(errors.summary(), file=sys.stderr)
    print(f"written to {args.out}", file=sys.stderr)
    return EXIT_SOME_FAILED if errors.total else 0


def _ask(who: str, assistant: "Assistant", args: argparse.Namespace) -> "Ask":
    """`model` is the assistant itself. Raises MMGPTError for a model or server that is not there."""
    if who.startswith(("http://", "https://")):
        import os

        from mm_gpt.serving.remote import RemoteAssistant

        remote = RemoteAssistant(who, api_key=os.environ.get("MM_GPT_API_KEY", ""))

        def ask_server(messages: "Sequence[Message]", seed: int) -> str:
            temperature = 0.7 if seed else 0.0
            return "".join(
                remote.chat(messages, max_new_tokens=LIST_TOKENS, temperature=temperature, seed=seed)
            ).strip()

        return ask_server
    if who != "model":
        import mm_gpt

        assistant = mm_gpt.load(who, device=args.device)

    def ask(messages: "Sequence[Message]", seed: int) -> str:
        temperature = 0.7 if seed else 0.0
        return assistant.chat(messages, max_new_tokens=LIST_TOKENS, temperature=temperature, seed=seed).text

    return ask


COMMANDS = {
    "pairs": Command(
        "Make preference pairs against what pictures and texts do not support.",
        (
            "mm-gpt pairs photos/ --out pairs/pairs.jsonl",
            "mm-gpt pairs questions.jsonl --lister https://example.org/v1 --rewriter model --out pairs.jsonl",
            "mm-gpt pairs flickr8k/train.tar --samples 10 --limit 2000 --out pairs.jsonl",
        ),
        add_pairs,
        run_pairs,
    ),
}
