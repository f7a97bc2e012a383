"""Finished runs as points of a scaling law, and the CSV files that hold them."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from mm_gpt.errors import MMGPTError, closest

MAX_BYTES = 64 * 2**20
"""Larger files are not tables of runs."""
TOKENS = "throughput/total_tokens"
STEP = "_step"
BATCH = "batch_size_in_tokens"


class CannotTell(MMGPTError):
    """The runs do not decide what was asked: too few, too narrow, optima that disagree, a gradient that is not zero."""


@dataclass(frozen=True)
class Point:
    """A finished run, or, without a loss, one that is to be predicted."""

    parameters: float
    """N, without input embeddings unless stated; the same way of counting in all points of a fit."""
    tokens: float
    """D"""
    flops: float
    """C of the whole training; about 6 N D."""
    loss: float = math.nan
    """Of held-out data, in nats or bits a token or byte. NaN for a run that is still to come."""
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"N {self.parameters:.4g}, D {self.tokens:.4g}"


def read_points(path: Path) -> list[Point]:
    """Points of a CSV with the columns `N`, `D`, `flops`, `loss` and, if there is one, `name`.

    Lines that begin with # are comments. Raises MMGPTError that names the file and the column or line.
    """
    rows = _rows(path, ["N", "D", "flops", "loss"])
    return [
        Point(
            parameters=_number(path, line, row, "N"),
            tokens=_number(path, line, row, "D"),
            flops=_number(path, line, row, "flops"),
            loss=_number(path, line, row, "loss"),
            name=row.get("name") or "",
        )
        for line, row in rows
    ]


def read_olmo(path: Path, column: str, *, parameters: float, flops_per_token: float, last: int = 5) -> Point:
    """The final point of a run from a CSV of OLMo's ladder: the mean of the last evaluations of `column` (`eval/...`).

    Tokens are `throughput/total_tokens` or, without that column, `_step` times `batch_size_in_tokens`. The columns, the
    mean over five evaluations and tabulated FLOPs per token (not 6 N) are those of Bhagia et al. (arXiv 2412.04403).
    Raises MMGPTError that names the file and the column or line.
    """
    if last < 1:
        raise MMGPTError(f"last must be at least 1, not {last}")
    rows = _rows(path, [column])[-last:]
    line, row = rows[-1]
    if row.get(TOKENS):
        tokens = _number(path, line, row, TOKENS)
    else:
        for needed in (STEP, BATCH):
            _check_column(path, needed, list(row))
        tokens = _number(path, line, row, STEP) * _number(path, line, row, BATCH)
    losses = [_number(path, number, each, column) for number, each in rows]
    return Point(parameters, tokens, tokens * flops_per_token, sum(losses) / len(losses), path.stem)


def _rows(path: Path, needed: list[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and cells of a CSV with a header that has the `needed` columns; at least one row."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MMGPTError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no table of runs is")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MMGPTError(f"{path}: not UTF-8 text") from None
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    try:
        table = list(csv.reader((line for _, line in kept), strict=True))
    except csv.Error as error:
        raise MMGPTError(f"{path}: not CSV: {error}") from None
    if len(table) != len(kept):
        raise MMGPTError(f"{path}: a cell goes over several lines")
    if len(table) < 2:
        raise MMGPTError(f"{path}: no rows below the header")
    header = [name.strip() for name in table[0]]
    for name in needed:
        _check_column(path, name, header)
    rows = []
    for (number, _), cells in zip(kept[1:], table[1:], strict=True):
        if len(cells) != len(header):
            raise MMGPTError(f"{path}: line {number} has {len(cells)} cells, the header {len(header)}")
        rows.append((number, dict(zip(header, cells, strict=True))))
    return rows


def _check_column(path: Path, name: str, header: list[str]) -> None:
    if name not in header:
        close = closest(name, header)
        hint = f"; did you mean {close!r}?" if close else f" (columns: {', '.join(header[:8])}, ...)"
        raise MMGPTError(f"{path}: no column {name!r}{hint}")


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise MMGPTError(f"{path}: line {line}: {column} is {row[column]!r}, not a number") from None
