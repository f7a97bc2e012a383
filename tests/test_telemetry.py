"""What a run says of itself: tokens, FLOPs, MFU and memory in its log, and the log in TensorBoard and W&B."""

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import on_ranks
from toy_stage import Pairs, ToyStage, logged, toy_config

from mm_gpt.config import override
from mm_gpt.errors import ConfigError
from mm_gpt.training import checkpoint
from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.distributed import ranks
from mm_gpt.training.loop import train
from mm_gpt.training.recipes import run_recipe, tiny
from mm_gpt.training.run_log import RunLog
from mm_gpt.training.stage import Measured
from mm_gpt.training.telemetry import Telemetry, known_peak, measured_peak, peak_memory
from mm_gpt.training.trackers import check_trackers, readable, tracking

CPU = torch.device("cpu")


class Counted(ToyStage):
    """Ten tokens in a step, of 12 FLOPs each."""

    def tokens(self, batch: Pairs) -> int:
        return len(batch.x)

    def flops(self, batch: Pairs) -> float:
        return 12.0 * len(batch.x)


class Stopped(Exception):
    """A process that ends in the middle of a step."""


def stopping_at(step: int) -> Counted:
    stage, steps = Counted(), iter(range(step))

    def stop(loss: torch.Tensor) -> torch.Tensor:
        if next(steps, None) is None:
            raise Stopped
        return loss

    stage.on_loss = stop
    return stage


# ---- the log ----


def test_tokens_and_flops_go_on_exactly_where_a_run_does(tmp_path: Path) -> None:
    config = toy_config(steps=8, save_every=3, log_every=2, validate_every=100)
    with pytest.raises(Stopped):
        train(stopping_at(5), config, tmp_path, progress=False)
    train(Counted(), config, tmp_path, resume=True, progress=False)
    assert logged(tmp_path, "tokens") == {2: 20, 4: 40, 6: 60, 8: 80}
    assert logged(tmp_path, "flops") == {2: 240, 4: 480, 6: 720, 8: 960}
    progress = json.loads((tmp_path / "step-000008" / checkpoint.PROGRESS_FILE).read_text())
    assert (progress["tokens"], progress["flops"]) == (80, 960)
    assert all(speed > 0 for speed in logged(tmp_path, "tokens_per_s").values())
    assert all(memory > 2**20 for memory in logged(tmp_path, "memory").values())
    assert logged(tmp_path, "mfu") == {}  # the peak of this processor is not known


def test_tokens_are_those_of_all_ranks(tmp_path: Path) -> None:
    """Each sees its own rows; rank 0 logs, and MFU is of all devices."""

    class Uneven(Counted):
        def tokens(self, batch: Pairs) -> int:
            return 10 + ranks()[0]

    def run(rank: int) -> None:
        train(Uneven(), toy_config(steps=2, validate_every=100), tmp_path, progress=False)

    assert on_ranks(run) == [None, None]
    assert logged(tmp_path, "tokens") == {1: 21, 2: 42}
    assert logged(tmp_path, "flops") == {1: 240, 2: 480}


def test_a_stage_that_does_not_count_has_no_tokens(tmp_path: Path) -> None:
    assert not isinstance(ToyStage(), Measured)
    train(ToyStage(), toy_config(steps=1), tmp_path, progress=False)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert "memory" in row
    assert not {"tokens", "flops", "tokens_per_s", "mfu"} & set(row)


def test_a_stage_whose_costs_are_unknown_is_not_measured() -> None:
    class Part(Counted):
        flops = None  # type: ignore[assignment]

    assert isinstance(Counted(), Measured)
    assert not isinstance(Part(), Measured)


def test_mfu_is_a_share_of_the_measured_peak(tmp_path: Path) -> None:
    telemetry = Telemetry(Counted(), toy_config(mfu_peak="measured"), CPU)
    assert telemetry.peak is not None
    assert telemetry.peak > 1e8
    telemetry.peak = 1000.0
    at = Progress(tokens=5, flops=1.0)
    values = telemetry.measure(at, telemetry.count(Counted().micro_batches(0, 1)), seconds=0.5)
    assert values.items() >= {"tokens": 15, "flops": 121.0, "tokens_per_s": 20.0, "mfu": 0.24}.items()
    assert (at.tokens, at.flops) == (15, 121.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L400", None),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_of_gpus(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_peaks_and_memory_that_are_measured() -> None:
    assert 1e7 < measured_peak(CPU, torch.float32, size=128) < 1e14
    held = torch.ones(2**22)  # 16 MB
    assert peak_memory(CPU) > held.numel() * 4


def test_a_row_of_several_steps(tmp_path: Path) -> None:
    """The last value of what is counted, rates over time, means of the rest."""
    log = RunLog(tmp_path)
    slow = {"loss": 1.0, "tokens": 10, "tokens_per_s": 10.0, "memory": 5, "seconds": 0.5, "data_seconds": 0.5}
    log.train(1, slow, flush=False)
    log.train(2, {"loss": 3.0, "tokens": 40, "tokens_per_s": 30.0, "memory": 5, "seconds": 1.0}, flush=True)
    row = log.rows[0]
    assert (row["loss"], row["tokens"], row["memory"]) == (2.0, 40, 5)
    assert row["tokens_per_s"] == pytest.approx(20.0)
    assert row["data_seconds"] == 0.5


def test_a_language_run_is_measured(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    from conftest import make_picture

    for number in range(12):
        make_picture(number).save(shapes / f"{number}.png")
        (shapes / f"{number}.txt").write_text("A red circle.\n")
    changes = ["train.steps=2", "train.log_every=1", "train.trackers=tensorboard", "rows=1"]
    run_recipe(override(tiny(str(shapes)), changes), tmp_path / "run", progress=False)
    tokens, flops = (logged(tmp_path / "run", key) for key in ("tokens", "flops"))
    assert 0 < tokens[1] < tokens[2]
    assert 0 < flops[1] < flops[2]
    assert curves(tmp_path / "run")["train/tokens"] == tokens


# ---- trackers ----


def curves(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run, every point of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(name)]
        found[name] = dict(points)
        assert len(points) == len(found[name]), f"{name} has a step twice"
    return found


def test_tensorboard_goes_on_with_the_same_curves_after_a_kill(tmp_path: Path) -> None:
    config = toy_config(steps=8, save_every=3, validate_every=2, trackers=("tensorboard",))
    with pytest.raises(Stopped):
        train(stopping_at(5), config, tmp_path, progress=False)  # steps 4 and 5 are logged and will be repeated
    train(Counted(), config, tmp_path, resume=True, progress=False)
    found = curves(tmp_path)
    assert list(found["train/loss"]) == list(range(1, 9))
    assert found["train/loss"] == pytest.approx(logged(tmp_path, "loss"))
    assert found["train/tokens"] == logged(tmp_path, "tokens")
    assert list(found["validation/loss"]) == [2, 4, 6, 8]


def test_what_is_shown_of_a_row() -> None:
    assert readable({"step": 3, "loss": 1.5}) == ({"train/loss": 1.5}, {})
    row = {"step": 3, "validation": {"loss": 2.0}, "samples": ["a", "b"]}
    assert readable(row) == ({"validation/loss": 2.0}, {"samples": "a\n\nb"})


def test_a_missing_package_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package wandb: pip install -e "\.\[track\]"'):
        run_recipe(override(tiny(str(tmp_path)), ["train.trackers=wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        check_trackers(["wandbb"])


class FakeWandB(SimpleNamespace):
    """Its module, with an account and a server that are there, or not."""

    def __init__(self, *, account: bool = True, fails: tuple[str, ...] = ()):
        super().__init__(fails=fails, account=account, runs=[], torn_down=0, Settings=lambda **options: options)
        self.__spec__ = None

    def _fail(self, what: str) -> None:
        if what in self.fails:
            raise ConnectionError(f"no {what} today\nand a long trace")

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        self._fail("login")
        return self.account

    def teardown(self) -> None:
        self.torn_down += 1

    def init(self, **options: Any) -> SimpleNamespace:
        if options["mode"] != "offline":
            self._fail("init")
        online = [run for run in self.runs if run.options["mode"] == "online"]
        # A server has all but the last row of a run that was killed
        step = online[-1].rows[-1][0] if online and options["mode"] == "online" else 0
        run = SimpleNamespace(options=options, rows=[], finished=False, step=step)

        def log(values: dict[str, float], step: int) -> None:
            self._fail("log")
            run.rows.append((step, values))

        def finish() -> None:
            self._fail("finish")
            run.finished = True

        run.log, run.finish = log, finish
        self.runs.append(run)
        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, fake: FakeWandB) -> None:
    config = toy_config(steps=8, save_every=3, validate_every=100, trackers=("wandb",))
    with pytest.raises(Stopped):
        train(stopping_at(5), config, tmp_path, progress=False)
    train(Counted(), config, tmp_path, resume=True, progress=False)
    first, second = fake.runs
    assert first.options["id"] == second.options["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert second.options["resume"] == "allow"
    assert [step for step, _ in first.rows] == [1, 2, 3, 4, 5]
    assert [step for step, _ in second.rows] == [5, 6, 7, 8, 8]  # the server lacks 5; 8 trains and validates
    assert first.options["config"]["train"]["steps"] == 8
    assert second.finished


@pytest.mark.parametrize("fails", [("login",), ("init",), ("log",), ("finish",), ("login", "log", "finish")])
def test_an_unreachable_wandb_never_ends_a_run(
    tmp_path: Path, fake: FakeWandB, fails: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails = fails
    with caplog.at_level(logging.WARNING):
        train(Counted(), toy_config(trackers=("wandb",)), tmp_path, progress=False)
    assert list(logged(tmp_path, "loss")) == [1, 2, 3, 4, 5, 6]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [f"wandb: no {what} today" in text for what, text in zip(fails, warnings, strict=False)].count(False) == 0
    assert all("\n" not in text for text in warnings)
    modes = [run.options["mode"] for run in fake.runs]
    assert modes == (["offline"] if {"login", "init"} & set(fails) else ["online"])
    assert fake.torn_down == ("init" in fails)


def test_offline_each_start_writes_the_whole_run(tmp_path: Path, fake: FakeWandB) -> None:
    """A kill loses what was not on the disk yet."""
    fake.account = False
    config = toy_config(steps=8, save_every=3, validate_every=100, trackers=("wandb",))
    with pytest.raises(Stopped):
        train(stopping_at(5), config, tmp_path, progress=False)
    train(Counted(), config, tmp_path, resume=True, progress=False)
    assert [step for step, _ in fake.runs[1].rows] == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_nobody_is_asked_for_a_key(tmp_path: Path, fake: FakeWandB) -> None:
    fake.account = False
    with tracking(["wandb"], RunLog(tmp_path), step=0):
        pass
    assert fake.runs[0].options["mode"] == "offline"


def test_wandb_offline_without_network_or_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    log = RunLog(tmp_path)
    with tracking(["wandb"], log, step=0):
        log.train(1, {"loss": 0.375}, flush=True)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(200):  # its own process writes
        if b"train/loss" in written.read_bytes():
            break
        time.sleep(0.1)
    assert b"0.375" in written.read_bytes()
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] in written.name


def test_other_ranks_have_no_trackers(fake: FakeWandB) -> None:
    with tracking(["wandb"], None, step=0):
        pass
    assert fake.runs == []
