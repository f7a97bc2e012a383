"""The quality classifier: GPT-3's keep rates, what it learns, what it writes, what it refuses to read."""

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mm_gpt.datasets.filters.quality import (
    QualityFilter,
    QualityReport,
    QualityTraining,
    features,
    keeps,
    quality_score,
    train_quality,
)
from mm_gpt.datasets.filters.text_filters import Words
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError

GOOD = Words("history science water river century island family church music language theory author animal light").words
BAD = Words("click cheap buy sale free login cookie casino offer download price now subscribe water pills").words
SHARED = Words("the of and in to a is was for it with as on by").words


def pages(words: list[str], number: int, name: str) -> Iterator[Document]:
    rng = np.random.default_rng(number)
    for at in range(number):
        text = " ".join(rng.choice([*words, *SHARED], size=int(rng.integers(20, 80))))
        yield Document((Text(text), Image("a.jpg")), id=f"{name}-{at}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QualityReport]:
    folder = tmp_path_factory.mktemp("quality")
    config = QualityTraining(num_features=2**12, epochs=5, batch_size=64)
    # Three times as many negatives: their number must not shift the scores.
    return folder, train_quality(pages(GOOD, 300, "good"), pages(BAD, 900, "bad"), folder, config)


@pytest.mark.parametrize(("score", "rate"), [(1, 1), (0.9, 0.424), (0.75, 0.134), (0.5, 0.026), (0, 0.00195)])
def test_keep_rates_of_gpt3(score: float, rate: float) -> None:
    assert (2 - score) ** -9 == pytest.approx(rate, rel=0.02), "numpy's pareto is Lomax"
    fractions = (np.arange(100_000) + 0.5) / 100_000
    kept = np.mean([keeps(score, float(fraction)) for fraction in fractions])
    assert kept == pytest.approx(rate, rel=0.02)
    pareto = np.random.default_rng(0).pareto(9, 100_000)
    assert kept == pytest.approx((pareto > 1 - score).mean(), abs=0.005), "not numpy's pareto"


def test_it_learns_to_tell_them_apart(trained: tuple[Path, QualityReport]) -> None:
    folder, report = trained
    assert (report.num_positives, report.num_negatives) == (300, 900)
    assert report.auc > 0.99
    assert report.accuracy > 0.95
    assert report.kept_positives > 5 * report.kept_negatives
    good = quality_score(Document((Text("The history of the river and its church."),)), folder)
    bad = quality_score(Document((Text("Click to buy cheap pills, free download."),)), folder)
    unknown = quality_score(Document((Text("zyx qwv"),)), folder)
    assert good > 0.7 > unknown > 0.3 > bad, "no evidence must stay near one half"


def test_the_filter_keeps_at_its_rate_and_repeats_itself(trained: tuple[Path, QualityReport]) -> None:
    stage = pickle.loads(pickle.dumps(QualityFilter(path=str(trained[0]))))
    documents = list(pages([*GOOD, *BAD], 600, "mixed"))
    expected = sum((2 - quality_score(document, trained[0])) ** -9 for document in documents)
    removed: Counter[str] = Counter()
    kept = {document.id: out for document in documents if (out := stage(document, removed))}
    assert abs(len(kept) - expected) < 5 * math.sqrt(expected) + 1
    assert removed == {"low quality": 600 - len(kept)}
    assert {document.id for document in reversed(documents) if stage(document, Counter())} == set(kept)
    other = QualityFilter(path=str(trained[0]), seed=1)
    assert {document.id for document in documents if other(document, Counter())} != set(kept)
    name, out = next(iter(kept.items()))
    assert out.metadata["quality"] == round(quality_score(out, trained[0]), 4)
    assert out.segments == next(document for document in documents if document.id == name).segments


def test_the_same_input_gives_the_same_files(tmp_path: Path, trained: tuple[Path, QualityReport]) -> None:
    config = QualityTraining(num_features=2**12, epochs=5, batch_size=64)
    train_quality(pages(GOOD, 300, "good"), pages(BAD, 900, "bad"), tmp_path, config)
    for name in ("quality.safetensors", "quality.json"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()
    assert json.loads((tmp_path / "quality.json").read_text())["training"]["num_features"] == 2**12


def test_features_are_the_same_everywhere_and_as_long_for_a_long_text() -> None:
    buckets, values = features("The cat, the CAT!", 2**18)
    # CRC-32 of b"the" and b"cat", modulo 2**18: on every machine, in every process.
    assert dict(zip(buckets.tolist(), values.tolist(), strict=True)) == pytest.approx(
        {0x3C456DE6 % 2**18: 0.5**0.5, 0x9E5E43A8 % 2**18: 0.5**0.5}
    )
    once, often = features("a b", 64), features("a b " * 1000, 64)
    assert np.allclose(once[1], often[1])
    assert len(features("123 !", 64)[0]) == 0
    assert len(features("a\ud800b", 64)[0]) == 1, "half a character is no reason to stop"


def test_a_class_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="no positive document"):
        train_quality([Document((Text("123"),))], pages(BAD, 5, "bad"), tmp_path)
    with pytest.raises(MMGPTError, match="no negative document"):
        train_quality(pages(GOOD, 5, "good"), [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_held_out_is_reported_as_unknown(tmp_path: Path) -> None:
    config = QualityTraining(num_features=64, epochs=1, held_out=0)
    report = train_quality(pages(GOOD, 5, "good"), pages(BAD, 5, "bad"), tmp_path, config)
    assert math.isnan(report.auc)
    assert json.loads((tmp_path / "quality.json").read_text())["report"]["auc"] is None


def broken(kind: str, folder: Path) -> None:
    tensors = load_file(folder / "quality.safetensors")
    if kind == "no weights":
        (folder / "quality.safetensors").unlink()
    elif kind == "not JSON":
        (folder / "quality.json").write_text("{")
    elif kind == "not an object":
        (folder / "quality.json").write_text("[]")
    elif kind == "cut":
        (folder / "quality.safetensors").write_bytes((folder / "quality.safetensors").read_bytes()[:-8])
    elif kind == "other size":
        save_file({**tensors, "weight": tensors["weight"][:-1]}, folder / "quality.safetensors")
    elif kind == "NaN":
        save_file({**tensors, "weight": tensors["weight"] * np.float32("nan")}, folder / "quality.safetensors")


@pytest.mark.parametrize("kind", ["no weights", "not JSON", "not an object", "cut", "other size", "NaN"])
def test_broken_classifiers_are_named(kind: str, tmp_path: Path) -> None:
    train_quality(pages(GOOD, 5, "g"), pages(BAD, 5, "b"), tmp_path, QualityTraining(num_features=64, epochs=1))
    broken(kind, tmp_path)
    with pytest.raises(MMGPTError, match=str(tmp_path)):
        QualityFilter(path=str(tmp_path))(Document((Text("a"),)), Counter())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"held_out": 1.0}, {"learning_rate": 0.0}])
def test_impossible_training_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        QualityTraining(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alpha"):
        QualityFilter(path="x", alpha=0)
