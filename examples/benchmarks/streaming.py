"""What it takes to start and to feed training from many captioned records in tars.

    python examples/benchmarks/streaming.py --out docs/results/streaming.json [--records 1000 10000 100000 1000000]

For each number of records: the seconds to index them, then, in a new process with that index, the seconds to the first
batch, the memory of the training process, and its processor time for each record (one worker reads). The records are
made in --folder, about 2.5 KB each, and kept there for the next time.
"""

import argparse
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

PER_TAR = 10_000
THINGS = ["dog", "man", "woman", "child", "horse", "ball", "boat", "tree", "street", "car", "bird", "table", "wall"]
WORDS = ["red", "small", "old", "wooden", "happy", "wet", "large", "blue", "young", "green"]
PLACES = ["on the grass", "in the snow", "by the sea", "near a fence", "under a bridge", "at night", "in a park"]


def make(folder: Path, count: int) -> Path:
    """Tars of `count` records: a small JPEG, and a JSON with two captions and a question."""
    from PIL import Image

    done = folder / "complete"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(count)
    pictures = []
    for _ in range(64):
        buffer = io.BytesIO()
        Image.effect_noise((24, 24), 40).convert("RGB").save(buffer, "JPEG", quality=60)
        pictures.append(buffer.getvalue())
    for start in tqdm(range(0, count, PER_TAR), desc="making tars", unit="tar", delay=2):
        with tarfile.open(folder / f"{start // PER_TAR:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + PER_TAR, count)):
                thing, other = rng.sample(THINGS, 2)
                captions = [
                    f"A {rng.choice(WORDS)} {name} {rng.choice(PLACES)} with {rng.choice(WORDS)} things."
                    for name in (thing, other)
                ]
                value = {"captions": captions, "qa": [{"question": f"Is there a {thing}?", "answer": "yes"}]}
                for suffix, data in (("jpg", rng.choice(pictures)), ("json", json.dumps(value).encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    done.touch()
    return folder


def start_training(folder: Path, tokenizer: Path, records: int) -> dict[str, float]:
    """In this process: the tiny model on what is in `folder`, up to `records` records."""
    import torch

    from mm_gpt.datasets.loading.sources import SourceConfig
    from mm_gpt.tokenizer import Tokenizer
    from mm_gpt.training.language import LanguageTask
    from mm_gpt.training.recipes import tiny

    torch.set_num_threads(1)
    import dataclasses

    recipe = dataclasses.replace(
        tiny(str(folder.parent)),
        sources=(SourceConfig(path=folder.name),),
        holdout=0.01,
        workers=1,
    )
    learned = Tokenizer.from_hf_folder(tokenizer)
    begin = time.perf_counter()
    task = LanguageTask(recipe, learned)
    opened = time.perf_counter() - begin
    task.micro_batches(0, 1)
    first = time.perf_counter() - begin
    seen, step, cpu = 0, 1, time.process_time()
    while seen < records:
        seen += sum(len(row.split()) for batch in task.micro_batches(step, 1) for row in batch.ids)
        step += 1
    cpu = time.process_time() - cpu
    task.loader.close()
    return {
        "opened_s": opened,
        "first_batch_s": first,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "main_ms_per_record": 2000 * cpu / seen,
    }


def index(folder: Path, tokenizer: Path) -> float:
    """Seconds to index `folder`, anew."""
    from mm_gpt.datasets.loading.index import index_tables
    from mm_gpt.datasets.loading.sources import SourceConfig
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.tokenizer import Tokenizer
    from mm_gpt.training.language import LanguageTask  # noqa: F401 (loaded before the clock starts)

    measure = measure_of(Tokenizer.from_hf_folder(tokenizer), folder)
    shutil.rmtree(folder / ".index", ignore_errors=True)
    begin = time.perf_counter()
    config = SourceConfig(path=folder.name)
    errors = ErrorCounter()
    index_tables(config.open(folder.parent, errors), measure, folder.name, errors)
    return time.perf_counter() - begin


def measure_of(tokenizer, folder: Path):  # type: ignore[no-untyped-def]
    from mm_gpt.datasets.loading.index import Measure
    from mm_gpt.training.language import build_model
    from mm_gpt.training.recipes import tiny

    recipe = tiny(str(folder.parent))
    return Measure(build_model(recipe, tokenizer)[1], recipe.row_length)


def child(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mm-gpt-streaming")
    parser.add_argument("--documents", type=int, default=4_000, help="that are fed to the training process")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, folder, tokenizer = options.child[0], Path(options.child[1]), Path(options.child[2])
        result = start_training(folder, tokenizer, options.documents) if kind == "train" else index(folder, tokenizer)
        print(json.dumps(result))
        return
    from mm_gpt.tokenizer import Tokenizer

    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = options.folder / "tokenizer"
    words = [
        f"A {word} {thing} {place} with things. Is there a?" for word in WORDS for thing in THINGS for place in PLACES
    ]
    tokenizer.mkdir(exist_ok=True)
    Tokenizer.train([*words, *["user assistant system yes no"] * 9], 500).save_folder(tokenizer)
    rows = []
    for count in options.records:
        folder = make(options.folder / f"records-{count}", count)
        seconds = float(child("--child", "index", folder, tokenizer))
        trained = json.loads(child("--documents", options.documents, "--child", "train", folder, tokenizer))
        rows.append({"records": count, "index_s": seconds, **trained})
        print(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}))
    values: dict[str, object] = {"rows": rows}
    if len(rows) > 1:
        small, large = rows[-2:]  # of fewer records, starting the processes takes longer than they work
        steeper = math.log(large["index_s"] / small["index_s"])
        values["index_exponent"] = steeper / math.log(large["records"] / small["records"])
        values["more_memory_mb"] = rows[-1]["peak_mb"] - rows[0]["peak_mb"]
        print({key: value for key, value in values.items() if key != "rows"})
    if options.out:
        options.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
