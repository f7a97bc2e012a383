"""CIDEr-D, BLEU and ROUGE-L of captions, equal to pycocoevalcap (the COCO caption evaluation) to rounding.

Every function takes raw strings: one candidate and at least one reference for each image. Tokens come from
`mm_gpt.eval.metrics.tokenize`. Scores are in the unit of the original: CIDEr-D 0..10, the others 0..1; papers print
them x100 (CIDEr-D 0.847 is "84.7").
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mm_gpt.errors import MMGPTError
from mm_gpt.eval.metrics.statistics import bootstrap_statistic
from mm_gpt.eval.metrics.tokenize import ptb_tokenize

_MAX_N = 4
_SIGMA = 6.0  # of CIDEr-D's length penalty, in bigrams
_BETA = 1.2  # ROUGE-L: weight of recall against precision
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's smoothing

Ngram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """One metric of a set of captions."""

    metric: str
    """`CIDEr-D`, `BLEU-1` .. `BLEU-4` or `ROUGE-L`."""
    score: float
    """Of the whole set. The mean of `per_item`, except for BLEU."""
    per_item: np.ndarray
    """(N,) score of each caption."""
    bleu_counts: np.ndarray | None = None
    """BLEU only, (N, 2 + 2n): candidate length, reference length, n matches, n guesses. Their sums give the score."""

    def interval(self, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval over images. For CIDEr-D the document frequencies stay those of the whole set."""
        return bootstrap_statistic(
            self.resampled, len(self.per_item), confidence=confidence, resamples=resamples, seed=seed
        )

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The score of each resample, (R,), for image indices (R, N)."""
        counts = self.bleu_counts
        if counts is None:
            return self.per_item[indices].mean(axis=1)
        n = len(counts)
        offsets = np.arange(len(indices))[:, None] * n
        times_drawn = np.bincount((indices + offsets).ravel(), minlength=len(indices) * n).reshape(-1, n)
        return bleu_from_counts(times_drawn @ counts)[:, -1]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726), 0..10, as class `Cider` of pycocoevalcap.

    Document frequencies come from the references given, so that scores of different sets cannot be compared, a single
    image scores 0, and a caption too short to have 4-grams loses a quarter. Raises MMGPTError for unequal or
    empty input.
    """
    counts = [
        (ngram_counts(candidate.split()), [ngram_counts(reference.split()) for reference in group])
        for candidate, group in _tokenize(candidates, references)
    ]
    metric = CiderD(group for _, group in counts)
    per_item = np.array([metric.score(candidate, group) for candidate, group in counts])
    return CaptionScore(metric="CIDEr-D", score=float(per_item.mean()), per_item=per_item)


class CiderD:
    """CIDEr-D of single captions, whose document frequencies are those of a set of images."""

    def __init__(self, images: Iterable[Sequence[Counter[Ngram]]]):
        """`images`: of each image the n-grams of its references (`ngram_counts`)."""
        self.document_frequency: Counter[Ngram] = Counter()
        self.num_images = 0
        for group in images:
            self.document_frequency.update({ngram for reference in group for ngram in reference})
            self.num_images += 1

    def score(self, candidate: Counter[Ngram], references: Sequence[Counter[Ngram]]) -> float:
        """0..10, the mean over the references."""
        weights, norms, bigrams = self._vector(candidate)
        total = 0.0
        for reference in references:
            reference_weights, reference_norms, reference_bigrams = self._vector(reference)
            dots = [0.0] * _MAX_N
            for ngram, weight in weights.items():
                if ngram in reference_weights:
                    other = reference_weights[ngram]
                    dots[len(ngram) - 1] += min(weight, other) * other  # clipped: repeating a word does not pay
            penalty = math.exp(-((bigrams - reference_bigrams) ** 2) / (2 * _SIGMA**2))
            for dot, norm, reference_norm in zip(dots, norms, reference_norms, strict=True):
                if norm and reference_norm:
                    total += penalty * dot / (norm * reference_norm)
        return 10 * total / (_MAX_N * len(references))

    def _vector(self, ngrams: Counter[Ngram]) -> tuple[dict[Ngram, float], list[float], int]:
        """tf-idf weights, their norm for each n, and the number of bigrams."""
        log_images = math.log(self.num_images)
        weights: dict[Ngram, float] = {}
        squares = [0.0] * _MAX_N
        for ngram, count in ngrams.items():
            weight = count * (log_images - math.log(max(1, self.document_frequency[ngram])))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
        bigrams = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
        return weights, [math.sqrt(square) for square in squares], bigrams


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], *, max_n: int = 4) -> list[CaptionScore]:
    """BLEU-1 to BLEU-`max_n` (Papineni et al. 2002), 0..1, of the corpus: counts are summed before dividing.

    The reference length is that of the reference closest in length, the shorter one on ties. Raises MMGPTError for
    unequal or empty input.
    """
    rows = [
        bleu_counts(candidate.split(), [reference.split() for reference in group], max_n)
        for candidate, group in _tokenize(candidates, references)
    ]
    counts = np.array(rows, dtype=np.float64)
    per_item = bleu_from_counts(counts)
    corpus = bleu_from_counts(counts.sum(axis=0, keepdims=True))[0]
    return [
        CaptionScore(
            metric=f"BLEU-{n}",
            score=float(corpus[n - 1]),
            per_item=per_item[:, n - 1],
            bleu_counts=np.concatenate([counts[:, : 2 + n], counts[:, 2 + max_n : 2 + max_n + n]], axis=1),
        )
        for n in range(1, max_n + 1)
    ]


def bleu_counts(candidate: list[str], references: Sequence[list[str]], max_n: int = _MAX_N) -> list[int]:
    """Of one tokenised caption, as in `CaptionScore.bleu_counts`: (2 + 2n)."""
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= ngram_counts(reference, max_n)
    matches = [0] * max_n
    for ngram, count in ngram_counts(candidate, max_n).items():
        matches[len(ngram) - 1] += min(count, most[ngram])
    guesses = [max(0, len(candidate) - n) for n in range(max_n)]
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return [len(candidate), closest, *matches, *guesses]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    """ROUGE-L (Lin 2004), 0..1, with beta 1.2; the best precision and the best recall may be of two references.

    Raises MMGPTError for unequal or empty input.
    """
    per_item = []
    for candidate_text, group in _tokenize(candidates, references):
        candidate = candidate_text.split(" ")  # not split(): an empty caption is one empty token in the original
        precision = recall = 0.0
        for reference_text in group:
            reference = reference_text.split(" ")
            common = _longest_common_subsequence(candidate, reference)
            precision = max(precision, common / len(candidate))
            recall = max(recall, common / len(reference))
        score = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if precision else 0.0
        per_item.append(score)
    values = np.array(per_item)
    return CaptionScore(metric="ROUGE-L", score=float(values.mean()), per_item=values)


def _tokenize(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    if len(candidates) != len(references):
        raise MMGPTError(f"{len(candidates)} candidate captions for {len(references)} sets of references")
    if not candidates:
        raise MMGPTError("no captions to score")
    for item, group in enumerate(references):
        if isinstance(group, str):
            raise MMGPTError(f"references of caption {item} must be a list of strings, got one string")
        if not group:
            raise MMGPTError(f"caption {item} has no reference")
    return [
        (ptb_tokenize(candidate), [ptb_tokenize(reference) for reference in group])
        for candidate, group in zip(candidates, references, strict=True)
    ]


def ngram_counts(words: list[str], max_n: int = _MAX_N) -> Counter[Ngram]:
    """How often each run of 1 to `max_n` words comes."""
    return Counter(tuple(words[i : i + n]) for n in range(1, max_n + 1) for i in range(len(words) - n + 1))


def bleu_from_counts(counts: np.ndarray) -> np.ndarray:
    """(N, 2 + 2n) counts as in `CaptionScore.bleu_counts` -> (N, n) BLEU-1 to BLEU-n."""
    max_n = (counts.shape[1] - 2) // 2
    length, reference_length = counts[:, 0], counts[:, 1]
    precisions = (counts[:, 2 : 2 + max_n] + _TINY) / (counts[:, 2 + max_n :] + _SMALL)
    geometric_means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, max_n + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity_penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return geometric_means * brevity_penalty[:, None]


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if a == b else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
