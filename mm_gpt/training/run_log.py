"""The log of a run: `log.jsonl`, one object a line, and `loss.png`."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_gpt.errors import MMGPTError
from mm_gpt.system.writing import naming, write_text
from mm_gpt.training import plot
from mm_gpt.training.stage import Decides

logger = logging.getLogger(__name__)

SO_FAR = ("tokens", "flops", "memory")
"""Of the steps of a row the last one's value counts, not their mean."""
RATES = ("tokens_per_s", "targets_per_s", "mfu")
"""Means over time."""


class RunLog:
    def __init__(self, out: Path):
        """What a run in `out`, an existing folder, has logged so far; a run that begins has no log."""
        self.out, self.path = out, out / "log.jsonl"
        self.rows: list[dict[str, Any]] = read_log(self.path) if self.path.exists() else []
        self._pending: list[dict[str, float]] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each row that is written."""

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: those steps are about to be repeated."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def judged(self, decides: Decides) -> dict[str, Any]:
        """The `best` value so far of what decides and its `step`, None before the first, and how many were `worse`
        since."""
        found: dict[str, Any] = {"best": None, "step": None, "worse": 0}
        for row in self.rows:
            value = row.get("validation", {}).get(decides.metric)
            if value is not None and decides.is_better(value, found["best"]):
                found = {"best": value, "step": row["step"], "worse": 0}
            elif value is not None:
                found["worse"] += 1
        return found

    def train(self, step: int, metrics: dict[str, float], *, flush: bool) -> None:
        self._pending.append(metrics)
        if flush:
            keys = dict.fromkeys(key for m in self._pending for key in m)
            row = {key: _summary(key, [m for m in self._pending if key in m]) for key in keys}
            self._pending = []
            self._write({"step": step, **row})

    def validation(self, step: int, values: dict[str, float], samples: list[str]) -> None:
        self._write({"step": step, "validation": values, "samples": samples})
        logger.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        for sample in samples:
            logger.info("  %s", sample)
        with naming(self.out / "loss.png"):
            plot.loss_curve(self.rows, self.out / "loss.png")

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for listener in self.listeners:
            listener(row)


def _summary(key: str, steps: list[dict[str, float]]) -> float:
    values = [step[key] for step in steps]
    if key in SO_FAR:
        return values[-1]
    seconds = [step.get("seconds", 0.0) + step.get("data_seconds", 0.0) for step in steps]
    if key in RATES and sum(seconds) > 0:
        return sum(value * each for value, each in zip(values, seconds, strict=True)) / sum(seconds)
    return sum(values) / len(values)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, but for a last one that a killed process left half written.

    Raises MMGPTError that names the file, and the line that is no row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MMGPTError(f"{path}: cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise MMGPTError(f"{path}: line {number} is not JSON") from None
            logger.warning("%s: half a line is dropped", path)
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise MMGPTError(f"{path}: line {number} is no row of a log")
        rows.append(row)
    return rows
