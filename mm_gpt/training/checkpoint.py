"""Checkpoints of a run: the model, and beside it what it takes to continue, on as many ranks or on others.

`OUT/step-000200/` holds the complete model, `training_state/` (optimizer state, every trainable parameter in its
training precision, and what the stage keeps itself; `mm_gpt.training.state_files`), and `training_state.json` (where
the run is, and who wrote it). `OUT/best` is the model with the best validation. What has one of these names is whole
(`mm_gpt.system.writing`).
"""

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.training.distributed import gather_over_ranks, raise_together, ranks
from mm_gpt.training.stage import Stage, TensorState
from mm_gpt.training.state_files import SavedTensors, Slice, own_slices

logger = logging.getLogger(__name__)

STATE_FOLDER = "training_state"
PROGRESS_FILE = "training_state.json"
FORMAT = 2
"""Of `PROGRESS_FILE` and what is beside it. 1 had one file of tensors, and no number."""
PARAMETER, BUFFER, OPTIMIZER, OWN = "parameter.", "buffer.", "optimizer.", "stage."
"""Before the names of tensors: a model's two kinds, `optimizer.` + a parameter + what is kept of it, a stage's own."""
OTHER_FORMAT = "was written by an older mm-gpt: end that run with it, or begin a new one from the model in this folder"


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Steps that are done."""
    cycles: list[int] = field(default_factory=list)
    """The step at which each cycle of the schedule ends."""
    tokens: int = 0
    """Tokens seen, of all ranks, without padding."""
    flops: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    """The place in the data, as JSON values."""
    noise: list[float] = field(default_factory=list)
    """The averages behind the gradient noise scale, where it is measured."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        """What `dataclasses.asdict` gave; a field that is younger than the checkpoint has its default. Raises KeyError,
        TypeError and ValueError."""
        values = {"step": values["step"]} | dict(values)
        kinds = {each.name: type(getattr(cls(), each.name)) for each in fields(cls)}
        return cls(**{name: kind(values[name]) for name, kind in kinds.items() if name in values})


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(step_folders(out), key=step_of, default=None)


def step_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = (path for path in out.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Of the name of a step folder."""
    return int(folder.name.removeprefix("step-"))


# ---- what is saved ----


def own_state(stage: Stage, optimizer: torch.optim.Optimizer, *, copy: bool) -> dict[str, Slice]:
    """What this rank writes: of whole tensors rank 0 all, the others what they alone have; of sharded ones its slice.

    All ranks call it. With `copy`, the tensors are those of this moment. Raises MMGPTError, on all ranks, when a tensor
    of the stage has one name and several values: which of them a checkpoint has would be up to chance.
    """
    rank = ranks()[0]
    state = _training_state(stage.model, optimizer)
    own = {OWN + name: tensor for name, tensor in _stage_tensors(stage).items()}
    whole = _only_mine({n: t for n, t in own.items() if not isinstance(t, DTensor)}, _device_of(stage.model))
    sharded = {name: tensor for name, tensor in (state | own).items() if isinstance(tensor, DTensor)}
    return own_slices((state if rank == 0 else {}) | sharded | whole, copy=copy)


def _only_mine(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Those that no rank before this one has. Raises MMGPTError where it has others by that name."""
    rank, world = ranks()
    if world == 1:
        return tensors
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    everybody = [json.loads(told) for told in gather_over_ranks(json.dumps(sums).encode(), device)]
    first: dict[str, int] = {}
    for number, told in enumerate(everybody):
        for name, found in told.items():
            if found != everybody[first.setdefault(name, number)][name]:
                raise MMGPTError(
                    f"{name} differs between rank {first[name]} and rank {number}: what each rank has of its own needs "
                    "the rank in its name"
                )
    return {name: tensor for name, tensor in tensors.items() if first[name] == rank}


def _checksum(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.data)} {tensor.dtype} {list(tensor.shape)}"


def _stage_tensors(stage: Stage) -> dict[str, Tensor]:
    return stage.state_tensors() if isinstance(stage, TensorState) else {}


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that training changes, not copies. Numbers that an optimizer keeps are tensors of their own."""
    state = {BUFFER + name: buffer for name, buffer in _buffers(model).items()}
    state |= {PARAMETER + name: parameter.detach() for name, parameter in _trainable(model).items()}
    for name, kept in _kept(model, optimizer).items():
        for key, value in kept.items():
            if isinstance(value, Tensor):
                state[f"{OPTIMIZER}{name}.{key}"] = value
            elif isinstance(value, bool | int | float):
                state[f"{OPTIMIZER}{name}.{key}"] = torch.tensor(value, dtype=torch.float64)
            elif value is not None:
                raise CheckpointError(f"the optimizer keeps {key} of {name}, which is neither tensor nor number")
    return state


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, MutableMapping[str, Any]]:
    """What the optimizer keeps, by the name of the parameter. One that had no gradient yet (no image in any batch) has
    nothing: each counts its own steps."""
    return {name: optimizer.state[p] for name, p in _trainable(model).items() if optimizer.state.get(p)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What training changes without gradients: the running statistics of BatchNorm."""
    saved = model.state_dict(keep_vars=True)
    return {name: saved[name] for name, _ in model.named_buffers() if name in saved}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- who saved it ----


def topology(model: nn.Module) -> dict[str, int]:
    """The ranks of this run, and over how many of them a copy of the model is sharded."""
    shards = (p for p in model.parameters() if isinstance(p, DTensor))
    degrees = (
        size
        for p in shards
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True)
        if placement.is_shard()
    )
    return {"ranks": ranks()[1], "shard": max(degrees, default=1)}


def _named(found: Mapping[str, Any]) -> str:
    """A topology in words."""
    count, shard = found.get("ranks"), found.get("shard")
    return f"{count} rank{'' if count == 1 else 's'}" + ("" if shard == 1 else f", {shard} to a copy of the model")


# ---- putting it back ----


def load_training_state(folder: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> Progress:
    """Put parameters, optimizer state and the stage's own tensors back; the rest is where the run is.

    All ranks call it; how many there are, and how the model is sharded over them, may have changed. Raises MMGPTError,
    on all ranks, when the state is missing, corrupt, or of another model or optimizer (CheckpointError where it is
    this rank's), and names who saved it if these are other ranks.
    """
    device, now = _device_of(stage.model), topology(stage.model)
    saved: SavedTensors | None = None
    then: Mapping[str, Any] = now
    with _together(device, lambda: then, now):
        progress, then, files = _read_progress(folder)
        saved = _saved_tensors(folder, files)
        _check_parameters(stage.model, saved)
    assert saved is not None
    if dict(then) != now:
        logger.info("%s: saved by %s, continued by %s", folder, _named(then), _named(now))
    with _together(device, lambda: then, now):
        _restore(saved, stage, optimizer)
    return progress


@contextmanager
def _together(device: torch.device, then: Any, now: Mapping[str, Any]) -> Iterator[None]:
    """An error inside is one on all ranks, and tells of a change of topology."""
    error: MMGPTError | None = None
    try:
        yield
    except MMGPTError as found:
        error = found
        if dict(then()) != dict(now):
            error = CheckpointError(f"{found} (saved by {_named(then())}, now {_named(now)})")
    raise_together(error, device)


def _read_progress(folder: Path) -> tuple[Progress, dict[str, Any], dict[str, int]]:
    path = folder / PROGRESS_FILE
    if (folder / f"{STATE_FOLDER}.safetensors").exists():
        raise CheckpointError(f"{folder}/{STATE_FOLDER}.safetensors {OTHER_FORMAT}")
    try:
        state = json.loads(path.read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: has format {state['format']!r}, not {FORMAT}: of another version of mm-gpt")
        progress = Progress.from_json(state)
        if progress.step != step_of(folder) or not all(isinstance(end, int) and end > 0 for end in progress.cycles):
            raise ValueError(f"step {progress.step}, cycles {progress.cycles}")
        files = {str(name): int(size) for name, size in state["files"].items()}
        return progress, dict(state["saved_by"]), files
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot continue from it ({error})") from None


def _saved_tensors(folder: Path, files: Mapping[str, int]) -> SavedTensors:
    """Raises CheckpointError unless all files are there as they were written."""
    path = folder / STATE_FOLDER
    found = {file.name: file.stat().st_size for file in path.glob("*.safetensors")} if path.is_dir() else {}
    if wrong := sorted(name for name in found | dict(files) if found.get(name) != files.get(name)):
        sizes = f"has {found.get(wrong[0], 'no')} bytes, not {files.get(wrong[0], 'any')}"
        raise CheckpointError(f"{path / wrong[0]}: cannot continue from it ({sizes})")
    return SavedTensors(path)


def _check_parameters(model: nn.Module, saved: SavedTensors) -> None:
    expected: dict[str, Tensor] = {BUFFER + name: buffer for name, buffer in _buffers(model).items()}
    expected |= {PARAMETER + name: parameter for name, parameter in _trainable(model).items()}
    found = {name: about for name, about in saved.found.items() if name.startswith((BUFFER, PARAMETER))}
    _check(saved.folder, found, expected, "this model")


def _check(
    folder: Path, found: Mapping[str, tuple[torch.dtype, torch.Size]], expected: Mapping[str, Tensor], what: str
) -> None:
    about = {name: (tensor.dtype, tensor.shape) for name, tensor in expected.items()}
    wrong = sorted(name for name in found.keys() | about.keys() if found.get(name) != about.get(name))
    if wrong:
        name = wrong[0]
        sides = f"{_shown(found.get(name))} there, {_shown(about.get(name))} here"
        raise CheckpointError(f"{folder}: {len(wrong)} tensors do not match {what}, such as {name} ({sides})")


def _shown(about: tuple[torch.dtype, torch.Size] | None) -> str:
    if about is None:
        return "nothing"
    return f"{str(about[0]).removeprefix('torch.')} {list(about[1])}"


def _restore(saved: SavedTensors, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
    names = {name.removeprefix(OPTIMIZER).rpartition(".")[0] for name in saved.found if name.startswith(OPTIMIZER)}
    trainable = _trainable(stage.model)
    if unknown := sorted(names - trainable.keys()):
        raise CheckpointError(f"{saved.folder}: has optimizer state of {unknown[0]}, which is not trained")
    _make_state(optimizer, [p for name, p in trainable.items() if name in names], list(trainable.values()))
    state = _training_state(stage.model, optimizer)
    found = {name: about for name, about in saved.found.items() if not name.startswith(OWN)}
    _check(saved.folder, found, state, "this model and optimizer")
    current = {OWN + name: tensor for name, tensor in _stage_tensors(stage).items()}
    own = {name: _empty_like(about, current.get(name)) for name, about in saved.found.items() if name.startswith(OWN)}
    saved.read_into(state | own)
    for name, kept in _kept(stage.model, optimizer).items():
        for key, value in kept.items():
            if isinstance(value, bool | int | float):
                kept[key] = type(value)(state[f"{OPTIMIZER}{name}.{key}"].item())
    if isinstance(stage, TensorState):
        stage.load_state_tensors({name.removeprefix(OWN): tensor for name, tensor in own.items()})
    elif own:
        raise CheckpointError(f"{saved.folder}: holds {next(iter(own))}, which this stage does not know")


def _empty_like(about: tuple[torch.dtype, torch.Size], current: Tensor | None) -> Tensor:
    """To read a stage's tensor into: sharded if the stage's is."""
    dtype, shape = about
    if isinstance(current, DTensor) and current.shape == shape:
        return torch.empty_like(current, dtype=dtype)
    return torch.empty(shape, dtype=dtype)


def _make_state(optimizer: torch.optim.Optimizer, chosen: list[nn.Parameter], trainable: list[nn.Parameter]) -> None:
    """Let the optimizer make what it keeps of the `chosen` parameters, and of no others: by a step of length zero, as
    it alone knows the kinds, shapes and places of it. The values are to be overwritten, those of the parameters too."""
    for parameter in trainable:
        optimizer.state.pop(parameter, None)
        parameter.grad = None
    for parameter in chosen:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        if chosen:
            optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
