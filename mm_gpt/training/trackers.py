"""The rows of a run's log in TensorBoard and in Weights & Biases as well.

They are copies: `log.jsonl` is what a run goes on from. So whatever happens to a tracker is a warning, and the run goes
on without it. Only rank 0 has trackers.
"""

import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mm_gpt.errors import ConfigError, unknown_name
from mm_gpt.system.writing import write_text
from mm_gpt.training.run_log import RunLog

logger = logging.getLogger(__name__)

TIMEOUT = 60
"""Seconds to wait for a server, when a run begins and when it ends."""


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is none, and for a package that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(unknown_name("tracker", name, TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'train.trackers={name} needs the package {name}: pip install -e ".[track]"')


@contextmanager
def tracking(names: Sequence[str], log: RunLog | None, *, step: int) -> Iterator[None]:
    """What is logged while inside goes to the trackers, too, of a run that has done `step` steps.

    Raises what `check_trackers` does; whatever else goes wrong is a warning.
    """
    check_trackers(names)
    if log is None or not names:
        yield
        return
    open_: dict[str, Tracker] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of a package that is not ours, and may not cost the run
            open_.pop(name, None)
            logger.warning("%s: %s; the run goes on without it", name, _one_line(error))

    def listen(row: dict[str, Any]) -> None:
        scalars, texts = readable(row)
        for name, tracker in list(open_.items()):
            attempt(name, lambda tracker=tracker: tracker.log(row["step"], scalars, texts))  # type: ignore[misc]

    for name in names:
        attempt(name, lambda name=name: open_.update({name: TRACKERS[name](log, step)}))  # type: ignore[misc]
    log.listeners.append(listen)
    try:
        yield
    finally:
        log.listeners.remove(listen)
        for name, tracker in list(open_.items()):
            attempt(name, tracker.close)


def readable(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and texts of a row of the log, by name."""
    scalars = {f"train/{key}": value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
    scalars |= {f"validation/{key}": value for key, value in row.get("validation", {}).items()}
    texts = {"samples": "\n\n".join(row["samples"])} if row.get("samples") else {}
    return scalars, texts


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__


class TensorBoard:
    """Event files in OUT/tensorboard: `tensorboard --logdir OUT`."""

    def __init__(self, log: RunLog, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Steps that are about to be repeated are taken out of what an earlier process wrote
        self.writer = SummaryWriter(str(log.out / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("recipe", f"```\n{json.dumps(_recipe(log.out), indent=2)}\n```", 0)

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self.writer.add_text(name, text, step)
        self.writer.flush()  # a killed run keeps what it has logged

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run of Weights & Biases, whose id stays in OUT/wandb.json, under the project WANDB_PROJECT ("mm-gpt").

    With WANDB_MODE=offline, without an account or without a network the run is written to OUT/wandb, for `wandb sync`.
    """

    def __init__(self, log: RunLog, step: int):
        import os

        import wandb

        path = log.out / "wandb.json"
        if not path.exists():
            write_text(path, json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")
        mode: Any = os.environ.get("WANDB_MODE") or self._mode(wandb)
        options = {
            "project": os.environ.get("WANDB_PROJECT", "mm-gpt"),
            "id": json.loads(path.read_text())["id"],
            "name": log.out.resolve().name,
            "dir": str(log.out),
            "config": _recipe(log.out),
            "settings": wandb.Settings(
                silent=True, console="off", init_timeout=TIMEOUT, finish_timeout=TIMEOUT, disable_code=True
            ),
        }
        try:
            self.run = wandb.init(mode=mode, resume=None if mode == "offline" else "allow", **options)
        except Exception as error:
            if mode == "offline":
                raise
            logger.warning("wandb: %s; the run is written offline", _one_line(error))
            wandb.teardown()  # or the id stays taken
            self.run = wandb.init(mode="offline", **options)
        self.sent = int(self.run.step)
        """Steps before this one are at the server; that of a repeated step is the same."""
        for row in log.rows:  # what it lacks: all of it where the run is written offline, in a folder for each start
            self.log(row["step"], *readable(row))

    @staticmethod
    def _mode(wandb: Any) -> str:
        """Offline where nobody is logged in: asking for a key would stop a run that nobody watches."""
        try:
            if wandb.login(prompt=False):
                return "online"
            reason = "nobody is logged in"
        except Exception as error:
            reason = _one_line(error)
        logger.warning("wandb: %s; the run is written offline, for `wandb sync`", reason)
        return "offline"

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if step >= self.sent:
            self.run.log({**scalars, **texts}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[RunLog, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def _recipe(out: Path) -> dict[str, Any]:
    path = out / "recipe.json"
    return json.loads(path.read_text()) if path.exists() else {}
