"""What it costs to keep a model's weights in fewer bits, against the same model in float32.

For each dtype: the divergence KL(float32 || dtype) of the next token's distribution, its mean and the value that 99.9 %
of the positions stay below; how often the likeliest token is the same; the perplexity of text. For a model that sees,
the same on questions about photos, with float32's own answers. With data, the scores of `mm-gpt eval`.

    python examples/quantisation_quality.py --model smollm2-135m-instruct
    python examples/quantisation_quality.py --captioning DATA/flickr8k/val-000000.tar --vqa DATA/daquar/val-000000.tar
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_gpt.document import Image, Message
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.harness import evaluate
from mm_gpt.hub.packing import parts_of, places
from mm_gpt.inference.assistant import Assistant, load
from mm_gpt.processor import collate
from mm_gpt.system.writing import write_text

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = sorted((ROOT / "mm_gpt/serving/samples").glob("*.jpg"))
TEXTS = sorted((ROOT / "docs").glob("*.md"))
QUESTIONS = ("Describe the image in one sentence.", "What is in the picture?", "Which colours do you see?")
WINDOW = 256
"""Tokens that are read at a time."""
DTYPES = ("bf16", "int8", "int4")


def divergences(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row of log-probabilities, (rows, vocabulary) -> (rows,)."""
    return (reference.exp() * (reference - other)).sum(-1)


def text_windows(assistant: Assistant, paths: Sequence[Path], most: int) -> list[Tensor]:
    """Ids (WINDOW,) from the beginning of each text."""
    encode = assistant.processor.tokenizer.encode
    share = -(-most // len(paths))
    texts = [torch.tensor(encode(path.read_text(encoding="utf-8")[: 8 * WINDOW * share])) for path in paths]
    windows = [window for ids in texts for window in ids.split(WINDOW)[:share] if len(window) == WINDOW]
    return windows[:most]


def photo_chats(assistant: Assistant) -> list[list[Message]]:
    """Questions about photos with the model's answers."""
    chats: list[list[Message]] = []
    for photo in PHOTOS:
        for question in QUESTIONS:
            answer = assistant.ask(photo, question, max_new_tokens=24)
            turn: Message = {"role": "user", "content": [Image(photo), question]}
            chats.append([turn, {"role": "assistant", "content": str(answer)}])
    return chats


@torch.inference_mode()
def text_logprobs(assistant: Assistant, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Log-probabilities (WINDOW, vocabulary) of what follows each token."""
    decoder = assistant.model.decoder
    for ids in windows:
        hidden = decoder(decoder.embed(ids[None]), torch.arange(len(ids))[None])
        yield decoder.logits(hidden[0]).log_softmax(-1)


@torch.inference_mode()
def chat_logprobs(assistant: Assistant, chats: Sequence[list[Message]]) -> Iterator[Tensor]:
    """The same for the words of conversations; places of images have no next token to be right about."""
    model, processor = assistant.model, assistant.processor
    for chat in chats:
        example = processor(processor.chat(chat, answer_starts=False))
        batch = collate([[example]], processor.pixels([example]))
        words = [not processor.is_image(id) for id in example.input_ids.tolist()]
        yield model.decoder.logits(model(batch)[0, torch.tensor(words)]).log_softmax(-1)


def compared(reference: Sequence[Tensor], other: Iterator[Tensor]) -> dict[str, float]:
    divergence, agree = [], []
    for expected, found in zip(reference, other, strict=True):
        divergence.append(divergences(expected, found))
        agree.append(expected.argmax(-1) == found.argmax(-1))
    all_of_them = torch.cat(divergence)
    return {
        "mean_kl": float(all_of_them.mean()),
        "kl_99.9": float(all_of_them.quantile(0.999)),
        "same_first_choice": float(torch.cat(agree).float().mean()),
        "positions": len(all_of_them),
    }


def perplexity(logprobs: Sequence[Tensor], windows: Sequence[Tensor]) -> float:
    nats = [-row[:-1].gather(-1, ids[1:, None]) for row, ids in zip(logprobs, windows, strict=True)]
    return float(torch.cat(nats).mean().exp())


def kept(assistant: Assistant) -> dict[str, Any]:
    """How the decoder's matrices are kept, and the memory they take in MB."""
    parts = [part for _, place in places(assistant.model.decoder) for part in parts_of(place)]
    if not parts:
        weights = [p for p in assistant.model.decoder.parameters() if p.dim() == 2]
        return {"kinds": ["F32"], "megabytes": sum(p.numel() for p in weights) * 4 / 1e6}
    return {"kinds": sorted({part.kind for part in parts}), "megabytes": sum(part.num_bytes for part in parts) / 1e6}


def scores(assistant: Assistant, args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """By `mm-gpt eval`, without its controls."""
    found = {}
    for task in ("captioning", "vqa"):
        if data := getattr(args, task):
            config = EvalConfig(
                task=task, data=(data,), model=args.model, controls=("none",), limit=args.limit, dtype=dtype
            )
            with tempfile.TemporaryDirectory() as folder:
                found[task] = evaluate(config, Path(folder) / "results.json", assistant=assistant)["metrics"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="default")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, metavar="DTYPE")
    parser.add_argument("--texts", nargs="+", type=Path, default=TEXTS, metavar="FILE", help="default: docs/*.md")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens of the texts (default: 8)")
    parser.add_argument("--captioning", metavar="DATA", help="captioned images for `mm-gpt eval captioning`")
    parser.add_argument("--vqa", metavar="DATA", help="questions for `mm-gpt eval vqa`")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of the data")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()

    plain = load(args.model, device="cpu", dtype="fp32")
    windows = text_windows(plain, args.texts, args.windows)
    chats = photo_chats(plain) if plain.processor.config.image is not None else []
    texts, answers = list(text_logprobs(plain, windows)), list(chat_logprobs(plain, chats))
    results = {"fp32": {**kept(plain), "perplexity": perplexity(texts, windows), **scores(plain, args, "fp32")}}
    del plain
    for dtype in args.dtypes:
        assistant = load(args.model, device="cpu", dtype=dtype)
        ours = list(text_logprobs(assistant, windows))
        found = {**kept(assistant), "perplexity": perplexity(ours, windows), "text": compared(texts, iter(ours))}
        if chats:
            found["images"] = compared(answers, chat_logprobs(assistant, chats))
        results[dtype] = found | scores(assistant, args, dtype)
        print(dtype, json.dumps(results[dtype]), file=sys.stderr)
    text = json.dumps({"model": args.model, "window": WINDOW, "dtypes": results}, indent=2) + "\n"
    if args.output is not None:
        write_text(args.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
