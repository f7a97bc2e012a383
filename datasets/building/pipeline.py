"""Documents through stages, with a count of what came in, what went out and why: the funnel."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mm_gpt.datasets.samples import Conversation, Record, Sample
from mm_gpt.document import Concepts, Document, Image, Text


class Filter(Protocol):
    """One step from raw documents to a corpus. A frozen dataclass: it travels to other processes and machines."""

    @property
    def name(self) -> str: ...

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        """The document with what is left of it, or None when it goes.

        `removed` counts what goes by rule: `"too few words"` (a document), `"text: repeated words"` (a segment),
        `"image: too small"`.
        """


def as_document(sample: Sample) -> Document:
    """All text and images of a sample in order: for what looks at content alone."""
    match sample:
        case Document():
            return sample
        case Conversation():
            parts = [part for turn in sample.messages for part in _parts(turn["content"])]
            segments = tuple(Text(part) if isinstance(part, str) else part for part in parts if _is_content(part))
            return Document(segments, id=sample.key, metadata=sample.metadata)
        case Record():
            texts = [*sample.captions, *(text for q in sample.questions for text in (q.question, q.answer))]
            images = () if isinstance(sample.image, Concepts) else (Image(sample.image),)
            return Document((*images, *map(Text, texts)), id=sample.key, metadata=sample.metadata)


def _parts(content: Any) -> Sequence[Any]:
    return content if isinstance(content, list | tuple) else [content]


def _is_content(part: Any) -> bool:
    return isinstance(part, str | Text | Image)


@dataclass
class Amount:
    """Documents, and what is in them."""

    documents: int = 0
    images: int = 0
    characters: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.images += num_images(document)
        self.characters += sum(len(segment.text) for segment in document.segments if isinstance(segment, Text))

    def merge(self, other: "Amount") -> None:
        self.documents += other.documents
        self.images += other.images
        self.characters += other.characters


@dataclass
class Step:
    """A line of the funnel."""

    came: Amount = field(default_factory=Amount)
    left: Amount = field(default_factory=Amount)
    removed: Counter[str] = field(default_factory=Counter)
    """By reason. Those of images begin with `image: `, and those of other parts of a document as in `PARTS`."""

    @property
    def removed_documents(self) -> int:
        """What came, less this, is what is left."""
        return sum(count for reason, count in self.removed.items() if not reason.startswith(PARTS))

    @property
    def removed_images(self) -> int:
        """What came, less this, is what is left."""
        return sum(count for reason, count in self.removed.items() if reason.startswith("image: "))


PARTS = ("image: ", "text: ", "branch: ", "personal data: ")
WITH_DOCUMENT = "image: went with its document"
UNKNOWN = "unknown"
_LANGUAGE = re.compile(r"[a-z]{2,3}(?![^\W_])")


def language_of(document: Document) -> str:
    """The language in a document's metadata, without script and country; what is no code there is `unknown`."""
    found = _LANGUAGE.match(str(document.metadata.get("language", "")))
    return found[0] if found else UNKNOWN


def num_images(document: Document) -> int:
    """The places in a document where an image stands."""
    return sum(isinstance(segment, Image) for segment in document.segments)


class Funnel:
    """What each step received, let through and removed, by language as far as it is known by then."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names` are steps in the order that they are shown in; others come behind them as they happen."""
        self.steps: dict[str, dict[str, Step]] = {name: {} for name in names}

    def step(self, name: str, language: str = UNKNOWN) -> Step:
        return self.steps.setdefault(name, {}).setdefault(language, Step())

    def run(self, stage: Filter, document: Document) -> Document | None:
        """A stage, counted."""
        removed: Counter[str] = Counter()
        before = Amount()
        before.add(document)
        result = stage(document, removed)
        # A stage that identifies the language counts under the one that it found.
        step = self.step(stage.name, language_of(result or document))
        step.came.merge(before)
        if result is not None:
            step.left.add(result)
        elif rest := before.images - Step(removed=removed).removed_images:
            removed[WITH_DOCUMENT] += rest
        step.removed.update(removed)
        return result

    def count(self, name: str, document: Document, reason: str | None = None) -> None:
        """A document that comes through the step `name`, or is removed there for `reason`."""
        step = self.step(name, language_of(document))
        step.came.add(document)
        if reason is None:
            step.left.add(document)
            return
        step.removed[reason] += 1
        if images := num_images(document):
            step.removed[WITH_DOCUMENT] += images

    def merge(self, other: "Funnel") -> None:
        for name, languages in other.steps.items():
            self.steps.setdefault(name, {})
            for language, theirs in languages.items():
                own = self.step(name, language)
                own.came.merge(theirs.came)
                own.left.merge(theirs.left)
                own.removed.update(theirs.removed)

    def total(self, name: str) -> Step:
        """A step over all languages."""
        result = Step()
        for step in self.steps[name].values():
            result.came.merge(step.came)
            result.left.merge(step.left)
            result.removed.update(step.removed)
        return result

    def to_json(self) -> dict[str, Any]:
        return {
            name: {
                language: {"in": vars(s.came), "out": vars(s.left), "removed": dict(s.removed.most_common())}
                for language, s in sorted(languages.items())
            }
            for name, languages in self.steps.items()
            if languages
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Funnel":
        funnel = cls()
        for name, languages in values.items():
            for language, step in languages.items():
                funnel.steps.setdefault(name, {})[language] = Step(
                    Amount(**step["in"]), Amount(**step["out"]), Counter(step["removed"])
                )
        return funnel

    # ---- For people ----

    def _names(self) -> list[str]:
        return [name for name, languages in self.steps.items() if languages]

    def markdown(self) -> str:
        """The table of steps, what each removed, and what is left by language."""
        lines = [
            "| step | documents in | out | images in | out | characters in | out | removed |",
            "|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        names = self._names()
        for name in names:
            s = self.total(name)
            why = ", ".join(f"{reason}: {count:,}" for reason, count in s.removed.most_common(8))
            more = len(s.removed) - 8
            why += f", {more} more" if more > 0 else ""
            numbers = [s.came.documents, s.left.documents, s.came.images, s.left.images]
            numbers += [s.came.characters, s.left.characters]
            lines.append(f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} | {_cell(why)} |")
        last = self.steps[names[-1]] if names else {}
        if len(last) > 1:
            lines += ["", "| language | documents | images | characters |", "|---|--:|--:|--:|"]
            for language, s in sorted(last.items(), key=lambda item: -item[1].left.documents):
                left = s.left
                lines.append(f"| {language} | {left.documents:,} | {left.images:,} | {left.characters:,} |")
        return "\n".join(lines) + "\n"

    def plot(self, path: Path) -> None:
        """Bars of what is left behind each step, in percent of what was read."""
        from matplotlib.figure import Figure

        names = self._names()
        steps = [self.total(name) for name in names]
        figure = Figure(figsize=(8, 1.2 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for ax, kind, colour in zip(axes, ("documents", "images", "characters"), ("C0", "C1", "C2"), strict=True):
            # What comes in first is not always most: extraction finds the images.
            most = max((getattr(s.came, kind) for s in steps), default=0) or 1
            values = [getattr(s.left, kind) for s in steps]
            ax.barh(range(len(names)), [100 * v / most for v in values], color=colour)
            for at, value in enumerate(values):
                ax.text(2, at, f"{value:,}", va="center", fontsize=8)
            ax.set_yticks(range(len(names)), names, fontsize=8)
            ax.set_xlim(0, 105)
            ax.set_title(kind, fontsize=9)
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
        figure.supxlabel("% of the most that came into a step", fontsize=8)
        figure.savefig(path, dpi=130)

    def save(self, folder: Path) -> None:
        """`funnel.json`, `funnel.md` and `funnel.png`."""
        values = json.dumps(self.to_json(), indent=2) + "\n"
        (folder / "funnel.json").write_text(values, encoding="utf-8")
        (folder / "funnel.md").write_text(self.markdown(), encoding="utf-8")
        self.plot(folder / "funnel.png")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def run_stages(stages: Iterable[Filter], document: Document, funnel: Funnel) -> Document | None:
    """The document behind all stages, or None at the first that drops it."""
    current: Document | None = document
    for stage in stages:
        if current is None:
            return None
        current = funnel.run(stage, current)
    return current
