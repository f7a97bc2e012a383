"""Whether a model still knows how sure it may be, before and after PPO.

Questions about what is where in held-out pictures, with every answer that there is for choices: how probable the
likeliest one is among them, and how often it is right. The expected calibration error has ten fixed bins. GPT-4's rose
tenfold with PPO, on a benchmark of exams (2303.08774); here PPO is about captions, and the questions are only what it
may forget.

python examples/alignment/calibration.py WORLD -o docs/results/alignment_calibration.json
"""

from pathlib import Path
from typing import Any

import numpy as np
import over_optimisation
from compare import recipe_of
from world import (
    Judge,
    asked,
    begin,
    cached,
    confidence,
    last,
    learn,
    once,
    options,
    verdict,
    write_result,
)

from mm_gpt.eval.metrics.calibration import calibration_bins, expected_calibration_error
from mm_gpt.hub.checkpoint import load_model


def judged(folder: Path, model_folder: Path, judge: Judge, name: str) -> np.ndarray:
    """(N, 2): see `world.confidence`."""

    def make() -> dict[str, Any]:
        model, processor = load_model(str(model_folder))
        found = confidence(model.eval(), processor, asked(folder, len(judge.prompts)))
        return {"judged": found.round(6).tolist()}

    return np.array(cached(folder / f"measures/choices-{name}.json", make)["judged"])


def summary(tables: list[np.ndarray], start: np.ndarray, *, resamples: int = 1000) -> dict[str, Any]:
    """Of one way, by seed, tables (N, 2): ECE and accuracy, and how far the ECE has moved from `start` (N, 2); over
    seeds and questions drawn anew together."""
    rng = np.random.default_rng(0)
    stacked = np.stack(tables)  # (S, N, 2)
    s, n = stacked.shape[:2]
    error = lambda table: expected_calibration_error(table[:, 0], table[:, 1])  # noqa: E731
    drawn = []
    for _ in range(resamples):
        which, questions = rng.integers(s, size=s), rng.integers(n, size=n)
        after = np.mean([error(stacked[seed, questions]) for seed in which])
        drawn.append((after, after - error(start[questions])))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    values = [error(table) for table in tables]
    bins = calibration_bins(stacked[..., 0].ravel(), stacked[..., 1].ravel())
    short = lambda value: round(float(value), 4)  # noqa: E731
    mean = float(np.mean(values))
    return {
        "ece": {"mean": short(mean), "ci95": [short(low[0]), short(high[0])], "seeds": [short(v) for v in values]},
        "change": {"mean": short(mean - error(start)), "ci95": [short(low[1]), short(high[1])]},
        "confidence": short(stacked[..., 0].mean()),
        "accuracy": short(stacked[..., 1].mean()),
        "bins": [[short(sure), short(right), n] for sure, right, n in bins],
    }


def draw(ways: dict[str, Any], path: Path) -> None:
    """Accuracy against confidence, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02))
    axes.plot([0, 1], [0, 1], "k--", lw=1)
    for name, values in ways.items():
        points = [(sure, right) for sure, right, _ in values["bins"]]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{name}, ECE {values['ece']['mean']:.3f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = options(__doc__, "docs/results/alignment_calibration.json").parse_args()
    judge, sizes = begin(args)
    folder: Path = args.world
    tables = {name: [judged(folder, folder / name / "best", judge, name)] for name in ("base", "sft")}
    for seed in range(args.seeds):
        runs = {
            "ppo": (f"ppo-{seed}", lambda s=seed: recipe_of(folder, sizes, "ppo", s)),
            "ppo, beta 0": (f"ppo-beta-0.0-{seed}", lambda s=seed: over_optimisation.recipe_of(folder, sizes, 0.0, s)),
        }
        for way, (name, recipe) in runs.items():
            out = once(folder / "runs" / name, lambda out, recipe=recipe: learn(recipe(), out))
            tables.setdefault(way, []).append(judged(folder, last(out), judge, name))
    ways = {name: summary(own, tables["sft"][0]) for name, own in tables.items()}
    said = [verdict(ways[name]["change"], f"{name}: ECE beside sft") for name in ways if name.startswith("ppo")]
    result = {
        "what": "ECE in ten fixed bins; 95 % bootstrap intervals over seeds and questions; changes are paired with sft",
        "seeds": args.seeds,
        "questions": len(tables["sft"][0]),
        "ways": ways,
        "found": said,
    }
    write_result(args.output, result)
    draw(ways, args.plot)
    print("\n".join(said))


if __name__ == "__main__":
    main()
