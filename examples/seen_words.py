"""The words that training data say about their pictures: what `mm_gpt.inference.hints` asks about a question.

    python examples/seen_words.py mm_gpt/weights/default/words.txt DATA/*/train*.tar DATA/concepts/classes.tar

Takes tars with a JSON file for each picture, or record of concepts without one, which holds `captions` or
question-answer pairs (`qa`). A word counts if it came with at least `--least` of them.
"""

import argparse
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def pictures(path: Path) -> Iterator[str]:
    """All that is said about each picture, or about what its concepts would show."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".json") and (file := tar.extractfile(member)) is not None:
                record = json.loads(file.read())
                pairs = [f"{pair['question']} {pair['answer']}" for pair in record.get("qa", ())]
                yield " ".join([*record.get("captions", ()), *pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("tars", type=Path, nargs="+")
    parser.add_argument("--least", type=int, default=3)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    total = 0
    for path in args.tars:
        for text in pictures(path):
            counts.update(set(re.findall(r"[a-z]{3,}", text.lower())))
            total += 1
    words = sorted(word for word, count in counts.items() if count >= args.least)
    args.out.write_text("\n".join(words) + "\n")
    print(f"{len(words)} words of {total} pictures in {args.out}")


if __name__ == "__main__":
    main()
