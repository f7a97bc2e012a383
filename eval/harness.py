"""The evaluation harness behind `mm-gpt eval`: one command from a model and data to a table and a JSON file.

The results file says what was measured, with what, on what: metrics with 95 % intervals, the same for every control and
the difference to it, counts of what was skipped, model, data and code. Beside it, `results.samples.jsonl` has a line
for every prediction, written batch by batch: the same command continues an interrupted run where it stopped and ends
with the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.eval.config import EvalConfig

if TYPE_CHECKING:
    from mm_gpt.eval.base import Score, Task
    from mm_gpt.eval.contamination import DirtyItems
    from mm_gpt.inference.assistant import Assistant

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "processor.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors")
INTERVALS = (
    "95 %: Wilson where each image has one right-or-wrong item (and where all items are alike), else percentile "
    "bootstrap over images (windows of text), 1000 resamples, paired for differences; null with fewer than two"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mm-gpt eval`."""
    parser.description = (
        "Evaluate a model: its captions, answers and names of things on images, perplexity on plain text."
    )
    parser.add_argument("--task", required=True, help="captioning, vqa, naming, unsupported_objects or perplexity")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PATH", help="tars or folders of records; text files for perplexity"
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        help="a model's name or folder (default: MM_GPT_MODEL, your setting, `default`)",
    )
    parser.add_argument(
        "--control",
        action="append",
        metavar="NAME",
        help="also run without the right image: shuffled, blank, no-image; of a model that has concepts "
        "no-concepts and concepts-alone; all; repeatable. For perplexity: before, the decoder before it was adapted "
        "(there the default)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images (windows of text)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--num-beams", type=int, metavar="N", help="default: 3 for captions, 1 for answers")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 40 for captions, 32 for answers")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled control and the bootstrap")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, int8 or int4 (default: %(default)s)")
    parser.add_argument(
        "--contamination",
        metavar="REPORT",
        help="a contamination.json of this data: also score the items that the training corpus holds, and the others",
    )
    parser.add_argument(
        "-o",
        "--out",
        "--output",
        dest="output",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.add_argument("--restart", action="store_true", help="replace the results of an earlier run in the same file")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """`mm-gpt eval`. Raises MMGPTError for everything that is the user's to fix."""
    config = EvalConfig(
        task=args.task,
        data=tuple(args.data),
        model=args.model,
        controls=None if args.control is None else tuple(args.control),
        limit=args.limit,
        batch_size=args.batch_size,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        contamination=args.contamination,
    )
    try:
        results = evaluate(config, args.output, restart=args.restart, progress=True)
    except KeyboardInterrupt:
        print("stopped; the same command continues this run", file=sys.stderr)
        return 130
    print(json.dumps(results, indent=2) if args.json else table(results))
    print(f"written to {args.output}", file=sys.stderr)
    return 0


def evaluate(
    config: EvalConfig,
    output: Path,
    *,
    assistant: Assistant | None = None,
    restart: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Run one evaluation, or what is left of it, and return what is also written to `output`.

    `assistant` is loaded from `config.model` unless given (it must then be that model). Raises MMGPTError for an
    unknown task or control, data with nothing to evaluate, or an `output` that belongs to another evaluation.
    """
    from mm_gpt.eval.tasks import TASKS
    from mm_gpt.inference.assistant import load

    if config.task not in TASKS:
        raise MMGPTError(unknown_name("task", config.task, TASKS))
    kind = TASKS[config.task]
    chosen, named = _controls(config.controls, kind), config.controls or ()
    earlier = None if restart else _read_results(output)
    assistant = assistant or load(config.model, device=config.device, dtype=config.dtype)
    config = dataclasses.replace(
        config,
        controls=chosen,
        num_beams=config.num_beams or kind.num_beams,
        max_new_tokens=config.max_new_tokens or kind.max_new_tokens,
    )
    task = kind(config, assistant)
    for control in chosen:
        try:
            task.check_control(control)
        except MMGPTError as error:
            if control in named:  # not by "all", nor as a default
                raise
            logger.warning("%s", error)
            config = dataclasses.replace(config, controls=tuple(c for c in config.controls or () if c != control))
    dirty = None
    if config.contamination is not None:
        from mm_gpt.eval.contamination import read_dirty_items

        dirty = read_dirty_items(Path(config.contamination), task)
    results = _header(config, task)
    samples = output.with_suffix(".samples.jsonl")
    if earlier is not None:
        _check_same(earlier, results, output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if earlier is None:
            if samples.exists() and not restart:
                raise MMGPTError(f"{samples} exists without its results; remove it, or replace it with --restart")
            samples.write_text("")
        if earlier is None or not earlier["finished"]:
            _write(output, json.dumps(results, indent=2) + "\n")
        conditions = ("none", *(config.controls or ()))
        rows = _predict(task, conditions, samples, progress)
        results |= _scored(task, conditions, rows, samples, dirty)
        _write(output, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise MMGPTError(f"{error.filename or output}: {error.strerror or error}") from None
    return results


def _controls(names: tuple[str, ...] | None, kind: type[Task]) -> tuple[str, ...]:
    """The controls to run, checked, in the task's order."""
    if names is None:
        return kind.default_controls
    for name in names:
        if name not in ("none", "all", *kind.controls):
            raise MMGPTError(unknown_name(f"control of {kind.name}", name, ("none", "all", *kind.controls)))
    return tuple(name for name in kind.controls if name in names or "all" in names)


# ---- predictions, and the log that survives an interruption ----


Rows = dict[tuple[str, str], dict[str, Any]]
"""Lines of the sample log by (control, id of the item)."""


def _predict(task: Task, conditions: tuple[str, ...], samples: Path, progress: bool) -> Rows:
    """All rows of `conditions` ("none" is the run without a control), and what else the log already held."""
    from tqdm import tqdm

    done = _read_samples(samples, task)
    batches = _batches(task)
    # A batch is run whole if any of it is missing: composed differently it could round differently.
    wanted = [(c, batch) for c in conditions for batch in batches if any((c, each.id) not in done for each in batch)]
    missing = sum(len(batch) for _, batch in wanted)
    total = len(conditions) * len(task.instances)
    with (
        samples.open("a", encoding="utf-8") as log,
        tqdm(total=total, initial=total - missing, desc=task.name, disable=None if progress else True) as bar,
    ):
        for condition, batch in wanted:
            for instance, prediction in zip(batch, task.predict(batch, condition), strict=True):
                if (condition, instance.id) not in done:
                    row = {"id": instance.id, "control": condition, **instance.row, **prediction}
                    done[condition, instance.id] = row
                    log.write(_line(row))
            log.flush()
            bar.update(len(batch))
    return done


def _batches(task: Task) -> list[list[Any]]:
    """Items of similar length together, the longest first: if memory runs out, it does so at once."""
    order = sorted(task.instances, key=lambda instance: -instance.length)
    size = task.config.batch_size
    return [order[i : i + size] for i in range(0, len(order), size)]


def _read_samples(samples: Path, task: Task) -> Rows:
    """Rows of an earlier run by (control, id). A line cut off by the interruption is dropped from the file."""
    rows: Rows = {}
    lines = samples.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if samples.exists() else []
    known = {instance.id for instance in task.instances}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key = (row["control"], row["id"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise MMGPTError(
                    f"{samples}:{number}: not a prediction; repair it, or start over by --restart"
                ) from None
            break
        if not line.endswith("\n"):
            break
        if row["id"] not in known:
            raise MMGPTError(f"{samples}:{number}: {row['id']!r} is not in the data; start over with --restart")
        row.pop("scores", None)
        rows[key] = row
    _write(samples, "".join(_line(row) for row in rows.values()))
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- the results file ----


def _header(config: EvalConfig, task: Task) -> dict[str, Any]:
    """What is known before the first prediction; with it an interrupted run is recognised."""
    import mm_gpt

    generation = task.generation()
    return {
        "finished": False,
        "task": task.name,
        "model": {"name": config.model, "sha256": model_sha256(config.model)},
        "data": {"paths": list(config.data), "sha256": task.data_sha256},
        "mm_gpt_version": mm_gpt.__version__,
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {**dataclasses.asdict(config), "data": list(config.data), "controls": list(config.controls or ())},
        "generation": None if generation is None else json.loads(json.dumps(dataclasses.asdict(generation))),
        "counts": {
            task.unit: task.num_groups,
            "items": len(task.instances),
            "skipped": dict(task.errors.counts),
            "skipped_examples": dict(task.errors.examples),
        },
        "intervals": INTERVALS,
        "scale_in_table": task.scale,
    }


def _scored(
    task: Task, conditions: tuple[str, ...], rows: Rows, samples: Path, dirty: DirtyItems | None
) -> dict[str, Any]:
    """Metrics of every condition. The sample log is rewritten in the order of the data, each row with its scores."""
    seed = task.config.seed
    scores = {}
    lines = []
    for condition in conditions:
        in_order = [rows[condition, instance.id] for instance in task.instances]
        scores[condition] = task.scores(in_order)
        for i, row in enumerate(in_order):
            lines.append(_line({**row, "scores": {m: float(s.per_item[i]) for m, s in scores[condition].items()}}))
    lines += [_line(row) for (condition, _), row in rows.items() if condition not in conditions]
    _write(samples, "".join(lines))
    plain = scores["none"]
    contamination = {}
    if dirty is not None:
        from mm_gpt.eval.contamination import split_scores

        contamination["contamination"] = split_scores(plain, dirty, task)
    return {
        "finished": True,
        "metrics": {name: _described(score, task, seed) for name, score in plain.items()},
        "baselines": {
            name: {"answer": answer, "metrics": {m: _described(s, task, seed) for m, s in of_answer.items()}}
            for name, (answer, of_answer) in task.baselines().items()
        },
        "controls": {
            control: {
                "metrics": {name: _described(score, task, seed) for name, score in of_control.items()},
                "differences": {name: _difference(plain[name], of_control[name], task, seed) for name in plain},
            }
            for control, of_control in scores.items()
            if control != "none"
        },
        "samples": samples.name,
        **contamination,
    }


def _described(score: Score, task: Task, seed: int) -> dict[str, float | None]:
    low, high = score.interval(seed=seed) if task.num_groups > 1 else (None, None)
    return {"value": float(score.score), "low": low, "high": high}


def _difference(plain: Score, control: Score, task: Task, seed: int) -> dict[str, float | None]:
    """Without the control minus with it. The same images are drawn for both: what they share cancels."""
    from mm_gpt.eval.metrics.statistics import bootstrap_statistic

    low: float | None = None
    high: float | None = None
    if task.num_groups > 1:
        low, high = bootstrap_statistic(
            lambda indices: plain.resampled(indices) - control.resampled(indices), task.num_groups, seed=seed
        )
    return {"value": float(plain.score - control.score), "low": low, "high": high}


def _read_results(output: Path) -> dict[str, Any] | None:
    """An earlier run's file; None when there is none. Raises MMGPTError for a file that is something else."""
    try:
        results = json.loads(output.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict) or not {"finished", "task", "model", "data", "config"} <= results.keys():
        raise MMGPTError(f"{output} exists and is no results file; choose another -o")
    return results


def _check_same(earlier: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Predictions are reused only if nothing changed that decides them; controls and batch size may."""

    def identity(results: dict[str, Any]) -> dict[str, Any]:
        model, data, config = results["model"], results["data"], results["config"]
        return {
            "task": results["task"],
            "model sha256": model["sha256"],
            "data sha256": data["sha256"],
            "mm-gpt version": results["mm_gpt_version"],
            "seed": config["seed"],
            **(results["generation"] or {}),
        }

    try:
        before = identity(earlier)
    except (KeyError, TypeError):
        raise MMGPTError(f"{output} exists and is no results file; choose another -o") from None
    for name, value in identity(now).items():
        if before.get(name) != value:
            raise MMGPTError(
                f"{output} holds another evaluation ({name}: {before.get(name)}, now {value}); "
                "choose another -o, or replace it with --restart"
            )


def model_sha256(name: str) -> str:
    """One checksum of a model's configuration, tokenizer and weights, by name or folder."""
    from mm_gpt.hub.checkpoint import model_folder

    folder = model_folder(name)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit this code is checked out at, with `-dirty` after local changes; None outside a checkout."""
    import mm_gpt

    root = Path(mm_gpt.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def table(results: dict[str, Any]) -> str:
    """The results as people read them: one line for each condition, with 95 % intervals."""
    scale = results["scale_in_table"]
    metrics = list(results["metrics"])
    counts = results["counts"]
    number = ".1f" if scale == 100 else ".3f"

    def cell(value: dict[str, float | None], form: str = number) -> str:
        middle = format(scale * (value["value"] or 0.0), form)
        if value["low"] is None or value["high"] is None:
            return middle
        return f"{middle} [{format(scale * value['low'], form)}, {format(scale * value['high'], form)}]"

    rows = [["", *metrics], [results["model"]["name"], *(cell(results["metrics"][m]) for m in metrics)]]
    for name, control in results["controls"].items():
        rows.append([name, *(cell(control["metrics"][m]) for m in metrics)])
        rows.append(["  difference", *(cell(control["differences"][m], f"+{number}") for m in metrics)])
    for name, baseline in results["baselines"].items():
        label = f"{name.replace('_', ' ')} ({baseline['answer']})"
        rows.append([label, *(cell(baseline["metrics"][m]) for m in metrics)])
    if "contamination" in results:
        from mm_gpt.eval.contamination import table_rows

        rows += table_rows(results["contamination"], metrics, cell)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    unit = next(iter(counts))
    title = (
        f"{results['task']}: {counts['items']} items, {counts[unit]} {unit}, {sum(counts['skipped'].values())} skipped"
    )
    if scale != 1:
        title += f"; scores × {scale:g}"
    if (generation := results["generation"]) is not None:
        names = ("num_beams", "max_new_tokens", "no_repeat_ngram_size")
        title += "; " + ", ".join(f"{name}={generation[name]}" for name in names)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *lines])
