"""The loss curve of a run, as a picture."""

from pathlib import Path
from typing import Any


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss (line) and validation loss (dots) against optimizer steps, written as PNG to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per target)")
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation"]["loss"]) for row in rows if "validation" in row]
    if train:
        axes.plot(*zip(*train, strict=True), lw=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", ms=4, label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
