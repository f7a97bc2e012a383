"""One loop for every stage of training.

What is trained, on what, and how it is judged is a `Task`; the loop adds accumulation, clipping, the schedule, logging,
validation, checkpoints and exact resumption. A task's micro-batches are a pure function of the step number and all
randomness inside a step is seeded by it, so a stopped run continues as if it had never been stopped.
"""

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.mmgpt import pick_device
from mm_gpt.training import checkpoint, plot
from mm_gpt.training.distributed import (
    average_buffers,
    process_group,
    ranks,
    sum_gradients,
    sum_over_ranks,
    wait_for_all,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer steps."""
    lr: float
    """Peak learning rate; a task's parameter groups scale it."""
    accumulate: int = 1
    """Micro-batches per step."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    final_lr: float = 0.0
    """Where the cosine ends, as a fraction of the peak."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip: float = 1.0
    """Largest norm of all gradients together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 computes matrix products in bfloat16 under autocast, with float32 master weights for what is trained. `auto`
    takes it where the hardware multiplies it: a processor without the instructions is four times slower in bf16."""
    device: str = "auto"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 200
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (self.lr > 0 and self.clip > 0):  # written so that NaN is refused
            raise ConfigError(f"lr and clip must be positive, not {self.lr} and {self.clip}")


@dataclass(frozen=True)
class ParameterGroup:
    name: str
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0


class Task(Protocol):
    """What a stage of training is made of."""

    @property
    def model(self) -> nn.Module: ...

    def parameter_groups(self) -> list[ParameterGroup]: ...

    def micro_batches(self, step: int, count: int) -> Sequence[Any]:
        """The `count` micro-batches of a step: the same ones each time it is called. Runs in another thread."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Summed loss and the count it is divided by, once a step's micro-batches are summed."""

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; `loss` among them decides which checkpoint is the best."""

    def samples(self) -> list[str]:
        """A few outputs to read."""

    def save(self, folder: Path) -> None:
        """Write the model, complete, into an existing empty folder."""


@runtime_checkable
class DataState(Protocol):
    """A task whose place in its data is more than the number of the step."""

    def data_state(self, step: int) -> dict[str, Any]:
        """JSON values from which step `step` can be loaded."""

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Raises MMGPTError when the data is no longer what it was."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to `final_lr`; steps count from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_lr
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(groups: Sequence[ParameterGroup], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay touches matrices only, never biases and norms."""
    settings = []
    for group in groups:
        for decay in (True, False):
            parameters = [p for p in group.parameters if p.requires_grad and (p.dim() >= 2) == decay]
            if parameters:
                weight_decay = config.weight_decay if decay else 0.0
                settings.append({"params": parameters, "lr_scale": group.lr_scale, "weight_decay": weight_decay})
    if not settings:
        raise ConfigError("nothing is trainable")
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether a precision setting means bfloat16 on this device."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "bf16"


def train(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    describe: dict[str, Any] | None = None,
) -> None:
    """Train `task` and leave checkpoints, `log.jsonl`, `loss.png` and `recipe.json` (what `describe` says) in `out`.

    Under torchrun every rank trains on its own rows and sums gradients with the others; rank 0 validates and writes.
    Ctrl-C (or SIGTERM) finishes the step, saves, and raises KeyboardInterrupt. Raises MMGPTError when `out` already
    holds a run and `resume` is not set, or when the loss is not finite.
    """
    device = pick_device(config.device)
    with process_group(device):
        _train(task, config, out, device, resume=resume, progress=progress, describe=describe)


def _train(
    task: Task,
    config: TrainConfig,
    out: Path,
    device: torch.device,
    *,
    resume: bool,
    progress: bool,
    describe: dict[str, Any] | None,
) -> None:
    leads = ranks()[0] == 0
    task.model.to(device)
    groups = task.parameter_groups()
    optimizer = make_optimizer(groups, config)
    log = RunLog(out, groups, resume=resume) if leads else None
    if log is not None:
        (out / "recipe.json").write_text(json.dumps(describe or {"train": dataclasses.asdict(config)}, indent=2) + "\n")
    step = 0
    if resume:
        if latest := checkpoint.latest(out):
            step, data = checkpoint.load_training_state(latest, task.model, optimizer)
            if isinstance(task, DataState):
                task.load_data_state(data)
            logger.info("continuing from %s", latest)
        wait_for_all()
        if log is not None:
            log.cut(step)
    task.model.train()
    best = log.best_loss() if log is not None else math.inf
    stopper = Stopper()
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not progress or not leads, dynamic_ncols=True)
    with stopper, bar, ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
        ahead = reader.submit(task.micro_batches, step, config.accumulate)  # while one step runs, the next is read
        while step < config.steps:
            begin = time.perf_counter()
            batches = ahead.result()
            waited = time.perf_counter() - begin
            if step + 1 < config.steps:
                ahead = reader.submit(task.micro_batches, step + 1, config.accumulate)
            metrics = training_step(task, batches, optimizer, config, step, device) | {"data_seconds": waited}
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            last = step == config.steps
            # Read once: what is raised below must have been saved. All ranks stop at the same step.
            stop = sum_over_ranks([float(stopper.requested)], device)[0] > 0
            improved = False
            if log is not None:
                values: dict[str, float] = {}
                if step % config.validate_every == 0 or last:
                    values = evaluate(task, config, device)
                    stop = stop or (stopper.requested and ranks()[1] == 1)
                improved = bool(values) and values["loss"] < best
                log.train(step, metrics, flush=step % config.log_every == 0 or last or stop)
                if values:
                    best = min(best, values["loss"])
                    log.validation(step, values, task.samples())
                if step % config.save_every == 0 or last or stop or improved:
                    data = task.data_state(step) if isinstance(task, DataState) else {}
                    checkpoint.save(task, optimizer, step, out, best=improved, data=data)
            if stop:
                wait_for_all()
                raise KeyboardInterrupt(f"stopped after step {step}; continue with --resume")


def training_step(
    task: Task,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    device: torch.device,
) -> dict[str, float]:
    """One optimizer step; returns its loss, gradient norm, learning rate and speed. Raises MMGPTError on NaN."""
    start = time.perf_counter()
    # Dropout, which differs between ranks; augmentation is seeded by the task in the same way.
    torch.manual_seed(config.seed * 1_000_003 + step + ranks()[0] * 7_919_000_003)
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    total_loss, total_count = 0.0, 0
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(config.precision, device)):
            loss, count = task.loss(batch.to(device))
        if int(count) > 0:
            loss.backward()
        total_loss += loss.item()
        total_count += int(count)
    total_loss, summed = sum_over_ranks([total_loss, float(total_count)], device)
    total_count = int(summed)
    if not math.isfinite(total_loss):
        raise MMGPTError(f"the loss is {total_loss} at step {step + 1}: lower the learning rate ({config.lr})")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(trained)
    parameters = [p for p in trained if p.grad is not None]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad /= max(1, total_count)  # a mean over the whole step's targets, not a mean of means
    norm = nn.utils.clip_grad_norm_(parameters, config.clip)
    if not math.isfinite(norm):  # one step further every weight would be NaN, and perhaps saved
        raise MMGPTError(f"the gradient is {float(norm)} at step {step + 1}: lower the learning rate ({config.lr})")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average_buffers(task.model)
    seconds = time.perf_counter() - start
    return {
        "loss": total_loss / max(1, total_count),
        "grad_norm": float(norm),
        "lr": lr,
        "targets_per_s": total_count / seconds,
        "seconds": seconds,
    }


@torch.no_grad()
def evaluate(task: Task, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """The task's validation metrics, in evaluation mode and the training precision."""
    task.model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(config.precision, device)):
            return task.validate()
    finally:
        task.model.train()


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        try:
            self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: nobody can press Ctrl-C there
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step (again to stop at once)")


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, up to one that a killed process left half written."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: half a line is dropped", path)
            return


class RunLog:
    """`log.jsonl` (one object a line) and `loss.png` of a run folder."""

    def __init__(self, out: Path, groups: Sequence[ParameterGroup], *, resume: bool):
        self.path = out / "log.jsonl"
        if self.path.exists() and not resume:
            raise MMGPTError(f"{out} already holds a run: continue it with --resume, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self._pending: list[dict[str, float]] = []
        if resume and self.path.exists():
            self.rows = list(_whole_rows(self.path))
        for group in groups:
            trainable = sum(p.numel() for p in group.parameters if p.requires_grad)
            logger.info("training %s: %s parameters, lr × %g", group.name, f"{trainable:,}", group.lr_scale)

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: those steps are about to be repeated."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def best_loss(self) -> float:
        return min((row["validation"]["loss"] for row in self.rows if "validation" in row), default=math.inf)

    def train(self, step: int, metrics: dict[str, float], *, flush: bool) -> None:
        self._pending.append(metrics)
        if flush:
            mean = {key: sum(m[key] for m in self._pending) / len(self._pending) for key in metrics}
            self._pending = []
            self._write({"step": step, **mean})

    def validation(self, step: int, values: dict[str, float], samples: list[str]) -> None:
        self._write({"step": step, "validation": values, "samples": samples})
        logger.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        for sample in samples:
            logger.info("  %s", sample)
        plot.loss_curve(self.rows, self.out / "loss.png")

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
