"""Caption every image of a folder into a JSONL or CSV file: `python examples/caption_folder.py photos/ captions.jsonl`.

Stop it whenever you like; the same command goes on where it stopped. `mm-gpt caption` does the same with more options.
"""

import argparse
import sys
from pathlib import Path

import mm_gpt
from mm_gpt.captioning import caption_images, share_cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="or a .tar, a glob, a file, a URL")
    parser.add_argument("out", type=Path, help=".jsonl or .csv")
    parser.add_argument("--model", help="default: MM_GPT_MODEL, your setting, `default`")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    share_cores()
    try:
        summary = caption_images(lambda: mm_gpt.load(args.model), [args.folder], args.out, batch_size=args.batch_size)
    except mm_gpt.MMGPTError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: {summary}")
    return 130 if summary.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
