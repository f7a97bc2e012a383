"""How long answers and captions take, of two checkouts (or two models) in the same run.

git worktree add before COMMIT
python examples/benchmarks/answer_time.py photos --against before -o docs/results/answer_time.json

Each is a process of its own, loaded and warmed up, and they take turns; photos are never seen twice by one of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

QUESTION = "What is the main thing in the picture?"
HERE = Path(__file__).resolve().parents[2]


def measure(photos: list[Path], model: str) -> dict[str, float]:
    """Seconds for each photo: a short answer, and a caption with the others in a batch."""
    import mm_gpt

    assistant = mm_gpt.load(model)
    first, *others = photos
    assistant.ask(str(first), QUESTION, max_new_tokens=8)
    half = len(others) // 2
    start = time.perf_counter()
    tokens = 0
    for photo in others[:half]:
        tokens += len(assistant.ask(str(photo), QUESTION, max_new_tokens=8).ids)
    answered = time.perf_counter()
    list(assistant.captions(map(str, others[half:])))
    described = time.perf_counter()
    return {
        "answer": (answered - start) / half,
        "answer tokens": tokens / half,
        "caption": (described - answered) / (len(others) - half),
    }


def run(checkout: Path, photos: Path, model: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(photos), "--worker", "--model", model]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of at least 9 photos")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    photos = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(photos) < 9:
        parser.error(f"{args.photos}: {len(photos)} photos, at least 9 are needed")
    if args.worker:
        print(json.dumps(measure(photos, args.model)))
        return
    checkouts = {"now": HERE} | ({} if args.against is None else {"before": args.against.resolve()})
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            seconds[name].append(run(checkout, args.photos.resolve(), args.model))
            print(f"{name}: {seconds[name][-1]}", file=sys.stderr)
    result: dict[str, object] = {"photos": len(photos), "rounds": args.rounds, "cores": os.cpu_count()}
    middle = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in seconds.items()
    }
    result["seconds for each photo"] = middle
    if "before" in middle:
        result["now / before"] = {key: middle["now"][key] / middle["before"][key] for key in ("answer", "caption")}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
