"""Seconds and memory of loading a checkpoint, against `transformers`, on the same files, in the same run.

Each load is a fresh process; the two take turns, so that a busy moment of the machine hits both. Counted is the call
alone, without imports, on files that the system has in its cache:

- load: until the model is there. What stays in the type that it is stored in may be a mapping of the file of which
  nothing is read yet; so there is also
- used: until every weight was read once, as the first answer does; and the processor time of that, which a busy
  machine does not stretch.
- peak: the most resident memory that the process ever had (VmHWM), the first use included, minus what it had before
  the call. It counts mapped pages of files as well as memory of the process's own; how much of each there is in the
  end is in the JSON.

    python examples/benchmarks/loading.py
    python examples/benchmarks/loading.py --model FOLDER
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm

SIZES = {"small": (256, 8, 8_000), "medium": (1024, 16, 32_000)}
"""Width, layers and vocabulary: 12 and 254 million weights."""
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = ("mm-gpt", "transformers")


def write_checkpoint(folder: Path, size: str, dtype: torch.dtype) -> None:
    """A random model of Llama's shape, in at least three shards."""
    width, layers, vocab = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=model.get_memory_footprint() // 3)


# ---- one load, in a process of its own ----


def ours(folder: Path, dtype: torch.dtype) -> Callable[[], nn.Module]:
    from mm_gpt.hub.decoders import decoder_config, decoder_table, settle_tying, stored_prefix, tied_left_over
    from mm_gpt.hub.weights import Checkpoint, read_json, unfilled
    from mm_gpt.model.decoder import Decoder

    def load() -> nn.Module:
        values = read_json(folder / "config.json")
        kind, checkpoint = values["model_type"], Checkpoint(folder)
        table = decoder_table(kind, prefix=stored_prefix(kind, checkpoint.names))
        config, table = settle_tying(decoder_config(values, str(folder)), table, checkpoint)
        with unfilled():
            decoder = Decoder(config)
        checkpoint.load(decoder, table, dtype=dtype)
        checkpoint.finish(tied_left_over(config))
        return decoder

    return load


def theirs(folder: Path, dtype: torch.dtype) -> Callable[[], nn.Module]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports it
    return lambda: cls.from_pretrained(folder, dtype=dtype)


def memory(file: str, *keys: str) -> list[int]:
    """Bytes, from a file of `/proc/self`."""
    lines = Path("/proc/self", file).read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return [int(values[key]) * 1024 for key in keys]


def measure(name: str, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    load = (ours if name == "mm-gpt" else theirs)(folder, dtype)
    (before,) = memory("status", "VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    model = load()
    loaded = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    start = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().view(torch.int16 if parameter.element_size() == 2 else torch.int32).max()
    used, cpu = loaded + time.perf_counter() - start, time.process_time() - start_cpu
    (peak,) = memory("status", "VmHWM")
    rss, anonymous = memory("smaps_rollup", "Rss", "Anonymous")
    return {
        "load_s": loaded,
        "used_s": used,
        "used_cpu_s": cpu,
        "model_bytes": size,
        "peak_growth_bytes": peak - before,
        "anonymous_bytes_after_use": anonymous,
        "file_backed_bytes_after_use": rss - anonymous,
    }


# ---- all of them ----


def compare(folder: Path, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of both."""
    for file in folder.iterdir():
        if file.is_file():
            file.read_bytes()  # into the system's cache
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for repeat in tqdm(range(repeats), desc=f"{folder.name} as {dtype}"):
        for name in NAMES[:: -1 if repeat % 2 else 1]:
            command = [sys.executable, __file__, "--one", name, str(folder), dtype]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of a decoder, instead of random ones")
    parser.add_argument("--size", choices=SIZES, default="medium", help="of the random ones (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, folder, dtype = args.one
        print(json.dumps(measure(name, Path(folder), TYPES[dtype])))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [args.model] if args.model else [Path(scratch, name) for name in TYPES]
        for folder in folders:
            if not args.model:
                write_checkpoint(folder, args.size, TYPES[folder.name])
            for dtype in TYPES:
                rows.append({"stored": folder.name, "loaded": dtype, **compare(folder, dtype, args.repeats)})
    titles = "".join(f"   {title:>13}" for title in ("load s", "used s", "used CPU s", "peak / size"))
    print(f"{'stored':12} {'as':5} {'size':>8}{titles}")
    for row in rows:
        size = row["mm-gpt"]["model_bytes"]
        pairs = [[row[name][key] for name in NAMES] for key in ("load_s", "used_s", "used_cpu_s")]
        pairs.append([row[name]["peak_growth_bytes"] / size for name in NAMES])
        columns = "   ".join(f"{a:6.2f} {b:6.2f}" for a, b in pairs)
        print(f"{row['stored']:12} {row['loaded']:5} {size / 1e6:5.0f} MB   {columns}")
    print("each pair: mm-gpt, transformers", file=sys.stderr)
    result = {
        "what": " ".join((__doc__ or "").split("\n\n    python")[0].split()),
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
