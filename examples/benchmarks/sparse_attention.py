"""Time and memory of attention patterns against the length of the text, and the exponents of both.

Dense grows with n²; local with a fixed window grows with n; strided and fixed, with l ≈ √n, with n·√n. Dense is torch's
fused kernel, whose memory grows with n only; `product` is the plain one, all pairs of scores under the strided mask.

Time is the processor time of one thread, so that other work on the machine counts little; what is reported is the
median of rounds in which the patterns take turns. Memory is the peak of what torch allocates during a call, as its
profiler counts it, without the inputs.

    python examples/benchmarks/sparse_attention.py --backward --out result.json --plot result.png
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from mm_gpt.model.attention import DENSE, Pattern, attend, visible

PATTERNS = ("dense", "product", "local", "strided", "fixed")
EXPECTED = {"dense": 2, "product": 2, "local": 1, "strided": 1.5, "fixed": 1.5}
"""Exponents of time on paper."""


def stride_for(length: int) -> int:
    """The power of two closest to √n, on a logarithmic scale."""
    return 2 ** math.floor(math.log2(length) / 2 + 0.5)


def make_pattern(name: str, length: int, args: argparse.Namespace) -> Pattern:
    stride = stride_for(length)
    if name == "local":
        return Pattern(kind="local", window=args.window)
    if name == "fixed":
        return Pattern(kind="fixed", stride=stride, summary=min(args.summary, stride))
    return DENSE if name == "dense" else Pattern(kind="strided", stride=stride)


def product(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """All (T, T) scores, most of them for nothing."""
    index = torch.arange(q.shape[2])
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible(pattern, index, index), -math.inf).softmax(-1) @ v


def run(name: str, inputs: list[Tensor], args: argparse.Namespace, *, backward: bool) -> None:
    pattern = make_pattern(name, inputs[0].shape[2], args)
    with torch.set_grad_enabled(backward):
        y = product(*inputs, pattern) if name == "product" else attend(*inputs, pattern=pattern)
        if backward:
            torch.autograd.grad(y.sum(), inputs)


def seconds(name: str, inputs: list[Tensor], args: argparse.Namespace, *, backward: bool) -> float:
    start = time.process_time()
    run(name, inputs, args, backward=backward)
    return time.process_time() - start


def peak_bytes(name: str, inputs: list[Tensor], args: argparse.Namespace, *, backward: bool) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run(name, inputs, args, backward=backward)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    sizes.sort(key=lambda e: e["ts"])
    return int(np.cumsum([e["args"]["Bytes"] for e in sizes]).max())


def exponent(lengths: list[int], values: list[float]) -> float | None:
    """The slope of the least-squares line through the points on logarithmic axes."""
    if len(lengths) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def draw(rows: list[dict], exponents: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = list(exponents)
    figure, axes = plt.subplots(len(phases), 2, figsize=(10, 4 * len(phases)), squeeze=False, layout="constrained")
    for phase, line in zip(phases, axes, strict=True):
        for axis, column, title, unit in zip(
            line, ("seconds", "peak_bytes"), ("time", "extra memory"), (1, 2**20), strict=True
        ):
            for name in PATTERNS:
                points = [row for row in rows if row["pattern"] == name and row["phase"] == phase]
                slope = exponents[phase][name][column]
                label = name if slope is None else f"{name}: n^{slope:.2f}"
                values = [row[column] / unit for row in points]
                axis.loglog([row["length"] for row in points], values, "o-", base=2, label=label)
            axis.set_yscale("log")
            axis.set_xlabel("tokens")
            axis.set_ylabel("seconds" if unit == 1 else "MiB")
            axis.set_title(f"{title}, {phase}")
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=256, help="tokens that local sees")
    parser.add_argument("--summary", type=int, default=8, help="c of fixed")
    parser.add_argument("--product-up-to", type=int, default=8192, help="longest text of the plain product (gigabytes)")
    parser.add_argument("--backward", action="store_true", help="also measure training: forward and backward")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    parser.add_argument("--plot", type=Path, help="also draw it, as PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    phases = {"forward": False, "forward and backward": True} if args.backward else {"forward": False}
    rows: list[dict] = []
    for length in args.lengths:
        generator = torch.Generator().manual_seed(length)
        shape = (1, args.heads, length, args.head_size)
        inputs = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
        names = [name for name in PATTERNS if name != "product" or length <= args.product_up_to]
        for phase, backward in phases.items():
            times: dict[str, list[float]] = {name: [] for name in names}
            peaks = {name: peak_bytes(name, inputs, args, backward=backward) for name in names}  # warms up, too
            for _ in tqdm(range(args.repeats), desc=f"{length} tokens, {phase}"):
                for name in names:
                    times[name].append(seconds(name, inputs, args, backward=backward))
            for name in names:
                pattern = make_pattern(name, length, args)
                rows.append(
                    {
                        "pattern": name,
                        "length": length,
                        "phase": phase,
                        "window": pattern.window,
                        "stride": pattern.stride,
                        "summary": pattern.summary,
                        "seconds": statistics.median(times[name]),
                        "fastest_seconds": min(times[name]),
                        "peak_bytes": peaks[name],
                    }
                )
    exponents: dict[str, dict] = {}
    for phase in phases:
        print(f"{phase:20}" + "".join(f"{length:>16}" for length in args.lengths) + "   exponents (time on paper)")
        exponents[phase] = {}
        for name in PATTERNS:
            points = [row for row in rows if row["pattern"] == name and row["phase"] == phase]
            slopes = {
                column: exponent([row["length"] for row in points], [row[column] for row in points])
                for column in ("seconds", "peak_bytes")
            }
            exponents[phase][name] = slopes
            cells = "".join(f"{row['seconds'] * 1e3:8.1f}ms{row['peak_bytes'] / 2**20:5.0f}M" for row in points)
            cells = cells.ljust(16 * len(args.lengths))
            fitted = ", ".join("-" if slope is None else f"{slope:.2f}" for slope in slopes.values())
            print(f"{name:20}{cells}   {fitted} ({EXPECTED[name]})")
    if args.out:
        result = {
            "dtype": "float32",
            "heads": args.heads,
            "head_size": args.head_size,
            "repeats": args.repeats,
            "threads": 1,
            "time": "median processor seconds of one thread",
            "memory": "peak bytes allocated by torch during the call, without the inputs (torch.profiler)",
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "exponents": exponents,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        draw(rows, exponents, args.plot)


if __name__ == "__main__":
    main()
