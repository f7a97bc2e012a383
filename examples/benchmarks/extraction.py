"""Pages per second and core, from HTML to text with images, beside `trafilatura.extract`, on the same pages.

The two take turns on each page. Counted is processor time of one process, which a busy machine does not stretch, from
the bytes of a page on. Ours gives a Document: the same text, images where they stand, metadata, opt-outs honoured.
trafilatura gives a string, without comments, once without and once with its own images.

    python examples/benchmarks/extraction.py FOLDER_OF_PAGES
    python examples/benchmarks/extraction.py crawl.warc.gz --pages 500 --json result.json

Real pages without a network at hand: `apt-get download gimp-help-en python-sklearn-doc`, then `dpkg -x`.
"""

import argparse
import json
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import trafilatura
from tqdm import tqdm

from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.web.extract import ExtractConfig, extract
from mm_gpt.datasets.web.pages import Page, folder_pages
from mm_gpt.datasets.web.warc import warc_pages
from mm_gpt.document import Document, Text


def pages_of(location: str, count: int) -> list[Page]:
    """A folder's pages in a random order that is always the same; a WARC's first ones."""
    errors = ErrorCounter()
    if re.search(r"\.warc(\.\w+)?$", location):
        return list(islice(warc_pages(location, errors), count))
    pages = list(folder_pages(location, errors))
    random.Random(0).shuffle(pages)
    return pages[:count]


def missing_characters(document: Document, reference: str) -> int:
    """How many letters of trafilatura's text ours has not, order aside."""
    ours = Counter("".join(s.text for s in document.segments if isinstance(s, Text)))
    return sum(n for c, n in (Counter(reference) - ours).items() if c.isalpha())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("location", help="a folder of .html files, or a WARC file")
    parser.add_argument("--pages", type=int, default=200, help="how many pages (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often; the fastest counts (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="without the comparison of extractors, in both")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    args = parser.parse_args()

    pages = pages_of(args.location, args.pages)
    config = ExtractConfig(fast=args.fast)
    options: dict[str, Any] = {"include_comments": False, "fast": args.fast}
    runs: dict[str, Callable[[Page], Any]] = {
        "mm-gpt": lambda page: extract(page.html, page.url or "https://example.com/", config, headers=page.headers),
        "trafilatura": lambda page: trafilatura.extract(page.html, **options),
        "trafilatura with images": lambda page: trafilatura.extract(page.html, include_images=True, **options),
    }
    seconds = dict.fromkeys(runs, 0.0)
    found: Counter[str] = Counter()
    for number, page in enumerate(tqdm(pages, unit="page")):
        best = dict.fromkeys(runs, float("inf"))
        results: dict[str, Any] = {}
        names = list(runs)
        for turn in range(args.rounds):
            for name in names[(number + turn) % 3 :] + names[: (number + turn) % 3]:
                start = time.process_time()
                results[name] = runs[name](page)
                best[name] = min(best[name], time.process_time() - start)
        for name, value in best.items():
            seconds[name] += value
        document, reference = results["mm-gpt"], results["trafilatura"]
        if document is not None and reference is not None:
            found["documents"] += 1
            found["letters"] += sum(map(str.isalpha, reference))
            found["letters missing"] += missing_characters(document, reference)
            found["images"] += len(document.images)
            found["images of trafilatura"] += (results["trafilatura with images"] or "").count("](")
        elif document is not None or reference is not None:
            found["pages that only one extracts"] += 1
    result = {
        "pages": len(pages),
        "megabytes": sum(len(page.html) for page in pages) / 1e6,
        "pages_per_second_and_core": {name: len(pages) / max(s, 1e-9) for name, s in seconds.items()},
        "ratio": seconds["trafilatura"] / max(seconds["mm-gpt"], 1e-9),
        **{name.replace(" ", "_"): count for name, count in found.items()},
        "trafilatura": trafilatura.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
