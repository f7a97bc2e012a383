"""The first answer of a fresh process: seconds until it is printed and until the process has ended, and peak memory.

Each answer is a process of its own, `python -m mm_gpt ask PHOTO QUESTION`. With `--against`, another checkout, perhaps
with another environment, takes turns with this one, so that a busy moment of the machine hits both; what is reported
is the ratio of the medians. The first round, which fills the caches, does not count.

    python examples/benchmarks/first_answer.py --against ../older-checkout
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "mm_gpt/serving/samples/cat.jpg"
QUESTION = "What colour is the cat?"


@dataclass(frozen=True)
class Run:
    answer_s: float
    """Until the answer is on stdout."""
    wall_s: float
    """Until the process has ended."""
    cpu_s: float
    """Of all cores, in user and system mode."""
    peak_mb: float
    """Resident memory, pages of files included."""


def run(python: str, checkout: Path, words: list[str]) -> tuple[Run, str]:
    """One process. This one has to stay small: the kernel counts what a process holds before it becomes another."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    process = subprocess.Popen([python, "-m", "mm_gpt", *words], stdout=subprocess.PIPE, env=environment, cwd=checkout)
    assert process.stdout is not None
    first = process.stdout.read(1)
    answered = time.perf_counter()
    text = first + process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended = time.perf_counter()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{checkout}: `mm-gpt {' '.join(words)}` failed with exit code {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return Run(answered - start, ended - start, usage.ru_utime + usage.ru_stime, peak), text.decode().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--against-python", default=sys.executable, metavar="PYTHON", help="default: this one")
    parser.add_argument("--photo", type=Path, default=PHOTO)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="what else `mm-gpt ask` gets; the last")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    words = ["ask", str(args.photo.resolve()), args.question, *args.options]
    subjects = {"this": (sys.executable, ROOT)}
    if args.against is not None:
        subjects["against"] = (args.against_python, args.against.resolve())
    runs: dict[str, list[Run]] = {name: [] for name in subjects}
    answers = {}
    for repeat in range(args.repeats + 1):
        for name, (python, checkout) in subjects.items():
            measured, answers[name] = run(python, checkout, words)
            if repeat:
                runs[name].append(measured)
    rows = []
    for name, all_runs in runs.items():
        values = [asdict(each) for each in all_runs]
        medians = {key: round(statistics.median(value[key] for value in values), 3) for key in values[0]}
        rows.append({"checkout": name, "answer": answers[name], **medians})
        print(
            f"{name:8} answer after {medians['answer_s']:.2f} s, end after {medians['wall_s']:.2f} s; "
            f"{medians['cpu_s']:.2f} s of processors, {medians['peak_mb']:.0f} MB: {answers[name]!r}"
        )
    result = {
        "what": "a fresh process of `mm-gpt ask`; medians of rounds in which the checkouts take turns",
        "words": [args.photo.name, args.question, *args.options],
        "repeats": args.repeats,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "rows": rows,
    }
    if len(rows) == 2:
        result["ratios"] = {key: round(rows[0][key] / rows[1][key], 3) for key in ("answer_s", "wall_s", "cpu_s")}
        print("this / against:", result["ratios"])
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
