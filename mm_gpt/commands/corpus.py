"""The `mm-gpt corpus ...` commands: from raw sources to what a model is trained on."""

import argparse
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm_gpt.commands.command import Command, check_folder, check_inputs, positive
from mm_gpt.errors import MMGPTError, unknown_name


def add_build(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a corpus: read sources of any known format, filter, fetch images, remove duplicates, write shards.\n"
        "Beside the shards stand funnel.md, funnel.json and funnel.png: what each step received, kept and removed.\n"
        "A build that was stopped or killed continues with the same command."
    )
    parser.add_argument(
        "words", nargs="+", metavar="SOURCE|KEY=VALUE", help="files, folders, quoted globs or URLs; settings (below)"
    )
    parser.epilog = f"{parser.epilog}\n\nsettings:\n{_settings()}"
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the corpus")
    parser.add_argument("--format", default="auto", metavar="NAME", help="see `mm-gpt corpus formats` (default: auto)")
    parser.add_argument("--images", metavar="FOLDER", help="that image names in the records are relative to")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run on the Ray cluster at HOST:PORT; without ADDRESS on the one that runs here, `here` starts one",
    )


def run_build(args: argparse.Namespace) -> int:
    from mm_gpt.config import override
    from mm_gpt.datasets.building.corpus import build_corpus
    from mm_gpt.datasets.building.corpus_config import CorpusConfig
    from mm_gpt.datasets.building.runner import Runner

    settings = [word for word in args.words if _is_setting(word)]
    sources = [word for word in args.words if not _is_setting(word)]
    if not sources:
        raise MMGPTError("name at least one source")
    config = override(CorpusConfig(), settings)
    check_inputs(sources)
    check_folder(args.out)
    progress = sys.stderr.isatty()
    runner = Runner(args.workers, progress=progress)
    if args.ray is not None:
        from mm_gpt.datasets.building.cluster import RayRunner

        runner = RayRunner(None if args.ray == "here" else args.ray, workers=args.workers, progress=progress)
    summary = build_corpus(sources, args.out, config, format=args.format, images=args.images, runner=runner)
    print(summary.funnel.markdown(), end="")
    print(
        f"mm-gpt: {summary.documents:,} documents with {summary.images:,} images and {summary.characters:,} characters "
        f"in {summary.shards} shards: {args.out}",
        file=sys.stderr,
    )
    if summary.errors.total:
        print(f"mm-gpt: {summary.errors.summary()}", file=sys.stderr)
    return 0


def _settings() -> str:
    """The fields of CorpusConfig: name and default, what may be written, and what the field's docstring says."""
    import dataclasses
    import textwrap

    from mm_gpt.config import field_docs
    from mm_gpt.datasets.building.corpus_config import CorpusConfig

    hints, docs = typing.get_type_hints(CorpusConfig), field_docs(CorpusConfig)
    lines, indent = [], " " * 6
    for field in dataclasses.fields(CorpusConfig):
        options = [option for option in typing.get_args(hints[field.name]) if option is not Ellipsis]
        kinds = [_kind(option) for option in options or [hints[field.name]]]
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        many = ", ..." if typing.get_origin(hints[field.name]) is tuple else ""
        lines.append(f"  {field.name}={default}  ({', '.join(kinds)}{many})")
        lines += textwrap.wrap(
            docs.get(field.name, ""), 108, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines)


def _kind(option: typing.Any) -> str:
    names = {type(None): "none", bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(option, str(option))


def _is_setting(word: str) -> bool:
    """`key=value`, and no path or URL that happens to hold an equals sign."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace("_", "").isalnum() and not Path(word).exists()


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a corpus, or any source, holds: its counts, and the first documents as text."
    parser.add_argument("source", metavar="SOURCE", help="a corpus folder or URL, or a source of any format")
    parser.add_argument("-n", type=int, default=3, metavar="N", help="documents to show (default: %(default)s)")
    parser.add_argument("--format", default="auto", metavar="NAME", help="see `mm-gpt corpus formats`")
    parser.add_argument("--images", metavar="FOLDER", help="that image names in the records are relative to")


def run_show(args: argparse.Namespace) -> int:
    from itertools import islice

    from mm_gpt.datasets.building.shards import Corpus, is_corpus
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.datasets.sources import read_samples

    if is_corpus(args.source):
        corpus = Corpus(args.source)
        counts = corpus.about.get("counts", {})
        described = ", ".join(f"{value:,} {name}" for name, value in counts.items())
        print(f"{args.source}: {len(corpus):,} samples in {len(corpus.shards)} shards ({described})", file=sys.stderr)
    errors = ErrorCounter()
    for sample in islice(read_samples(args.source, errors, format=args.format, images=args.images), max(0, args.n)):
        print(describe(sample))
    if errors.total:
        print(f"mm-gpt: {errors.summary()}", file=sys.stderr)
    return 0


def describe(sample: Any) -> str:
    """A sample for people to read: text as it is, an image as its place and size."""
    from mm_gpt.datasets.building.pipeline import as_document
    from mm_gpt.document import Image
    from mm_gpt.errors import ImageError

    document = as_document(sample)
    lines = [f"=== {document.id}  [{type(sample).__name__.lower()}]"]
    about = {key: value for key, value in document.metadata.items() if isinstance(value, str | int | float)}
    if about:
        lines.append("    " + ", ".join(f"{key}: {value}" for key, value in about.items()))
    for segment in document.segments:
        if isinstance(segment, Image):
            try:
                is_remote = isinstance(segment.source, str) and "://" in segment.source
                size = segment.name if is_remote else "{1} x {0}".format(*segment.size())
            except ImageError as error:
                size = str(error)
            lines.append(f"<image {size}{f', alt: {segment.alt}' if segment.alt else ''}>")
        else:
            lines.append(segment.text)
    # What strangers wrote must not move the cursor or rename the terminal.
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in "\n".join(lines)) + "\n"


def add_formats(parser: argparse.ArgumentParser) -> None:
    parser.description = "The formats of sources. `auto` tells them by names and the first record."


def run_formats(args: argparse.Namespace) -> int:
    from mm_gpt.datasets.sources import FORMATS

    width = max(map(len, FORMATS))
    for name, format in FORMATS.items():
        print(f"{name:{width}}  {format.about}")
    return 0


def add_contamination(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look for evaluation sets in a corpus: GPT-3's 13-grams and overlaps, GPT-2's 8-grams, GPT-4's substrings of\n"
        "50 characters, images by their looks. `mm-gpt eval --contamination OUT/contamination.json` then gives clean\n"
        "and dirty scores, and `mm-gpt corpus build CORPUS contamination=OUT/index` cuts what was found."
    )
    parser.add_argument("corpus", nargs="+", metavar="CORPUS", help="corpus folders, or sources of any format")
    parser.add_argument(
        "--eval", action="append", required=True, metavar="TASK=DATA", help="like vqa=daquar/val.tar; repeatable"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="for the report and the index")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default: %(default)s)")


def run_contamination(args: argparse.Namespace) -> int:
    from itertools import chain

    from mm_gpt.datasets.contamination.report import markdown, search_contamination
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.datasets.sources import read_samples
    from mm_gpt.eval.config import EvalConfig
    from mm_gpt.eval.contamination import evaluation_items
    from mm_gpt.eval.tasks import TASKS

    check_inputs(args.corpus)
    check_folder(args.out)
    sets = {}
    for word in args.eval:
        task, equals, data = word.partition("=")
        if not equals:
            raise MMGPTError(f"--eval {word!r} is not of the form TASK=DATA")
        if task not in TASKS:
            raise MMGPTError(unknown_name("task", task, TASKS))
        sets[word] = evaluation_items(EvalConfig(task=task, data=(data,)))
    errors = ErrorCounter()
    samples = chain.from_iterable(read_samples(location, errors) for location in args.corpus)
    values = search_contamination(samples, sets, args.out, workers=args.workers)
    print(markdown(values), end="")
    if errors.total:
        print(f"mm-gpt: {errors.summary()}", file=sys.stderr)
    return 0


MIN_VOCABULARY = 259


def _texts(locations: Sequence[str], errors: Any) -> Iterator[tuple[str, str]]:
    """(language, text) of each sample that has text."""
    from mm_gpt.datasets.building.pipeline import as_document, language_of
    from mm_gpt.datasets.sources import read_samples
    from mm_gpt.document import Text

    for location in locations:
        for sample in read_samples(location, errors):
            document = as_document(sample)
            text = "\n\n".join(segment.text for segment in document.segments if isinstance(segment, Text))
            if text:
                yield language_of(document), text


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn a byte-level BPE tokenizer from corpora. Languages are sampled by XLM's rule, so that the small ones\n"
        "get a share of the vocabulary; `mm-gpt train RECIPE tokenizer=OUT` uses it."
    )
    parser.add_argument("corpus", nargs="+", metavar="CORPUS", help="corpus folders, or sources of any format")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="for tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--alpha", type=float, default=0.5, help="1: languages by size, 0: all alike (default: 0.5)")
    parser.add_argument("--characters", type=int, default=50_000_000, metavar="N", help="to learn from, at most")


def run_tokenizer(args: argparse.Namespace) -> int:
    from collections import Counter

    from mm_gpt.datasets.loading.multilingual import SCRIPT_SPLIT, language_weights
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.tokenizer import Tokenizer

    if args.vocab_size < MIN_VOCABULARY:
        raise MMGPTError(f"--vocab-size must be at least {MIN_VOCABULARY}, for each byte and three special tokens")
    if args.characters < 1:
        raise MMGPTError(f"--characters must be at least 1, not {args.characters}")
    check_inputs(args.corpus)
    check_folder(args.out)
    # Twice over the corpus, so that it is never in memory: to count, and to learn.
    errors = ErrorCounter()
    sizes: Counter[str] = Counter()
    for language, text in _texts(args.corpus, errors):
        sizes[language] += len(text)
    if not sizes:
        raise MMGPTError(f"{', '.join(args.corpus)}: no text to learn from")
    weights = language_weights(sizes, args.alpha)
    # At most as much as it takes to read the language with the most text once.
    total = min(args.characters, max(size / weights[language] for language, size in sizes.items()))
    rates = {language: total * weights[language] / size for language, size in sizes.items()}

    def sample() -> Iterator[str]:
        due = dict.fromkeys(sizes, 0.5)
        for language, text in _texts(args.corpus, ErrorCounter(max_examples=0)):
            due[language] += rates[language]
            times = int(due[language])
            due[language] -= times
            yield from [text] * times

    tokenizer = Tokenizer.train(sample(), args.vocab_size, split=SCRIPT_SPLIT)
    tokenizer.save_folder(args.out)
    for language, size in sorted(sizes.items()):
        print(f"{language}  {size:,} characters")
    if errors.total:
        print(f"mm-gpt: {errors.summary()}", file=sys.stderr)
    print(f"mm-gpt: {tokenizer.vocab_size:,} ids: {args.out / 'tokenizer.json'}", file=sys.stderr)
    return 0


def add_quality(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the quality classifier of GPT-3: logistic regression on hashed words, between documents that somebody\n"
        "chose and raw ones. `mm-gpt corpus build SOURCE quality=OUT` then keeps a document with the probability\n"
        "(2 - score)^-9."
    )
    parser.add_argument("good", nargs="+", metavar="GOOD", help="sources of good documents")
    parser.add_argument("--raw", action="append", required=True, metavar="SOURCE", help="raw documents; repeatable")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="for the classifier")


def run_quality(args: argparse.Namespace) -> int:
    import dataclasses

    from mm_gpt.datasets.building.pipeline import as_document
    from mm_gpt.datasets.filters.quality import train_quality
    from mm_gpt.datasets.samples import ErrorCounter
    from mm_gpt.datasets.sources import read_samples

    check_inputs([*args.good, *args.raw])
    check_folder(args.out)
    errors = ErrorCounter()

    def documents(locations: list[str]) -> Iterator[Any]:
        return (as_document(sample) for location in locations for sample in read_samples(location, errors))

    report = train_quality(documents(args.good), documents(args.raw), args.out)
    for name, value in dataclasses.asdict(report).items():
        print(f"{name}: {value}")
    if errors.total:
        print(f"mm-gpt: {errors.summary()}", file=sys.stderr)
    return 0


COMMANDS = {
    "corpus build": Command(
        "Make a corpus of web pages, WARC files, public datasets, captioned images or text.",
        (
            "mm-gpt corpus build pages/ --out corpus",
            "mm-gpt corpus build 'crawl/*.warc.gz' --out corpus filters=obelics languages=en",
            "mm-gpt corpus build llava_v1_5_mix665k.json --images images/ --out corpus",
            "mm-gpt corpus build s3://bucket/pages/ --out /shared/corpus --ray",
        ),
        add_build,
        run_build,
        usage="mm-gpt corpus build [options] SOURCE [SOURCE ...] [KEY=VALUE ...] --out FOLDER",
    ),
    "corpus show": Command(
        "Show what is in a corpus or source.",
        ("mm-gpt corpus show corpus", "mm-gpt corpus show obelics.parquet -n 1"),
        add_show,
        run_show,
    ),
    "corpus formats": Command(
        "List the formats of sources.",
        ("mm-gpt corpus formats",),
        add_formats,
        run_formats,
    ),
    "corpus contamination": Command(
        "Look for evaluation sets in a corpus.",
        ("mm-gpt corpus contamination corpus --eval vqa=daquar/val-000000.tar --out contamination",),
        add_contamination,
        run_contamination,
    ),
    "corpus quality": Command(
        "Train a classifier that tells good documents from raw ones.",
        ("mm-gpt corpus quality books/ encyclopedia/ --raw crawl.warc.gz --out quality",),
        add_quality,
        run_quality,
    ),
    "corpus tokenizer": Command(
        "Learn a tokenizer from corpora.",
        ("mm-gpt corpus tokenizer corpus --out tokenizer --vocab-size 8000",),
        add_tokenizer,
        run_tokenizer,
    ),
}
