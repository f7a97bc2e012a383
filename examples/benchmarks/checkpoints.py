"""What a checkpoint costs a run: how long it stands still, how much memory it takes, its size, and how fast it loads.

python examples/benchmarks/checkpoints.py -o docs/results/checkpoints.json

A model of `--millions` matrices of 1000 × 1000 in float32 with AdamW's moments, and the model itself in float16 beside
it, in one process. Each way has a process of its own, and they take turns: `waiting` and `background` are
`train.async_save` off and on; `one file` is all of it by safetensors' `save_file`, `torch` by
torch.distributed.checkpoint's own writer of safetensors, each without the model. Times are the least of `--repeats`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.training.checkpoint import Progress, latest, load_training_state
from mm_gpt.training.saving import Saver
from mm_gpt.training.stage import LOWEST_LOSS, ParameterGroup

WAYS = ("waiting", "background", "one file", "torch")


class Matrices:
    """As much of a stage as is saved."""

    on_policy, decides = False, LOWEST_LOSS

    def __init__(self, millions: int):
        self.model = nn.ParameterDict({f"matrix{n}": torch.randn(1000, 1000) * 0.02 for n in range(millions)})

    def prepare(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", list(self.model.parameters()))]

    def save(self, folder: Path) -> None:
        write_tensors({name: p.detach().half() for name, p in self.model.items()}, folder / "model.safetensors")


def gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(way: str, millions: int, folder: Path) -> dict[str, float]:
    """Once, in this process."""
    stage = Matrices(millions)
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=1e-3, fused=True)
    gradient = torch.ones(1000, 1000)  # one for all: the peak of memory is to be that of saving
    for parameter in stage.model.parameters():
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    tensors = {f"parameter.{name}": p.detach() for name, p in stage.model.items()}
    for name, p in stage.model.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    before, start = gigabytes(), time.perf_counter()
    if way in ("waiting", "background"):
        with Saver(folder, torch.device("cpu"), background=way == "background") as saver:
            saver.save(stage, optimizer, Progress(1), best=False)  # type: ignore[arg-type]
            stalled = time.perf_counter() - start
            saver.finish()
    elif way == "one file":
        save_file(tensors, folder / "one.safetensors")
        with (folder / "one.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        stalled = time.perf_counter() - start
    else:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
        stalled = time.perf_counter() - start
    saved, peak = time.perf_counter() - start, gigabytes()
    begin = time.perf_counter()
    if step := latest(folder):
        load_training_state(step, stage, optimizer)  # type: ignore[arg-type]
    elif way == "one file":
        found = load_file(folder / "one.safetensors")
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
    else:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "stalled_seconds": round(stalled, 2),
        "saved_seconds": round(saved, 2),
        "more_memory_gb": round(peak - before, 2),
        "load_seconds": round(time.perf_counter() - begin, 2),
        "gb_on_disk": round(size / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=135)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="one of them, once, here")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.way:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.way, args.millions, Path(folder))))
        return
    results: dict[str, dict[str, float]] = {}
    for _ in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--millions", str(args.millions)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            known = results.setdefault(way, found)
            results[way] = {key: min(known[key], value) for key, value in found.items()}
    for way, found in results.items():
        print(f"{way}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    if args.out:
        about = {"parameters": args.millions * 10**6, "threads": torch.get_num_threads(), "torch": torch.__version__}
        command_line = f"python examples/benchmarks/checkpoints.py --millions {args.millions} --repeats {args.repeats}"
        args.out.write_text(json.dumps({"command": command_line, **about, "ways": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
