"""What the experiments have in common: small models, their runs, intervals over seeds, tables and pictures."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from gimp_manual import Page, generated_manual, read_manual
from torch import Tensor

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.decoder_config import DecoderConfig

Sizes = TypeVar("Sizes")
"""A dataclass with `steps`."""
NO_EFFECT = "  no effect shown: the interval holds 0"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""The 97.5 % quantile of Student's t, by the number of seeds."""


def small_config(
    vocab_size: int, *, width: int, layers: int, max_length: int, causal: bool = True, head_size: int = 16
) -> DecoderConfig:
    """A transformer as GPT-2's, small enough for hundreds of runs."""
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=width // head_size,
        num_kv_heads=width // head_size,
        head_size=head_size,
        mlp_width=4 * width,
        max_length=max_length,
        norm="layer",
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        causal=causal,
        init="magneto",  # by the width: N(0, 0.02) is for larger ones
    )


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """(size, T) without end: each row once an epoch, in an order drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(len(rows), generator=generator)])
        yield rows[left[:size]]
        left = left[size:]


def best_rate(loss_at: Callable[[float], float], start: float, *, factor: float = 2.0, walks: int = 6) -> float:
    """The learning rate with the lowest loss, found by walking downhill from `start` in steps of `factor`."""
    losses: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in losses:
            found = loss_at(start * factor**place)
            losses[place] = found if math.isfinite(found) else math.inf
        return losses[place]

    place = 0
    for _ in range(walks):
        better = min((place, place - 1, place + 1), key=at)
        if better == place:
            break
        place = better
    return start * factor**place


class Finished:
    """What runs have found, by name, in a file beside the result: the same command goes on where it was stopped."""

    def __init__(self, output: Path, about: dict[str, Any]):
        self.path = output.with_suffix(".runs.jsonl")
        self.found: dict[str, Any] = {}
        first = json.dumps({"about": about})
        if self.path.is_file():
            begun, *rows = self.path.read_text(encoding="utf-8").splitlines()
            if begun != first:
                raise MMGPTError(f"{self.path}: holds runs of other settings; delete it, or name another --output")
            for row in rows:
                self.found |= json.loads(row)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(first + "\n", encoding="utf-8")

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a run, made where it is not there. It has to be one of JSON's."""
        if name not in self.found:
            self.found[name] = make()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: self.found[name]}) + "\n")
        return self.found[name]


def linear_accuracy(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Of logistic regression on frozen states: each is states (N, D) and classes (N,).

    Its weight decay is the one that is best on `validation`.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0) + 1e-3
    x, classes = (train[0] - mean) / std, int(train[1].max()) + 1
    best = (-1.0, 0.0)
    for decay in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((classes, x.shape[1]), (classes,)))
        solver = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def loss(weight: Tensor = weight, bias: Tensor = bias, solver: Any = solver, decay: float = decay) -> Tensor:
            solver.zero_grad()
            found = F.cross_entropy(F.linear(x, weight, bias), train[1]) + decay * weight.square().sum() / 2
            found.backward()
            return found

        solver.step(loss)
        with torch.no_grad():
            right = [
                float((F.linear((states - mean) / std, weight, bias).argmax(dim=1) == labels).float().mean())
                for states, labels in (validation, test)
            ]
        best = max(best, (right[0], right[1]), key=lambda pair: pair[0])
    return best[1]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, and its 95 % interval by Student's t, for which seeds have to be nearly normal."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return {"mean": round(mean, 4), "ci95": None, "seeds": [round(mean, 4)]}
    if not all(map(math.isfinite, values)):
        return {"mean": None, "ci95": None, "seeds": [round(v, 4) if math.isfinite(v) else None for v in values]}
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    ci95 = [round(mean - half, 4), round(mean + half, 4)]
    return {"mean": round(mean, 4), "ci95": ci95, "seeds": [round(v, 4) for v in values]}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The difference, seed by seed."""
    return interval([a - b for a, b in zip(values, others, strict=True)])


def said(effect: dict[str, Any], what: str, *, digits: int = 3) -> str:
    """An effect in words; one whose interval holds 0 is none."""
    if effect["mean"] is None:
        return f"{what}: diverged"
    if effect["ci95"] is None:
        return f"{what}: {effect['mean']:+.{digits}f} (one seed)"
    low, high = effect["ci95"]
    found = f"{what}: {effect['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return found if low > 0 or high < 0 else f"{found}{NO_EFFECT}"


def cell(effect: dict[str, Any], digits: int = 3) -> str:
    if effect["mean"] is None:
        return "diverged"
    half = "" if effect["ci95"] is None else f" ± {(effect['ci95'][1] - effect['ci95'][0]) / 2:.{digits}f}"
    return f"{effect['mean']:.{digits}f}{half}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(result: dict[str, Any], tables: str, args: argparse.Namespace, finished: Finished) -> None:
    """The result as JSON, in place of the runs that it is made of, and its tables in the page, where there is one.

    The page shows the differences whose intervals leave out 0; the JSON has the others too.
    """
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in result.items())
    args.output.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
    finished.path.unlink()
    shown = [found for found in result["found"] if NO_EFFECT not in found]
    text = f"{tables}\n\n" + "".join(f"- {found}\n" for found in shown)
    if len(shown) < len(result["found"]):
        text += "\nOf all other pairs the interval of the difference holds 0.\n"
    print(text)
    if args.page is not None and args.plot.parent.resolve() == args.page.parent.resolve():
        text += f"\n![{args.output.stem.replace('_', ', ')}]({args.plot.name})\n"
    if args.page is not None and args.page.is_file():
        fill_page(args.page, args.output.stem, text)


def fill_page(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of a page that are named for it. Raises MMGPTError where they are missing."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise MMGPTError(f"{page}: lacks {begin.strip()} or {end}")
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """As PNG with a palette, a quarter of the size."""
    import io

    from PIL import Image as PILImage

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.open(buffer).convert("RGB").quantize(48).save(path, optimize=True)


def options(about: str | None, name: str, seeds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manual", type=Path, nargs="?", help="folder with GIMP's manual; without it, made-up text")
    parser.add_argument("--seeds", type=int, default=seeds, choices=[1, *sorted(STUDENT)])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: whether it runs")
    parser.add_argument("--steps", type=int, help="train for as many, instead of for minutes")
    output = Path(f"docs/results/literature_{name}.json")
    parser.add_argument("-o", "--output", type=Path, default=output, help=f"JSON (default {output})")
    plot = Path(f"docs/literature_{name}.png")
    parser.add_argument("--plot", type=Path, default=plot, help=f"PNG (default {plot})")
    parser.add_argument("--page", type=Path, help="whose table is replaced, such as docs/literature.md")
    return parser


def chosen(args: argparse.Namespace, full: Sizes, quick: Sizes) -> Sizes:
    """The sizes that the options ask for. Raises ConfigError for less than a step."""
    sizes = quick if args.quick else full
    if args.steps is None:
        return sizes
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {args.steps}")
    return replace(sizes, steps=args.steps)


def pages_of(args: argparse.Namespace, languages: tuple[str, ...]) -> list[Page]:
    return generated_manual(languages) if args.manual is None else read_manual(args.manual, languages)
