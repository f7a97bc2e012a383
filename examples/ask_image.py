"""Ask about an image from Python: `python examples/ask_image.py photo.jpg "What is the dog doing?"`."""

import argparse
import sys

import mm_gpt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="a file or an http(s) URL")
    parser.add_argument("question")
    parser.add_argument("--model", help="default: MM_GPT_MODEL, your setting, `default`")
    args = parser.parse_args()
    try:
        model = mm_gpt.load(args.model)
        answer = model.ask(args.image, args.question, max_new_tokens=60)
    except mm_gpt.MMGPTError as error:
        print(error, file=sys.stderr)
        return 1
    print(answer)
    print(f"{answer.prompt_tokens} tokens read, {answer.completion_tokens} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
