"""Ways to align one small model, held against each other where the truth is known.

All begin with the same model, `sft`, and know of what is wanted through the same wavering raters: the answers
that they ranked (DPO), or a reward model of these (best-of-n, PPO, PPO-ptx, GRPO). Controls: nothing at all (`sft`, and
`base`, which has seen no demonstration), GRPO on the true reward (what there is to win), on the true reward of other
pictures, and each model with its picture taken away. Measured on held-out combinations: the true reward, the KL
divergence from `sft` (k1, nats an answer), and what it costs: the loss on held-out text and on held-out captions of the
wild, which is what the base model was pretrained on.

python examples/alignment/compare.py WORLD -o docs/results/alignment_compare.json
"""

from pathlib import Path
from typing import Any

import numpy as np
from world import (
    PRETRAINING,
    Answers,
    Judge,
    Sizes,
    begin,
    best_of,
    best_of_kl,
    cached,
    interval,
    options,
    policy_recipe,
    preference_recipe,
    sources,
    trained,
    verdict,
    write_result,
)

GAMMAS = {"ppo_ptx": 1.0, "ppo_ptx_light": 0.1}
"""Of the pretraining term, beside means over tokens. Here it is more than a memory: captions of the wild answer the
very prompt that is aligned, worse than they should."""
NS = (4, 16, 64)
SHOWN = ("truth", "proxy", "kl", "unsupported", "flattery", "words", "no sentence", "truth without the image")
COSTS = ("language loss", "caption loss")
METHODS = ("dpo", "grpo", "ppo", *GAMMAS, "grpo_truth", "grpo_shuffled")


def recipe_of(folder: Path, sizes: Sizes, method: str, seed: int) -> Any:
    if method == "dpo":
        return preference_recipe(folder, sizes, seed)
    if method in GAMMAS:
        extra = {"pretraining": sources(*PRETRAINING), "pretraining_weight": GAMMAS[method], "pretraining_rows": 2}
        return policy_recipe(folder, sizes, "ppo", seed, **extra)
    return policy_recipe(folder, sizes, method, seed)


def measures(folder: Path, judge: Judge, sizes: Sizes, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Of each way the measures by seed. `base` and `sft` are one model each: their seeds are those of sampling."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("base", "sft"):
        made = [lambda n=name, s=seed: judge.measure(folder / n / "best", s) for seed in range(seeds)]
        found[name] = [cached(folder / f"measures/{name}-{seed}.json", make) for seed, make in enumerate(made)]
    for seed in range(seeds):
        for method in METHODS:
            make = lambda m=method, s=seed: recipe_of(folder, sizes, m, s)  # noqa: E731
            found.setdefault(method, []).append(trained(folder, judge, f"{method}-{seed}", make, seed))
            print(f"{method} {seed}: true reward {np.mean(found[method][-1]['truth']):.3f}", flush=True)
    return found


def chosen(folder: Path, judge: Judge, sizes: Sizes) -> dict[str, Any]:
    """Best of n answers of `sft` by the reward model: the expected truth and proxy, of each held-out prompt."""

    def make() -> dict[str, Any]:
        answers = Answers.sample(judge.start, judge.processor, judge.prompts, sizes.best_of, seed=77)
        truth, proxy = answers.truth(), answers.rewarded(judge.reward)
        values: dict[str, Any] = {}
        for n in (1, 2, *NS, sizes.best_of // 2):
            if n <= sizes.best_of:
                own = {"truth": best_of(proxy, truth, n), "proxy": best_of(proxy, proxy, n)}
                values[str(n)] = {name: v.tolist() for name, v in own.items()} | {"kl": best_of_kl(n)}
        agree = np.corrcoef(truth.ravel(), proxy.ravel())[0, 1]
        return {"best_of": values, "correlation": float(agree) if np.isfinite(agree) else None}

    return cached(folder / "measures/best_of.json", make)


def summary(found: dict[str, list[dict[str, Any]]], best: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals, and what each way changes beside `sft`, prompt by prompt."""
    ways: dict[str, Any] = {}
    for name, by_seed in found.items():
        own: dict[str, Any] = {key: interval([v[key] for v in by_seed]) for key in (*SHOWN, *COSTS)}
        own["change"] = {
            key: interval([np.subtract(v[key], s[key]) for v, s in zip(by_seed, found["sft"], strict=True)])
            for key in ("truth", "proxy", "unsupported", "flattery", *COSTS)
        }
        own["samples"] = by_seed[0]["samples"][:3]
        ways[name] = own
    # What the pretraining term saves, and what it costs.
    for name in GAMMAS:
        ways[name]["beside ppo"] = {
            key: interval([np.subtract(v[key], p[key]) for v, p in zip(found[name], found["ppo"], strict=True)])
            for key in ("truth", *COSTS)
        }
    for n, values in best["best_of"].items():
        truth = {key: interval(values[key]) for key in ("truth", "proxy")}
        ways[f"best_of_{n}"] = truth | {"kl_bound": round(values["kl"], 4)}
    return ways


def sentences(ways: dict[str, Any]) -> list[str]:
    said = []
    for name in METHODS:
        change = ways[name]["change"]
        said.append(verdict(change["truth"], f"{name}: true reward beside sft"))
        for key in COSTS:
            said.append(verdict(change[key], f"{name}: {key} beside sft"))
    for name, gamma in GAMMAS.items():
        for key, effect in ways[name]["beside ppo"].items():
            said.append(verdict(effect, f"{name} (gamma {gamma:g}): {key} beside ppo"))
    for name in ("sft", "grpo"):
        said.append(f"{name} without the picture: {ways[name]['truth without the image']['mean']:.3f}")
    return said


def draw(ways: dict[str, Any], path: Path) -> None:
    """The true reward, against the KL divergence, and what it costs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [name for name in ways if name not in ("best_of_1", "best_of_2")]
    for at, name in enumerate(reversed(names)):
        mean, (low, high) = ways[name]["truth"]["mean"], ways[name]["truth"]["ci95"]
        left.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
        if "truth without the image" in ways[name]:
            left.plot(ways[name]["truth without the image"]["mean"], at, "x", color="C3")
    left.set_yticks(range(len(names)), list(reversed(names)))
    left.set_xlabel("true reward; × without the picture")
    best = sorted((w["kl_bound"], w["truth"]["mean"]) for name, w in ways.items() if name.startswith("best_of"))
    middle.plot(*zip(*best, strict=True), "k--", lw=1, label="best of n, log n - (n-1)/n")
    for name in ways:
        if "kl" in ways[name] and name != "base":
            middle.plot(ways[name]["kl"]["mean"], ways[name]["truth"]["mean"], "o", label=name)
    middle.set(xlabel="KL from sft (nats an answer)", ylabel="true reward")
    middle.legend(fontsize=7)
    own = [name for name in ways if "change" in ways[name] and name != "base"]
    for number, key in enumerate(COSTS):
        for at, name in enumerate(own):
            mean, (low, high) = ways[name]["change"][key]["mean"], ways[name]["change"][key]["ci95"]
            label = key if at == 0 else None
            place = at + 0.2 * number
            right.errorbar(
                place, mean, yerr=[[mean - low], [high - mean]], fmt="os"[number], color=f"C{number}", label=label
            )
    right.set_xticks(range(len(own)), own, rotation=30, ha="right", fontsize=8)
    right.set_ylabel("change of held-out loss beside sft (nats)")
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = options(__doc__, "docs/results/alignment_compare.json").parse_args()
    judge, sizes = begin(args)
    best = chosen(args.world, judge, sizes)
    ways = summary(measures(args.world, judge, sizes, args.seeds), best)
    said = sentences(ways)
    result = {
        "what": "held-out combinations; 95 % bootstrap intervals over seeds and prompts; changes are paired with sft",
        "seeds": args.seeds,
        "prompts": len(judge.prompts),
        "answers to a prompt": sizes.measured,
        "gammas": GAMMAS,
        "correlation of proxy and truth over answers of sft": best["correlation"],
        "ways": ways,
        "found": said,
    }
    write_result(args.output, result)
    draw(ways, args.plot)
    print("\n".join(said))


if __name__ == "__main__":
    main()
