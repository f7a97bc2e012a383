"""Hallucination pairs of many prompts: answers are sampled, each goes through the loop, pairs are written.

Everything that took time is kept line by line, so that an interrupted run continues.
"""

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mm_gpt.alignment.completions import prompt_document
from mm_gpt.alignment.hallucination import (
    MAX_ROUNDS,
    Lister,
    NothingKnownError,
    Outcome,
    Rewriter,
    SamplesRewriter,
    caption_prompt,
    pair,
    rewrite_until_supported,
)
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparison, topic, write_comparisons
from mm_gpt.datasets.formats.preferences import comparison_in
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, sample_name
from mm_gpt.datasets.sources import read_samples
from mm_gpt.document import Image
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.system.writing import naming, write_text

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant

T = TypeVar("T")


def read_prompts(locations: Sequence[str], errors: ErrorCounter, *, limit: int | None = None) -> Iterator[Comparison]:
    """Captioned photos, asked to be described, and prompts of comparison sets; one that cannot be read or has the name
    of an earlier one is counted. Raises MMGPTError for a path that leads nowhere."""
    sources = [read_samples(location, errors) for location in locations]
    return itertools.islice(_usable(itertools.chain.from_iterable(sources), errors), limit)


def _usable(samples: Iterable[Any], errors: ErrorCounter) -> Iterator[Comparison]:
    seen: set[str] = set()
    for sample in samples:
        name = sample_name(sample)
        try:
            if isinstance(sample, Record):
                prompt = caption_prompt(sample)
            elif isinstance(sample, Conversation):
                prompt = dataclasses.replace(comparison_in(sample), completions=())
            else:
                raise BadRecordError("no prompt")
            for image in (part for message in prompt.prompt for part in message["content"] if isinstance(part, Image)):
                image.load()
        except (BadRecordError, ImageError) as error:
            errors.add("broken image" if isinstance(error, ImageError) else str(error), name)
            continue
        except MMGPTError as error:
            errors.add("nothing to ask", str(error))
            continue
        if prompt.key in seen:
            errors.add("name of an earlier prompt", prompt.key)
            continue
        seen.add(prompt.key)
        yield prompt


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time, the last ones fewer."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How pairs are made. Raises ConfigError naming a value that is out of range."""

    samples: int = 8
    """Answers that are drawn to each prompt, beside the likeliest one."""
    temperature: float = 1.0
    max_new_tokens: int = 40
    """Of an answer. One that is longer is left out: it has no end."""
    max_rounds: int = MAX_ROUNDS
    pairs_per_prompt: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "samples", "seed", at_least=0)
        check_numbers(self, "temperature", above=0)
        check_numbers(self, "max_new_tokens", "max_rounds", "pairs_per_prompt", at_least=1)


def make_pairs(
    prompts: Iterable[Comparison],
    assistant: "Assistant",
    lister: Lister,
    rewriter: Rewriter | None,
    out: Path,
    config: PairsConfig,
    *,
    errors: ErrorCounter,
    about: Mapping[str, Any],
    batch_size: int = 8,
    restart: bool = False,
) -> dict[str, Any]:
    """Answer every prompt, run the loop on every answer, and write the pairs to `out` as `write_comparisons` does.

    A prompt that is too long for a model, or of which the lister knows nothing, is counted in `errors`.

    `rewriter` None takes other samples (`SamplesRewriter`). Answers and outcomes are kept in `OUT.journal.jsonl`: the
    same call continues where it was interrupted. `about`, JSON values, is what else decides them (model, lister); a
    journal of other settings or of other prompts raises MMGPTError, and so do prompts of which none can be used. Gives
    the report.
    """
    journal = Journal(out.with_suffix(".journal.jsonl"), {**dataclasses.asdict(config), **about}, restart=restart)
    rewrite = rewriter or SamplesRewriter(journal.answers)
    outcomes: list[Outcome] = []
    counts: Counter[str] = Counter()

    def found(prompt: Comparison) -> list[Outcome]:
        answers = dict.fromkeys(journal.answers[prompt.key])
        return [rewrite_until_supported(prompt, a, lister, rewrite, max_rounds=config.max_rounds) for a in answers]

    def pairs() -> Iterator[Comparison]:
        fitting = (prompt for prompt in prompts if prompt.key in journal.answers or fits(assistant, prompt, errors))
        for batch in batches(fitting, batch_size):
            for prompt in batch:
                journal.check(prompt)
            new = [prompt for prompt in batch if prompt.key not in journal.answers]
            for prompt, answers in zip(new, sampled_answers(assistant, new, config), strict=True):
                journal.add(prompt, answers=answers)
            for prompt in batch:
                try:
                    if prompt.key not in journal.outcomes:
                        journal.add(prompt, outcomes=found(prompt))
                except (ContextOverflowError, NothingKnownError) as error:
                    errors.add("cannot be listed", f"{prompt.key}: {error}")
                    continue
                own = journal.outcomes[prompt.key]
                outcomes.extend(own)
                kept = [outcome for outcome in own if outcome.end == "kept"][: config.pairs_per_prompt]
                counts.update(prompts=1, pairs=len(kept), prompts_with_pairs=bool(kept))
                yield from (pair(prompt, outcome, name=f"#{n}") for n, outcome in enumerate(kept))
        if not counts["prompts"]:
            raise MMGPTError(f"none of the prompts can be used: {errors.summary()}")

    try:
        write_comparisons(pairs(), out)
    finally:
        journal.close()
    return {**counts, **report(outcomes)}


def fits(assistant: "Assistant", prompt: Comparison, errors: ErrorCounter) -> bool:
    """Whether the model's context holds the prompt and some answer; counts one for which that is not so."""
    room = assistant.processor.config.max_length
    try:
        length = len(assistant.processor(prompt_document(assistant.processor, prompt)))
    except ContextOverflowError:
        length = room
    if length >= room:
        errors.add("prompt too long", prompt.key)
    return length < room


def sampled_answers(assistant: "Assistant", prompts: Sequence[Comparison], config: PairsConfig) -> list[list[str]]:
    """To each prompt the likeliest answer and `config.samples` drawn ones, as far as they have an end. The draws depend
    on the seed and the prompt's key alone."""
    if not prompts:
        return []
    engine = assistant.engine
    documents = [prompt_document(assistant.processor, prompt) for prompt in prompts]
    likeliest = GenerationConfig(max_new_tokens=config.max_new_tokens)
    answers = [[answer] for answer in engine.generate(documents, likeliest)]
    if config.samples:
        drawn = dataclasses.replace(likeliest, n=config.samples, temperature=config.temperature)
        seeds = [zlib.crc32(f"{config.seed}/{prompt.key}".encode()) for prompt in prompts]
        more = engine.generate(documents, [dataclasses.replace(drawn, seed=seed) for seed in seeds])
        for own, samples in zip(answers, batches(more, config.samples), strict=True):
            own += samples
    return [[a.strip() for a in own if a.finish_reason == "stop" and a.strip()] for own in answers]


def _digest(prompt: Comparison) -> str:
    """Of what is asked and of what is known about it: data of other content may have the same keys."""
    texts = [part for message in prompt.prompt for part in message["content"] if isinstance(part, str)]
    about = json.dumps([topic(prompt.prompt), texts, dict(prompt.columns)], sort_keys=True, default=str)
    return hashlib.sha256(about.encode("utf-8", "backslashreplace")).hexdigest()[:16]


class Journal:
    """Answers and outcomes by the key of their prompt, line by line; the first line says what they depend on."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        """Raises MMGPTError for a file of other settings, or of another kind."""
        self.answers: dict[str, list[str]] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self._prompts: dict[str, str] = {}
        self._path = path
        head = json.dumps({"settings": json.loads(json.dumps(settings))}, sort_keys=True) + "\n"
        with naming(path):
            lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() and not restart else []
            if lines and lines[0] != head:
                raise MMGPTError(f"{path}: holds answers of other settings: choose another --out, or --restart")
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            for number, line in enumerate(whole[1:], start=2):
                self._read(line, f"{path}:{number}")
            write_text(path, "".join(whole or [head]))
            self._file = path.open("a", encoding="utf-8")

    def check(self, prompt: Comparison) -> None:
        """Raises MMGPTError when what is kept under a prompt's key answers another one."""
        if prompt.key in self._prompts and self._prompts[prompt.key] != _digest(prompt):
            raise MMGPTError(
                f"{self._path}: holds answers to another prompt {prompt.key}: choose another --out, or --restart"
            )

    def add(
        self, prompt: Comparison, *, answers: Sequence[str] = (), outcomes: Sequence[Outcome] | None = None
    ) -> None:
        key = prompt.key
        row: dict[str, Any] = {"key": key}
        if outcomes is None:
            self._prompts[key] = row["prompt"] = _digest(prompt)
            self.answers[key] = row["answers"] = list(answers)
        else:
            self.outcomes[key] = list(outcomes)
            row["outcomes"] = [dataclasses.asdict(outcome) for outcome in outcomes]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self, line: str, where: str) -> None:
        try:
            row = json.loads(line)
            if "outcomes" in row:
                self.outcomes[row["key"]] = [
                    Outcome(**{**outcome, "unsupported": tuple(outcome["unsupported"])}) for outcome in row["outcomes"]
                ]
            else:
                self._prompts[row["key"]] = row["prompt"]
                self.answers[row["key"]] = list(row["answers"])
        except (ValueError, KeyError, TypeError):
            raise MMGPTError(f"{where}: is no line of answers; repair it, or start over with --restart") from None


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts of how the loops ended, of the rounds of what was kept, and what was listed most often."""
    kept = [outcome for outcome in outcomes if outcome.end == "kept"]
    lengths = [(len((o.rewritten or "").split()), len(o.answer.split())) for o in kept]
    return {
        "answers": len(outcomes),
        "ends": dict(Counter(outcome.end for outcome in outcomes).most_common()),
        "rounds": {str(n): count for n, count in sorted(Counter(outcome.rounds for outcome in kept).items())},
        "words_chosen": sum(a for a, _ in lengths) / max(1, len(kept)),
        "words_rejected": sum(b for _, b in lengths) / max(1, len(kept)),
        "unsupported": dict(Counter(u for outcome in outcomes for u in outcome.unsupported).most_common(30)),
    }
