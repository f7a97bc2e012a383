"""Checkpoints of a run: the model, and beside it what it takes to continue.

`OUT/step-000200/` holds the complete model and `training_state.safetensors` (optimizer moments and every trainable
parameter in its training precision). `OUT/best` is the model with the lowest validation loss. What has one of these
names is whole (`mm_gpt.system.writing`).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mm_gpt.errors import CheckpointError
from mm_gpt.system.writing import naming, new_folder, remove_folder
from mm_gpt.training.distributed import ranks
from mm_gpt.training.stage import Stage, TensorState

STATE_FILE = "training_state.safetensors"
PROGRESS_FILE = "training_state.json"
OWN = "stage."
"""Before the names of what a stage keeps itself."""
KEEP = 2  # step folders; older ones are deleted


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Steps that are done."""
    cycles: list[int] = field(default_factory=list)
    """The step at which each cycle of the schedule ends."""
    data: dict[str, Any] = field(default_factory=dict)
    """The place in the data, as JSON values."""
    noise: list[float] = field(default_factory=list)
    """The averages behind the gradient noise scale, where it is measured."""


def save(stage: Stage, optimizer: torch.optim.Optimizer, progress: Progress, out: Path, *, best: bool) -> None:
    """Write `OUT/step-NNNNNN`, and before it `OUT/best` when `best`. All ranks call it; rank 0 writes.

    In this order a kill in between makes the run repeat these steps and save the best model again; in the other one the
    log would know of a best loss whose model nobody saved. Raises MMGPTError naming what cannot be written.
    """
    if ranks()[0] != 0:
        return
    if best:
        with new_folder(out / "best") as folder:
            stage.save(folder)
    with new_folder(out / f"step-{progress.step:06d}") as folder:
        stage.save(folder)
        with naming(folder / STATE_FILE):
            save_file(_training_state(stage.model, optimizer) | _stage_state(stage), folder / STATE_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps(dataclasses.asdict(progress)) + "\n")
    for old in _steps(out)[:-KEEP]:
        remove_folder(old)


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(_steps(out), key=_step_of, default=None)


def _steps(out: Path) -> list[Path]:
    found = (path for path in out.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def load_training_state(folder: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> Progress:
    """Put parameters, optimizer moments and the stage's own state back; the rest is where the run is.

    Raises CheckpointError when the state is missing, corrupt, or of another model.
    """
    path, model = folder / STATE_FILE, stage.model
    try:
        tensors = load_file(path)
        state = json.loads((folder / PROGRESS_FILE).read_text())
        cycles = [int(end) for end in state.get("cycles", [])]
        noise = [float(value) for value in state.get("noise", [])]
        progress = Progress(int(state["step"]), cycles, dict(state.get("data", {})), noise)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot continue from it ({error})") from None
    expected = {name: tensor.shape for name, tensor in _training_state(model, optimizer).items()}
    own = {name.removeprefix(OWN): tensors.pop(name) for name in list(tensors) if name.startswith(OWN)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise CheckpointError(f"{path}: {len(wrong)} tensors do not match this model, such as {wrong[0]}")
    with torch.no_grad():
        for name, buffer in _buffers(model).items():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in _trainable(model).items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if steps := tensors[f"step.{name}"]:  # 0: it had no gradient yet, and so has no moments
                optimizer.state[parameter] = {
                    "step": steps,
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
                }
    if isinstance(stage, TensorState):
        stage.load_state_tensors(own)
    elif own:
        raise CheckpointError(f"{path}: holds {next(iter(own))}, which this stage does not know")
    return progress


def _stage_state(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = stage.state_tensors() if isinstance(stage, TensorState) else {}
    return {OWN + name: tensor.contiguous() for name, tensor in tensors.items()}


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"buffer.{name}": buffer.contiguous() for name, buffer in _buffers(model).items()}
    for name, parameter in _trainable(model).items():
        state = optimizer.state.get(parameter, {})
        tensors[f"parameter.{name}"] = parameter.detach().contiguous()
        # Each parameter counts its own steps: those without a gradient (no image in any batch) are not among them.
        tensors[f"step.{name}"] = state.get("step", torch.tensor(0.0))
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter)).contiguous()
    return tensors


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes without gradients: the running statistics of BatchNorm."""
    saved = model.state_dict(keep_vars=True)
    return {name: saved[name] for name, _ in model.named_buffers() if name in saved}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
