"""Checkpoints of training state: across numbers of ranks, written in the background, and whatever goes wrong."""

import contextlib
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import make_tiny
from forked_ranks import on_ranks
from safetensors.torch import load_file
from sharded_model import Given, batch_of, document
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_stage import ToyStage, losses, one_step, save_checkpoint, toy_config

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.system import tensor_files
from mm_gpt.training import checkpoint
from mm_gpt.training.averaging import WeightAverage
from mm_gpt.training.checkpoint import Progress, load_training_state
from mm_gpt.training.distributed import process_group, ranks
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.parallel import shard_model
from mm_gpt.training.saving import Saver
from mm_gpt.training.stage import ParameterGroup
from mm_gpt.training.state_files import SavedTensors

CPU = torch.device("cpu")


class Rows(nn.Module):
    """Five, one and three rows, and a weight that nothing uses: uneven and empty slices on any number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1), nn.Linear(1, 3))
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Sharded(ToyStage):
    """A regression by a model that the ranks share; the mean of its weights belongs to its state, and a number of each
    rank."""

    shards = True

    def __init__(self, *, copies: int = 1) -> None:
        super().__init__()
        self.model = Rows()
        self.copies = copies
        self.average: WeightAverage | None = None
        self.own: dict[str, Tensor] = {}

    def prepare(self) -> list[Any]:
        world = ranks()[1]
        if world > 1:
            shape = (world,) if self.copies == 1 else (self.copies, world // self.copies)
            names = ("shard",) if self.copies == 1 else ("copy", "shard")
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            layers: nn.Sequential = self.model.layers  # type: ignore[assignment]
            for module in (*layers, self.model):
                fully_shard(module, mesh=mesh)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.average = WeightAverage(self.model, 0.5)
        return super().prepare()

    def after_step(self) -> dict[str, float]:
        assert self.average is not None
        self.average.update()
        return {}

    def save(self, folder: Path) -> None:
        tensor_files.write_tensors(self.model.state_dict(), folder / "model.safetensors")

    def state_tensors(self) -> dict[str, Tensor]:
        assert self.average is not None
        mine = {f"rank{ranks()[0]}.draws": torch.arange(ranks()[0] + 2.0)}
        return self.average.state_tensors() | mine | self.own

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert self.average is not None
        self.average.load_state_tensors(tensors)
        self.own = {name: tensor for name, tensor in tensors.items() if not name.startswith("average.")}


def optimizer_of(kind: str, stage: Sharded) -> torch.optim.Optimizer:
    groups = stage.prepare()
    if kind == "adamw":
        return make_optimizer(groups, toy_config(weight_decay=0.1))
    settings: list[dict[str, Any]] = [{"params": groups[0].parameters, "lr_scale": 1.0}]
    return Counting(settings, lr=0.1)


class Counting(torch.optim.Optimizer):
    """Keeps numbers beside its tensors, as some do."""

    def __init__(self, settings: list[dict[str, Any]], lr: float) -> None:
        super().__init__(settings, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"steps": 0, "share": 0.25, "last": torch.zeros_like(parameter), "none": None}
                state["steps"] += 1
                state["share"] /= 2
                state["last"].copy_(parameter.grad)
                parameter.sub_(parameter.grad, alpha=group["lr"] * state["share"])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(stage: Sharded, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters, what the optimizer keeps of each, and the average; by name, as arrays."""
    found: dict[str, Any] = {}
    for name, parameter in stage.model.named_parameters():
        found[name] = whole(parameter.detach()).numpy().copy()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = whole(value).numpy().copy() if isinstance(value, Tensor) else value
    assert stage.average is not None
    return found | {f"average {n}": whole(t).numpy().copy() for n, t in stage.average.state_tensors().items()}


def trained(stage: Sharded, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses; the ranks see the same, so that their number does not matter."""
    found = []
    for step in steps:
        found.append(one_step(stage, optimizer, toy_config(), step)["loss"])
        stage.after_step()
    return found


def save_shared(out: Path, kind: str, copies: int = 1) -> dict[str, Any]:
    """After three steps, on these ranks."""
    with process_group(CPU):
        stage = Sharded(copies=copies)
        optimizer = optimizer_of(kind, stage)
        trained(stage, optimizer, range(3))
        save_checkpoint(stage, optimizer, Progress(3, data={"row": 7}), out, best=False)
        return {"state": everything(stage, optimizer), "losses": trained(stage, optimizer, range(3, 6))}


def load_shared(out: Path, kind: str) -> dict[str, Any]:
    with process_group(CPU):
        stage = Sharded()
        optimizer = optimizer_of(kind, stage)
        folder = checkpoint.latest(out)
        assert folder is not None
        at = load_training_state(folder, stage, optimizer)
        assert (at.step, at.data) == (3, {"row": 7})
        own = {name: tensor.tolist() for name, tensor in stage.own.items()}
        return {
            "state": everything(stage, optimizer),
            "own": own,
            "losses": trained(stage, optimizer, range(3, 6)),
        }


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert type(value) is type(other[name]), name
        assert (value == other[name]).all() if hasattr(value, "shape") else value == other[name], name


@pytest.mark.parametrize(("kind", "counts"), [("adamw", (1, 3, 4)), ("counting", (3,))], ids=["adamw", "numbers"])
def test_saved_on_two_ranks_loaded_on_others(tmp_path: Path, kind: str, counts: tuple[int, ...]) -> None:
    """Check 5 of parallel training: parameters, moments, steps and averages are equal to the bit on 1, 3 and 4 ranks,
    with uneven and empty slices, and training goes on with the same losses. What each rank has of its own stays."""
    first, second = on_ranks(lambda rank: save_shared(tmp_path, kind))
    assert isinstance(first, dict), first
    equal(first["state"], second["state"])
    files = sorted(path.name for path in (tmp_path / "step-000003" / "training_state").iterdir())
    assert files == ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors"]
    moments = {name.partition(" ")[2] for name in first["state"] if " " in name and not name.startswith("average")}
    exported = load_file(tmp_path / "step-000003" / "model.safetensors")
    assert all((exported[name].numpy() == first["state"][name]).all() for name in exported)
    assert len(exported) == 7
    assert moments == ({"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"steps", "share", "last", "none"})
    for count in counts:
        for found in on_ranks(lambda rank: load_shared(tmp_path, kind), count):
            assert isinstance(found, dict), found
            equal(found["state"], first["state"])
            assert found["own"] == {"rank0.draws": [0, 1], "rank1.draws": [0, 1, 2]}
            assert found["losses"] == pytest.approx(first["losses"], rel=1e-6)


class Tiny(Given):
    """A whole multimodal model."""

    def __init__(self) -> None:
        model, self.processor = make_tiny()
        model.train()
        super().__init__(model, [batch_of(self.processor, [document(n, image=n % 2 == 0)]) for n in range(2)])

    def prepare(self) -> list[ParameterGroup]:
        if ranks()[1] > 1:
            shard_model(self.model, ranks()[1], CPU, bf16=False)
        return super().prepare()

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder)


def tiny(out: Path, kind: str, *, load: bool) -> dict[str, Any]:
    """The state of a saved or a loaded one, as arrays, and the loss of the step behind."""
    with process_group(CPU):
        stage, settings = Tiny(), toy_config(optimizer=kind, lr=1e-3)
        optimizer = make_optimizer(stage.prepare(), settings, stage.model)
        if load:
            load_training_state(out / "step-000002", stage, optimizer)
        else:
            for step in range(2):
                one_step(stage, optimizer, settings, step)
            save_checkpoint(stage, optimizer, Progress(2), out, best=False)
        found = {n: whole(t).numpy().copy() for n, t in checkpoint._training_state(stage.model, optimizer).items()}
        return {"state": found, "loss": one_step(stage, optimizer, settings, 2)["loss"]}


@pytest.mark.parametrize(("kind", "count"), [("muon", 2), ("adafactor", 1)])
def test_every_optimizer_of_ours(tmp_path: Path, kind: str, count: int) -> None:
    """A multimodal model with tied weights, saved by as many ranks, goes on in one process."""
    make_tiny()  # imports what each process would import for seconds
    (saved, *_), (loaded,) = (
        on_ranks(lambda rank, load=load: tiny(tmp_path, kind, load=load), number)  # type: ignore[misc]
        for load, number in ((False, count), (True, 1))
    )
    assert isinstance(saved, dict), saved
    assert isinstance(loaded, dict), loaded
    equal(saved["state"], loaded["state"])
    assert loaded["loss"] == pytest.approx(saved["loss"], rel=1e-6)
    kept = {name.rpartition(".")[2] for name in saved["state"] if name.startswith("optimizer.")}
    assert kept >= ({"momentum_buffer", "exp_avg"} if kind == "muon" else {"row_var", "variance"})
    exported, _ = load_model(tmp_path / "step-000002")
    state = exported.state_dict()
    names = [name.removeprefix("parameter.") for name in saved["state"] if name.startswith("parameter.")]
    assert all(torch.allclose(state[n], torch.from_numpy(saved["state"][f"parameter.{n}"]), atol=1e-3) for n in names)


def test_copies_of_a_sharded_model_are_saved_once(tmp_path: Path) -> None:
    """Four ranks, two copies of two slices: the second copy writes what it alone has."""
    first = on_ranks(lambda rank: save_shared(tmp_path, "adamw", copies=2), 4)[0]
    assert isinstance(first, dict), first
    folder = tmp_path / "step-000003"
    assert json.loads((folder / "training_state.json").read_text())["saved_by"] == {"ranks": 4, "shard": 2}
    for rank in (2, 3):
        assert list(load_file(folder / "training_state" / f"rank-{rank}-of-4.safetensors")) == [
            f"stage.rank{rank}.draws"
        ]
    found = load_shared(tmp_path, "adamw")
    equal(found["state"], first["state"])


def test_torch_reads_what_is_saved(tmp_path: Path) -> None:
    """The files are in the layout of torch's own safetensors storage."""
    first = on_ranks(lambda rank: save_shared(tmp_path, "adamw"))[0]
    target = {"parameter.layers.0.weight": torch.zeros(5, 4), "optimizer.layers.0.weight.exp_avg": torch.zeros(5, 4)}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "step-000003" / "training_state"))
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert (target["parameter.layers.0.weight"].numpy() == first["state"]["layers.0.weight"]).all()
    assert (target["optimizer.layers.0.weight.exp_avg"].numpy() == first["state"]["layers.0.weight exp_avg"]).all()


def test_a_slice_that_is_lost_is_missed(tmp_path: Path) -> None:
    """torch's reader leaves the rows of a lost file as they were, without a word."""
    on_ranks(lambda rank: save_shared(tmp_path, "adamw"))
    folder = tmp_path / "step-000003" / "training_state"
    lost, kept = folder / "rank-0-of-2.safetensors", folder.parent / "kept"
    lost.rename(kept)
    target = {"parameter.layers.0.weight": torch.full((5, 4), 7.0)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert (target["parameter.layers.0.weight"] == 7).sum() == 12
    with pytest.raises(CheckpointError, match=r"rank-0-of-2\.safetensors: cannot continue from it \(has no bytes"):
        load_shared(tmp_path, "adamw")
    with pytest.raises(CheckpointError, match=r"not each part of .* is there once"):
        SavedTensors(folder)
    shutil.copy(kept, lost)
    shutil.copy(kept, folder / "rank-0-of-3.safetensors")  # left over from other ranks
    with pytest.raises(CheckpointError, match=r"rank-0-of-3\.safetensors: cannot continue from it"):
        load_shared(tmp_path, "adamw")
    with pytest.raises(CheckpointError, match=r"not each part of .* is there once"):
        SavedTensors(folder)


# ---- what does not fit ----


def saved_here(tmp_path: Path, stage: ToyStage | None = None) -> tuple[ToyStage, Path]:
    stage = stage or ToyStage()
    train(stage, toy_config(steps=2), tmp_path, progress=False)
    return stage, tmp_path / "step-000002"


def refused(folder: Path, optimizer: Callable[[ToyStage], torch.optim.Optimizer], match: str) -> None:
    stage = ToyStage()
    made = optimizer(stage)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_training_state(folder, stage, made)
    assert "\n" not in str(caught.value)


def plain(stage: ToyStage) -> torch.optim.Optimizer:
    return make_optimizer(stage.prepare(), toy_config())


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    """Of torch, a fresh optimizer's `state_dict` would load nothing, dtypes be cast, and unknown keys be ignored, all
    of it silently; and CheckpointException is no Exception."""
    _, folder = saved_here(tmp_path)

    def other(stage: ToyStage) -> torch.optim.Optimizer:
        return torch.optim.SGD(stage.model.parameters(), lr=0.1, momentum=0.9)

    def halved(stage: ToyStage) -> torch.optim.Optimizer:
        stage.model.to(torch.bfloat16)
        return plain(stage)

    def frozen(stage: ToyStage) -> torch.optim.Optimizer:
        stage.model.vector.requires_grad_(False)
        return plain(stage)

    def odd(stage: ToyStage) -> torch.optim.Optimizer:
        made = plain(stage)
        made.register_step_post_hook(lambda *_: made.state[stage.model.matrix].update(note="a word"))  # type: ignore
        return made

    refused(
        folder,
        other,
        r"tensors do not match this model and optimizer, such as optimizer\.matrix\.exp_avg "
        r"\(float32 \[3, 4\] there, nothing here\)",
    )
    refused(folder, halved, r"parameter\.matrix \(float32 \[3, 4\] there, bfloat16 \[3, 4\] here\)")
    refused(folder, frozen, r"parameter\.vector \(float32 \[3\] there, nothing here\)")
    refused(folder, odd, "the optimizer keeps note of matrix, which is neither tensor nor number")
    values = json.loads((folder / "training_state.json").read_text())
    (folder / "training_state.json").write_text(json.dumps(values | {"format": 3}))
    refused(folder, plain, "has format 3, not 2")
    (folder / "training_state.safetensors").write_bytes(b"")
    refused(folder, plain, r"training_state\.safetensors was written by an older mm-gpt")


def test_a_stage_without_state_refuses_that_of_another(tmp_path: Path) -> None:
    stage = Sharded()
    optimizer = optimizer_of("adamw", stage)
    save_checkpoint(stage, optimizer, Progress(1), tmp_path, best=False)

    class Without(ToyStage):
        def __init__(self) -> None:
            super().__init__()
            self.model = Rows()

    other = Without()
    with pytest.raises(CheckpointError, match=r"holds stage\..*, which this stage does not know"):
        load_training_state(tmp_path / "step-000001", other, make_optimizer(other.prepare(), toy_config()))


def test_a_value_that_differs_between_ranks_needs_the_rank_in_its_name(tmp_path: Path) -> None:
    """One of them would be in the checkpoint, by chance, and nobody would be told."""

    def differing(rank: int) -> str:
        with process_group(CPU):
            stage = Sharded()
            optimizer = optimizer_of("adamw", stage)
            stage.own = {"seed": torch.tensor([rank])}
            save_checkpoint(stage, optimizer, Progress(1), tmp_path, best=False)
        return "saved"

    for told in on_ranks(differing):
        assert told.startswith(
            "MMGPTError: stage.seed differs between rank 0 and rank 1: what each rank has of its own"
        )
    assert not list(tmp_path.glob("*step*"))


class OfTwo(Sharded):
    """Can go on only with as many ranks as it was saved by."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if sum("draws" in name for name in tensors) != ranks()[1]:
            raise CheckpointError("the draws are those of other ranks")


def test_another_number_of_ranks_is_named_where_it_cannot_go_on(tmp_path: Path) -> None:
    """Check 8 of parallel training: saved and current topology are in the message."""
    on_ranks(lambda rank: save_shared(tmp_path, "adamw"))

    def load(rank: int) -> None:
        with process_group(CPU):
            stage = OfTwo()
            load_training_state(tmp_path / "step-000003", stage, optimizer_of("adamw", stage))

    assert on_ranks(load, 2) == [None, None]
    (told,) = on_ranks(load, 1)
    assert told == (
        "CheckpointError: the draws are those of other ranks (saved by 2 ranks, 2 to a copy of the model, now 1 rank)"
    )


# ---- in the background ----


class Held:
    """Writing waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, write = threading.Event(), tensor_files._write

        def wait(*arguments: Any) -> None:
            assert self.free.wait(60)
            write(*arguments)

        monkeypatch.setattr(tensor_files, "_write", wait)


def spoil(stage: Sharded, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for tensor in (*stage.model.parameters(), *optimizer.state.values()):
            for each in tensor.values() if isinstance(tensor, dict) else [tensor]:
                each.fill_(7)


def test_the_background_writes_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 6 of parallel training: everything is changed right after the call, and the file has the values of before,
    of tensors on the CPU as well; three saves in a row are of three moments."""
    held = Held(monkeypatch)
    stage = Sharded()
    optimizer = optimizer_of("adamw", stage)
    kept, states = [], []
    with Saver(tmp_path, CPU, background=True) as saver:
        for step in range(1, 4):
            held.free.clear()
            trained(stage, optimizer, range(step, step + 1))
            states.append(everything(stage, optimizer))
            before = copy.deepcopy(stage.model.state_dict()), copy.deepcopy(optimizer.state_dict())
            progress = Progress(step, data={"rows": [step]})
            saver.save(stage, optimizer, progress, best=step == 2)
            assert saver.is_writing
            assert checkpoint.latest(tmp_path) == (tmp_path / f"step-{step - 1:06d}" if step > 1 else None)
            spoil(stage, optimizer)
            assert stage.average is not None
            stage.average.update()
            progress.data["rows"].append(0)
            kept.append(before)
            held.free.set()
            saver.finish()
            assert not saver.is_writing
            stage.model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
    for step in (2, 3):
        folder = tmp_path / f"step-{step:06d}"
        again = Sharded()
        made = optimizer_of("adamw", again)
        assert load_training_state(folder, again, made).data == {"rows": [step]}
        found = everything(again, made)
        equal(found, states[step - 1])
        exported = load_file(folder / "model.safetensors")
        assert all(torch.equal(exported[name], tensor) for name, tensor in kept[step - 1][0].items())
    assert (load_file(tmp_path / "best" / "model.safetensors")["unused"] == kept[1][0]["unused"]).all()
    assert not any((states[0][name] == states[1][name]).all() for name in ("layers.0.weight", "layers.0.weight step"))


class Slow(ToyStage):
    """Its checkpoints are large enough to be killed while they are written; the model is one file beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.ballast = torch.zeros(500_000)

    def save(self, folder: Path) -> None:
        tensor_files.write_tensors(self.model.state_dict(), folder / "model.safetensors")

    def after_step(self) -> dict[str, float]:
        self.ballast += 1  # the number of steps
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        return {"ballast": self.ballast}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.ballast = tensors["ballast"].clone()


@pytest.mark.parametrize("signalled", [False, True], ids=["to its end", "stopped"])
def test_a_run_that_saves_in_the_background_is_the_same_run(tmp_path: Path, signalled: bool) -> None:
    """The end of a run waits for what is being written, and so does Ctrl-C."""
    for name, background in (("waiting", False), ("background", True)):
        stage = Slow()
        if signalled:
            calls = iter(range(1, 100))

            def stop(loss: Tensor, calls: Any = calls) -> Tensor:
                if next(calls) == 4:
                    os.kill(os.getpid(), signal.SIGINT)
                return loss

            stage.on_loss = stop
        config = toy_config(steps=6, save_every=1, validate_every=3, async_save=background)
        with pytest.raises(KeyboardInterrupt) if signalled else contextlib.nullcontext():
            train(stage, config, tmp_path / name, progress=False)
    one, other = tmp_path / "waiting", tmp_path / "background"
    assert losses(one) == losses(other)
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    last = 4 if signalled else 6
    names = [path.name for path in sorted(other.glob("step-*"))]
    assert names == [f"step-{last - 1:06d}", f"step-{last:06d}"]
    assert len(files) == 5
    for path in files:
        found, expected = load_file(other / path), load_file(one / path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), path
    assert not [path for path in other.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_a_failure_in_the_background_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the step behind, or where the next checkpoint begins; those from before stay."""
    train(Slow(), toy_config(steps=2, save_every=1), tmp_path, progress=False)

    def broken(*arguments: Any) -> None:
        raise MMGPTError("model.safetensors: cannot be written (the disk is gone)")

    monkeypatch.setattr(tensor_files, "_write", broken)
    config = toy_config(steps=9, save_every=3, async_save=True)
    with pytest.raises(MMGPTError, match=r"^model\.safetensors: cannot be written \(the disk is gone\)$"):
        train(Slow(), config, tmp_path, resume=True, progress=False)
    assert max(losses(tmp_path)) in (3, 4, 5)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-000001", "step-000002"]
    assert not list(tmp_path.glob(".tmp*"))


def test_what_was_begun_is_ended_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    stage, calls = Slow(), iter(range(1, 100))

    def fail(loss: Tensor) -> Tensor:
        if next(calls) == 3:
            threading.Timer(0.2, held.free.set).start()
            raise MMGPTError("no more")
        return loss

    stage.on_loss = fail
    with pytest.raises(MMGPTError, match="no more"):
        train(stage, toy_config(steps=9, save_every=2, async_save=True), tmp_path, progress=False)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"


def test_a_full_disk_of_one_rank_ends_all(tmp_path: Path) -> None:
    """Each says whose it was; nothing is left of the checkpoint, and the one from before is whole."""

    def run(rank: int, background: bool) -> str:
        with process_group(CPU):
            stage = Sharded()
            optimizer = optimizer_of("adamw", stage)
            with Saver(tmp_path, CPU, background=background) as saver:
                saver.save(stage, optimizer, Progress(1), best=False)
                saver.finish()
                if rank == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
                saver.save(stage, optimizer, Progress(2), best=True)
                saver.finish()
        return "saved"

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for background in (False, True):
        first, second = on_ranks(lambda rank, background=background: run(rank, background))  # type: ignore[misc]
        told = f"{tmp_path}/step-000002/training_state/rank-1-of-2.safetensors: cannot be written (File too large"
        assert first.startswith(f"MMGPTError: rank 1: {told}")
        assert second.startswith(f"MMGPTError: {told}")
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def start_ranks(run: Callable[[int], None], world: int) -> list[Any]:
    """As many processes as ranks, to be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ["WORLD_SIZE"] = str(world)
        torch.set_num_threads(1)
        with contextlib.suppress(RuntimeError):  # the other one is gone
            run(rank)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=start, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def killed_run(out: Path, seconds: float, world: int, *, background: bool) -> int:
    """Go on with a run, on as many ranks, of which the last is killed so many seconds after the second step was logged.
    Returns the last step that was."""
    before = max(losses(out), default=0) if (out / "log.jsonl").exists() else 0

    def run(rank: int) -> None:
        train(Slow(), toy_config(steps=10**6, save_every=1, async_save=background), out, resume=True, progress=False)

    children = start_ranks(run, world)
    try:
        end = time.monotonic() + 60
        while not (out / "log.jsonl").exists() or max(losses(out), default=0) < before + 2:
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(seconds)
        assert all(child.is_alive() for child in children)
        children[-1].kill()
        for child in children:
            child.join(10)
    finally:
        for child in children:
            child.kill()
            child.join()
    return max(losses(out), default=0)


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
@pytest.mark.parametrize(("world", "times"), [(1, 20), (2, 5), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_killed_while_it_saves_a_run_loses_an_interval_at_most(
    tmp_path: Path, world: int, times: int, background: bool
) -> None:
    """Check 7 of parallel training: SIGKILL at 20 random moments of a run that does little but save; the newest
    checkpoint can always be loaded, is whole, and is the one before the last that was begun, or newer."""
    out, rng, last = tmp_path / "run", random.Random(world), 0
    for _ in range(times):
        logged = killed_run(out, rng.uniform(0, 0.1), world, background=background)
        step, folder = 0, checkpoint.latest(out)
        if folder is not None:
            stage = Slow()
            step = load_training_state(folder, stage, make_optimizer(stage.prepare(), toy_config())).step
            assert (stage.ballast == step).all()
            assert load_file(folder / "model.safetensors")
        # A step is logged before its checkpoint is begun; in the background the one before may still be written then.
        assert step >= logged - (2 if background else 1)
        assert step >= last
        last = step
    assert last >= times
