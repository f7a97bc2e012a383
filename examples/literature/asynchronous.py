"""Asynchronous updates, whose gradients are τ updates old, against synchronous ones.

A gradient is taken at the weights of some update, and applied when others have changed them. With W workers that are
equally fast and do not wait for each other, every gradient is τ = W - 1 updates old (DistBelief; Hogwild!, 1106.5730;
Zhang et al., 1511.05950). Simulated on one small language model, with the learning rate chosen anew for every τ. Three
ways are held against synchronous training of one worker, all with as many gradients of as many tokens:

  delayed        W workers in turn, each gradient exactly τ updates old
  uneven         W workers whose speeds vary, so that delays do: τ updates on average
  synchronous    W workers that wait, and a mean of W gradients in each of the W times fewer updates

python examples/literature/asynchronous.py debian --page docs/literature.md
python examples/literature/asynchronous.py --quick --seeds 1 -o /tmp/try.json --plot /tmp/try.png
"""

import argparse
import heapq
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gimp_manual import split, texts, token_rows
from small_runs import (
    Finished,
    batches,
    best_rate,
    cell,
    chosen,
    interval,
    options,
    pages_of,
    paired,
    said,
    save_figure,
    small_config,
    table,
    write,
)
from torch import Tensor, nn
from tqdm import tqdm

from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.schedules import learning_rate
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.train_config import TrainConfig

Loss = Callable[[Any], tuple[Tensor, int]]
"""Of a batch: the summed loss, and how many things it is a sum over."""
OPTIMIZERS = ("adamw", "sgd")


def constant_versions(delay: int, updates: int) -> list[int]:
    """For each update, how many updates the weights of its gradient had seen: τ fewer, and none in the beginning."""
    return [max(0, update - delay) for update in range(updates)]


def uneven_versions(workers: int, updates: int, rng: random.Random) -> list[int]:
    """The same of workers that take exponentially distributed times: delays are uneven, W - 1 on average."""
    finished = [(rng.expovariate(1.0), worker, 0) for worker in range(workers)]
    heapq.heapify(finished)
    versions = []
    for update in range(updates):
        now, worker, version = heapq.heappop(finished)
        versions.append(version)
        heapq.heappush(finished, (now + rng.expovariate(1.0), worker, update + 1))
    return versions


def gradients(parameters: Sequence[nn.Parameter], parts: Sequence[Any], loss_of: Loss) -> tuple[list[Tensor], float]:
    """Of the mean loss over all parts of a step, summed part by part, as ranks sum theirs; and that loss."""
    found = [loss_of(part) for part in parts]
    count = sum(number for _, number in found)
    total: list[Tensor] = []
    for loss, _ in found:
        own = torch.autograd.grad(loss / count, list(parameters))
        total = list(own) if not total else [a + b for a, b in zip(total, own, strict=True)]
    return total, sum(float(loss.detach()) for loss, _ in found) / count


def train_stale(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Any]],
    loss_of: Loss,
    versions: Sequence[int],
    *,
    rate: Callable[[int], float] | None = None,
    clip: float | None = None,
) -> list[float]:
    """Train with gradients that were taken at the weights after `versions[n]` updates, and applied as update n.

    steps: the batches of each update, in parts. The losses are those at the weights that the gradients were taken at.
    With versions 0, 1, 2, ... this is synchronous training. Stops at a loss that is not finite.
    """
    taken: dict[int, list[int]] = defaultdict(list)
    for update, version in enumerate(versions):
        if not 0 <= version <= update:
            raise ValueError(f"update {update} cannot have the gradient of weights after {version} updates")
        taken[version].append(update)
    waiting: dict[int, list[Tensor]] = {}
    losses = [math.nan] * len(versions)
    for update in range(len(versions)):
        for later in taken[update]:  # whose gradients are taken at the weights as they are now
            waiting[later], losses[later] = gradients(parameters, steps[later], loss_of)
        for parameter, gradient in zip(parameters, waiting.pop(update), strict=True):
            parameter.grad = gradient
        if not math.isfinite(losses[update]):
            break
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(update)
        optimizer.step()
    return losses


# ---- The experiment ----


@dataclass(frozen=True)
class Sizes:
    steps: int = 256
    """Of one worker, each with a batch of its own; a power of 2, so that workers share them evenly."""
    rows: int = 8
    length: int = 32
    width: int = 48
    layers: int = 2
    vocab_size: int = 512
    delays: tuple[int, ...] = (0, 1, 3, 7, 15)
    walks: int = 5
    held_out: int = 128


FULL, QUICK = Sizes(), Sizes(steps=8, width=32, layers=1, vocab_size=300, delays=(0, 3), walks=1, held_out=4)
RATES = {"adamw": 16e-3, "sgd": 2.0}
"""Where the search begins, at no delay."""


class World:
    """Text, and a loss on held-out text after training in one of the ways."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes):
        self.sizes = sizes
        parts = split(pages_of(args, ("en",)))
        tokenizer = Tokenizer.train(texts(parts["train"], "en"), sizes.vocab_size)
        self.rows = {name: token_rows(pages, "en", tokenizer, sizes.length + 1) for name, pages in parts.items()}
        self.config = small_config(
            tokenizer.vocab_size, width=sizes.width, layers=sizes.layers, max_length=sizes.length
        )
        self.positions = torch.arange(sizes.length)

    def loss_of(self, model: Decoder) -> Loss:
        def loss(rows: Tensor) -> tuple[Tensor, int]:
            positions = self.positions.expand(len(rows), -1)
            hidden = model(model.embed(rows[:, :-1]), positions)
            total, _ = model.loss(hidden, rows[:, 1:].contiguous())
            return total, rows[:, 1:].numel()

        return loss

    def run(self, optimizer: str, way: str, delay: int, lr: float, seed: int, part: str) -> float:
        """Nats a token on held-out text: of `validation` where rates are chosen, of `test` for figures."""
        sizes, workers = self.sizes, delay + 1
        together = workers if way == "synchronous" else 1  # gradients in an update
        updates = sizes.steps // together
        data = list(islice(batches(self.rows["train"], sizes.rows, seed), sizes.steps))
        steps = [data[at * together : (at + 1) * together] for at in range(updates)]
        if way == "uneven":
            versions = uneven_versions(workers, updates, random.Random(seed))
        else:
            versions = constant_versions(0 if way == "synchronous" else delay, updates)
        model = Decoder(self.config)
        init_weights(model, torch.Generator().manual_seed(seed))
        config = TrainConfig(
            steps=updates, lr=lr, warmup_steps=max(1, updates // 10), final_lr=0.1, weight_decay=0.01, beta2=0.95
        )
        parameters = list(model.parameters())
        if optimizer == "adamw":
            made: torch.optim.Optimizer = make_optimizer([ParameterGroup("all", parameters)], config)
        else:
            made = torch.optim.SGD(parameters, lr=lr)
        rate = lambda update: learning_rate(config, update)  # noqa: E731
        losses = train_stale(parameters, made, steps, self.loss_of(model), versions, rate=rate, clip=1.0)
        if math.isnan(losses[-1]):
            return math.inf
        with torch.no_grad():
            total, count = self.loss_of(model)(self.rows[part][: sizes.held_out])
        return float(total) / count


def stability(delay: int) -> float:
    """The largest lr · curvature at which gradient descent with a delay settles on a parabola: 2 without a delay."""
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def measure(world: World, seeds: int, finished: Finished, progress: tqdm) -> dict[str, Any]:
    """optimizer -> way -> τ -> its best rate, losses by seed, and the same at the rate that is best without delay."""
    found: dict[str, Any] = {}

    def loss(*run: Any) -> float:
        progress.update()
        return finished.get(" ".join(map(str, run)), lambda: world.run(*run))

    for optimizer in OPTIMIZERS:
        ways: dict[str, Any] = {}
        base = 0.0
        for way in ("delayed", "uneven", "synchronous"):
            start = base or RATES[optimizer]
            for delay in world.sizes.delays:
                if delay == 0 and way != "delayed":
                    continue  # one worker: all three are the same
                progress.set_description(f"{optimizer} {way} τ={delay}")

                def tried(lr: float, way: str = way, delay: int = delay, optimizer: str = optimizer) -> float:
                    return loss(optimizer, way, delay, lr, 1000, "validation")

                best = start = best_rate(tried, start, walks=world.sizes.walks)
                base = base or best
                own: dict[str, Any] = {"lr": best, "losses": [], "at the rate without delay": []}
                for seed in range(seeds):
                    own["losses"].append(loss(optimizer, way, delay, best, seed, "test"))
                    if way == "delayed":
                        own["at the rate without delay"].append(loss(optimizer, way, delay, base, seed, "test"))
                ways.setdefault(way, {})[delay] = own
        found[optimizer] = ways
    return found


def summary(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    ways: dict[str, Any] = {}
    sentences = []
    for optimizer, by_way in found.items():
        base = by_way["delayed"][0]["losses"]
        for way, by_delay in by_way.items():
            for delay, own in by_delay.items():
                entry = {"lr": own["lr"], "loss": interval(own["losses"]), "cost": paired(own["losses"], base)}
                if own["at the rate without delay"]:
                    entry["at the rate without delay"] = interval(own["at the rate without delay"])
                ways.setdefault(optimizer, {}).setdefault(way, {})[str(delay)] = entry
                if delay:
                    sentences.append(said(entry["cost"], f"{optimizer}, {way}, τ = {delay}: loss beside one worker"))
        for way in ("delayed", "uneven"):
            for delay, own in by_way[way].items():
                if delay:
                    effect = paired(own["losses"], by_way["synchronous"][delay]["losses"])
                    ways[optimizer][way][str(delay)]["beside synchronous"] = effect
                    what = f"{optimizer}, {way}, τ = {delay}: loss beside {delay + 1} synchronous workers"
                    sentences.append(said(effect, what))
    return ways, sentences


def tables(ways: dict[str, Any]) -> str:
    lines = []
    for optimizer, by_way in ways.items():
        rows = []
        for delay, own in by_way["delayed"].items():
            others = [by_way[way].get(delay) for way in ("uneven", "synchronous")]
            cells = [cell(own["loss"]), f"{own['lr']:.2g}", cell(own["at the rate without delay"])]
            for other in others:
                cells += ["", ""] if other is None else [cell(other["loss"]), f"{other['lr']:.2g}"]
            rows.append([delay, f"{stability(int(delay)):.2f}", *cells])
        header = ["τ", "stable below", "delayed", "its rate", "at the rate of τ = 0", "uneven", "its rate"]
        lines += [f"{optimizer}:\n", table([*header, "synchronous", "its rate"], rows), ""]
    return "\n".join(lines)


def draw(ways: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (optimizer, by_way) in zip(figure.subplots(1, len(ways), squeeze=False)[0], ways.items(), strict=True):
        for number, (way, by_delay) in enumerate(by_way.items()):
            for key, style in (("loss", "o-"), ("at the rate without delay", "x:")):
                points = [
                    (int(delay), own[key])
                    for delay, own in by_delay.items()
                    if key in own and own[key]["mean"] is not None
                ]
                if not points:
                    continue
                half = [0 if p["ci95"] is None else (p["ci95"][1] - p["ci95"][0]) / 2 for _, p in points]
                label = f"{way}, the rate of τ = 0" if style == "x:" else way
                places, means = [d for d, _ in points], [p["mean"] for _, p in points]
                axes.errorbar(places, means, yerr=half, fmt=style, color=f"C{number}", capsize=3, label=label, ms=4)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set(title=optimizer, xlabel="τ, updates that a gradient is late", ylabel="nats a token, held-out text")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = options(__doc__, "asynchronous", 3).parse_args()
    torch.set_num_threads(1)
    sizes, start = chosen(args, FULL, QUICK), time.process_time()
    world = World(args, sizes)
    finished = Finished(args.output, {"manual": args.manual is not None, **vars(sizes), "delays": list(sizes.delays)})
    with tqdm(unit="run", disable=None) as progress:
        ways, sentences = summary(measure(world, args.seeds, finished, progress))
    result = {
        "what": "nats a token on held-out pages; 95 % intervals of Student's t over seeds; differences are paired",
        "text": "GIMP's manual in English" if args.manual else "made up",
        "seeds": list(range(args.seeds)),
        "sizes": vars(sizes),
        "rates": "chosen for each way and τ by the loss on other pages with another seed, in steps of 2",
        "processor seconds": round(time.process_time() - start),
        "ways": ways,
        "found": sentences,
    }
    write(result, tables(ways), args, finished)
    draw(ways, args.plot)


if __name__ == "__main__":
    main()
