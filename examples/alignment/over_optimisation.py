"""What happens to the truth when a learnt reward is optimised ever further, and what the KL penalty is good for.

PPO on the reward model of `world.py`, whose raters like flattering words, at several β, watched along the way: the
proxy that is optimised, the truth, and the KL divergence from where it began. With a small β the proxy goes on rising
and the truth falls (2210.10760). Best-of-n is drawn beside it at its KL divergence of log n - (n-1)/n; its truth is
exact, over all ways to draw n of 128 answers.

python examples/alignment/over_optimisation.py WORLD -o docs/results/alignment_over_optimisation.json
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from compare import chosen
from world import (
    QUICK,
    Judge,
    Sizes,
    begin,
    cached,
    interval,
    log_rows,
    options,
    policy_recipe,
    trained,
    verdict,
    write_result,
)

BETAS = (0.0, 0.02, 0.1, 0.5)
STEPS, STOPS = 200, 8
"""Steps of a run, and how often it is looked at on the way."""
TRUE = "rewards/true_reward/mean"


def recipe_of(folder: Path, sizes: Sizes, beta: float, seed: int) -> Any:
    steps = 2 if sizes == QUICK else STEPS
    longer = dataclasses.replace(sizes, policy_steps=steps)
    more: dict[str, Any] = {"beta": beta, "validate_every": max(1, steps // STOPS)}
    return policy_recipe(folder, longer, "ppo", seed, **more)


def path_of(out: Path) -> list[dict[str, float]]:
    """Step, KL divergence, proxy and truth along a run, from held-out prompts with one answer each."""
    found = []
    for row in log_rows(out):
        if "validation" in row:
            own = row["validation"]
            truth = own.get(TRUE, own["reward"])
            found.append({"step": row["step"], "kl": own["kl"], "proxy": own["reward"], "truth": truth})
    return found


def mean_path(paths: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """Of several seeds, with the smallest and the largest truth."""
    names = ("step", "kl", "proxy", "truth")
    table = np.array([[[at[name] for name in names] for at in path] for path in paths])  # (S, stops, 4)
    mean = {name: [round(float(v), 4) for v in table[:, :, at].mean(axis=0)] for at, name in enumerate(names)}
    for name, reduce in (("lowest truth", np.min), ("highest truth", np.max)):
        mean[name] = [round(float(v), 4) for v in reduce(table[:, :, 3], axis=0)]
    return mean


def draw(result: dict[str, Any], path: Path) -> None:
    """Proxy and truth against KL, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for key, one in zip(("proxy", "truth"), axes, strict=True):
        for number, (beta, values) in enumerate(result["paths"].items()):
            one.plot(values["kl"], values[key], "o-", ms=3, color=f"C{number}", label=f"PPO, beta {beta}")
        best = result["best_of_n"]
        one.plot([b["kl"] for b in best], [b[key]["mean"] for b in best], "k--", lw=1, label="best of n")
        one.set(xlabel="KL from the start (nats an answer)", ylabel=f"{key}, held out")
        one.grid(alpha=0.3)
        one.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = options(__doc__, "docs/results/alignment_over_optimisation.json").parse_args()
    judge, sizes = begin(args)
    folder: Path = args.world
    runs: dict[str, list[list[dict[str, float]]]] = {}
    ends: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for beta in BETAS:
            name = f"ppo-beta-{beta}-{seed}"
            make = lambda b=beta, s=seed: recipe_of(folder, sizes, b, s)  # noqa: E731
            ends.setdefault(str(beta), []).append(trained(folder, judge, name, make, seed))
            runs.setdefault(str(beta), []).append(path_of(folder / "runs" / name))
            print(f"beta {beta}, seed {seed}: {runs[str(beta)][-1][-1]}", flush=True)
    paths = {beta: mean_path(own) for beta, own in runs.items()}
    result = {
        "what": "PPO on a learnt reward; held-out combinations; 95 % bootstrap intervals over seeds and prompts",
        "seeds": args.seeds,
        "paths": paths,
        "best_of_n": [
            {"n": int(n), "kl": round(v["kl"], 4), **{k: interval(v[k]) for k in ("proxy", "truth")}}
            for n, v in chosen(folder, judge, sizes)["best_of"].items()
        ],
        **summary(folder, judge, ends, args.seeds),
    }
    write_result(args.output, result)
    draw(result, args.plot)
    print("\n".join(result["found"]))


def summary(folder: Path, judge: Judge, ends: dict[str, list[dict[str, Any]]], seeds: int) -> dict[str, Any]:
    """What the end of each run changes beside the start."""
    starts = [
        cached(folder / f"measures/sft-{seed}.json", lambda s=seed: judge.measure(folder / "sft/best", s))
        for seed in range(seeds)
    ]
    table: dict[str, Any] = {}
    said = []
    for beta, found in ends.items():
        change = {
            key: interval([np.subtract(v[key], s[key]) for v, s in zip(found, starts, strict=True)])
            for key in ("truth", "proxy", "flattery", "unsupported", "language loss")
        }
        own = {key: interval([v[key] for v in found]) for key in ("truth", "proxy", "kl", "flattery")}
        table[beta] = own | {"change": change, "samples": found[0]["samples"][:3]}
        said.append(verdict(change["proxy"], f"beta {beta}: proxy"))
        said.append(verdict(change["truth"], f"beta {beta}: truth"))
    falls = table["0.0"]["change"]["truth"]["ci95"][1] < 0 < table["0.0"]["change"]["proxy"]["ci95"][0]
    said.append(f"beta 0 over-optimises (proxy up, truth down): {'yes' if falls else 'not shown'}")
    return {"ends": table, "found": said}


if __name__ == "__main__":
    main()
