"""The training loop and the language stage: exact numbers, exact resumption, and what is refused."""

import dataclasses
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny, make_tokenizer, tiny_config
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_stage import Pairs, ToyStage, logged, losses, one_step, toy_config

from mm_gpt.datasets.loading.draws import RecordSampling, draw_documents
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import Record
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub import checkpoint as hub_checkpoint
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Batch, collate
from mm_gpt.training import checkpoint, language
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.run_log import RunLog
from mm_gpt.training.schedules import learning_rate
from mm_gpt.training.stage import Decides, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.transforms import ImageTransformConfig

# ---- one step ----


def test_learning_rate_golden() -> None:
    config = toy_config(steps=10, lr=1.0, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[9] == pytest.approx(0.1 + 0.45 * (1 - math.sqrt(3) / 2))
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(toy_config(steps=1, lr=1.0), 0) == 1.0
    assert learning_rate(toy_config(steps=3, lr=1.0, warmup_steps=9), 2) == pytest.approx(1 / 3)


def test_more_steps_do_not_make_the_learning_rate_jump(tmp_path: Path) -> None:
    """Continued with more steps: the cosine was stretched, and the rate leapt up. What was planned stays, and a second
    cycle follows, which warms up from the final rate; stopped and continued anywhere, it is the same one."""
    config = toy_config(steps=20, warmup_steps=4, final_lr=0.1)
    longer = dataclasses.replace(config, steps=60)
    train(ToyStage(), config, tmp_path / "whole", progress=False)
    train(ToyStage(), longer, tmp_path / "whole", resume=True, progress=False)
    rates = logged(tmp_path / "whole", "lr")
    assert [rates[step + 1] for step in range(20)] == [learning_rate(config, step) for step in range(20)]
    rises = [rates[step + 1] - rates[step] for step in range(20, 60)]
    assert max(rises) == pytest.approx(0.9 * config.lr / 4)  # a tenth of 40 steps
    assert rates[21] == pytest.approx(0.1 * config.lr)
    assert max(rates[step] for step in range(21, 61)) == config.lr
    assert rates[60] < 0.11 * config.lr
    stopped = ToyStage()
    stop_at(stopped, 7)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, config, tmp_path / "parts", progress=False)
    for at in (5, 30):
        stopped = ToyStage()
        stop_at(stopped, at)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, longer, tmp_path / "parts", resume=True, progress=False)
    train(ToyStage(), longer, tmp_path / "parts", resume=True, progress=False)
    assert logged(tmp_path / "parts", "lr") == rates
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_fewer_steps_end_a_run_on_its_schedule(tmp_path: Path) -> None:
    train(ToyStage(), toy_config(steps=10), tmp_path / "whole", progress=False)
    stage = ToyStage()
    stop_at(stage, 4)
    with pytest.raises(KeyboardInterrupt):
        train(stage, toy_config(steps=10), tmp_path / "short", progress=False)
    train(ToyStage(), toy_config(steps=7), tmp_path / "short", resume=True, progress=False)
    whole = logged(tmp_path / "whole", "lr")
    assert logged(tmp_path / "short", "lr") == {step: whole[step] for step in range(1, 8)}


def test_micro_batches_weigh_by_their_targets() -> None:
    """A mean of means: a micro-batch with one target would count as much as one with a hundred."""
    parameters = []
    for count in (1, 3):
        task = ToyStage()
        config = toy_config(accumulate=count, clip=1e9)
        optimizer = make_optimizer(task.prepare(), config)
        metrics = one_step(task, optimizer, config, 0)
        parameters.append((metrics["loss"], metrics["grad_norm"], *(p.detach() for p in task.model.parameters())))
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-5, atol=1e-6)


def test_micro_batches_of_the_model_weigh_by_their_targets() -> None:
    """The same with images, text, and a row without any target."""
    model, processor = make_tiny()
    documents = [
        Document((Image(make_picture(1)), Text("a red circle on a blue ground and more"))),
        Document((Text("x"),)),
        Document((Text("dog"), Image(make_picture(2)))),
    ]

    def batch(chosen: list[Document]) -> Batch:
        examples = [processor(d) for d in chosen]
        pixels = [processor.transform(i.load()) for e in examples for i in e.images]
        return collate([[e] for e in examples], torch.stack(pixels) if pixels else torch.zeros(0, 3, 32, 32))

    gradients = []
    for batches in ([batch(documents)], [batch([d]) for d in documents]):
        model.zero_grad()
        total = 0
        for b in batches:
            loss, count = model.loss(b)
            loss.backward()
            total += int(count)
        gradients.append([p.grad / total for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_adamw_by_hand() -> None:
    """Two steps against the formulas of 1711.05101: decay outside the moments, clipping before, no decay of vectors."""
    config = toy_config(lr=0.1, warmup_steps=2, weight_decay=0.3, clip=0.5, beta1=0.8, beta2=0.9, eps=1e-3)
    task = ToyStage()
    task.model.double()
    names = {"matrix": 0.3, "vector": 0.0}
    expected = {name: task.model.get_parameter(name).detach().clone() for name in names}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    optimizer = make_optimizer(task.prepare(), config)
    originals = task.micro_batches
    task.micro_batches = lambda step, count: [Pairs(b.x.double(), b.y.double()) for b in originals(step, count)]  # type: ignore[method-assign]
    for step in (0, 1):
        (batch,) = task.micro_batches(step, 1)
        leaves = {name: p.clone().requires_grad_(True) for name, p in expected.items()}
        error = torch.nn.functional.linear(batch.x, leaves["matrix"], leaves["vector"]) - batch.y
        (error.square().sum() / len(batch.x)).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in leaves.values() if p.grad is not None))
        scale = min(1.0, 0.5 / (norm + 1e-6))
        lr = (0.05, 0.1)[step]
        for name, decay in names.items():
            gradient = leaves[name].grad
            assert gradient is not None
            first = 0.8 * moments[name][0] + 0.2 * gradient * scale
            second = 0.9 * moments[name][1] + 0.1 * (gradient * scale).square()
            moments[name] = first, second
            update = (first / (1 - 0.8 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-3)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        metrics = one_step(task, optimizer, config, step)
        assert metrics["grad_norm"] == pytest.approx(norm)
        assert metrics["lr"] == pytest.approx(lr)
        for name, value in expected.items():
            torch.testing.assert_close(task.model.get_parameter(name).detach(), value, rtol=1e-10, atol=1e-12)
    assert (task.model.get_parameter("unused") == 1).all()  # no gradient, no decay


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    task = ToyStage()
    steps = iter(range(100))
    task.on_loss = lambda loss: loss * (value if next(steps) == 2 else 1.0)
    with pytest.raises(MMGPTError, match=rf"the loss is {value} at step 3: lower the learning rate \(0\.1\)"):
        train(task, toy_config(save_every=1), tmp_path / "run", progress=False)
    assert (checkpoint.latest(tmp_path / "run") or Path()).name == "step-000002"


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    """sqrt(0): the loss is fine, its gradient is not. One step on, every weight would be NaN, and be saved."""
    task = ToyStage()
    task.on_loss = lambda loss: loss + (loss * 0).sqrt()
    with pytest.raises(MMGPTError, match="the gradient is nan at step 1"):
        train(task, toy_config(), tmp_path / "run", progress=False)
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_a_step_without_targets_changes_nothing() -> None:
    task = ToyStage()
    task.loss = lambda batch: {"loss": Term((task.model(batch.x) * 0).sum(), 0)}  # type: ignore[method-assign]
    task.counts = lambda batch: {"loss": 0}  # type: ignore[method-assign]
    before = [p.clone() for p in task.model.parameters()]
    config = toy_config(weight_decay=0.1)
    metrics = one_step(task, make_optimizer(task.prepare(), config), config, 0)
    assert metrics["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


class TwoTerms(ToyStage):
    """A regression beside a pull to zero of every other row, each with its own denominator, and a gauge."""

    def counts(self, batch: Pairs) -> dict[str, float]:
        return {"fit": len(batch.x), "pull": len(batch.x[::2])}

    def loss(self, batch: Pairs) -> dict[str, Term]:
        fitted, pulled = self.model(batch.x), self.model(batch.x[::2])
        return {
            "fit": Term((fitted - batch.y).square().sum(), len(batch.x)),
            "pull": Term(pulled.square().sum(), len(pulled), 0.3),
            "largest": Term(fitted.abs().amax(), 1, 0.0),
        }


def test_terms_have_their_own_denominators() -> None:
    """Sum over terms of weight x (sum of totals / sum of counts), over micro-batches of different sizes."""
    task, config = TwoTerms(sizes=(3, 5, 2)), toy_config(accumulate=3, clip=1e9)
    batches = task.micro_batches(0, 3)
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
    every_other = torch.cat([b.x[::2] for b in batches])
    assert len(every_other) == 6
    task.model.zero_grad()
    fit = (task.model(x) - y).square().sum() / 10
    pull = task.model(every_other).square().sum() / 6
    (fit + 0.3 * pull).backward()
    wanted = [p.grad.clone() for p in task.model.parameters() if p.grad is not None]
    task.model.zero_grad()
    optimizer = make_optimizer(task.prepare(), config)
    kept: list[Tensor] = []
    optimizer.step = lambda: kept.extend(p.grad.clone() for p in task.model.parameters() if p.grad is not None)  # type: ignore[method-assign, assignment, misc]
    metrics = one_step(task, optimizer, config, 0)
    for mine, other in zip(kept, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    assert metrics["loss"] == pytest.approx(float(fit + 0.3 * pull), rel=1e-5)
    assert metrics["fit"] == pytest.approx(float(fit), rel=1e-5)
    assert metrics["pull"] == pytest.approx(float(pull), rel=1e-5)
    assert metrics["largest"] == pytest.approx(sum(float(task.model(b.x).abs().amax()) for b in batches) / 3, rel=1e-5)


def test_a_count_that_was_not_foreseen() -> None:
    for wrong, message in ((4.0, "counts 10 targets, of which 4 were foreseen"), (0.0, "'loss' whose count was not")):
        task, config = ToyStage(), toy_config()
        task.counts = lambda batch, wrong=wrong: {"loss": wrong}  # type: ignore[method-assign, misc]
        with pytest.raises(MMGPTError, match=message):
            one_step(task, make_optimizer(task.prepare(), config), config, 0)


class OnPolicy(ToyStage):
    """Learns from what its weights give: a sample is used for two steps."""

    on_policy = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sampled = torch.zeros(0)
        self.threads: set[str] = set()

    def micro_batches(self, step: int, count: int) -> list[Pairs]:
        self.threads.add(threading.current_thread().name)
        batches = super().micro_batches(step, count)
        if step % 2 == 0:
            self.sampled = self.model.get_parameter("matrix").detach().clone()
        return [Pairs(b.x, b.y + (b.x @ self.sampled.T)) for b in batches]

    def state_tensors(self) -> dict[str, Tensor]:
        return {"sampled": self.sampled}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.sampled = tensors["sampled"]

    def after_step(self) -> dict[str, float]:
        return {"norm_of_sample": float(self.sampled.norm())}


@pytest.mark.parametrize("stop", [2, 3])
def test_on_policy_runs_continue_between_sample_and_update(tmp_path: Path, stop: int) -> None:
    """Nothing is read ahead of the weights; a sample in use is saved with them, and goes on bit for bit."""
    whole = OnPolicy()
    train(whole, toy_config(), tmp_path / "whole", progress=False)
    assert whole.threads == {threading.current_thread().name}
    first = OnPolicy()
    stop_at(first, stop)
    with pytest.raises(KeyboardInterrupt):
        train(first, toy_config(), tmp_path / "stopped", progress=False)
    train(OnPolicy(), toy_config(), tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    norms = logged(tmp_path / "whole", "norm_of_sample")
    assert norms == logged(tmp_path / "stopped", "norm_of_sample")
    assert norms[1] == norms[2] != norms[3]


def test_what_decides(tmp_path: Path) -> None:
    """The best checkpoint is that of the metric and the direction that the stage names; NaN is never the best."""
    task = ToyStage()
    task.decides = Decides("accuracy", higher_is_better=True)
    values = iter([math.nan, 0.5, 0.9, 0.7, 0.9, 0.8])
    task.validate = lambda: {"loss": 1.0, "accuracy": next(values)}  # type: ignore[method-assign]
    saved: list[float] = []
    plain = task.save

    def save(folder: Path) -> None:
        plain(folder)
        if "best" in folder.name:
            saved.append(folder.stat().st_ino)

    task.save = save  # type: ignore[method-assign]
    train(task, toy_config(validate_every=1), tmp_path / "run", progress=False)
    assert len(saved) == 2
    log = RunLog(tmp_path / "run")
    assert log.judged(task.decides)["best"] == 0.9
    assert log.judged(Decides())["best"] == 1.0
    assert log.judged(Decides("missing"))["best"] is None


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing is trainable"):
        make_optimizer([ParameterGroup("none", [])], toy_config())


# ---- runs, checkpoints, resumption ----


def test_a_run_leaves_its_log_its_curve_and_its_best_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = ToyStage(validation=[3.0, 1.0, 2.0])
    train(task, toy_config(validate_every=2, save_every=2), out, progress=False)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["validation"]["loss"] for row in rows if "validation" in row] == [3.0, 1.0, 2.0]
    assert [row["samples"] for row in rows if "validation" in row] == [["a sample"]] * 3
    with PILImage.open(out / "loss.png") as curve:
        assert min(curve.size) > 200
    best, fourth, last = ((out / name / "weights.txt").read_text() for name in ("best", "step-000004", "step-000006"))
    assert best == fourth != last
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000004", "step-000006"]  # the newest two
    assert not list(out.glob(".tmp*"))
    assert task.model.training


def test_log_rows_are_means_of_their_steps(tmp_path: Path) -> None:
    train(ToyStage(), toy_config(), tmp_path / "each", progress=False)
    train(ToyStage(), toy_config(log_every=4), tmp_path / "some", progress=False)
    each, some = losses(tmp_path / "each"), losses(tmp_path / "some")
    assert set(some) == {4, 6}
    assert some[4] == pytest.approx(sum(each[s] for s in (1, 2, 3, 4)) / 4)
    assert some[6] == pytest.approx((each[5] + each[6]) / 2)


def test_a_nan_on_validation_is_never_the_best(tmp_path: Path) -> None:
    task = ToyStage(validation=[math.nan, 2.0, math.nan])
    train(task, toy_config(validate_every=2, save_every=2), tmp_path / "run", progress=False)
    best, fourth = ((tmp_path / "run" / n / "weights.txt").read_text() for n in ("best", "step-000004"))
    assert best == fourth


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train(ToyStage(), toy_config(steps=1), tmp_path, progress=False)
    with pytest.raises(MMGPTError, match="already holds a run: continue it with --resume, or choose another --out"):
        train(ToyStage(), toy_config(steps=1), tmp_path, progress=False)


def stop_at(task: ToyStage, step: int, number: int = signal.SIGINT) -> None:
    """The signal arrives in the middle of this step."""
    calls = iter(range(1, 1000))

    def on_loss(loss: Tensor) -> Tensor:
        if next(calls) == step:
            signal.raise_signal(number)
        return loss

    task.on_loss = on_loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path: Path, number: int, at: int, norm: bool) -> None:
    """Moments, running statistics, the schedule and the data: bit by bit."""
    whole, stopped = ToyStage(norm=norm), ToyStage(norm=norm)
    train(whole, toy_config(), tmp_path / "whole", progress=False)
    stop_at(stopped, at, number)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {at}; continue with --resume"):
        train(stopped, toy_config(), tmp_path / "stopped", progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert list(losses(tmp_path / "stopped")) == list(range(1, at + 1))
    resumed = ToyStage(norm=norm)
    train(resumed, toy_config(), tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_signal_during_validation_saves_too(tmp_path: Path) -> None:
    """Validation may take minutes: what was trained before it must not be lost."""
    task = ToyStage()
    plain = task.validate

    def validate() -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return plain() | {"loss": math.nan}

    task.validate = validate  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        train(task, toy_config(validate_every=3, log_every=100), tmp_path, progress=False)
    assert (checkpoint.latest(tmp_path) or Path()).name == "step-000003"
    assert list(losses(tmp_path)) == [3]


def test_parameters_count_their_own_steps(tmp_path: Path) -> None:
    """A connector that had no image for some steps: AdamW's correction counts the steps with a gradient only."""

    class Sometimes(ToyStage):
        with_images: tuple[Pairs, ...] = ()

        def micro_batches(self, step: int, count: int) -> list[Pairs]:
            batches = super().micro_batches(step, count)
            if step in (2, 3, 5):
                self.with_images = (*self.with_images, *batches)
            return batches

        def loss(self, batch: Pairs) -> dict[str, Term]:
            term = super().loss(batch)["loss"]
            if any(batch is other for other in self.with_images):
                extra = (self.model.get_parameter("unused") - 3).square().sum()
                term = dataclasses.replace(term, total=term.total + extra)
            return {"loss": term}

    for name, stop in (("whole", 0), ("early", 2), ("late", 4)):
        task = Sometimes()
        if stop:
            stop_at(task, stop)
            with pytest.raises(KeyboardInterrupt):
                train(task, toy_config(), tmp_path / name, progress=False)
            task = Sometimes()
        train(task, toy_config(), tmp_path / name, resume=bool(stop), progress=False)
    assert losses(tmp_path / "early") == losses(tmp_path / "whole") == losses(tmp_path / "late")


def test_a_killed_run_repeats_what_was_not_saved(tmp_path: Path) -> None:
    """SIGKILL: the log is ahead of the last checkpoint, and its last line may be half written."""
    train(ToyStage(), toy_config(), tmp_path / "whole", progress=False)
    out = tmp_path / "killed"
    task = ToyStage()
    calls = iter(range(1, 100))

    def die(loss: Tensor) -> Tensor:
        if next(calls) == 6:
            raise SystemError("killed")
        return loss

    task.on_loss = die
    with pytest.raises(SystemError):
        train(task, toy_config(save_every=3), out, progress=False)
    assert list(losses(out)) == [1, 2, 3, 4, 5]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (out / ".tmp-step-000006").mkdir()  # a checkpoint that was being written is no checkpoint
    train(ToyStage(), toy_config(save_every=3), out, resume=True, progress=False)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert losses(out) == losses(tmp_path / "whole")


def test_resuming_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    """Killed before the first checkpoint: no step may be in the log twice."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    train(ToyStage(), toy_config(steps=2), tmp_path, resume=True, progress=False)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3  # two steps and a validation


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    train(ToyStage(), toy_config(), tmp_path, progress=False)
    before = (tmp_path / "log.jsonl").read_text()
    train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_corrupted_training_state_is_named(tmp_path: Path) -> None:
    train(ToyStage(), toy_config(), tmp_path, progress=False)
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    state, counter = folder / "training_state/rank-0-of-1.safetensors", folder / "training_state.json"
    whole, text = state.read_bytes(), counter.read_text()
    for broken in (whole[: len(whole) // 2], b"", b"\x80\x04 a pickle"):
        state.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors: cannot continue from it"):
            train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    state.unlink()
    with pytest.raises(CheckpointError, match="cannot continue from it"):
        train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    state.write_bytes(whole)
    for broken_text in ("", "[]", "{}", '{"step": "many"}', "\xff"):
        counter.write_bytes(broken_text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="cannot continue from it"):
            train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    for wrong in ({"step": -1}, {"step": 99}, {"cycles": ["x"]}, {"cycles": [-3]}):
        counter.write_text(json.dumps(json.loads(text) | wrong))
        with pytest.raises(CheckpointError, match="cannot continue from it"):
            train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    counter.write_text(text)
    log = tmp_path / "log.jsonl"
    rows = log.read_text()
    for row in ("[1]", "{}"):
        log.write_text(f"{row}\n{rows}")
        with pytest.raises(MMGPTError, match=r"log\.jsonl: .* is no row of a log"):
            train(ToyStage(), toy_config(), tmp_path, resume=True, progress=False)
    log.write_text(rows)
    with pytest.raises(CheckpointError, match=r"tensors do not match this model, such as buffer\.norm"):
        train(ToyStage(norm=True), toy_config(), tmp_path, resume=True, progress=False)
    other = ToyStage()
    other.model.vector = nn.Parameter(torch.zeros(1))  # copy_ would have spread it over all three
    with pytest.raises(CheckpointError, match=r"do not match this model, such as .*vector"):
        train(other, toy_config(), tmp_path, resume=True, progress=False)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    task = ToyStage()

    def twice(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    task.on_loss = twice
    with pytest.raises(KeyboardInterrupt):
        train(task, toy_config(), tmp_path, progress=False)
    assert checkpoint.latest(tmp_path) is None


# ---- the language stage ----


NUM_CHATS = 12


def write_data(folder: Path) -> None:
    """Five pictures with two captions each, two held out, and chats that fill rows of their own."""
    for name, numbers in (("pictures", range(5)), ("held-out", range(5, 7))):
        (folder / name).mkdir(parents=True)
        for n in numbers:
            make_picture(n).save(folder / name / f"{n}.png")
            (folder / name / f"{n}.txt").write_text(f"A red circle number {n}.\nBlue ground {n}.\n")
    chats = [
        [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(NUM_CHATS)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def tiny_recipe(data: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> LanguageRecipe:
    settings: dict[str, Any] = {
        "steps": 7,
        "lr": 3e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "validate_every": 4,
        "save_every": 3,
        "seed": 5,
    }
    config = tiny_config(make_tokenizer().vocab_size)
    values: dict[str, Any] = {
        "train": TrainConfig(**(settings | (train or {}))),
        "model": config,
        "image": ImageTransformConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "sources": (SourceConfig(path="pictures"), SourceConfig(path="chats.jsonl")),
        "validation": (SourceConfig(path="held-out"),),
        "decoder": "full",
        "vision_blocks": 1,
        "row_length": 128,
        "rows": 1,
        "data": str(data),
    }
    return LanguageRecipe(**(values | changes))


def tiny_task(recipe: LanguageRecipe) -> LanguageTask:
    return LanguageTask(recipe, make_tokenizer())


LORA = LoRAConfig(rank=2, alpha=4, dropout=0.2)


@pytest.mark.parametrize("kind", ["full", "lora", "started"])
def test_language_training_resumes_bit_by_bit(tmp_path: Path, data: Path, kind: str, tiny_model_folder: Path) -> None:
    """In the middle of an epoch, with augmentation, dropout, images in some batches only, and validation between."""
    changes: dict[str, Any] = {}
    if kind == "lora":
        changes = {
            "model": dataclasses.replace(tiny_config(make_tokenizer().vocab_size), lora=LORA),
            "decoder": "frozen",
        }
    if kind == "started":
        changes = {"model": None, "image": None, "start": str(tiny_model_folder), "dropout": 0.3}
    recipe = tiny_recipe(data, train={"accumulate": 2}, **changes)
    task = tiny_task(recipe)
    assert 2 < epoch_rows(task) < 14  # the run covers more than one epoch and stops inside one
    train(task, recipe.train, tmp_path / "whole", progress=False)
    stopped = tiny_task(recipe)
    plain, calls = stopped.loss, iter(range(1, 100))

    def loss(batch: Batch) -> dict[str, Term]:
        if next(calls) == 2 * 4 + 1:  # the first micro-batch of step 5
            signal.raise_signal(signal.SIGINT)
        return plain(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
        train(stopped, recipe.train, tmp_path / "stopped", progress=False)
    train(tiny_task(recipe), recipe.train, tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name in (
        "step-000007/model.safetensors",
        "best/model.safetensors",
        "step-000007/training_state/rank-0-of-1.safetensors",
    ):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_dropout_of_a_model_to_start_from(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    """A recipe sets it for the decoder of any model; validation and what is saved know nothing of it."""
    recipe = tiny_recipe(data, model=None, image=None, start=str(tiny_model_folder), dropout=0.4)
    task, plain = LanguageTask(recipe), LanguageTask(dataclasses.replace(recipe, dropout=None))
    (batch,) = plain.micro_batches(0, 1)
    values = []
    for each in (task, plain):
        each.model.train()
        for seed in (0, 1):
            torch.manual_seed(seed)
            values.append(float(each.loss(batch)["loss"].total))
    assert values[2] == values[3]
    assert len(set(values)) == 3
    for each in (task, plain):
        each.model.eval()
    assert task.validate() == pytest.approx(plain.validate(), rel=1e-5)
    (tmp_path / "saved").mkdir()
    task.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved")[0].decoder.config == plain.model.decoder.config
    with pytest.raises(ConfigError, match="dropout must be at least 0 and below 1, not 1"):
        dataclasses.replace(recipe, dropout=1.0)


SCRIPT = """
import sys
from pathlib import Path
from test_training import tiny_recipe, tiny_task
from mm_gpt.training.loop import train
recipe = tiny_recipe(Path(sys.argv[1]), train={"steps": 400, "save_every": 1000, "validate_every": 1000})
train(tiny_task(recipe), recipe.train, Path(sys.argv[2]), resume="--resume" in sys.argv, progress=False)
"""


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path, data: Path) -> None:
    """A real SIGINT at a moment nobody chose; then the run goes on exactly."""
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(data), str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not ((out / "log.jsonl").exists() and len(losses(out)) >= 3):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "KeyboardInterrupt: stopped after step" in message
    done = max(losses(out))
    assert (checkpoint.latest(out) or Path()).name == f"step-{done:06d}"
    recipe = tiny_recipe(data, train={"steps": 400, "save_every": 1000, "validate_every": 1000})
    task = tiny_task(recipe)
    plain, calls = task.loss, iter(range(1, 1000))

    def loss(batch: Batch) -> dict[str, Term]:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(batch)

    task.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe.train, out, resume=True, progress=False)
    task = tiny_task(recipe)  # the reference, uninterrupted up to there
    optimizer = make_optimizer(task.prepare(), recipe.train)
    task.model.train()
    expected = {step + 1: one_step(task, optimizer, recipe.train, step)["loss"] for step in range(done + 2)}
    assert losses(out) == expected


def test_a_tiny_model_learns_its_pictures(tmp_path: Path, data: Path) -> None:
    recipe = tiny_recipe(
        data,
        train={"steps": 40, "lr": 1e-2, "validate_every": 40, "save_every": 40, "weight_decay": 0.0},
        rows=8,
        augment=False,
        validation=(SourceConfig(path="pictures"),),
    )
    task = tiny_task(recipe)
    before = task.validate()["loss"]
    train(task, recipe.train, tmp_path, progress=False)
    assert task.validate()["loss"] < before / 3
    model, processor = load_model(tmp_path / "best")
    assert processor.config.tokens_per_image == model.tokens_per_image
    assert model.config == recipe.model


# ---- data ----


def shown(task: LanguageTask, first: int, count: int) -> list[Batch]:
    return [batch for index in range(first, first + count) for batch in task.micro_batches(index, 1)]


def epoch_ids(task: LanguageTask, epoch: int) -> list[str]:
    """The ids of an epoch's documents, as its windows hold them."""
    ids: list[str] = []
    for row, begin in task.loader.plan.rows():
        if begin.epoch > epoch:
            break
        if begin.epoch == epoch:
            ids += [task.sources[item.source].document(item.unit).id for item in row]
    return ids


def epoch_rows(task: LanguageTask, epoch: int = 0) -> int:
    """Rows of an epoch."""
    return sum(
        1
        for _, begin in itertools.takewhile(lambda r: r[1].epoch <= epoch, task.loader.plan.rows())
        if begin.epoch == epoch
    )


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch))
    )


def test_batches_are_a_function_of_their_number(data: Path) -> None:
    """Whoever asks, in whatever order: pixels after augmentation included. Another seed gives other ones."""
    one, other = tiny_task(tiny_recipe(data)), tiny_task(tiny_recipe(data))
    in_order = shown(one, 0, 9)
    for index in (8, 3, 0, 5, 8):
        assert same(shown(other, index, 1)[0], in_order[index])
    pair = tiny_task(tiny_recipe(data, train={"accumulate": 2})).micro_batches(2, 2)
    assert same(pair[0], in_order[4])
    assert same(pair[1], in_order[5])
    changed = shown(tiny_task(tiny_recipe(data, train={"seed": 6})), 0, 9)
    assert not all(same(a, b) for a, b in zip(in_order, changed, strict=True))


def test_an_epoch_shows_everything_once(data: Path) -> None:
    task = tiny_task(tiny_recipe(data))
    wanted = Counter([str(n) for n in range(5)] + [f"{data.name}/chats.jsonl:{n + 1}" for n in range(NUM_CHATS)])
    start, orders, pixels = 0, [], []
    for epoch in range(3):
        batches = shown(task, start, epoch_rows(task, epoch))
        start += len(batches)
        ids = [id for batch in batches for row in batch.ids for id in row.split()]
        assert Counter(ids) == wanted
        orders.append(ids)
        pixels.append(sorted(float(p.sum()) for batch in batches for p in batch.pixel_values))
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert pixels[0] != pixels[1]  # augmented anew
    assert any(len(batch.image_rows) == 0 for batch in shown(task, 0, start))  # text-only batches occur here


def test_mirror_images_only_where_no_text_tells_sides_apart() -> None:
    """Stops: "the man on the left" learned from the mirror image, and one that is never or always mirrored."""
    processor = make_tiny()[1]

    def share(texts: tuple[str, ...], *, augment: bool = True) -> float:
        record, how = Record("0", Path("photo.jpg"), texts), RecordSampling(augment=augment)
        draws = [draw_documents(record, random.Random(n), 0, processor, how) for n in range(200)]
        return sum(draw[0].images[0].mirrored for draw in draws) / 200

    assert 0.35 < share(("A dog leaps over a wall.", "Two dogs.")) < 0.65
    assert share(("A dog leaps over a wall.",), augment=False) == 0
    for sided in ("What is left of the bed?", "A dog on the Right.", "A sign reads stop.", "A man says hello."):
        assert share(("Two dogs.", sided)) == 0


def test_half_an_epoch_each_time(data: Path) -> None:
    """`repeat` 0.4: all pictures come before one comes again."""
    sources = (SourceConfig(path="pictures", repeat=0.4), SourceConfig(path="chats.jsonl", repeat=2))
    task = tiny_task(tiny_recipe(data, sources=sources))
    pictures: list[str] = []
    for epoch in range(5):
        ids = epoch_ids(task, epoch)
        assert sum("chats" in id for id in ids) == 2 * NUM_CHATS
        pictures += sorted(id for id in ids if "chats" not in id)
    assert Counter(pictures) == Counter({str(n): 2 for n in range(5)})
    assert len(set(pictures[:4])) == 4


def test_documents_too_long_are_left_out(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than the context: counted and left out, in training and validation."""
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 400}]}
    (data / "long.jsonl").write_text(json.dumps(long) + "\n")
    source = SourceConfig(path="long.jsonl")
    recipe = tiny_recipe(data, sources=(SourceConfig(path="chats.jsonl"), source), validation=(source,))
    task = tiny_task(recipe)
    batches = shown(task, 0, epoch_rows(task))
    assert sum(len(row.split()) for batch in batches for row in batch.ids) == NUM_CHATS
    assert f"skipped {data.name}/long.jsonl:1: longer than the context" in caplog.text
    assert task.validate()["loss"] == 0.0
    with pytest.raises(MMGPTError, match=r"no usable record: .* longer than the context \(data.*/long\.jsonl:1"):
        tiny_task(dataclasses.replace(recipe, sources=(source,)))


def test_a_document_longer_than_a_row_has_one_of_its_own(data: Path) -> None:
    """LLaVA's images alone take more than a row of the usual length: they must not be left out."""
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 40}]}
    (data / "long.jsonl").write_text(json.dumps(long) + "\n")
    sources = (SourceConfig(path="chats.jsonl"), SourceConfig(path="long.jsonl"))
    task = tiny_task(dataclasses.replace(tiny_recipe(data, sources=sources), row_length=64))
    batches = shown(task, 0, epoch_rows(task))
    (row,) = [row for batch in batches for row in batch.ids if "long" in row]
    assert row == f"{data.name}/long.jsonl:1"
    assert max(batch.input_ids.shape[1] for batch in batches) > 64


def test_a_broken_image_is_counted_not_fatal(tmp_path: Path) -> None:
    """Known before training; the others are trained on."""
    write_data(tmp_path)
    (tmp_path / "pictures" / "2.png").write_bytes(b"not a picture")
    task = tiny_task(tiny_recipe(tmp_path))
    ids = [id for batch in shown(task, 0, epoch_rows(task)) for row in batch.ids for id in row.split()]
    assert {id for id in ids if "chats" not in id} == {"0", "1", "3", "4"}
    assert task.errors.counts == {"broken image": 1}
    assert "pictures:2" in task.errors.summary()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"messages": 3}',
        '{"messages": "text"}',
        '{"messages": ["text"]}',
        '{"messages": [{"role": "tool", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": "half \\ud800"}]}',
    ],
)
def test_a_malformed_chat_is_counted_with_file_and_line(tmp_path: Path, line: str) -> None:
    """Stops: a run that one bad line of a thousand ends, and one that skips it without a word."""
    write_data(tmp_path)
    good = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    (tmp_path / "chats.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    for _ in range(2):  # also when the index is there
        task = tiny_task(tiny_recipe(tmp_path, sources=(SourceConfig(path="chats.jsonl"),)))
        assert len(task.sources[0]) == 2
        assert task.errors.total == 1
        assert "chats.jsonl:3" in task.errors.summary()


def test_chats_with_line_separators_inside(tmp_path: Path) -> None:
    """U+2028 and U+0085 are ends of lines for str.splitlines, not for JSON."""
    write_data(tmp_path)
    turns = [{"role": "user", "content": "one\u2028two\u0085three"}, {"role": "assistant", "content": "yes"}]
    chat = {"messages": turns}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat, ensure_ascii=False), encoding="utf-8")
    source = tiny_task(tiny_recipe(tmp_path, sources=(SourceConfig(path="chats.jsonl"),))).sources[0]
    document = source.document(source.some(1)[0][0])
    assert any(isinstance(s, Text) and s.text == "one\u2028two\u0085three" for s in document.segments)
    with pytest.raises(MMGPTError, match=r"gone\.jsonl: no such file"):
        tiny_task(tiny_recipe(tmp_path, sources=(SourceConfig(path="gone.jsonl"),)))


# ---- what is trained ----


def trained_names(task: LanguageTask) -> set[str]:
    task.prepare()
    return {name for name, p in task.model.named_parameters() if p.requires_grad}


def test_what_each_stage_trains(data: Path) -> None:
    config = tiny_config(make_tokenizer().vocab_size)
    align = tiny_task(tiny_recipe(data, decoder="frozen", vision_blocks=0))
    assert {name.split(".")[0] for name in trained_names(align)} == {"connector", "image_marks"}
    adapt = tiny_task(tiny_recipe(data, decoder="frozen", model=dataclasses.replace(config, lora=LORA)))
    decoder = {name for name in trained_names(adapt) if name.startswith("decoder.")}
    assert decoder
    assert all(".lora_" in name for name in decoder)
    full = tiny_task(tiny_recipe(data, train_connector=False, vision_blocks=0))
    assert trained_names(full) == {n for n, _ in full.model.named_parameters() if n.startswith("decoder.")}


def test_frozen_parts_stay_as_they_are(tmp_path: Path, data: Path) -> None:
    config = dataclasses.replace(tiny_config(make_tokenizer().vocab_size), lora=LORA)
    recipe = tiny_recipe(data, train={"steps": 3}, decoder="frozen", model=config, vision_blocks=1)
    task = tiny_task(recipe)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    train(task, recipe.train, tmp_path, progress=False)
    trained = trained_names(task)
    for name, parameter in task.model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, before[name]), name
    changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "connector", "vision", "image_marks"}


def test_weight_decay_and_learning_rates_of_the_groups(data: Path) -> None:
    """Biases and norms are not pulled to zero; every trained parameter is in one group exactly."""
    recipe = tiny_recipe(data, connector_lr=2.0, vision_lr=0.25)
    task = tiny_task(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    for name, parameter in task.model.named_parameters():
        assert (id(parameter) in groups) == parameter.requires_grad, name
        if parameter.requires_grad:
            group = groups[id(parameter)]
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0), name
            scale = {"decoder": 1.0, "vision": 0.25}.get(name.split(".")[0], 2.0)
            assert group["lr_scale"] == scale, name


def test_a_fully_trained_decoder_is_saved_with_its_weights(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder known by name is not stored, unless it is no longer the one that the name stands for."""
    tiny, processor = make_tiny()
    monkeypatch.setattr(language, "load_decoder", lambda name: (tiny.decoder, processor.tokenizer))
    model = dataclasses.replace(tiny.config, decoder="smollm2-135m-instruct")
    task = LanguageTask(tiny_recipe(data, model=model, decoder="full"))
    with torch.no_grad():
        task.model.decoder.blocks[0].mlp.down.weight.add_(0.5)
    task.save(tmp_path)
    again, _ = load_model(tmp_path)
    assert torch.equal(
        again.decoder.blocks[0].mlp.down.weight, task.model.decoder.blocks[0].mlp.down.weight.half().float()
    )


def test_starting_from_a_model(tmp_path: Path, data: Path) -> None:
    recipe = tiny_recipe(data)
    first = tiny_task(recipe)
    first.save(tmp_path)
    second = LanguageTask(dataclasses.replace(recipe, start=str(tmp_path)))
    table = first.model.decoder.embedding.weight
    assert torch.equal(second.model.decoder.embedding.weight, table.half().float())
    other = dataclasses.replace(recipe.model, lora=LORA)
    with pytest.raises(ConfigError, match="holds another model than the recipe describes"):
        LanguageTask(dataclasses.replace(recipe, start=str(tmp_path), model=other))


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "stored"])
def test_training_all_of_a_model_with_low_rank_updates(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    """`finetune ... decoder=full` on the default model, say: the updates become weights, and all weights are trained.
    They stayed frozen under their adaptation, without a word."""
    tiny, processor = make_tiny()
    name = "smollm2-135m-instruct" if by_name else tiny.config.decoder
    model = MMGPT(dataclasses.replace(tiny.config, decoder=name, lora=LORA), tiny.decoder)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_b" in key:
                parameter.normal_(std=0.1)
    monkeypatch.setattr(
        hub_checkpoint, "load_decoder", lambda name, dtype: (make_tiny()[0].decoder, processor.tokenizer)
    )
    (tmp_path / "start").mkdir()
    save_model(model, processor, tmp_path / "start")
    recipe = tiny_recipe(data, start=str(tmp_path / "start"), model=None, train={"steps": 2, "lr": 1e-2})
    task = LanguageTask(recipe)
    batch = task.micro_batches(0, 1)[0]
    started = load_model(tmp_path / "start")[0]
    with torch.no_grad():
        torch.testing.assert_close(task.model.eval()(batch), started(batch), rtol=0, atol=1e-4)
    train(task, recipe.train, tmp_path / "run", progress=False)
    again = load_model(tmp_path / "run/step-000002")[0]
    assert again.config.lora is None
    assert again.config.decoder == tiny.config.decoder
    for key, weight in make_tiny()[0].decoder.named_parameters():
        assert not torch.equal(again.decoder.get_parameter(key), weight), key  # all of them are trained
    with torch.no_grad():
        torch.testing.assert_close(again(batch), task.model.eval()(batch), rtol=0, atol=0.1)


def test_a_tokenizer_larger_than_the_vocabulary(data: Path) -> None:
    """Its last ids would be read as images, or as nothing."""
    config = tiny_config(make_tokenizer().vocab_size - 1)
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ ids, the decoder \d+"):
        tiny_task(tiny_recipe(data, model=config))


def test_a_model_of_text_alone(tmp_path: Path, data: Path) -> None:
    """Nothing of the image's settings concerns it, and pictures are refused by name."""
    config = dataclasses.replace(tiny_config(make_tokenizer().vocab_size), vision=None, connector=None)
    chats = (SourceConfig(path="chats.jsonl"),)
    recipe = tiny_recipe(data, model=config, image=None, sources=chats, validation=chats, train={"steps": 2})
    assert recipe.augment
    task = tiny_task(recipe)
    train(task, recipe.train, tmp_path, progress=False)
    assert task.validate()["loss"] > 0
    assert task.samples() == []
    assert load_model(tmp_path / "best")[0].tokens_per_image == 0
    with pytest.raises(MMGPTError, match=r"an image, and this model reads text alone \(pictures:0"):
        tiny_task(dataclasses.replace(recipe, sources=(SourceConfig(path="pictures"),)))


def test_bf16_keeps_master_weights_in_float32(data: Path) -> None:
    """Frozen weights are stored in bfloat16, trained ones never: small updates would be lost."""
    config = dataclasses.replace(tiny_config(make_tokenizer().vocab_size), lora=LORA)
    recipe = tiny_recipe(data, train={"precision": "bf16"}, decoder="frozen", model=config)
    task = tiny_task(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    assert task.model.decoder.embedding.weight.dtype == torch.bfloat16
    task.model.train()
    metrics = one_step(task, optimizer, recipe.train, 0)
    assert math.isfinite(metrics["loss"])
    assert len(task.samples()) == 2
    exact = tiny_task(tiny_recipe(data, decoder="frozen", model=config))
    exact.model.load_state_dict({k: v.float() for k, v in task.model.state_dict().items()})
    assert isinstance(exact.model, MMGPT)


def test_what_is_frozen_is_saved_as_it_was(tmp_path: Path, data: Path) -> None:
    """Stops: a base whose weights lose half their digits by a run that does not even train them."""
    config = dataclasses.replace(tiny_config(make_tokenizer().vocab_size), lora=LORA)
    task = tiny_task(tiny_recipe(data, train={"precision": "bf16"}, decoder="frozen", model=config))
    before = {name: p.detach().clone() for name, p in task.model.decoder.named_parameters() if ".lora_" not in name}
    task.prepare()
    task.save(tmp_path)
    again = load_model(tmp_path)[0]
    for name, weight in before.items():
        assert torch.equal(again.decoder.get_parameter(name), weight.half().float() if weight.dim() > 1 else weight)


def test_validation_does_not_disturb_training(tmp_path: Path, data: Path) -> None:
    """Evaluation mode left on, or random numbers used up: the curve would depend on how often one looks."""
    curves = []
    for every in (1, 100):
        recipe = tiny_recipe(data, train={"steps": 4, "validate_every": every})
        train(tiny_task(recipe), recipe.train, tmp_path / str(every), progress=False)
        curves.append(losses(tmp_path / str(every)))
    assert curves[0] == curves[1]
