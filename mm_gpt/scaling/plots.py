"""Loss against compute: the runs of a ladder, the law through them, and where the target came out."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mm_gpt.errors import MMGPTError
from mm_gpt.scaling.laws import Fit
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.system.writing import whole_file

COLOURS = 32
"""Of a palette: a plot needs no more, and is a third as large."""


def plot_losses(
    path: Path,
    fits: Mapping[str, Fit],
    *,
    target: Point | None = None,
    measured: Mapping[str, float] | None = None,
) -> None:
    """A PNG with a panel for each metric; `measured` are the target's losses. Raises MMGPTError without a fit."""
    from matplotlib.figure import Figure
    from PIL import Image

    if not fits:
        raise MMGPTError(f"{path}: there is no law to draw")
    figure = Figure(figsize=(4.2 * len(fits), 3.6), layout="constrained")
    for number, (metric, fit) in enumerate(fits.items()):
        axes = figure.add_subplot(1, len(fits), number + 1, xscale="log", xlabel="training FLOPs", title=metric)
        if number == 0:
            axes.set_ylabel("loss (nats per token)")
        runs = sorted(fit.points, key=lambda point: point.flops)
        end = target or runs[-1]
        if fit.form in ("power", "pure"):
            flops = np.geomspace(runs[0].flops, max(end.flops, runs[-1].flops), 40)
            law = [Point(1.0, 1.0, float(c), name="law") for c in flops]
            axes.plot(flops, [fit.predict(point) for point in law], lw=1, color="#224488", label="law")
            try:
                low, high = zip(*(fit.interval(point) for point in law), strict=True)
                axes.fill_between(flops, low, high, color="#c8d4ee", label="90 %")
            except CannotTell:
                pass  # as many coefficients as runs: there is no interval to draw
        axes.plot([p.flops for p in runs], [p.loss for p in runs], "o", ms=4, color="#224488", label="rungs")
        if target is not None:
            if fit.form == "parametric":
                axes.plot([target.flops], [fit.predict(target)], "_", ms=14, color="#224488", label="predicted")
            if measured is not None and metric in measured:
                axes.plot([target.flops], [measured[metric]], "*", ms=10, color="#cc3311", label="target")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    drawn.seek(0)
    with whole_file(path) as temporary, Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLOURS).save(temporary, "PNG", optimize=True)
