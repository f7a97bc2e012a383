"""Capability before training, emergence, and laws by modality."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from mm_gpt.errors import MMGPTError
from mm_gpt.scaling.capability import (
    Attempts,
    difficulty_buckets,
    emergence,
    fit_accuracy,
    mean_log_loss,
    predict_capability,
    small_models,
    solved_by_all,
)
from mm_gpt.scaling.laws import CannotTell, Point, fit_parametric
from mm_gpt.scaling.modalities import MixedPoint, fit_modalities

HERE = Path(__file__).parent
FLOPS = np.geomspace(1e12, 1e15, 7)
TARGET = 1e18


def attempts(flops: float, alphas: dict[str, float], *, samples: int = 10**6, k: float = 0.1) -> Attempts:
    """A model whose pass rates follow -log p = alpha (C / 1e12)^-k on each problem."""
    rates = {name: math.exp(-alpha * (flops / 1e12) ** -k) for name, alpha in alphas.items()}
    return Attempts(flops, samples, {name: round(samples * rate) for name, rate in rates.items()}, f"C{flops:.0e}")


PROBLEMS = {f"problem-{index}": 0.5 + index / 3 for index in range(12)}
MODELS = [attempts(flops, PROBLEMS) for flops in FLOPS]


def test_mean_of_logs_and_not_log_of_the_mean() -> None:
    """The sheet's example: rates of .9, .5 and .1 have a mean -log of 1.0337; -log of their mean is .6931."""
    model = Attempts(1.0, 10, {"a": 9, "b": 5, "c": 1})
    assert mean_log_loss(model, ["a", "b", "c"]) == pytest.approx(1.0337, abs=1e-4)
    assert -math.log((0.9 + 0.5 + 0.1) / 3) == pytest.approx(0.6931, abs=1e-4)
    assert mean_log_loss(model, ["a"]) == pytest.approx(-math.log(0.9))


def test_unsolved_problems() -> None:
    """Scaling check 7: infinite unless a floor of 1 / (2n) is asked for; and the filter leaves them out."""
    model = Attempts(1.0, 50, {"a": 25, "b": 0}, "tiny")
    with pytest.raises(CannotTell, match=r"tiny never solves problem 'b': leave out .* or ask for the floor"):
        mean_log_loss(model, ["a", "b"])
    assert mean_log_loss(model, ["a", "b"], floor=True) == pytest.approx((math.log(2) + math.log(100)) / 2)
    other = Attempts(2.0, 50, {"a": 30, "b": 5})
    assert solved_by_all([model, other]) == ["a"]
    assert solved_by_all([other]) == ["a", "b"]
    with pytest.raises(CannotTell, match="no problems are left"):
        mean_log_loss(model, [])


def test_wrong_attempts() -> None:
    with pytest.raises(MMGPTError, match="problem 'a' passed 11 of 10 times"):
        Attempts(1.0, 10, {"a": 11})
    with pytest.raises(MMGPTError, match="samples must be at least 1"):
        Attempts(1.0, 0, {})
    with pytest.raises(MMGPTError, match=r"small: no attempts at problem 'b'"):
        solved_by_all([Attempts(1.0, 10, {"a": 1}, "small"), Attempts(1.0, 10, {"a": 1, "b": 1})])


def test_capability_is_predicted() -> None:
    """GPT-4's law from models with a thousandth of the compute and less; the target's own results are not looked at."""
    prediction = predict_capability(MODELS, TARGET)
    truth = np.mean(list(PROBLEMS.values())) * 1e6**-0.1
    assert prediction.log_loss == pytest.approx(truth, rel=0.01)
    assert prediction.fit.coefficients["b"] == pytest.approx(-0.1, abs=2e-3)
    assert prediction.held_out.error == pytest.approx(0, abs=2e-3)
    assert prediction.low < prediction.log_loss < prediction.high
    assert "over 12 problems; the largest small model, held out" in str(prediction)
    with pytest.raises(CannotTell, match="2 amounts of compute are too few"):
        predict_capability(MODELS[:2], TARGET)
    with pytest.raises(CannotTell, match=r"no model has at most 0.001 of the target's 1e\+12 FLOPs"):
        predict_capability(MODELS, 1e12)


def test_the_large_model_is_not_looked_at() -> None:
    """Scaling check 7: results of the large model, poisoned, change neither buckets nor filter nor prediction."""
    large = attempts(TARGET, PROBLEMS)
    poisoned = Attempts(TARGET, large.samples, {name: 0 if n % 2 else 7 for n, name in enumerate(PROBLEMS)})
    found = []
    for models in ([*MODELS, large], [*MODELS, poisoned]):
        small = small_models(models, TARGET)
        assert small == MODELS
        buckets = difficulty_buckets(small, count=3)
        found.append((buckets, solved_by_all(small), predict_capability(models, TARGET, problems=buckets[1])))
    assert found[0] == found[1]
    assert found[0][2].problems == found[0][0][1]


def test_buckets() -> None:
    """By the mean pass rate of small models, hardest first, equal in size; the hardest may be dropped."""
    hardest_first = sorted(PROBLEMS, key=lambda name: -PROBLEMS[name])
    buckets = difficulty_buckets(MODELS, count=6)
    assert [len(bucket) for bucket in buckets] == [2] * 6
    assert [name for bucket in buckets for name in bucket] == hardest_first
    dropped = difficulty_buckets(MODELS, count=3, drop_hardest=3)
    assert [name for bucket in dropped for name in bucket] == hardest_first[3:]
    with pytest.raises(MMGPTError, match="12 problems cannot be put into 13 buckets"):
        difficulty_buckets(MODELS, count=13)
    # A problem that the smallest model never solves is in a bucket, and left out of its law
    passed = dict(MODELS[0].passed) | {"problem-0": 0}
    models = [Attempts(MODELS[0].flops, MODELS[0].samples, passed), *MODELS[1:]]
    (everything,) = difficulty_buckets(models, count=1)
    assert "problem-0" in everything
    assert "problem-0" not in predict_capability(models, TARGET, problems=everything).problems
    assert "problem-0" in predict_capability(models, TARGET, problems=everything, floor=True).problems


def test_accuracy_of_a_loss() -> None:
    loss = np.linspace(0.5, 2.0, 30)
    accuracy = 0.25 + (0.9 - 0.25) / (1 + np.exp(6 * (loss - 1.1)))
    fit = fit_accuracy(loss, accuracy, chance=0.25)
    assert (fit.low, fit.high, fit.k, fit.middle) == pytest.approx((0.25, 0.9, 6, 1.1), abs=1e-3)
    assert fit.predict(0.3) == pytest.approx(0.25 + 0.65 / (1 + math.exp(6 * (0.3 - 1.1))), abs=1e-4)
    # Bounds: what the numbers would take below chance or above 1 stays there
    beyond = fit_accuracy(loss, 0.1 + 1.1 / (1 + np.exp(6 * (loss - 1.1))), chance=0.25)
    assert 0.25 <= beyond.low <= beyond.high <= 1
    with pytest.raises(CannotTell, match=r"accuracy gets to 0.27 with 0.25 for guessing"):
        fit_accuracy(loss, np.full(30, 0.27), chance=0.25)
    with pytest.raises(CannotTell, match=r"4 pairs .* are too few"):
        fit_accuracy(loss[:4], accuracy[:4], chance=0.25)
    with pytest.raises(MMGPTError, match="30 losses and 29 accuracies"):
        fit_accuracy(loss, accuracy[1:], chance=0.25)


def read(name: str) -> list[dict[str, str]]:
    with (HERE / name).open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_olmo_accuracy() -> None:
    """The sheet's chain for HellaSwag: the law's loss through the sigmoid gives 7B-4T +1.4 % and 13B-5T +2.5 %."""
    rows = read("olmo_points.csv")
    points = [Point(float(row["N"]), float(row["D"]), float(row["flops"]), float(row["hellaswag_bpb"])) for row in rows]
    law = fit_parametric(points[:16])
    pairs = [(float(row["loss"]), float(row["accuracy"])) for row in read("olmo_hellaswag_training.csv")]
    losses, accuracies = zip(*pairs, (0.0, 1.0), strict=True)  # a loss of 0 is always right
    sigmoid = fit_accuracy(losses, accuracies, chance=0.25)
    errors = [
        sigmoid.predict(law.predict(point)) / float(row["hellaswag_accuracy"]) - 1
        for point, row in zip(points[16:], rows[16:], strict=True)
    ]
    assert errors == pytest.approx([0.014, 0.025], abs=1e-3)


def test_emergence_only_where_both_jump() -> None:
    """A whole answer of ten tokens turns a smooth likelihood into a step; that alone is not emergence."""
    flops = np.geomspace(1e12, 1e18, 9)
    smooth = np.linspace(-1.2, -0.02, 9)  # per token
    assert emergence(flops, np.exp(2 * smooth), smooth, problems=1000).verdict == "smooth"
    mirage = emergence(flops, np.exp(10 * smooth), smooth, problems=1000)
    assert mirage.verdict == "only exact match jumps"
    assert (mirage.exact_match_jumps, mirage.likelihood_jumps) == ((8,), ())
    step = np.array([-2.0, -1.98, -1.97, -1.95, -1.93, -0.4, -0.38, -0.37, -0.36])
    match = np.array([0.0, 0.0, 0.01, 0.01, 0.02, 0.71, 0.72, 0.73, 0.73])
    real = emergence(flops, match, step, problems=1000)
    assert (real.verdict, real.exact_match_jumps, real.likelihood_jumps) == ("emergent", (5,), (5,))
    mixed = np.random.default_rng(0).permutation(9)
    assert emergence(flops[mixed], match[mixed], step[mixed], problems=1000) == real
    assert emergence(flops, match, smooth, problems=1000).verdict == "only exact match jumps"
    # Jumps at different rungs are not one ability, and noise is no jump
    assert emergence(flops, match, np.roll(step, 2) + np.array([-1, -1] + [0] * 7), problems=1000).verdict != "emergent"
    assert emergence(flops, match / 20, step, problems=20).verdict == "smooth"
    assert emergence(flops, match, -1 + (step + 2) / 500, problems=1000).verdict == "only exact match jumps"


def test_emergence_needs_rungs() -> None:
    with pytest.raises(CannotTell, match="4 rungs are too few"):
        emergence([1, 2, 3, 4], [0, 0, 0, 1], [-4, -3, -2, -1], problems=10)
    with pytest.raises(CannotTell, match="leave out runs that diverged"):
        emergence([1, 2, 3, 4, 5], [0, 0, 0, 0, 1], [-4, -3, math.nan, -2, -1], problems=10)
    with pytest.raises(MMGPTError, match="two rungs have the same compute"):
        emergence([1, 2, 3, 3, 5], [0, 0, 0, 0, 1], [-4, -3, -3, -2, -1], problems=10)
    with pytest.raises(MMGPTError, match="5 rungs with 4 exact matches"):
        emergence([1, 2, 3, 4, 5], [0, 0, 0, 1], [-4, -3, -3, -2, -1], problems=10)


WORTH = {"text": 0.3, "captions": 0.05}


def mixed_runs(noise: float, shares: tuple[float, ...] = (0.2, 0.5, 0.8)) -> list[MixedPoint]:
    """A ladder on two modalities; a token of one is worth something for the other."""
    rng = np.random.default_rng(0)
    runs = []
    for n in np.geomspace(1e6, 1e8, 4):
        for ratio in (5, 80):
            for share in shares:
                text, captions = n * ratio * (1 - share), n * ratio * share
                losses = {
                    "text": 300 / n**0.33 + 1500 / (text + WORTH["text"] * captions) ** 0.37 + 1.8,
                    "captions": 100 / n**0.3 + 4000 / (captions + WORTH["captions"] * text) ** 0.42 + 1.1,
                }
                noisy = {name: loss * math.exp(rng.normal(0, noise)) for name, loss in losses.items()}
                runs.append(MixedPoint(n, {"text": text, "captions": captions}, noisy, 6 * n * n * ratio))
    return runs


def test_what_a_token_of_the_other_kind_is_worth() -> None:
    fits = fit_modalities(mixed_runs(0.003))
    target = MixedPoint(1e9, {"text": 1e10, "captions": 1e10}, {}, 1.2e20)
    truth = {
        "text": 300 / 1e9**0.33 + 1500 / 1.3e10**0.37 + 1.8,
        "captions": 100 / 1e9**0.3 + 4000 / 1.05e10**0.42 + 1.1,
    }
    for name, worth in WORTH.items():
        fit = fits[name]
        assert fit.worth_low < worth < fit.worth_high
        assert fit.worth == pytest.approx(worth, rel=0.1)
        assert fit.worth_high < 1.3 * fit.worth_low
        assert fit.predict(target) == pytest.approx(truth[name], rel=0.01)


def test_worth_that_cannot_be_told() -> None:
    with pytest.raises(
        CannotTell, match=r"captions: all runs have the same share of its tokens \(50%\).*vary the mixture"
    ):
        fit_modalities(mixed_runs(0.003, shares=(0.5,)))
    with pytest.raises(CannotTell, match=r"captions: a token of another kind may be worth .* add runs"):
        fit_modalities(mixed_runs(0.05, shares=(0.48, 0.5, 0.52)))
    with pytest.raises(CannotTell, match="no runs"):
        fit_modalities([])
    with pytest.raises(MMGPTError, match="no modality in common"):
        fit_modalities([MixedPoint(1e6, {"text": 1e8}, {"txt": 3.0}, 6e14)])
