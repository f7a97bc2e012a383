"""`mm-gpt caption` on a folder of photos, in fresh processes, against another checkout of this project.

The two take turns; what is reported are seconds and photos a second, and the ratio of the medians. Without FOLDER, real
photos in mixed sizes are written into a temporary one.

    python examples/benchmarks/captioning.py --against ../older-checkout
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smolvlm import photos, processor_features

ROOT = Path(__file__).resolve().parents[2]


def caption(python: str, checkout: Path, folder: Path, options: list[str]) -> float:
    """Seconds of one process that captions all photos."""
    with tempfile.TemporaryDirectory() as place:
        command = [python, "-m", "mm_gpt", "caption", str(folder), "-o", f"{place}/captions.jsonl", *options]
        start = time.perf_counter()
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=checkout, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{checkout}: {done.stderr.strip()}")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--photos", type=int, default=64, help="written where there is no FOLDER")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="what else `mm-gpt caption` gets; last")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        if args.folder is None:
            for number, picture in enumerate(photos(args.photos)):
                picture.save(folder / f"{number:03}.jpg", quality=88)
        checkouts = {"this": ROOT, **({"against": args.against.resolve()} if args.against else {})}
        times: dict[str, list[float]] = {name: [] for name in checkouts}
        for repeat in range(args.repeats + 1):
            for name, checkout in checkouts.items():
                seconds = caption(sys.executable, checkout, folder.resolve(), args.options)
                if repeat:  # the first round fills the caches
                    times[name].append(seconds)
        count = len(list(folder.iterdir()))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:8} {seconds:7.1f} s   {count / seconds:5.2f} photos/s")
    ratio = medians["against"] / medians["this"] if args.against else None
    if ratio is not None:
        print(f"ratio {ratio:.2f}")
    if args.output:
        result = {"photos": count, "seconds": times, "ratio": ratio, "processor": processor_features()}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
