"""The folder of a run: nothing in it is lost, whenever the process is killed or the disk is full."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_ranks import Run, rows, write_corpus
from torch import Tensor
from toy_stage import ToyStage, losses, save_checkpoint, toy_config

from mm_gpt.errors import MMGPTError
from mm_gpt.system import writing
from mm_gpt.system.locks import open_locked
from mm_gpt.training import checkpoint
from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer

STATE = "training_state/rank-0-of-1.safetensors"


class Versioned(ToyStage):
    """Its model is two files, which must be of one version."""

    version = 0

    def save(self, folder: Path) -> None:
        for name in ("one.txt", "other.txt"):
            (folder / name).write_text(str(self.version))


def save_version(stage: Versioned, out: Path, version: int, *, best: bool) -> None:
    stage.version = version
    save_checkpoint(stage, make_optimizer(stage.prepare(), toy_config()), Progress(version), out, best=best)


def version_of(folder: Path) -> int:
    one, other = ((folder / name).read_text() for name in ("one.txt", "other.txt"))
    assert one == other
    return int(one)


def killed_at(number: int, stage: Versioned, out: Path) -> bool:
    """Save version 6 in another process, which dies before its `number`-th change of the file system, if it comes."""
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree", "ctypes.dlsym")
    count = 0

    def hook(event: str, arguments: object) -> None:
        nonlocal count
        count += event in changes
        if count == number:
            os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(hook)
            save_version(stage, out, 6, best=True)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_killed_at_any_moment_of_a_save_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Between two renames there was no `best` at all, and nothing put it back."""
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    stage = Versioned()
    begun = tmp_path / "begun"
    for version in (1, 2, 4):
        save_version(stage, begun, version, best=version == 2)
    assert sorted(path.name for path in begun.iterdir()) == ["best", "step-000002", "step-000004"]
    seen, number = set(), 0
    while True:
        number += 1
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        killed = killed_at(number, stage, out)
        if exchange and sys.platform in ("linux", "darwin"):
            assert version_of(out / "best") in (2, 6)  # a load that comes before any resume
        writing.recover(out)
        newest = checkpoint.latest(out)
        assert newest is not None
        best, step = version_of(out / "best"), version_of(newest)
        assert json.loads((newest / "training_state.json").read_text())["step"] == step
        assert load_file(newest / STATE)
        assert (best, step) in ((2, 4), (6, 4), (6, 6))
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
        seen.add((best, step))
        if not killed:
            break
    assert number > 20
    assert seen == {(2, 4), (6, 4), (6, 6)}


def test_a_kill_while_the_log_is_cut_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was emptied before it was written anew."""
    train(ToyStage(), toy_config(steps=2), tmp_path, progress=False)
    before = (tmp_path / "log.jsonl").read_text()

    def killed(path: Path) -> None:
        raise SystemError("killed")

    monkeypatch.setattr(writing, "_sync", killed)
    with pytest.raises(SystemError):
        train(ToyStage(), toy_config(steps=3), tmp_path, resume=True, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == before
    monkeypatch.undo()
    train(ToyStage(), toy_config(steps=3), tmp_path, resume=True, progress=False)
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path: Path) -> None:
    """Here a limit on the size of files, which fails as a full disk does; then the run goes on as if nothing was."""
    train(ToyStage(), toy_config(steps=4, save_every=1), tmp_path / "whole", progress=False)
    stage, out = ToyStage(), tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = iter(range(1, 100))

    def fill(loss: Tensor) -> Tensor:
        if next(calls) == 3:
            size = (out / "step-000002" / STATE).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, before[1]))
        return loss

    stage.on_loss = fill
    try:
        with pytest.raises(MMGPTError) as caught:
            train(stage, toy_config(steps=4, save_every=1), out, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert message.startswith(f"{out}/step-000003/{STATE}: cannot be written (File too large")
    assert "\n" not in message
    assert sorted(path.name for path in out.glob("*step*")) == ["step-000001", "step-000002"]
    assert not list(out.glob(".tmp*"))
    train(ToyStage(), toy_config(steps=4, save_every=1), out, resume=True, progress=False)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["log.jsonl", "recipe.json", "loss.png"])
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    train(ToyStage(), toy_config(steps=1), out, progress=False)
    (out / name).unlink()
    (out / name).mkdir()  # also refused to a superuser
    if name == "log.jsonl":
        with pytest.raises(MMGPTError, match=rf"{name}: cannot be read"):
            train(ToyStage(), toy_config(steps=2), out, resume=True, progress=False)
    else:
        with pytest.raises(MMGPTError, match=rf"{name}: cannot be written"):
            train(ToyStage(), toy_config(steps=2), out, resume=True, progress=False)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(tmp_path: Path, resume: bool) -> None:
    """They wrote into each other's log and checkpoints."""
    second = ToyStage()

    def meanwhile(loss: Tensor) -> Tensor:
        with pytest.raises(MMGPTError, match=f"{tmp_path.name}: another process is writing it"):
            train(second, toy_config(), tmp_path, resume=resume, progress=False)
        return loss

    stage = ToyStage()
    stage.on_loss = meanwhile
    train(stage, toy_config(steps=2), tmp_path, progress=False)
    with open_locked(tmp_path / ".lock", tmp_path):  # free again
        assert list(losses(tmp_path)) == [1, 2]


def test_folders_that_are_called_like_steps(tmp_path: Path) -> None:
    """`step-000002 copy`, say: it ended resuming with a traceback."""
    train(ToyStage(), toy_config(steps=2), tmp_path, progress=False)
    (tmp_path / "step-000002 copy").mkdir()
    (tmp_path / "step-").mkdir()
    assert (checkpoint.latest(tmp_path) or Path()).name == "step-000002"


def test_sigterm_to_one_rank_stops_all_and_leaves_no_worker(tmp_path: Path) -> None:
    """Two ranks with two workers each: both stop after the same step, and no process of theirs is left."""
    write_corpus(tmp_path / "corpus")
    run = Run(tmp_path, "stopped", steps=10_000)
    try:
        deadline = time.monotonic() + 200
        while not any(row["step"] >= 2 for row in rows(run.out / "log.jsonl")):
            assert all(process.poll() is None for process in run.processes)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.processes[1].send_signal(signal.SIGTERM)
        messages = [process.communicate(timeout=100)[1] for process in run.processes]
        for process in run.processes:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
    finally:
        for process in run.processes:
            process.kill()
    last = max(losses(run.out))
    assert all(f"KeyboardInterrupt: stopped after step {last}" in message for message in messages), messages
    assert (checkpoint.latest(run.out) or Path()).name == f"step-{last:06d}"
