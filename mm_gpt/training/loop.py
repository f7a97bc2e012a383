"""One loop for every stage of training.

What is trained, on what, and how it is judged is a `Stage`; the loop adds accumulation, clipping, the schedule,
logging, validation, checkpoints and exact resumption. A stage's micro-batches are a pure function of the step number
(and of the weights, where a stage learns from its own samples) and all randomness inside a step is seeded by it, so a
stopped run continues as if it had never been stopped.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.mmgpt import pick_device
from mm_gpt.system.locks import open_locked
from mm_gpt.system.stopping import Stopper
from mm_gpt.system.writing import naming, recover, write_text
from mm_gpt.training import checkpoint
from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.distributed import (
    average_statistics,
    check_same_settings,
    check_same_step,
    check_same_weights,
    gather_over_ranks,
    of_rank_0,
    process_group,
    ranks,
    sum_gradients,
    sum_over_ranks,
    union_over_ranks,
    wait_for_all,
)
from mm_gpt.training.kept_memory import kept_memory
from mm_gpt.training.noise_scale import NoiseScale
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.parallel import clip_gradients, forget_unused, is_sharded, reshard, sharing
from mm_gpt.training.run_log import RunLog
from mm_gpt.training.saving import Saver
from mm_gpt.training.schedules import cycle_ends, learning_rate, sizes_of
from mm_gpt.training.stage import AfterStep, DataState, Shards, Stage
from mm_gpt.training.telemetry import Telemetry
from mm_gpt.training.trackers import tracking
from mm_gpt.training.train_config import TrainConfig, use_bf16

logger = logging.getLogger(__name__)


def train(
    stage: Stage,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    describe: dict[str, Any] | None = None,
) -> None:
    """Train `stage` and leave checkpoints, `log.jsonl`, `loss.png` and `recipe.json` (what `describe` says) in `out`.

    Under torchrun every rank trains and validates on its own rows, sums with the others, and rank 0 writes.
    Ctrl-C (or SIGTERM) finishes the step, saves, and raises KeyboardInterrupt. Raises MMGPTError when `out` already
    holds a run and `resume` is not set, when another process trains there, when it cannot be written (checkpoints from
    before stay whole), when ranks do not start alike, or when the loss is not finite.
    """
    device = pick_device(config.device)
    leads = ranks()[0] == 0
    with kept_memory(device), process_group(device), _owned(out, resume=resume) if leads else nullcontext():
        wait_for_all()  # for what rank 0 tidies up
        run = Run(stage, config, out, device, resume=resume)
        if leads:
            write_text(
                out / "recipe.json", json.dumps(describe or {"train": dataclasses.asdict(config)}, indent=2) + "\n"
            )
        with tracking(config.trackers, run.log, step=run.at.step):
            run.loop(progress=progress)


@contextmanager
def _owned(out: Path, *, resume: bool) -> Iterator[None]:
    """The folder of a run, this process's alone while inside."""
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open_locked(out / ".lock", out)
    with lock:
        if (out / "log.jsonl").exists() and not resume:
            raise MMGPTError(f"{out} already holds a run: continue it with --resume, or choose another --out")
        with naming(out):
            recover(out)
        yield


class Run:
    """A stage on its way: what `train` keeps from step to step."""

    def __init__(self, stage: Stage, config: TrainConfig, out: Path, device: torch.device, *, resume: bool):
        self.stage, self.config, self.out, self.device = stage, config, out, device
        settings = {"train": dataclasses.asdict(config)}
        check_same_settings(settings | ({"data": stage.data_state(0)} if isinstance(stage, DataState) else {}), device)
        if sharing(config.shard) == 1:
            stage.model.to(device)
        elif not (isinstance(stage, Shards) and stage.shards):
            raise ConfigError("this stage is trained with the whole model on each rank: train.shard must be 1")
        self.sizes = sizes_of(stage, config)
        if config.noise_scale and self.sizes.full * ranks()[1] == 1:
            raise ConfigError("noise_scale compares micro-batches: give accumulate=2 or more, or several processes")
        if config.noise_scale and sharing(config.shard) > 1:
            raise ConfigError("noise_scale needs each rank's own gradient: train.shard must be 1")
        groups = stage.prepare()
        self.optimizer = make_optimizer(groups, config, stage.model)
        self.at = Progress()
        latest = checkpoint.latest(out) if resume else None
        check_same_step(0 if latest is None else checkpoint.step_of(latest), device)
        if latest is not None:
            self.at = checkpoint.load_training_state(latest, stage, self.optimizer)
            if isinstance(stage, DataState):
                stage.load_data_state(self.at.data)
            logger.info("continuing from %s", latest)
        if not is_sharded(stage.model):  # else each rank has its own slices, of rank 0's or of one checkpoint
            check_same_weights(self.at.step, stage.model, device)
        self.at.cycles = cycle_ends(config, self.at.step, self.at.cycles, self.sizes)
        self.noise = NoiseScale(self.at.noise) if config.noise_scale else None
        self.saver = Saver(out, device, background=config.async_save)
        self.log: RunLog | None = None
        if ranks()[0] == 0:
            self.log = RunLog(out)
            if resume:
                self.log.cut(self.at.step)
            for group in groups:
                trainable = sum(p.numel() for p in group.parameters if p.requires_grad)
                logger.info("training %s: %s parameters, lr × %g", group.name, f"{trainable:,}", group.lr_scale)
        judged = {} if self.log is None else self.log.judged(stage.decides)
        judged = of_rank_0(judged, device)
        self.best: float | None = judged["best"]
        self.worse: int = judged["worse"]
        """Validations since the best one."""
        if resume and self._out_of_patience() and self.at.step < config.steps and self.log is not None:
            logger.warning(
                "%s stopped at step %d, with no better %s in %d validations: with a larger train.patience it goes on",
                out, self.at.step, stage.decides.metric, self.worse,
            )  # fmt: skip
        self.telemetry = Telemetry(stage, config, device)
        stage.model.train()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.worse >= self.config.patience

    def loop(self, *, progress: bool) -> None:
        """All steps that are left."""
        at, config, stage = self.at, self.config, self.stage
        hidden = not progress or self.log is None
        bar = tqdm(total=config.steps, initial=at.step, unit="step", disable=hidden, dynamic_ncols=True)
        prefetching = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        with Stopper() as stopper, bar, prefetching as reader, self.saver:
            ahead: Future[Sequence[Any]] | None = None  # read while the step before runs
            while at.step < config.steps and not self._out_of_patience():
                begin = time.perf_counter()
                count, following = self.sizes.count(at.step), self.sizes.count(at.step + 1)
                batches = stage.micro_batches(at.step, count) if ahead is None else ahead.result()
                waited = time.perf_counter() - begin
                if at.step + 1 < config.steps and not stage.on_policy:
                    ahead = reader.submit(stage.micro_batches, at.step + 1, following)
                counted = self.telemetry.count(batches)
                lr = learning_rate(config, at.step, at.cycles, self.sizes)
                metrics = training_step(
                    stage, batches, self.optimizer, config, at.step, self.device, lr=lr, noise=self.noise
                ) | {"data_seconds": waited}
                if isinstance(stage, AfterStep):
                    metrics |= stage.after_step()
                at.step += 1
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
                # Read once: what is raised below must have been saved. All ranks stop at the same step.
                asked, writing, *counted = sum_over_ranks(
                    [float(stopper.requested), float(self.saver.is_writing), *counted], self.device
                )
                metrics |= self.telemetry.measure(at, counted, metrics["seconds"] + waited)
                if not writing:
                    self.saver.finish()
                if self._judge_and_save(metrics, stopper, stop=asked > 0):
                    self.saver.finish()
                    raise KeyboardInterrupt(f"stopped after step {at.step}; continue with --resume")
        if self.log is not None and self.best is not None:
            judged = self.log.judged(stage.decides)
            where = self.out / "best"
            logger.info("the best %s, %.4g at step %d, is %s", stage.decides.metric, self.best, judged["step"], where)

    def _judge_and_save(self, metrics: dict[str, float], stopper: Stopper, *, stop: bool) -> bool:
        """What all ranks do after a step. Returns whether to stop, which a signal may have asked for meanwhile."""
        config, step = self.config, self.at.step
        last = step == config.steps
        values: dict[str, float] = {}
        if step % config.validate_every == 0 or last:
            values = of_rank_0(evaluate(self.stage, config, self.device), self.device)
            stop = stop or (stopper.requested and ranks()[1] == 1)
        metric = self.stage.decides.metric
        value = values.get(metric)
        improved = value is not None and self.stage.decides.is_better(value, self.best)
        if value is not None:
            self.worse = 0 if improved else self.worse + 1
        if self._out_of_patience() and not last and self.log is not None:
            logger.info("step %d ends the run: %d validations without a better %s", step, self.worse, metric)
        last = last or self._out_of_patience()
        if self.log is not None:
            self.log.train(step, metrics, flush=step % config.log_every == 0 or last or stop)
            if values:
                self.log.validation(step, values, self.stage.samples())
        if improved:
            self.best = value
        if step % config.save_every == 0 or last or stop or improved:
            self.at.data = self.stage.data_state(step) if isinstance(self.stage, DataState) else {}
            self.at.noise = [] if self.noise is None else self.noise.state
            self.saver.save(self.stage, self.optimizer, self.at, best=improved)
        return stop


def training_step(
    stage: Stage,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    device: torch.device,
    *,
    lr: float | None = None,
    noise: NoiseScale | None = None,
) -> dict[str, float]:
    """One optimizer step at the rate `lr` (None: that of a run of one cycle); returns its loss and the mean of each of
    its terms, gradient norm, learning rate and speed, and the noise scale where `noise` measures it.

    Raises MMGPTError on NaN."""
    start = time.perf_counter()
    # Dropout, which differs between ranks; augmentation is seeded by the stage in the same way.
    torch.manual_seed(config.seed * 1_000_003 + step + ranks()[0] * 7_919_000_003)
    lr = learning_rate(config, step) if lr is None else lr
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    counts = _summed([stage.counts(batch) for batch in batches], device)
    totals: dict[str, list[float]] = {}  # of each term its total, its count and its weight
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = is_sharded(stage.model)
    broken: list[str] = []  # the samples of micro-batches without a finite loss
    for number, batch in enumerate(batches):
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(config.precision, device)):
            terms = stage.loss(batch.to(device))
        # Shards are gathered and summed by all ranks together: one without targets takes part with zeros.
        learned = {name: term for name, term in terms.items() if term.weight and (term.count or sharded)}
        if unforeseen := [name for name, term in learned.items() if term.count and not counts.get(name)]:
            raise MMGPTError(f"the loss has a term {unforeseen[0]!r} whose count was not foreseen")
        # A mean over the whole step's targets, not a mean of means.
        parts = [term.total * (term.weight / (counts.get(name) or 1)) for name, term in learned.items()]
        if parts and (part := sum(parts[1:], start=parts[0])).requires_grad:  # not where all that is read is frozen
            part.backward()
        if noise is not None and number == 0:
            noise.see_first(trained, {name: term.count for name, term in learned.items()}, counts)
        for name, term in terms.items():
            known, total = totals.setdefault(name, [0.0, 0.0, term.weight]), float(term.total.detach())
            known[0] += total
            known[1] += float(term.count)
            if term.weight and not math.isfinite(total):
                broken += getattr(batch, "ids", [])
    loss, means = _means(totals, counts, device)
    if not math.isfinite(loss):
        where = _where(broken, device)
        raise MMGPTError(f"the loss is {loss} at step {step + 1}{where}: lower the learning rate ({config.lr})")
    if sharded:
        forget_unused(stage.model)
    else:
        sum_gradients(trained)
    parameters = [p for p in trained if p.grad is not None]
    norm = clip_gradients(parameters, config.clip)
    if not math.isfinite(norm):  # one step further every weight would be NaN, and perhaps saved
        raise MMGPTError(f"the gradient is {float(norm)} at step {step + 1}: lower the learning rate ({config.lr})")
    noisy = {} if noise is None else noise.after_step(norm, counts, device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average_statistics(stage.model)
    seconds = time.perf_counter() - start
    return {
        "loss": loss,
        **{name: mean for name, mean in means.items() if name != "loss"},
        "grad_norm": float(norm),
        **noisy,
        "lr": lr,
        "targets_per_s": sum(counts.values()) / seconds,
        "seconds": seconds,
    }


def _summed(counts: Sequence[Mapping[str, float]], device: torch.device) -> dict[str, float]:
    """Of each term, summed over the micro-batches and all ranks."""
    names = union_over_ranks({name for each in counts for name in each}, device)
    sums = sum_over_ranks([sum(each.get(name, 0) for each in counts) for name in names], device)
    return dict(zip(names, sums, strict=True))


def _means(
    totals: Mapping[str, Sequence[float]], counts: Mapping[str, float], device: torch.device
) -> tuple[float, dict[str, float]]:
    """The step's loss, and the mean of each term, over the step's micro-batches and all ranks, of which one without a
    micro-batch knows no weights. Raises MMGPTError for a count that `Stage.counts` did not foresee: the gradient was
    divided by another."""
    names = union_over_ranks(totals, device)
    own = [totals.get(name, (0.0, 0.0, 0.0)) for name in names]
    sums = sum_over_ranks([v for total, count, weight in own for v in (total, count, weight * total)], device)
    summed, counted, weighted = sums[0::3], sums[1::3], sums[2::3]
    for name, (_, _, weight), count in zip(names, own, counted, strict=True):
        if weight and abs(count - counts.get(name, 0.0)) > 1e-6 * max(1.0, count):
            raise MMGPTError(
                f"the loss's {name} counts {count:g} targets, of which {counts.get(name, 0.0):g} were foreseen"
            )
    divisors = [max(count, 1e-12) for count in counted]
    loss = sum(total / divisor for total, divisor in zip(weighted, divisors, strict=True))
    return loss, {n: total / divisor for n, total, divisor in zip(names, summed, divisors, strict=True)}


def _where(broken: Sequence[str], device: torch.device) -> str:
    """Which rank's samples have a loss that is not finite, in words; `broken` are this rank's."""
    found = [json.loads(data) for data in gather_over_ranks(json.dumps([*broken]).encode(), device)]
    shown = []
    for rank, ids in enumerate(found):
        if ids := [name for row in ids for name in row.split()]:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            shown.append((f"rank {rank}, " if len(found) > 1 else "") + "samples " + " ".join(ids[:5]) + more)
    return f" ({'; '.join(shown)})" if shown else ""


@torch.no_grad()
def evaluate(stage: Stage, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """The stage's validation metrics, in evaluation mode and the training precision."""
    stage.model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(config.precision, device)):
            return stage.validate()
    finally:
        reshard(stage.model)
        stage.model.train()
