"""How full the rows are that documents are packed into, and what other ways of batching would waste.

python examples/benchmarks/packing.py corpus --row-length 512 2048 -o docs/results/packing.json

For each corpus and row length: the share of positions that hold a token, over one epoch of the loader's own plan; and
for comparison, of the same pieces in batches of eight padded to the longest, and of whole documents packed one after
the other where the next one still fits (next-fit), cut at the row's end.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from mm_gpt.datasets.loading.index import Measure
from mm_gpt.datasets.loading.plan import Plan
from mm_gpt.datasets.loading.sources import SourceConfig, open_sources
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.processor import Processor


def measure(location: str, processor: Processor, row_length: int) -> dict[str, object]:
    config, errors = SourceConfig(path=location), ErrorCounter()
    (source,) = open_sources([config], [config.open(Path(), errors)], Measure(processor, row_length), errors=errors)
    plan = Plan([source], row_length=row_length)
    rows = [row for row, _ in itertools.takewhile(lambda found: found[1].epoch == 0, plan.rows())]
    tokens = sum(item.tokens for row in rows for item in row)
    lengths = [item.tokens for row in rows for item in row]
    random.Random(0).shuffle(lengths)
    padded = sum(8 * max(lengths[at : at + 8]) for at in range(0, len(lengths) - 7, 8))
    next_fit, left = 0, 0
    for length in lengths:
        if length > left:
            next_fit, left = next_fit + 1, row_length
        left -= length
    return {
        "corpus": Path(location).name,
        "row_length": row_length,
        "pieces": len(lengths),
        "images": source.images,
        "tokens": tokens,
        "used": round(tokens / (len(rows) * row_length), 4),
        "used by next-fit": round(tokens / (next_fit * row_length), 4),
        "used in batches of eight": round(sum(lengths[: len(lengths) // 8 * 8]) / max(1, padded), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--row-length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--model", default="default", help="whose tokenizer and image size count (default: default)")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    _, processor = load_model(args.model)
    results = [measure(corpus, processor, length) for corpus in args.corpus for length in args.row_length]
    print("| corpus | row | pieces | images | tokens | used | next-fit | batches of eight |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in results:
        shares = (
            f"{100 * float(str(r[key])):.1f} %" for key in ("used", "used by next-fit", "used in batches of eight")
        )
        counts = (f"{r[key]:,}" for key in ("row_length", "pieces", "images", "tokens"))
        print(f"| {r['corpus']} | {' | '.join([*counts, *shares])} |")
    if args.out is not None:
        args.out.write_text(json.dumps({"model": args.model, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
