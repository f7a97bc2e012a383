"""Decoding against llama.cpp and transformers: the same weights, the same run, one token after the other.

Each format of the weights is written as a GGUF file that both read (4 bits keep their embeddings in Q8_0). The engines
take turns, so that a busy moment of the machine hits all; what counts are the ratios of the medians. llama.cpp's
threads spin: run this on an idle machine, or in front of all others (`chrt -f 5 python …`).

    pip install xllamacpp
    python examples/benchmarks/decode.py --quick
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from mm_gpt.hub.fetching import download
from mm_gpt.hub.gguf.reader import load_gguf
from mm_gpt.inference.compiled import CompiledDecoder
from mm_gpt.kernels.kv_blocks import BLOCK
from mm_gpt.kernels.memory import huge
from mm_gpt.kernels.processor import host_features, host_isa
from mm_gpt.kernels.team import default_threads

MODEL = "smollm2-135m-instruct"
FORMATS = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_1")
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
Decode = Callable[[int, int], float]
"""(rows, new tokens) -> tokens a second, prompts not counted."""


def write_format(source: Path, target: Path, kind: str) -> None:
    """The same model with its matrices in another format."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        own = "F32" if values.ndim < 2 else kind
        if kind.startswith("Q4") and tensor.name == "token_embd.weight":
            own = "Q8_0"
        stored = GGMLQuantizationType[own]
        data = values if own == "F32" else quantize(values, stored)
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ours(path: Path, kind: str, threads: int) -> Decode:
    decoder, _ = load_gguf(path, "fp32" if kind == "F32" else "stored")
    kv_dtype = torch.float32 if kind == "F32" else torch.bfloat16
    compiled = CompiledDecoder(decoder.eval(), kv_dtype=kv_dtype, threads=threads)

    def decode(rows: int, tokens: int) -> float:
        size = (len(PROMPT) + tokens) // BLOCK + 1
        tables = [[compiled.pool.allocate() for _ in range(size)] for _ in range(rows)]
        ids, start = torch.tensor([PROMPT[0]] * rows), 0.0
        for place in range(len(PROMPT) + tokens):
            if place == len(PROMPT):
                start = time.perf_counter()
            at = torch.full((rows,), place)
            _, logits = compiled(ids, at, at, tables)
            ids = torch.tensor([PROMPT[place + 1]] * rows) if place + 1 < len(PROMPT) else logits.argmax(dim=-1)
        taken = time.perf_counter() - start
        for table in tables:
            for block in table:
                compiled.pool.release(block)
        return rows * tokens / taken

    return decode


def llama_cpp(path: Path, threads: int) -> Decode:
    """By its own clock: the time from a prompt's end to its last token; for several rows, the slowest one's."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 8192, 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def decode(rows: int, tokens: int) -> float:
        answers: list[Any] = [None] * rows

        def ask(row: int) -> None:
            request = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
            answer = server.handle_completions(request | {"cache_prompt": False})
            answers[row] = json.loads(answer) if isinstance(answer, str) else answer

        askers = [threading.Thread(target=ask, args=(row,)) for row in range(rows)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        return rows * tokens / max(answer["timings"]["predicted_ms"] for answer in answers) * 1000

    return decode


def hugging_face(path: Path) -> Decode:
    """transformers' own forward and cache in float32, without the overhead of its `generate`."""
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def decode(rows: int, tokens: int) -> float:
        output = model(input_ids=torch.tensor([PROMPT] * rows), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
        return rows * tokens / (time.perf_counter() - start)

    return decode


def memory_speed() -> float:
    """Bytes a second that torch's sum reads, of numbers in huge pages: a hint, not the limit."""
    numbers = huge(1 << 28).view(torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return (1 << 28) / min(times)


@contextmanager
def quiet() -> Iterator[None]:
    """llama.cpp's log goes away with the process's standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure(source: Path, folder: Path, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    path = folder / f"{kind}.gguf"
    write_format(source, path, kind)
    with quiet():
        engines: dict[str, Decode] = {
            "mm-gpt": ours(path, kind, args.threads),
            "llama.cpp": llama_cpp(path, args.threads),
        }
        if kind == "F32":
            engines["transformers"] = hugging_face(path)
        rows = []
        for batch in (1, 8):
            speeds: dict[str, list[float]] = {name: [] for name in engines}
            for repeat in range(args.repeats + 1):
                for name, decode in engines.items():
                    speed = decode(batch, args.new_tokens)
                    if repeat:  # the first round warms up
                        speeds[name].append(speed)
            medians = {name: statistics.median(all_speeds) for name, all_speeds in speeds.items()}
            ratios = {name: medians["mm-gpt"] / speed for name, speed in medians.items() if name != "mm-gpt"}
            rows.append({"format": kind, "batch": batch, "tokens_per_s": medians, "ratios": ratios})
    path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="3 repeats of 24 tokens")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.new_tokens = 3, 24
    torch.set_num_threads(args.threads)
    source = next(iter(download.fetch(MODEL).values()))
    features = [name for name in sorted(host_features()) if host_features()[name] and name.startswith(("avx", "fma"))]
    print(f"{args.threads} threads, kernels for {host_isa().name}; processor: {' '.join(features)}")
    print("tokens/s")
    print(f"{'format':6} {'batch':>5} {'mm-gpt':>8} {'llama.cpp':>10} {'ratio':>6} {'transformers':>13} {'ratio':>6}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.formats:
            for row in measure(source, Path(folder), kind, args):
                speed, ratio = row["tokens_per_s"], row["ratios"]
                line = f"{kind:6} {row['batch']:5} {speed['mm-gpt']:8.1f}"
                line += f" {speed['llama.cpp']:10.1f} {ratio['llama.cpp']:6.2f}"
                if "transformers" in speed:
                    line += f" {speed['transformers']:13.1f} {ratio['transformers']:6.2f}"
                print(line, flush=True)
                rows.append(row)
    result = {
        "model": MODEL,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "threads": args.threads,
        "kernels": host_isa().name,
        "features": features,
        "memory_bytes_per_s": memory_speed(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"medians of {args.repeats} alternating runs", file=sys.stderr)


if __name__ == "__main__":
    main()
