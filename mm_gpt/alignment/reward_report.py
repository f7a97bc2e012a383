"""Is a reward model right, and what does it look at? A report about comparisons that it has not learned from.

Beside accuracy it says how far length alone would go, and how often the model is still right when each prompt has the
images of another: a model that reads the question and the answer alone loses nothing by that.
"""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_gpt.alignment.losses import comparison_pairs, pairwise_loss
from mm_gpt.alignment.reward_model import RewardModel, Scored, score_comparisons
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Image
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.metrics.statistics import bootstrap_statistic
from mm_gpt.processor import Processor
from mm_gpt.system.writing import naming, write_text

REPORT, PLOT = "reward_report.json", "reward_report.png"
NOTHING_BETTER = "no answer is better than another"
CONSTANT = 1e-6
"""Scores that differ by less than this, or by this share of their size, are one score."""
UNMOVED = 1e-3
"""A reward that other images move by less, in standard deviations of the scores, does not look at them."""


@dataclass(frozen=True)
class RewardReport:
    """Means over prompts, each of which counts once however many pairs it has. Intervals are of 95%."""

    prompts: int
    pairs: int
    accuracy: float
    """How often the better answer has the higher score; half of a pair whose scores are equal."""
    accuracy_interval: tuple[float, float]
    loss: float
    """-log σ(better - worse - margin) in nats; ln 2 = 0.693 for a model that knows nothing."""
    margin: float
    """The better answer's score less the worse one's."""
    reward_mean: float
    reward_std: float
    """Of all answers."""
    length_correlation: float | None
    """Pearson's, of an answer's score with its tokens; None where either is always the same."""
    longer_is_better: float
    """The accuracy of preferring the longer answer; half of a pair of equal length."""
    prefers_longer: float
    """How often the longer answer has the higher score."""
    image_prompts: int = 0
    """Prompts with images for which there are images of another prompt: what the following is measured on."""
    accuracy_images: float | None = None
    accuracy_images_shuffled: float | None = None
    """With the images of another prompt."""
    image_gain: float | None = None
    """The difference of these two: what the images are worth."""
    image_gain_interval: tuple[float, float] | None = None
    image_effect: float | None = None
    """How far other images move a score, root mean square, in standard deviations of the scores."""
    skipped: int = 0
    """Comparisons and answers that could not be read or compared."""
    findings: tuple[str, ...] = ()
    """What is wrong, in words."""

    def values(self) -> dict[str, float]:
        """The numbers among it, for a log."""
        return {k: float(v) for k, v in vars(self).items() if isinstance(v, int | float)}


@dataclass(frozen=True)
class Facts:
    """What is kept of a comparison when it has been scored."""

    number: int
    ranks: tuple[int, ...]
    margin: float
    images: tuple[str, ...]
    """What tells the prompt's images from others."""


@dataclass(frozen=True)
class Judged:
    """A comparison with its scores."""

    facts: Facts
    scores: Tensor  # (K,) float64
    tokens: Tensor  # (K,)

    def margins(self) -> Tensor:
        """(N,), of each pair the better answer's score less the worse one's."""
        better, worse = comparison_pairs(self.facts.ranks)
        return self.scores[better] - self.scores[worse]

    def longer(self) -> Tensor:
        """(N,), of each pair whether the better answer is longer: 1, 0 where it is as long, or -1."""
        better, worse = comparison_pairs(self.facts.ranks)
        return (self.tokens[better] - self.tokens[worse]).sign()

    def right(self) -> float:
        """The share of pairs that are judged right."""
        return _share(self.margins().sign())


def judge(
    model: RewardModel,
    processor: Processor,
    comparisons: Sequence[Comparison],
    errors: ErrorCounter,
    *,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> tuple[RewardReport, list[Judged]]:
    """The report, and what it is about. `seed` draws which prompt is shown with whose images.

    Raises MMGPTError when no comparison can be judged.
    """
    before = errors.total
    facts: list[Facts] = []
    score = partial(score_comparisons, model, processor, errors=errors, batch_tokens=batch_tokens)
    scored = list(score(_comparable(comparisons, errors, facts)))
    judged = [_judged(own, found) for own, found in zip(facts, scored, strict=True) if None not in found.scores]
    if not judged:
        raise MMGPTError(f"no comparison can be judged: {errors.summary()}")
    partners = _partners([each.facts for each in judged], seed)
    swapped = score(
        with_images_of(comparisons[judged[own].facts.number], comparisons[judged[other].facts.number])
        for own, other in partners
    )
    shuffled = [
        (judged[own], _judged(judged[own].facts, found))
        for (own, _), found in zip(partners, swapped, strict=True)
        if None not in found.scores
    ]
    report = _with_images(_report(judged), shuffled)
    report = dataclasses.replace(report, skipped=errors.total - before)
    return dataclasses.replace(report, findings=tuple(_findings(report))), judged


def _comparable(comparisons: Sequence[Comparison], errors: ErrorCounter, facts: list[Facts]) -> Iterator[Comparison]:
    """Those with a pair to compare, one at a time; what they are is added to `facts`."""
    for number in range(len(comparisons)):
        try:
            comparison = comparisons[number]
        except (BadRecordError, MMGPTError) as error:
            errors.add(str(error), f"comparison {number}")
            continue
        ranks = tuple(completion.rank for completion in comparison.completions)
        if len(set(ranks)) < 2:
            errors.add(NOTHING_BETTER, comparison.key)
            continue
        images = tuple(map(_identity, images_of(comparison)))
        facts.append(Facts(number, ranks, comparison.margin or 0.0, images))
        yield comparison


def _judged(facts: Facts, found: Scored) -> Judged:
    return Judged(facts, torch.tensor(found.scores, dtype=torch.float64), torch.tensor(found.tokens))


def _share(signs: Tensor) -> float:
    """How many are positive; half of the zeros."""
    return float((signs.double() + 1).mean() / 2)


def _report(judged: Sequence[Judged]) -> RewardReport:
    """What does not need other images."""
    scores, lengths = (torch.cat([getattr(each, name) for each in judged]).double() for name in ("scores", "tokens"))
    right = np.array([each.right() for each in judged])
    losses = [float(pairwise_loss(each.margins(), torch.zeros(()), each.facts.margin).mean()) for each in judged]
    return RewardReport(
        prompts=len(judged),
        pairs=sum(len(each.margins()) for each in judged),
        accuracy=float(right.mean()),
        accuracy_interval=bootstrap_statistic(lambda chosen: right[chosen].mean(axis=1), len(right)),
        loss=float(np.mean(losses)),
        margin=float(np.mean([float(each.margins().mean()) for each in judged])),
        reward_mean=float(scores.mean()),
        reward_std=float(scores.std(correction=0)),
        length_correlation=pearson(scores.numpy(), lengths.numpy()),
        longer_is_better=float(np.mean([_share(each.longer()) for each in judged])),
        prefers_longer=float(np.mean([_share(each.margins().sign() * each.longer()) for each in judged])),
    )


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """The correlation of two series (N,); None where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return None if scale < CONSTANT * CONSTANT else float(a @ b) / scale


# ---- The images of another prompt ----


def _with_images(report: RewardReport, shuffled: Sequence[tuple[Judged, Judged]]) -> RewardReport:
    """`shuffled`: prompts with their own images, and with those of another."""
    if not shuffled:
        return report
    own = np.array([true.right() for true, _ in shuffled])
    other = np.array([false.right() for _, false in shuffled])
    gain = own - other
    moved = torch.cat([false.scores - true.scores for true, false in shuffled])
    return dataclasses.replace(
        report,
        image_prompts=len(shuffled),
        accuracy_images=float(own.mean()),
        accuracy_images_shuffled=float(other.mean()),
        image_gain=float(gain.mean()),
        image_gain_interval=bootstrap_statistic(lambda chosen: gain[chosen].mean(axis=1), len(gain)),
        image_effect=float(moved.square().mean().sqrt()) / max(report.reward_std, 1e-12),
    )


def _partners(facts: Sequence[Facts], seed: int) -> list[tuple[int, int]]:
    """For each prompt with images another one with as many, but other ones; a prompt for which there is none is left
    out. A function of the comparisons and the seed."""
    groups: dict[int, list[int]] = {}
    for at, each in enumerate(facts):
        if each.images:
            groups.setdefault(len(each.images), []).append(at)
    partners = []
    for size, group in sorted(groups.items()):
        random.Random(f"{seed}/{size}").shuffle(group)
        for place, own in enumerate(group):
            following = (group[(place + more) % len(group)] for more in range(1, len(group)))
            if (other := next((at for at in following if facts[at].images != facts[own].images), None)) is not None:
                partners.append((own, other))
    return sorted(partners)


def images_of(comparison: Comparison) -> list[Image]:
    """Of the prompt, in order."""
    return [part for message in comparison.prompt for part in _parts(message) if isinstance(part, Image)]


def with_images_of(comparison: Comparison, other: Comparison) -> Comparison:
    """The comparison with the images of another prompt, which has as many, in their places."""
    images = iter(images_of(other))
    prompt = tuple(
        {**message, "content": [next(images) if isinstance(part, Image) else part for part in _parts(message)]}
        for message in comparison.prompt
    )
    return dataclasses.replace(comparison, prompt=prompt)


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message["content"]
    return list(content) if isinstance(content, list | tuple) else [content]


def _identity(image: Image) -> str:
    """Equal for what is the same picture: the same file, the same bytes."""
    match image.source:
        case bytes() as data:
            return hashlib.sha256(data).hexdigest()
        case str() | Path() as name:
            return str(name)
        case other:
            return str(id(other))


# ---- In words and as a picture ----


def _findings(report: RewardReport) -> Iterator[str]:
    """What nobody should overlook."""
    if report.reward_std <= CONSTANT * max(1.0, abs(report.reward_mean)):
        yield f"the reward is constant: every answer has {report.reward_mean:.6g}"
        return
    low, high = report.accuracy_interval
    if low <= 0.5:
        yield f"no better than chance: accuracy {report.accuracy:.3f}, interval {low:.3f} to {high:.3f}"
    if report.longer_is_better >= report.accuracy > 0.5:
        yield (
            f"preferring the longer answer is right as often: {report.longer_is_better:.3f}, "
            f"the reward {report.accuracy:.3f}"
        )
    if report.image_effect is None or report.image_gain is None or report.image_gain_interval is None:
        return
    of = f"over {report.image_prompts} prompts with images"
    if report.image_effect <= UNMOVED:
        yield f"the reward ignores the images: other ones move scores by {report.image_effect:.1g} deviations, {of}"
    elif report.image_gain_interval[0] <= 0:
        low, high = report.image_gain_interval
        yield (
            f"the images are not shown to matter: accuracy {report.accuracy_images:.3f}, and with those of other "
            f"prompts {report.accuracy_images_shuffled:.3f} (difference {low:.3f} to {high:.3f}), {of}"
        )


def describe(report: RewardReport) -> list[str]:
    """The report in lines for people, findings last."""
    low, high = report.accuracy_interval
    lines = [
        f"accuracy {report.accuracy:.3f} ({low:.3f} to {high:.3f}) over {report.prompts} prompts, {report.pairs} pairs",
        f"loss {report.loss:.4f}, margin {report.margin:.3f}, "
        f"reward {report.reward_mean:.3f} ± {report.reward_std:.3f}",
    ]
    correlation = "none" if report.length_correlation is None else f"{report.length_correlation:.3f}"
    lines.append(
        f"correlation with length {correlation}; the longer answer is better {report.longer_is_better:.3f} of the time "
        f"and preferred {report.prefers_longer:.3f}"
    )
    if report.accuracy_images is not None:
        lines.append(
            f"with its own images {report.accuracy_images:.3f}, with those of other prompts "
            f"{report.accuracy_images_shuffled:.3f}, over {report.image_prompts} prompts"
        )
    return lines + [f"note: {finding}" for finding in report.findings]


def write_report(report: RewardReport, judged: Sequence[Judged], out: Path) -> None:
    """`reward_report.json` and `reward_report.png` in an existing folder. Raises MMGPTError where they cannot be
    written."""
    write_text(out / REPORT, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    with naming(out / PLOT):
        plot_report(report, judged, out / PLOT)


def plot_report(report: RewardReport, judged: Sequence[Judged], path: Path) -> None:
    """Margins of all pairs, scores against lengths, and accuracies, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(torch.cat([each.margins() for each in judged]).numpy(), bins=30)
    left.axvline(0, color="black", lw=1)
    left.set(xlabel="score of the better answer less the worse one's", ylabel="pairs")
    scores, lengths = (torch.cat([getattr(each, name) for each in judged]).numpy() for name in ("scores", "tokens"))
    is_best = np.concatenate([np.array(each.facts.ranks) == min(each.facts.ranks) for each in judged])
    for name, chosen in (("best answers", is_best), ("others", ~is_best)):
        middle.plot(lengths[chosen], scores[chosen], ".", ms=4, alpha=0.5, label=name)
    middle.legend()
    middle.set(xlabel="tokens of the answer", ylabel="score")
    bars = {"reward": report.accuracy, "longer answer": report.longer_is_better}
    if report.accuracy_images is not None and report.accuracy_images_shuffled is not None:
        bars |= {"own images": report.accuracy_images, "others' images": report.accuracy_images_shuffled}
    low, high = report.accuracy_interval
    right.bar(list(bars), list(bars.values()))
    right.errorbar(0, report.accuracy, yerr=[[report.accuracy - low], [high - report.accuracy]], color="black")
    right.axhline(0.5, color="black", lw=1, ls=":")
    right.tick_params(axis="x", labelrotation=20)
    right.set(ylabel="accuracy", ylim=(0, 1))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
