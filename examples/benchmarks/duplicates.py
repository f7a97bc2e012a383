"""Finding near-duplicates: speed and quality against datasketch, datatrove and rensa; how time and memory grow.

Compared, on the same documents, with 128 hashes and shingles of five words, on one core, taking turns:

- signatures: from the text to the signature. datasketch gets words from a regular expression, with its default SHA-1
  and with xxHash, and so does rensa, which is written in Rust (R-MinHash, and C-MinHash of one permutation that is
  turned); datatrove splits at spaces here (its tokenizer for English, spaCy, is slower).
- permutations: from shingle hashes to the signature alone.
- quality: which of the planted pairs are found. A pair is one from an exact Jaccard similarity of 0.8 on. datasketch:
  MinHashLSH with this threshold; datatrove: 16 buckets of 8 hashes, linked as its second stage does; rensa: 16 bands
  of 8 hashes, and of the pairs that share one those whose signatures agree by the threshold.

Growth: from a thousand documents of about 100 words on, a tenth of them exact copies and a tenth near copies, through
both phases, each size in a process of its own. Time is that of the processor, which other work on the machine hardly
stretches; for fingerprints it includes making up the documents. Memory is the most resident memory of the process
(VmHWM) minus what it had before the phase.

    python examples/benchmarks/duplicates.py
    python examples/benchmarks/duplicates.py --largest 1000000 --out result.json --plot result.png
    python examples/benchmarks/duplicates.py --largest 0 --out result.json  # the comparison alone; growth stays
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_gpt.datasets.duplicates.documents import find_duplicates
from mm_gpt.datasets.duplicates.fingerprints import write_fingerprints
from mm_gpt.datasets.duplicates.minhash import MinHash, shingle_hashes, word_hashes
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Text

THRESHOLD = 0.8
NUM_WORDS = 5
WORD = re.compile(r"\w+")
MEMORY = 256 << 20


def vocabulary(size: int = 20_000) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(size)]


# ---- against others ----


def planted(count: int) -> tuple[list[str], list[float]]:
    """Texts of 100 to 600 words and, after each, its copy with some of the words changed; the pairs' similarities."""
    chance, known = random.Random(1), vocabulary()
    texts, similarities = [], []
    for _ in range(count):
        words = chance.choices(known, k=chance.randint(100, 600))
        copy = list(words)
        for place in chance.sample(range(len(copy)), int(len(copy) * chance.uniform(0, 0.08))):
            copy[place] = chance.choice(known)
        first, second = (set(zip(*(part[i:] for i in range(NUM_WORDS)), strict=False)) for part in (words, copy))
        texts += [" ".join(words), " ".join(copy)]
        similarities.append(len(first & second) / len(first | second))
    return texts, similarities


def word_shingles(text: str) -> list[str]:
    words = WORD.findall(text.lower())
    return [" ".join(words[i : i + NUM_WORDS]) for i in range(len(words) - NUM_WORDS + 1)]


def encoded_shingles(text: str) -> list[bytes]:
    return [shingle.encode() for shingle in word_shingles(text)]


class SplitAtSpaces:
    """A word tokenizer for datatrove."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


def datatrove_signer(folder: str) -> Any:
    import datatrove.pipeline.dedup.minhash as module
    import xxhash
    from datatrove.utils.hashing import HashConfig

    module.load_word_tokenizer = lambda language: SplitAtSpaces()
    config = module.MinhashConfig(
        n_grams=NUM_WORDS, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=32)
    )
    signer = module.MinhashDedupSignature(folder, config)
    signer._hash_func = lambda text: xxhash.xxh32_intdigest(text.encode())  # its own passes str, refused by xxhash 4
    return signer


def seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in tqdm(range(rounds), desc=", ".join(functions)):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare_speed(texts: list[str], rounds: int, folder: str) -> dict[str, Any]:
    import rensa
    import xxhash
    from datasketch import MinHash as Sketch

    ours, signer = MinHash(threshold=THRESHOLD, shingle_words=NUM_WORDS), datatrove_signer(folder)
    shingles = [shingle_hashes(word_hashes(text), NUM_WORDS) for text in texts]
    as_numbers, as_columns = (
        [part.tolist() for part in shingles],
        [part.astype(np.uint64)[:, None] for part in shingles],
    )

    def sketch(hashfunc: Callable[[Any], int] | None, part: list[Any]) -> None:
        Sketch(num_perm=128, hashfunc=hashfunc).update_batch(part)

    def rusty(kind: Any, text: str) -> None:
        made = kind(128, 1)
        made.update(word_shingles(text))
        made.digest()

    signatures = seconds(
        {
            "mm-gpt": lambda: [ours.signature(text) for text in texts],
            "datasketch": lambda: [sketch(None, encoded_shingles(text)) for text in texts],
            "datasketch, xxHash": lambda: [sketch(xxhash.xxh32_intdigest, encoded_shingles(text)) for text in texts],
            "rensa": lambda: [rusty(rensa.RMinHash, text) for text in texts],
            "rensa, C-MinHash": lambda: [rusty(rensa.CMinHash, text) for text in texts],
            "datatrove": lambda: [signer.get_signature(signer.get_shingles(text)) for text in texts],
        },
        rounds,
    )
    permutations = seconds(
        {
            "mm-gpt": lambda: [ours.signature_of(part) for part in shingles],
            "datasketch": lambda: [sketch(int, part) for part in as_numbers],
            "datatrove": lambda: [signer.get_signature(part) for part in as_columns],
        },
        rounds,
    )
    result = {}
    for name, times in (("signatures", signatures), ("permutations", permutations)):
        result[name] = {
            who: {"documents_per_s": len(texts) / value, "mm-gpt_is_faster_by": value / times["mm-gpt"]}
            for who, value in times.items()
        }
    return result


def ours_finds(texts: list[str], folder: Path) -> set[tuple[int, int]]:
    documents = (Document((Text(text),), id=f"{index:08}") for index, text in enumerate(texts))
    write_fingerprints(documents, folder / "part", ErrorCounter(), minhash=MinHash(threshold=THRESHOLD))
    return {(int(one.duplicate_of), int(one.document)) for one in find_duplicates([folder / "part"])}


def datasketch_finds(texts: list[str]) -> set[tuple[int, int]]:
    from datasketch import MinHash as Sketch
    from datasketch import MinHashLSH

    index, found = MinHashLSH(threshold=THRESHOLD, num_perm=128), set()
    for number, text in enumerate(texts):
        sketch = Sketch(num_perm=128)
        sketch.update_batch(encoded_shingles(text))
        found |= {(other, number) for other in index.query(sketch)}
        index.insert(number, sketch)
    return found


def rensa_finds(texts: list[str]) -> set[tuple[int, int]]:
    import rensa

    index, found = rensa.RMinHashLSH(THRESHOLD, 128, 16), set()
    made = []
    for number, text in enumerate(texts):
        made.append(rensa.RMinHash(128, 1))
        made[-1].update(word_shingles(text))
        similar = [other for other in index.query(made[-1]) if made[-1].jaccard(made[other]) >= THRESHOLD]
        found |= {(other, number) for other in similar}
        index.insert(number, made[-1])
    return found


def datatrove_finds(texts: list[str], folder: str) -> set[tuple[int, int]]:
    signer, found = datatrove_signer(folder), set()
    signatures = [signer.get_signature(signer.get_shingles(text)) for text in texts]
    for band in range(16):
        order = sorted((signature[band], number) for number, signature in enumerate(signatures))
        found |= {(a[1], b[1]) for a, b in pairwise(order) if a[0] == b[0]}
    return found


def compare_quality(count: int, folder: str) -> dict[str, Any]:
    texts, similarities = planted(count)
    true = {(2 * i, 2 * i + 1) for i, similarity in enumerate(similarities) if similarity >= THRESHOLD}
    clear = {(2 * i, 2 * i + 1) for i, similarity in enumerate(similarities) if similarity >= THRESHOLD + 0.1}
    result: dict[str, Any] = {"pairs": count, "duplicates": len(true), "of_similarity_above_0.9": len(clear)}
    for name, found in (
        ("mm-gpt", ours_finds(texts, Path(folder))),
        ("datasketch", datasketch_finds(texts)),
        ("datatrove", datatrove_finds(texts, folder)),
        ("rensa", rensa_finds(texts)),
    ):
        right = len(found & true)
        result[name] = {
            "recall": right / len(true),
            "recall_above_0.9": len(found & clear) / len(clear),
            "precision": right / max(1, len(found)),
        }
    return result


# ---- growth ----


def stream(count: int) -> Iterator[Document]:
    """Of ten documents in a row the second is a copy of the first, the third has one word of it changed."""
    known, size = vocabulary(), 1000
    for start in range(0, count, size):
        chance = np.random.default_rng(start)
        numbers, lengths = chance.integers(0, len(known), (size, 120)), chance.integers(80, 120, size)
        for place in range(min(size, count - start)):
            source = place - place % 10 if place % 10 in (1, 2) else place
            words = [known[number] for number in numbers[source, : lengths[source]].tolist()]
            if place % 10 == 2:
                words[40] = "changed"
            yield Document((Text(" ".join(words)),), id=f"{start + place:010}")


def memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def clock() -> Any:
    """Seconds of the processor, and of the clock on the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def measure(count: int, scratch: str) -> dict[str, Any]:
    """Both phases over `count` documents."""
    for _ in stream(1000):  # what the stream itself takes
        pass
    MinHash().signature("the tables of characters")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        before, start = memory(), clock()
        write_fingerprints(stream(count), f"{folder}/part", ErrorCounter())
        first, middle = clock() - start, memory()
        disk = sum(path.stat().st_size for path in Path(folder, "part").iterdir())
        start = clock()
        reasons = Counter(one.reason for one in find_duplicates([f"{folder}/part"], memory=MEMORY, scratch=folder))
        second = clock() - start
    return {
        "documents": count,
        "fingerprints_cpu_s": first[0],
        "fingerprints_s": first[1],
        "fingerprints_growth_bytes": middle - before,
        "fingerprints_disk_bytes": disk,
        "find_cpu_s": second[0],
        "find_s": second[1],
        "find_growth_bytes": memory() - middle,
        "found": dict(reasons),
    }


def exponent(rows: list[dict[str, Any]], key: str) -> float | None:
    """The slope of processor time over documents, both logarithmic, from ten thousand documents on."""
    points = [(row["documents"], row[key]) for row in rows if row["documents"] >= 10_000]
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) > 1 else None


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    counts = [row["documents"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, name in (("fingerprints_cpu_s", "fingerprints"), ("find_cpu_s", "finding duplicates")):
        slope = exponent(rows, key)
        label = name if slope is None else f"{name}: time ~ documents^{slope:.2f}"
        left.loglog(counts, [row[key] for row in rows], "o-", label=label)
    left.loglog(counts, [rows[-1]["find_cpu_s"] * count / counts[-1] for count in counts], "k:", label="linear")
    left.set(xlabel="documents", ylabel="processor seconds")
    for key, name in (("fingerprints_growth_bytes", "fingerprints"), ("find_growth_bytes", "finding duplicates")):
        right.semilogx(counts, [row[key] / 2**20 for row in rows], "o-", label=name)
    right.semilogx(counts, [row["fingerprints_disk_bytes"] / 2**20 for row in rows], "k:", label="fingerprints on disk")
    right.axhline(MEMORY / 2**20, color="grey", label="memory limit")
    right.set(xlabel="documents", ylabel="peak memory, MiB", ylim=(0, 1.5 * MEMORY / 2**20))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(result: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=100_000, help="documents; 0: no growth (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="planted pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", help="where gigabytes go for a while (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--plot", type=Path, help="draw the growth")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.scratch or tempfile.gettempdir())))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        speed = compare_speed(planted(200)[0], args.rounds, folder)
        quality = compare_quality(args.pairs, folder)
    result: dict[str, Any] = {
        "what": " ".join((__doc__ or "").split("\n\n    python")[0].split()),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("numpy", "datasketch", "datatrove", "rensa")},
        "documents_compared": {"speed": 400, "quality": 2 * args.pairs},
        **speed,
        "quality": quality,
    }
    if args.largest < 1000 and args.out and args.out.is_file():
        result["growth"] = json.loads(args.out.read_text()).get("growth")
    rows: list[dict[str, Any]] = []
    counts = [10**power for power in range(3, 10) if 10**power <= args.largest]
    for count in tqdm(counts, desc="growth"):
        command = [
            sys.executable,
            __file__,
            "--one",
            str(count),
            *(["--scratch", args.scratch] if args.scratch else []),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        result["growth"] = {
            "memory_limit_bytes": MEMORY,
            "exponent_fingerprints": exponent(rows, "fingerprints_cpu_s"),
            "exponent_find": exponent(rows, "find_cpu_s"),
            "rows": rows,
        }
        write(result, args.out)  # after each size: the largest takes long
        if args.plot:
            plot(rows, args.plot)
    write(result, args.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
