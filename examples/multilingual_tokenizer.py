"""Train a tokenizer on corpora in many languages, and count what it and others need for text that it never saw.

    python examples/multilingual_tokenizer.py debian/corpora/* --out tokenizer --gpt2 encoder.json vocab.bpe

Languages are sampled as in XLM, q_i ∝ p_i^0.5. One page in ten is held out, the same page in every language, so that
all languages are measured on the same content. Pages that stand there in another language than their folder says are
left out. Writes `tokenizer.json`, `report.json` and `tokenizer.png` into --out.
"""

import argparse
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_gpt.datasets.building.shards import read_corpus
from mm_gpt.datasets.filters.language_id import identify
from mm_gpt.datasets.loading.multilingual import language_weights, tokens_per_character, train_tokenizer
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Text
from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.tokenizer import Tokenizer

HELD_OUT = 10  # one page in so many
MIN_CHARACTERS = 2_000  # of held-out text, or a language is not reported
ALPHAS = (0.0, 0.5, 1.0)


def read_texts(corpora: Iterable[Path]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to learn from and texts held out, by language: one text a page."""
    train: dict[str, list[str]] = defaultdict(list)
    held_out: dict[str, list[str]] = defaultdict(list)
    for folder in corpora:
        for sample in read_corpus(str(folder), ErrorCounter()):
            if not isinstance(sample, Document):
                continue
            language = str(sample.metadata.get("language", ""))
            text = "\n\n".join(segment.text for segment in sample.segments if isinstance(segment, Text))
            if language and text and identify(text)[0] == language:
                side = held_out if is_held_out(sample.id) else train
                side[language].append(text)
    return dict(sorted(train.items())), dict(sorted(held_out.items()))


def is_held_out(id: str) -> bool:
    """By the name of the page alone, which its translations share."""
    return zlib.crc32(id.rpartition("/")[2].encode()) % HELD_OUT == 0


def measure(tokenizers: dict[str, Tokenizer], texts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Language -> tokenizer -> tokens per character."""
    enough = {language: list(part) for language, part in texts.items() if sum(map(len, part)) >= MIN_CHARACTERS}
    return {
        language: {name: round(tokens_per_character(t, part), 4) for name, t in tokenizers.items()}
        for language, part in enough.items()
    }


def plot(rows: dict[str, dict[str, float]], names: Sequence[str], path: Path) -> None:
    """Tokens per character, a group of marks for each language, the costliest under GPT-2's first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = sorted(rows, key=lambda language: rows[language][names[-1]])
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    for name, mark in zip(names, "osv^Dx", strict=False):
        axes.plot(order, [rows[language][name] for language in order], mark, label=name, markersize=5)
    axes.set_yscale("log")
    axes.set_yticks([0.2, 0.3, 0.5, 1, 2, 3], labels=["0.2", "0.3", "0.5", "1", "2", "3"])
    axes.minorticks_off()
    axes.set_ylabel("tokens per character")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(
    train: dict[str, list[str]], held_out: dict[str, list[str]], others: dict[str, Tokenizer], args: argparse.Namespace
) -> tuple[Tokenizer, dict[str, Any]]:
    counts = {language: sum(map(len, texts)) for language, texts in train.items()}
    mine = f"mm-gpt {args.vocab // 1000}k"
    options = {"max_characters": args.characters}
    tokenizer = train_tokenizer(train, args.vocab, alpha=args.alpha, **options)
    tokenizers = {
        mine: tokenizer,
        f"{mine}, SmolLM2's split": train_tokenizer(train, args.vocab, alpha=args.alpha, split=None, **options),
    } | others
    rows = measure(tokenizers, held_out)
    sweep = {
        str(alpha): measure({"": train_tokenizer(train, args.vocab, alpha=alpha, **options)}, held_out)
        for alpha in (ALPHAS if args.sweep else ())
        if alpha != args.alpha
    }
    weights = language_weights(counts, args.alpha)
    return tokenizer, {
        "vocab_size": {name: t.vocab_size for name, t in tokenizers.items()},
        "alpha": args.alpha,
        "sampled_characters": args.characters,
        "train_characters": counts,
        "sampled_share": {language: round(weight, 5) for language, weight in weights.items()},
        "held_out_characters": {language: sum(map(len, held_out[language])) for language in rows},
        "tokens_per_character": rows,
        "tokens_per_character_at_other_alpha": {
            alpha: {language: values[""] for language, values in table.items()} for alpha, table in sweep.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path, help="corpus folders whose documents name their language")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--characters", type=int, default=20_000_000, help="how many are sampled to learn from")
    parser.add_argument("--sweep", action="store_true", help="also train with alpha 0 and 1")
    parser.add_argument(
        "--gpt2", nargs=2, type=Path, metavar=("ENCODER", "BPE"), help="GPT-2's encoder.json, vocab.bpe"
    )
    parser.add_argument("--compare", nargs="*", type=Path, default=[], help="Hugging Face folders of other tokenizers")
    args = parser.parse_args()
    others = {"SmolLM2 49k": load_decoder("smollm2-135m-instruct")[1]}
    others |= {folder.name: Tokenizer.from_hf_folder(folder) for folder in args.compare}
    if args.gpt2:
        others["GPT-2 50k"] = Tokenizer.from_gpt2_files(*args.gpt2)
    train, held_out = read_texts(args.corpora)
    tokenizer, result = report(train, held_out, others, args)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(args.out / "tokenizer.json")
    (args.out / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = result["tokens_per_character"]
    names = list(result["vocab_size"])
    plot(rows, names, args.out / "tokenizer.png")
    print(f"| language | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for language, values in rows.items():
        print(f"| {language} | {' | '.join(f'{values[name]:.3f}' for name in names)} |")


if __name__ == "__main__":
    main()
