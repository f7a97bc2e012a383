"""Seconds per turn of a long conversation about images: segment memory, a growing cache, and reading all again.

One decoder with relative positions and random weights holds the same conversation in three ways. `memory` keeps the
last `--memory` tokens (Transformer-XL); `cache` keeps keys and values of everything; `again` reads the whole chat anew
at each turn, as a server without state does. Every turn shows an image and asks a question.

Time is the processor time of one thread, so that other work on the machine counts little; what is reported is the
median of rounds in which the three take turns.

    python examples/benchmarks/conversation.py --out docs/results/conversation.json --plot docs/conversation.png
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from tqdm import tqdm

from mm_gpt.document import Image, Message
from mm_gpt.inference.chat_session import ChatSession
from mm_gpt.inference.engine import Engine
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.decoder import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig

WAYS = ("memory", "cache", "again")
IMAGE_SIZE = 32
QUESTION = "What is in this picture, and how is it different from the one before? Answer in one sentence, please."


def make_engine(args: argparse.Namespace, *, memory: int, context: int) -> Engine:
    """The same weights each time, whatever the memory."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["user assistant system", QUESTION] * 4, 400)
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=args.width,
        num_layers=args.layers,
        num_heads=args.width // 64,
        num_kv_heads=args.width // 64,
        head_size=64,
        mlp_width=4 * args.width,
        max_length=context,
        positions="relative",
        memory_length=memory,
    )
    vision = VisionConfig(model="timm/test_vit", image_size=IMAGE_SIZE)
    model = MMGPT(ModelConfig(decoder=decoder, vision=vision, connector=ConnectorConfig(kind="mlp"))).eval()
    model.requires_grad_(False)
    half = (0.5, 0.5, 0.5)
    image = ImageTransformConfig(size=IMAGE_SIZE, mean=half, std=half)
    config = ProcessorConfig(image=image, tokens_per_image=model.tokens_per_image, max_length=context)
    return Engine(model, Processor(tokenizer, config, vocab_size=tokenizer.vocab_size))


class Again:
    """A conversation that reads everything at each turn."""

    def __init__(self, engine: Engine, config: GenerationConfig):
        self.engine, self.config = engine, config
        self.messages: list[Message] = []
        self.tokens_read = 0

    def say(self, content: Any) -> None:
        self.messages.append({"role": "user", "content": content})
        self.engine.forget()
        (answer,) = self.engine.generate([self.engine.processor.chat(self.messages)], self.config)
        self.tokens_read = answer.prompt_tokens
        self.messages.append({"role": "assistant", "content": answer.text})


def pictures(count: int) -> list[Image]:
    blocks = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [Image(PILImage.fromarray(block).resize((64, 48), PILImage.Resampling.NEAREST)) for block in blocks]


def converse(way: str, engine: Engine, args: argparse.Namespace) -> tuple[list[float], list[int]]:
    """Seconds and tokens read of each turn."""
    config = GenerationConfig(max_new_tokens=args.answer_tokens)
    talk = Again(engine, config) if way == "again" else ChatSession(engine, config)
    seconds, tokens = [], []
    for picture in pictures(args.turns):
        start = time.thread_time()
        talk.say([picture, QUESTION])
        seconds.append(time.thread_time() - start)
        tokens.append(talk.tokens_read)
    return seconds, tokens


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    labels = {"memory": "segment memory", "cache": "growing cache", "again": "all read again"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for number, (key, name) in enumerate((("seconds", "seconds"), ("tokens_read", "tokens read")), start=1):
        axes = figure.add_subplot(1, 2, number, xlabel="turn", ylabel=name)
        for row in rows:
            axes.plot(range(1, len(row[key]) + 1), row[key], label=labels[row["way"]])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--memory", type=int, default=128, help="tokens; also the length of a segment")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--plot", type=Path, help="write a picture of it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bounded = make_engine(args, memory=args.memory, context=args.memory)
    whole = make_engine(args, memory=0, context=args.turns * (len(QUESTION) + 64))
    engines = {"memory": bounded, "cache": whole, "again": whole}
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    tokens: dict[str, list[int]] = {}
    for way in WAYS:
        converse(way, engines[way], argparse.Namespace(**vars(args) | {"turns": 2}))  # warms up
    for _ in tqdm(range(args.repeats)):
        for way in WAYS:
            measured, tokens[way] = converse(way, engines[way], args)
            seconds[way].append(measured)
    rows = []
    for way in WAYS:
        median = [round(statistics.median(turn), 5) for turn in zip(*seconds[way], strict=True)]
        rows.append({"way": way, "seconds": median, "tokens_read": tokens[way]})
    tenth = max(1, args.turns // 10)
    print(f"{'':8} {'first':>9} {'middle':>9} {'last':>9} {'all':>9} seconds; tokens read: first, last")
    for row in rows:
        part = row["seconds"]
        middle = args.turns // 2
        shown = [statistics.mean(p) for p in (part[:tenth], part[middle : middle + tenth], part[-tenth:])]
        times = " ".join(f"{value:9.3f}" for value in [*shown, sum(part)])
        print(f"{row['way']:8} {times}          {row['tokens_read'][0]:5} {row['tokens_read'][-1]:5}")
    result = {
        "what": "processor seconds of one thread per turn; medians of rounds in which the three take turns",
        "turns": args.turns,
        "repeats": args.repeats,
        "decoder": {"width": args.width, "layers": args.layers, "memory": args.memory, "weights": "random"},
        "answer_tokens": args.answer_tokens,
        "image_tokens": bounded.model.tokens_per_image + 2,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
