"""Prefill and decode speed against `transformers`, on the same weights, in the same run.

The two take turns, so that a busy moment of the machine hits both; what is reported is the ratio of the medians.

    python examples/benchmarks/decoder_speed.py
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from mm_gpt.hub.fetching import download
from mm_gpt.hub.gguf.reader import load_gguf
from mm_gpt.inference.assistant import transpose_for_cpu
from mm_gpt.model.decoder import Decoder, KVCache

MODEL = "smollm2-135m-instruct"


def ours(decoder: Decoder, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of the greedy tokens after it."""
    batch, length = ids.shape
    start = time.perf_counter()
    cache = KVCache(decoder.config, batch, length + new_tokens, dtype=torch.float32, device=ids.device)
    positions = torch.arange(length).expand(batch, -1)
    token = decoder.logits(decoder(decoder.embed(ids), positions, cache=cache)[:, -1]).argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    for step in range(new_tokens):
        hidden = decoder(decoder.embed(token), torch.full((batch, 1), length + step), cache=cache)
        token = decoder.logits(hidden[:, -1]).argmax(-1, keepdim=True)
    return prefilled - start, time.perf_counter() - prefilled


def theirs(model: transformers.PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """The same with transformers' own forward and cache, without the overhead of its `generate`."""
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return prefilled - start, time.perf_counter() - prefilled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    path = next(iter(download.fetch(MODEL).values()))
    decoder, _ = load_gguf(path)
    decoder.eval().requires_grad_(False)
    transpose_for_cpu(decoder)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    rows = []
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(100, 40_000, (batch, args.prompt_tokens), generator=generator)
        runs: dict[str, Callable[[], tuple[float, float]]] = {
            "mm-gpt": lambda ids=ids: ours(decoder, ids, args.new_tokens),
            "transformers": lambda ids=ids: theirs(model, ids, args.new_tokens),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        with torch.inference_mode():
            for repeat in tqdm(range(args.repeats + 1), desc=f"batch {batch}"):
                for name, run in runs.items():
                    measured = run()
                    if repeat:  # the first round warms up
                        times[name].append(measured)
        for phase, tokens in (("prefill", args.prompt_tokens), ("decode", args.new_tokens)):
            column = 0 if phase == "prefill" else 1
            speed = {n: batch * tokens / statistics.median(t[column] for t in ts) for n, ts in times.items()}
            ratio = speed["mm-gpt"] / speed["transformers"]
            rows.append({"phase": phase, "batch": batch, "tokens_per_s": speed, "ratio": ratio})
    print(f"{'':8} {'batch':>5} {'mm-gpt':>10} {'transformers':>13} {'ratio':>6}   (tokens/s)")
    for row in rows:
        speed = row["tokens_per_s"]
        speeds = f"{speed['mm-gpt']:10.1f} {speed['transformers']:13.1f}"
        print(f"{row['phase']:8} {row['batch']:5} {speeds} {row['ratio']:6.2f}")
    result = {
        "model": MODEL,
        "dtype": "float32",
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"medians of {args.repeats} alternating runs", file=sys.stderr)


if __name__ == "__main__":
    main()
